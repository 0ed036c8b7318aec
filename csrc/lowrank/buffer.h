// Memory of a call, aligned for vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "lowrank/cpu_kernels.h"

namespace marquardt {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

// `count` numbers of any value, aligned to kPadBytes.
template <class T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + kPadBytes - 1) / kPadBytes * kPadBytes;
  auto* p = static_cast<T*>(std::aligned_alloc(kPadBytes, static_cast<size_t>(std::max(bytes, kPadBytes))));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(p);
}

}  // namespace marquardt
