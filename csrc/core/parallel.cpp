#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

namespace marquardt {

int64_t thread_count() {
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

int64_t core_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return found;
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

void parallel_ranges(int64_t n, RangeFunction f, void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { f(begin, end, context); });
}

}  // namespace marquardt
