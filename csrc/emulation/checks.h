// Small kernels that test the machine and core/ptx.h, by name: the module `_machine` runs them on numpy arrays.
#pragma once

#include <cstdint>
#include <string>

#include "emulation/machine.h"

namespace marquardt::checks {

constexpr int kMostArrays = 4, kMostNumbers = 4;

// What a check is given; each says in its comment what that is.
struct Arguments {
  void* array[kMostArrays] = {};
  int64_t number[kMostNumbers] = {};
};

// Launches the check of that name; false if the file (checks.cu, checks_misuse.cu, checks_ptx.cu) has none.
bool run_machine_check(const std::string& name, const emulation::Grid& at, const Arguments& a);
bool run_misuse_check(const std::string& name, const emulation::Grid& at, const Arguments& a);
bool run_ptx_check(const std::string& name, const emulation::Grid& at, const Arguments& a);

}  // namespace marquardt::checks
