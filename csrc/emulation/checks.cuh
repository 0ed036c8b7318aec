// For the files of checks.
#pragma once

#include "core/launch.h"
#include "core/ptx.h"
#include "emulation/checks.h"

namespace marquardt::checks {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMostThreads = 1024;

struct Check {
  const char* name;
  void (*kernel)(Arguments);
};

template <size_t N>
bool run_one_of(const Check (&all)[N], const std::string& name, const emulation::Grid& at, const Arguments& a) {
  for (const Check& check : all) {
    if (name != check.name) continue;
    launch(check.name, check.kernel, {at.grid, at.block, at.cluster, at.shared}, nullptr, a);
    return true;
  }
  return false;
}

MQ_DEVICE inline int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class T>
MQ_DEVICE inline T* array(const Arguments& a, int i) {
  return static_cast<T*>(a.array[i]);
}

}  // namespace marquardt::checks
