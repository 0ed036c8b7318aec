#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace marquardt {

int64_t thread_count() {
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

void parallel_ranges(int64_t n, RangeFunction f, void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { f(begin, end, context); });
}

}  // namespace marquardt
