// The body of floor_avx512.cpp, floor_avx2.cpp and floor_baseline.cpp.
#pragma once

#include "core/simd.h"
#include "floor/floor_kernels.h"

namespace marquardt::MQ_ISA {

template <int N, bool Streaming>
void triad_of(const float* const* inputs, float* out, int64_t n) {
  constexpr int kStep = kWidth<float>;
  int64_t i = 0;
  if constexpr (Streaming) {
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % kBytes != 0; ++i) {
      out[i] = inputs[0][i];
      for (int j = 1; j < N; ++j) out[i] += inputs[j][i];
    }
  }
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    Vec<float> a = load(inputs[0] + i), b = load(inputs[0] + i + kStep);
#pragma GCC unroll 8
    for (int j = 1; j < N; ++j) {
      a += load(inputs[j] + i);
      b += load(inputs[j] + i + kStep);
    }
    if constexpr (Streaming) {
      stream(out + i, a);
      stream(out + i + kStep, b);
    } else {
      store(out + i, a);
      store(out + i + kStep, b);
    }
  }
  for (; i < n; ++i) {
    out[i] = inputs[0][i];
    for (int j = 1; j < N; ++j) out[i] += inputs[j][i];
  }
  if constexpr (Streaming) stream_fence();
}

template <bool Streaming>
void triad_count(const float* const* inputs, int count, float* out, int64_t n) {
  switch (count) {
    case 1: return triad_of<1, Streaming>(inputs, out, n);
    case 2: return triad_of<2, Streaming>(inputs, out, n);
    case 3: return triad_of<3, Streaming>(inputs, out, n);
    case 4: return triad_of<4, Streaming>(inputs, out, n);
    case 5: return triad_of<5, Streaming>(inputs, out, n);
    case 6: return triad_of<6, Streaming>(inputs, out, n);
    case 7: return triad_of<7, Streaming>(inputs, out, n);
    default: return triad_of<8, Streaming>(inputs, out, n);
  }
}

inline void triad(const float* const* inputs, int count, float* out, int64_t n, bool streaming) {
  streaming ? triad_count<true>(inputs, count, out, n) : triad_count<false>(inputs, count, out, n);
}

inline float read(const float* input, int64_t n) {
  constexpr int kStep = kWidth<float>, kSums = 8;
  Vec<float> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kStep <= n; i += kSums * kStep) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) sum[s] += load(input + i + s * kStep);
  }
  float total = 0.0f;
  for (; i < n; ++i) total += input[i];
  for (int s = 0; s < kSums; ++s)
    for (int lane = 0; lane < kStep; ++lane) total += sum[s][lane];
  return total;
}

// Enough independent chains to fill the units on any processor of the kind.
inline int64_t multiply(int64_t steps, double* sink) {
  constexpr int kChains = kBytes == 64 ? 16 : 12;
  Vec<double> x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = broadcast(*sink + i);
  const Vec<double> a = broadcast(0.999), b = broadcast(1e-9);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = fma(x[i], a, b);
  }
  Vec<double> sum = x[0];
  for (int i = 1; i < kChains; ++i) sum += x[i];
  *sink = sum[0];
  return steps * kChains * kWidth<double>;
}

const FloorKernels floor_kernels = {triad, read, multiply};

}  // namespace marquardt::MQ_ISA
