// outputs = C·rows, element by element. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "frame/cpu_gram.h"
#include "frame/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// Up to eight rows and two outputs, everything in registers. A tail goes through padded buffers and the same
// arithmetic, so that an element's value does not depend on where it stands.
template <class T, int N, int Pairs, int M>
void apply_small(const T* const* rows, const T* c, T* const* outs, int64_t n, bool streaming) {
  Vec<T> coefficient[M][N];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) coefficient[m][j] = broadcast(c[m * N + j]);
  constexpr int kStep = kWidth<T>;

  const auto combine = [&](const T* const* from, int64_t at, Vec<T>* result) {
    Vec<T> frame[N];
    load_frame<N, Pairs, T>(from, at, frame);
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
      result[m] = coefficient[m][0] * frame[0];
#pragma GCC unroll 8
      for (int j = 1; j < N; ++j) result[m] = fma(coefficient[m][j], frame[j], result[m]);
    }
  };
  const auto part = [&](int64_t at, int64_t count) {
    if (count <= 0) return;
    const Tail<T, N> tail(rows, N, at, count);
    Vec<T> result[M];
    combine(tail.rows, 0, result);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < count; ++i) outs[m][at + i] = result[m][i];
  };

  int64_t i = 0;
  if (streaming) {  // streamed stores want alignment: the head goes the way of a tail
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(outs[0]) % kBytes);
    const int64_t head = misaligned == 0 ? 0 : (kBytes - misaligned) / static_cast<int64_t>(sizeof(T));
    i = head < n ? head : n;
    part(0, i);
    for (int m = 0; m < M; ++m) streaming = streaming && reinterpret_cast<uintptr_t>(outs[m] + i) % kBytes == 0;
  }
  Vec<T> result[M];
  if (streaming) {
    for (; i + kStep <= n; i += kStep) {
      combine(rows, i, result);
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) stream(outs[m] + i, result[m]);
    }
  } else {
    for (; i + 2 * kStep <= n; i += 2 * kStep) {
      Vec<T> second[M];
      combine(rows, i, result);
      combine(rows, i + kStep, second);
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) {
        store(outs[m] + i, result[m]);
        store(outs[m] + i + kStep, second[m]);
      }
    }
    for (; i + kStep <= n; i += kStep) {
      combine(rows, i, result);
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) store(outs[m] + i, result[m]);
    }
  }
  part(i, n - i);
}

// Any number of rows, four outputs at a time: a row is loaded once for the four.
template <class T>
void apply_general(const T* const* rows, int count, const T* c, int outputs, T* const* outs, int64_t n) {
  constexpr int kStep = kWidth<T>;
  const auto block = [&](const T* const* from, int64_t at, int m0, int ms, Vec<T>* sum) {
    for (int m = 0; m < ms; ++m) sum[m] = broadcast(c[(m0 + m) * count]) * load<T>(from[0] + at);
    for (int j = 1; j < count; ++j) {
      const Vec<T> row = load<T>(from[j] + at);
      for (int m = 0; m < ms; ++m) sum[m] = fma(broadcast(c[(m0 + m) * count + j]), row, sum[m]);
    }
  };
  Vec<T> sum[4];
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int m0 = 0; m0 < outputs; m0 += 4) {
      const int ms = outputs - m0 < 4 ? outputs - m0 : 4;
      block(rows, i, m0, ms, sum);
      for (int m = 0; m < ms; ++m) store(outs[m0 + m] + i, sum[m]);
    }
  if (i == n) return;
  const Tail<T, kMaxVectors> tail(rows, count, i, n - i);
  for (int m0 = 0; m0 < outputs; m0 += 4) {
    const int ms = outputs - m0 < 4 ? outputs - m0 : 4;
    block(tail.rows, 0, m0, ms, sum);
    for (int m = 0; m < ms; ++m)
      for (int64_t k = i; k < n; ++k) outs[m0 + m][k] = sum[m][k - i];
  }
}

template <class T, int Pairs, int M>
bool apply_rows(const T* const* rows, int count, const T* c, T* const* outs, int64_t n, bool streaming) {
  switch (count) {
    case 1: apply_small<T, 1, 0, M>(rows, c, outs, n, streaming); return true;
    case 2: apply_small < T, 2, Pairs<1 ? 0 : 1, M>(rows, c, outs, n, streaming); return true;
    case 3: apply_small < T, 3, Pairs<1 ? 0 : 1, M>(rows, c, outs, n, streaming); return true;
    case 4: apply_small<T, 4, Pairs, M>(rows, c, outs, n, streaming); return true;
    default: break;
  }
  if constexpr (Pairs == 0 && M == 1) {
    switch (count) {
      case 5: apply_small<T, 5, 0, M>(rows, c, outs, n, streaming); return true;
      case 6: apply_small<T, 6, 0, M>(rows, c, outs, n, streaming); return true;
      case 7: apply_small<T, 7, 0, M>(rows, c, outs, n, streaming); return true;
      case 8: apply_small<T, 8, 0, M>(rows, c, outs, n, streaming); return true;
      default: break;
    }
  }
  return false;
}

template <class T, int M>
bool apply_outputs(const T* const* rows, int count, int pairs, const T* c, T* const* outs, int64_t n, bool streaming) {
  switch (pairs) {
    case 0: return apply_rows<T, 0, M>(rows, count, c, outs, n, streaming);
    case 1: return apply_rows<T, 1, M>(rows, count, c, outs, n, streaming);
    default: return apply_rows<T, 2, M>(rows, count, c, outs, n, streaming);
  }
}

template <class T>
void apply(const T* const* rows, int count, int pairs, const T* c, int outputs, T* const* outs, int64_t n,
           bool streaming) {
  if (outputs == 1 && apply_outputs<T, 1>(rows, count, pairs, c, outs, n, streaming)) return;
  if (outputs == 2 && apply_outputs<T, 2>(rows, count, pairs, c, outs, n, streaming)) return;
  apply_general<T>(rows, count, c, outputs, outs, n);
}

template <class T>
void clamp(T* row, T low, T high, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {  // comparisons that leave a NaN as it is
    const T x = row[i] < low ? low : row[i];
    row[i] = x > high ? high : x;
  }
}

}  // namespace marquardt::MQ_ISA
