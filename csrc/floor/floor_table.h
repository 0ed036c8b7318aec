// The body of floor_avx512.cpp, floor_avx2.cpp and floor_baseline.cpp.
#pragma once

#include "core/simd.h"
#include "floor/floor_kernels.h"

namespace marquardt::MQ_ISA {

// put(i, Σ inputs[j][i …]) for vectors from i on, two at a time; returns where it stopped.
template <int N, class Put>
MQ_INLINE int64_t triad_sum(const float* const* inputs, int64_t i, int64_t n, const Put& put) {
  constexpr int kStep = kWidth<float>;
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    Vec<float> a = load(inputs[0] + i), b = load(inputs[0] + i + kStep);
#pragma GCC unroll 8
    for (int j = 1; j < N; ++j) {
      a += load(inputs[j] + i);
      b += load(inputs[j] + i + kStep);
    }
    put(i, a);
    put(i + kStep, b);
  }
  return i;
}

template <int N, int M, bool Streaming>
void triad_of(const float* const* inputs, float* const* outs, int64_t n) {
  const auto elements = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = inputs[0][i];
      for (int j = 1; j < N; ++j) sum += inputs[j][i];
      for (int m = 0; m < M; ++m) outs[m][i] = sum;
    }
  };
  const auto vectors = [&](int64_t from, auto store_one) {
    return triad_sum<N>(inputs, from, n, [&](int64_t i, Vec<float> v) {
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) store_one(outs[m] + i, v);
    });
  };
  const auto off = [](const float* to) { return reinterpret_cast<uintptr_t>(to) % static_cast<unsigned>(kBytes); };
  int64_t head = 0;
  bool streams = Streaming;
  if constexpr (Streaming) {
    while (head < n && off(outs[0] + head) != 0) ++head;
    for (int m = 1; m < M; ++m) streams = streams && off(outs[m] + head) == 0;
  }
  elements(0, head);
  const int64_t done = streams ? vectors(head, [](float* to, Vec<float> v) { stream(to, v); })
                               : vectors(head, [](float* to, Vec<float> v) { store(to, v); });
  elements(done, n);
  if constexpr (Streaming) stream_fence();
}

template <int M, bool Streaming>
void triad_count(const float* const* inputs, int count, float* const* outs, int64_t n) {
  switch (count) {
    case 1: return triad_of<1, M, Streaming>(inputs, outs, n);
    case 2: return triad_of<2, M, Streaming>(inputs, outs, n);
    case 3: return triad_of<3, M, Streaming>(inputs, outs, n);
    case 4: return triad_of<4, M, Streaming>(inputs, outs, n);
    case 5: return triad_of<5, M, Streaming>(inputs, outs, n);
    case 6: return triad_of<6, M, Streaming>(inputs, outs, n);
    case 7: return triad_of<7, M, Streaming>(inputs, outs, n);
    default: return triad_of<8, M, Streaming>(inputs, outs, n);
  }
}

inline void triad(const float* const* inputs, int count, float* const* outs, int outputs, int64_t n, bool streaming) {
  if (outputs == 1) {
    streaming ? triad_count<1, true>(inputs, count, outs, n) : triad_count<1, false>(inputs, count, outs, n);
  } else {
    streaming ? triad_count<2, true>(inputs, count, outs, n) : triad_count<2, false>(inputs, count, outs, n);
  }
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
