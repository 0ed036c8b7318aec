// Gram sums over one chunk. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "frame/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// kWidth<A> elements of a row as A.
template <class A, class T>
MQ_INLINE Vec<A> load_row(const T* from) {
  if constexpr (sizeof(A) == sizeof(T)) {
    return load<T>(from);
  } else {
    return load_as_double(from);
  }
}

template <int N, int Pairs, class A, class T>
MQ_INLINE void load_frame(const T* const* rows, int64_t at, Vec<A>* frame) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) frame[j] = load_row<A>(rows[j] + at);
#pragma GCC unroll 8
  for (int j = 0; j < Pairs; ++j) frame[2 * j + 1] -= frame[2 * j];
}

MQ_INLINE void add_lanes(Vec<double> sum, double* lanes) {
  store(lanes, load(lanes) + sum);
}

MQ_INLINE void add_lanes(Vec<float> sum, double* lanes) {
  add_lanes(fold_to_double(sum), lanes);
}

// The rows of a tail, padded with zeros to whole vectors.
template <class T, int N>
struct Tail {
  T buffer[N][kWidth<T>];
  const T* rows[N] = {};

  MQ_INLINE Tail(const T* const* from, int count, int64_t at, int64_t n) {
    for (int j = 0; j < count; ++j) {
      for (int i = 0; i < kWidth<T>; ++i) buffer[j][i] = i < n ? from[j][at + i] : T(0);
      rows[j] = buffer[j];
    }
  }
};

// All N(N+1)/2 entries of up to four rows in one sweep, with enough independent sums to hide the latency of fma.
template <class T, class A, int N, int Pairs>
void gram_small(const T* const* rows, int64_t n, double (*acc)[kLanes]) {
  constexpr int kEntries = N * (N + 1) / 2, kUnroll = kEntries == 1 ? 8 : kEntries <= 3 ? 4 : kEntries <= 6 ? 2 : 1;
  constexpr int kStep = kWidth<A>;
  Vec<A> sum[kUnroll][kEntries] = {};
  Vec<A> frame[N];
  int64_t i = 0;
  for (; i + kUnroll * kStep <= n; i += kUnroll * kStep) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      load_frame<N, Pairs, A>(rows, i + u * kStep, frame);
#pragma GCC unroll 4
      for (int a = 0; a < N; ++a)
#pragma GCC unroll 4
        for (int b = 0; b <= a; ++b) sum[u][a * (a + 1) / 2 + b] = fma(frame[a], frame[b], sum[u][a * (a + 1) / 2 + b]);
    }
  }
  const auto add = [&](const T* const* from, int64_t at) {
    load_frame<N, Pairs, A>(from, at, frame);
    for (int a = 0; a < N; ++a)
      for (int b = 0; b <= a; ++b) sum[0][a * (a + 1) / 2 + b] = fma(frame[a], frame[b], sum[0][a * (a + 1) / 2 + b]);
  };
  for (; i + kStep <= n; i += kStep) add(rows, i);
  if (i < n) {
    const Tail<T, N> tail(rows, N, i, n - i);
    add(tail.rows, 0);
  }
  for (int e = 0; e < kEntries; ++e) {
    Vec<A> total = sum[0][e];
    for (int u = 1; u < kUnroll; ++u) total += sum[u][e];
    add_lanes(total, acc[e]);
  }
}

// One 4×4 tile of a larger Gram: rows a0… with rows b0…
template <class T, class A>
void gram_tile(const T* const* rows, int a0, int na, int b0, int nb, int64_t n, double (*acc)[kLanes]) {
  constexpr int kStep = kWidth<A>;
  Vec<A> sum[4][4] = {};
  const auto add = [&](const T* const* a_rows, const T* const* b_rows, int64_t at) {
    Vec<A> a[4] = {}, b[4] = {};
    for (int j = 0; j < na; ++j) a[j] = load_row<A>(a_rows[j] + at);
    for (int j = 0; j < nb; ++j) b[j] = load_row<A>(b_rows[j] + at);
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum[p][q] = fma(a[p], b[q], sum[p][q]);
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) add(rows + a0, rows + b0, i);
  if (i < n) {
    const Tail<T, 4> a(rows + a0, na, i, n - i), b(rows + b0, nb, i, n - i);
    add(a.rows, b.rows, 0);
  }
  for (int p = 0; p < na; ++p)
    for (int q = 0; q < nb; ++q) {
      const int row = a0 + p, column = b0 + q;
      if (column <= row) add_lanes(sum[p][q], acc[row * (row + 1) / 2 + column]);
    }
}

// Row 0 with rows 1…: entry j − 1.
template <class T, class A>
void gram_first(const T* const* rows, int count, int64_t n, double (*acc)[kLanes]) {
  constexpr int kStep = kWidth<A>;
  for (int j0 = 1; j0 < count; j0 += 4) {
    const int nb = count - j0 < 4 ? count - j0 : 4;
    Vec<A> sum[4] = {};
    const auto add = [&](const T* first, const T* const* others, int64_t at) {
      const Vec<A> g = load_row<A>(first + at);
      for (int j = 0; j < nb; ++j) sum[j] = fma(g, load_row<A>(others[j] + at), sum[j]);
    };
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) add(rows[0], rows + j0, i);
    if (i < n) {
      const Tail<T, 1> first(rows, 1, i, n - i);
      const Tail<T, 4> others(rows + j0, nb, i, n - i);
      add(first.rows[0], others.rows, 0);
    }
    for (int j = 0; j < nb; ++j) add_lanes(sum[j], acc[j0 + j - 1]);
  }
}

template <class T, class A, int Pairs>
void gram_full(const T* const* rows, int count, int64_t n, double (*acc)[kLanes]) {
  switch (count) {
    case 1: return gram_small<T, A, 1, 0>(rows, n, acc);
    case 2: return gram_small < T, A, 2, Pairs<1 ? 0 : 1>(rows, n, acc);
    case 3: return gram_small < T, A, 3, Pairs<1 ? 0 : 1>(rows, n, acc);
    case 4: return gram_small<T, A, 4, Pairs>(rows, n, acc);
    default: break;
  }
  for (int a = 0; a < count; a += 4)
    for (int b = 0; b <= a; b += 4)
      gram_tile<T, A>(rows, a, count - a < 4 ? count - a : 4, b, count - b < 4 ? count - b : 4, n, acc);
}

template <class T, class A>
void gram_of(const T* const* rows, int count, int pairs, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  if (kind == GramKind::first) return gram_first<T, A>(rows, count, n, acc);
  switch (pairs) {
    case 0: return gram_full<T, A, 0>(rows, count, n, acc);
    case 1: return gram_full<T, A, 1>(rows, count, n, acc);
    default: return gram_full<T, A, 2>(rows, count, n, acc);
  }
}

// Chunk after chunk: the sums of each are folded into double before the next begins.
template <class T>
void gram(const T* const* rows, int count, int pairs, GramKind kind, bool exact, int64_t n, double (*acc)[kLanes]) {
  const T* at[kMaxVectors];
  for (int j = 0; j < count; ++j) at[j] = rows[j];
  for (int64_t left = n; left > 0; left -= kChunk) {
    const int64_t part = left < kChunk ? left : kChunk;
    if (exact) {
      gram_of<T, double>(at, count, pairs, kind, part, acc);
    } else {
      gram_of<T, T>(at, count, pairs, kind, part, acc);
    }
    for (int j = 0; j < count; ++j) at[j] += part;
  }
}

}  // namespace marquardt::MQ_ISA
