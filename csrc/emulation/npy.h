// Arrays in .npy files (little-endian, C order): f4, f8, u2, i8.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace marquardt::emulation {

static_assert(std::endian::native == std::endian::little);

struct Npy {
  std::string type;  // "f4", "f8", "u2" or "i8"
  std::vector<int64_t> shape;
  std::vector<unsigned char> bytes;

  int64_t item() const { return type[1] - '0'; }
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / item(); }
};

// What stands behind 'key': in the header's dict.
inline std::string npy_value(const std::string& header, const std::string& key, const std::string& file) {
  const std::string quoted = "'" + key + "':";
  const size_t at = header.find(quoted);
  if (at == std::string::npos) throw std::runtime_error(file + ": no " + key + " in the header of the .npy file");
  const size_t first = header.find_first_not_of(' ', at + quoted.size());
  return first == std::string::npos ? std::string() : header.substr(first);
}

inline Npy read_npy(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) throw std::runtime_error(file + ": cannot be read");
  const auto fail = [&](const std::string& why) { throw std::runtime_error(file + ": " + why); };
  unsigned char start[12] = {};
  in.read(reinterpret_cast<char*>(start), 10);
  if (!in || std::memcmp(start, "\x93NUMPY", 6) != 0) fail("not a .npy file");
  const bool wide = start[6] >= 2;  // version 2 has a longer length
  if (wide) in.read(reinterpret_cast<char*>(start) + 10, 2);
  uint32_t length = 0;
  std::memcpy(&length, start + 8, wide ? 4 : 2);
  if (!in || length > (1u << 20)) fail("the header of the .npy file is cut off");
  std::string header(length, '\0');
  in.read(header.data(), length);
  if (!in) fail("the header of the .npy file is cut off");

  Npy array;
  const std::string descr = npy_value(header, "descr", file);
  for (const char* type : {"f4", "f8", "u2", "i8"})
    if (descr.starts_with("'<" + std::string(type) + "'")) array.type = type;
  if (array.type.empty())
    fail("element type " + descr.substr(0, descr.find(',')) + " is not one of <f4, <f8, <u2, <i8");
  if (!npy_value(header, "fortran_order", file).starts_with("False")) fail("not in C order");
  std::string shape = npy_value(header, "shape", file);
  if (!shape.starts_with("(") || shape.find(')') == std::string::npos) fail("no shape in the header");
  shape = shape.substr(1, shape.find(')') - 1);
  int64_t count = 1;
  for (size_t at = 0; (at = shape.find_first_of("0123456789", at)) != std::string::npos;) {
    size_t used = 0;
    array.shape.push_back(std::stoll(shape.substr(at), &used));
    at += used;
    if (array.shape.back() > 0 && count > (int64_t{1} << 40) / array.shape.back()) fail("too large");
    count *= array.shape.back();
  }
  array.bytes.resize(static_cast<size_t>(count * array.item()));
  in.read(reinterpret_cast<char*>(array.bytes.data()), static_cast<std::streamsize>(array.bytes.size()));
  if (in.gcount() != static_cast<std::streamsize>(array.bytes.size())) fail("has fewer elements than its shape");
  if (in.peek() != std::ifstream::traits_type::eof()) fail("has more elements than its shape");
  return array;
}

inline void write_npy(const std::string& file, const Npy& array) {
  std::string shape;
  for (const int64_t n : array.shape) shape += std::to_string(n) + ",";
  std::string header = "{'descr': '<" + array.type + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append((64 - (10 + header.size() + 1) % 64) % 64, ' ').push_back('\n');
  const auto length = static_cast<uint16_t>(header.size());
  std::ofstream out(file, std::ios::binary | std::ios::trunc);
  out.write("\x93NUMPY\x01\x00", 8);
  out.write(reinterpret_cast<const char*>(&length), 2);
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  out.write(reinterpret_cast<const char*>(array.bytes.data()), static_cast<std::streamsize>(array.bytes.size()));
  out.flush();
  if (!out) throw std::runtime_error(file + ": cannot be written");
}

}  // namespace marquardt::emulation
