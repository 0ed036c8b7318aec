// The floors that the benchmarks compare with: how fast this machine moves the same bytes when nothing else is
// asked. Not used by any op.
#pragma once

#include <cstdint>

namespace marquardt {

struct FloorKernels {
  // outs[i][:n] = Σ inputs[j][:n], up to 8 inputs and 2 outputs; `streaming` writes past the caches.
  void (*triad)(const float* const* inputs, int count, float* const* outs, int outputs, int64_t n, bool streaming);
  // The sum of n floats: a read sweep with nothing but additions.
  float (*read)(const float* input, int64_t n);
  // `steps` rounds of fused multiply-adds of doubles in registers; returns their number, `sink` gets a sum of them.
  int64_t (*multiply)(int64_t steps, double* sink);
};

namespace avx512 {
extern const FloorKernels floor_kernels;
}
namespace avx2 {
extern const FloorKernels floor_kernels;
}
namespace baseline {
extern const FloorKernels floor_kernels;
}

}  // namespace marquardt
