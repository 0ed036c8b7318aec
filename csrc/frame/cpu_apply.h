// outputs = C·rows, element by element. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "frame/cpu_gram.h"
#include "frame/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// A number as a type.
template <int N>
struct Count {
  static constexpr int value = N;
};

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

// Vectors of A that hold as many elements as one of T.
template <class T, class A>
constexpr int kParts = static_cast<int>(sizeof(A) / sizeof(T));

template <class T, class A>
MQ_INLINE Vec<T> joined(const Vec<A>* parts) {
  if constexpr (sizeof(A) == sizeof(T)) {
    return parts[0];
  } else {
    return narrow(parts[0], parts[1]);
  }
}

// M outputs of any number of rows over n elements, U vectors at a time, summed in A: a row is loaded once for all of them.
template <class T, class A, int M, int U>
void apply_block(const T* const* rows, int count, const A* c, T* const* outs, int64_t n, bool streaming) {
  constexpr int kStep = kWidth<T>, kHalves = kParts<T, A>;
  const auto combine = [&](const T* const* from, int64_t at, auto units, Vec<T>(*result)[U]) {
    constexpr int kUnits = decltype(units)::value, kVectors = kUnits * kHalves;
    Vec<A> sum[M][kVectors], row[kVectors];
    const auto load_vectors = [&](int j) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load_row<A>(from[j] + at + v * kWidth<A>);
    };
    load_vectors(0);  // a first product, not a sum with 0: it keeps −0
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] = broadcast(c[m * count]) * row[v];
    for (int j = 1; j < count; ++j) {
      load_vectors(j);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec<A> factor = broadcast(c[m * count + j]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[m][v] = fma(factor, row[v], sum[m][v]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) result[m][u] = joined<T, A>(sum[m] + u * kHalves);
  };
  Vec<T> result[M][U];
  const auto part = [&](int64_t at, int64_t length) {
    if (length <= 0) return;
    const Tail<T, kMaxVectors> tail(rows, count, at, length);
    combine(tail.rows, 0, Count<1>{}, result);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < length; ++i) outs[m][at + i] = result[m][0][i];
  };
  int64_t i = 0;
  if (streaming) {
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(outs[0]) % kBytes);
    const int64_t head = misaligned == 0 ? 0 : (kBytes - misaligned) / static_cast<int64_t>(sizeof(T));
    i = head < n ? head : n;
    part(0, i);
    for (int m = 0; m < M; ++m) streaming = streaming && reinterpret_cast<uintptr_t>(outs[m] + i) % kBytes == 0;
  }
  const auto put = [&](int64_t at, auto units) {
    combine(rows, at, units, result);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int u = 0; u < decltype(units)::value; ++u) {
        if (streaming) {
          stream(outs[m] + at + u * kStep, result[m][u]);
        } else {
          store(outs[m] + at + u * kStep, result[m][u]);
        }
      }
  };
  for (; i + U * kStep <= n; i += U * kStep) put(i, Count<U>{});
  for (; i + kStep <= n; i += kStep) put(i, Count<1>{});
  part(i, n - i);
}

// Any number of rows and outputs, four outputs at a time over a stretch of elements that stays in the first cache.
template <class T, class A>
void apply_general(const T* const* rows, int count, const A* c, int outputs, T* const* outs, int64_t n,
                   bool streaming) {
  constexpr int64_t kStretch = 512;
  constexpr bool kWide = sizeof(A) != sizeof(T);
  const T* from[kMaxVectors];
  T* to[kMaxOutputs];
  for (int64_t begin = 0; begin < n; begin += outputs > 4 ? kStretch : n) {
    const int64_t length = outputs > 4 && n - begin > kStretch ? kStretch : n - begin;
    for (int j = 0; j < count; ++j) from[j] = rows[j] + begin;
    for (int m = 0; m < outputs; ++m) to[m] = outs[m] + begin;
    for (int m = 0; m < outputs; m += 4) {
      const A* some = c + static_cast<int64_t>(m) * count;
      switch (outputs - m) {
        case 1: apply_block<T, A, 1, kWide ? 2 : 4>(from, count, some, to + m, length, streaming); break;
        case 2: apply_block<T, A, 2, kWide ? 1 : 2>(from, count, some, to + m, length, streaming); break;
        case 3: apply_block<T, A, 3, kWide ? 1 : 2>(from, count, some, to + m, length, streaming); break;
        default: apply_block<T, A, 4, kWide ? 1 : 2>(from, count, some, to + m, length, streaming);
      }
    }
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
  apply_general<T, T>(rows, count, c, outputs, outs, n, streaming);
}

// The same with sums in double, rounded once.
template <class T>
void apply_wide(const T* const* rows, int count, const double* c, int outputs, T* const* outs, int64_t n,
                bool streaming) {
  apply_general<T, double>(rows, count, c, outputs, outs, n, streaming);
}

template <class T>
void sum_in_double(const T* const* rows, int count, const double* c, double* out, int64_t n) {
  constexpr int kStep = kWidth<double>;
  const auto sum_at = [&](const T* const* from, int64_t at) {
    Vec<double> sum = {};
    for (int j = 0; j < count; ++j) sum = fma(broadcast(c[j]), load_row<double>(from[j] + at), sum);
    return sum;
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store(out + i, sum_at(rows, i));
  if (i == n) return;
  const Tail<T, kMaxVectors> tail(rows, count, i, n - i);
  const Vec<double> sum = sum_at(tail.rows, 0);
  for (int64_t k = i; k < n; ++k) out[k] = sum[k - i];
}

template <class T>
void clamp(T* row, T low, T high, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {  // comparisons that leave a NaN as it is
    const T x = row[i] < low ? low : row[i];
    row[i] = x > high ? high : x;
  }
}

}  // namespace marquardt::MQ_ISA
