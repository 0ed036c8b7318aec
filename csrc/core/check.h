// Errors that say which op, which argument, which rule, and what came instead:
//
//   lm_direction: prev must have the shape of eps ([2, 4, 8, 8]), got [2, 4, 8, 9]
//
// The stable ABI carries an exception to Python as a RuntimeError, so the kind stands in front of the message and
// python/marquardt/errors.py raises it as that.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace marquardt {

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class Rule, class Got>
[[noreturn]] void fail(const char* kind, const char* op, const std::string& argument, const Rule& rule,
                       const Got& got) {
  throw std::runtime_error(join(kind, ": ", op, ": ", argument, " must ", rule, ", got ", got));
}

template <class Rule, class Got>
[[noreturn]] void value_error(const char* op, const std::string& argument, const Rule& rule, const Got& got) {
  fail("ValueError", op, argument, rule, got);
}

template <class Rule, class Got>
[[noreturn]] void type_error(const char* op, const std::string& argument, const Rule& rule, const Got& got) {
  fail("TypeError", op, argument, rule, got);
}

}  // namespace marquardt
