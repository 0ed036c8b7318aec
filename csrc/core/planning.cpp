#include "core/planning.h"

#if defined(MARQUARDT_WITH_CUDA) || defined(MARQUARDT_EMULATION)

namespace marquardt {
namespace {

thread_local bool plans_only = false;
thread_local std::string plans;  // of the calls since begin, one after the other

}  // namespace

bool planning() {
  return plans_only;
}

void planned(const std::string& words) {
  if (!plans.empty()) plans += "; ";
  plans += words;
}

}  // namespace marquardt

// For marquardt.explain, by ctypes: between begin and end this thread plans its calls and launches nothing.
extern "C" __attribute__((visibility("default"))) void marquardt_plan_begin() {
  marquardt::plans_only = true;
  marquardt::plans.clear();
}

extern "C" __attribute__((visibility("default"))) const char* marquardt_plan_end() {
  marquardt::plans_only = false;
  return marquardt::plans.c_str();
}

#endif
