// The Jacobian of a softmax times a vector, row by row. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "lowrank/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// Σ p·z over one row: four sums of the compute type, in double after every 1024 numbers.
template <class T>
MQ_INLINE double weighted_sum(const T* p, const T* z, int64_t columns) {
  constexpr int64_t kBlock = 1024, kStep = kWidth<T>;
  double total = 0.0;
  int64_t c = 0;
  while (c + kStep <= columns) {
    const int64_t stop = c + kBlock < columns ? c + kBlock : columns;
    Vec<T> sum[4] = {};
    for (; c + 4 * kStep <= stop; c += 4 * kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum[u] = fma(load(p + c + u * kStep), load(z + c + u * kStep), sum[u]);
    }
    for (; c + kStep <= stop; c += kStep) sum[0] = fma(load(p + c), load(z + c), sum[0]);
    total += sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  for (; c < columns; ++c) total += static_cast<double>(p[c]) * static_cast<double>(z[c]);
  return total;
}

template <class T>
void softmax_jvp(const T* p, int64_t p_stride, T* z, int64_t z_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, p += p_stride, z += z_stride) {
    const T mean = static_cast<T>(weighted_sum(p, z, columns));
    const Vec<T> means = broadcast(mean);
    int64_t c = 0;
    for (; c + kWidth<T> <= columns; c += kWidth<T>) store(z + c, load(p + c) * (load(z + c) - means));
    for (; c < columns; ++c) z[c] = p[c] * (z[c] - mean);
  }
}

}  // namespace marquardt::MQ_ISA
