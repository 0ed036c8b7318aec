// Loops over torch's own threads.
#pragma once

#include <cstdint>

namespace marquardt {

// Threads a loop may use here (1 inside another parallel region).
int64_t thread_count();

// The cache that a core has to itself.
int64_t core_cache_bytes();

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls f on ranges that cover [0, n); ranges are contiguous, one per thread, and may run at the same time.
void parallel_ranges(int64_t n, RangeFunction f, void* context);

template <class F>
void parallel_for(int64_t n, bool parallel, const F& f) {
  if (n <= 0) return;
  if (!parallel || n == 1) {
    f(int64_t{0}, n);
    return;
  }
  parallel_ranges(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace marquardt
