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

// All N(N+1)/2 entries of up to six rows in one sweep, with enough independent sums to hide the latency of fma.
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
#pragma GCC unroll 8
      for (int a = 0; a < N; ++a)
#pragma GCC unroll 8
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

// Where the product of two rows goes; those of a row with neighbouring columns are neighbours.
MQ_INLINE int entry_of(GramKind kind, int count, int row, int column) {
  if (kind == GramKind::full) return row * (row + 1) / 2 + column;
  return row == 0 ? column - 1 : count + column - 3;
}

// Rows a0 … with rows b0 … over n elements, a multiple of the vector's width: NA × NB sums in registers.
template <class A, int NA, int NB, bool Diagonal>
void gram_tile(const A* const* rows, int count, GramKind kind, int a0, int b0, int64_t n, double (*acc)[kLanes]) {
  Vec<A> sum[NA][NB];
#pragma GCC unroll 4
  for (int p = 0; p < NA; ++p)
#pragma GCC unroll 9
    for (int q = 0; q < NB; ++q) sum[p][q] = Vec<A>{};
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    Vec<A> b[NB];
#pragma GCC unroll 9
    for (int q = 0; q < NB; ++q) b[q] = load<A>(rows[b0 + q] + i);
#pragma GCC unroll 4
    for (int p = 0; p < NA; ++p) {
      const Vec<A> a = Diagonal ? b[p] : load<A>(rows[a0 + p] + i);
#pragma GCC unroll 9
      for (int q = 0; q < (Diagonal ? p + 1 : NB); ++q) sum[p][q] = fma(a, b[q], sum[p][q]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < NA; ++p) {
    double (*to)[kLanes] = acc + entry_of(kind, count, a0 + p, b0);
#pragma GCC unroll 9
    for (int q = 0; q < (Diagonal ? p + 1 : NB); ++q) add_lanes(sum[p][q], to[q]);
  }
}

template <class A, int NA>
void gram_columns(const A* const* rows, int count, GramKind kind, int a0, int b0, int nb, int64_t n,
                  double (*acc)[kLanes]) {
  switch (nb) {
    case 1: return gram_tile<A, NA, 1, false>(rows, count, kind, a0, b0, n, acc);
    case 2: return gram_tile<A, NA, 2, false>(rows, count, kind, a0, b0, n, acc);
    case 3: return gram_tile<A, NA, 3, false>(rows, count, kind, a0, b0, n, acc);
    case 4: return gram_tile<A, NA, 4, false>(rows, count, kind, a0, b0, n, acc);
    default: break;
  }
  if constexpr (NA == 1) {
    switch (nb) {
      case 5: return gram_tile<A, 1, 5, false>(rows, count, kind, a0, b0, n, acc);
      case 6: return gram_tile<A, 1, 6, false>(rows, count, kind, a0, b0, n, acc);
      case 7: return gram_tile<A, 1, 7, false>(rows, count, kind, a0, b0, n, acc);
      default: return gram_tile<A, 1, 8, false>(rows, count, kind, a0, b0, n, acc);
    }
  }
}

// All entries of a larger Gram, 4 × 4 at a time.
template <class A>
void gram_tiles(const A* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  const auto at_most_4 = [](int left) { return left < 4 ? left : 4; };
  if (kind != GramKind::full) {  // row 0, or rows 0 and 1, with those behind
    if (kind == GramKind::two) gram_columns<A, 1>(rows, count, kind, 0, 1, 1, n, acc);
    if (kind == GramKind::two) {
      for (int b = 2; b < count; b += 4) gram_columns<A, 2>(rows, count, kind, 0, b, at_most_4(count - b), n, acc);
    } else {
      for (int b = 1; b < count; b += 8)
        gram_columns<A, 1>(rows, count, kind, 0, b, count - b < 8 ? count - b : 8, n, acc);
    }
    return;
  }
  for (int a = 0; a < count; a += 4) {
    const int na = at_most_4(count - a);
    if (na == 1) {  // a lone row wants more sums than four at a time, or it waits for each fma
      for (int b = 0; b <= a; b += 8) {
        if (a - b == 8) {
          gram_tile<A, 1, 9, false>(rows, count, kind, a, b, n, acc);
          return;
        }
        gram_columns<A, 1>(rows, count, kind, a, b, a + 1 - b, n, acc);
      }
      return;
    }
    for (int b = 0; b < a; b += 4) {
      switch (na) {
        case 2: gram_columns<A, 2>(rows, count, kind, a, b, 4, n, acc); break;
        case 3: gram_columns<A, 3>(rows, count, kind, a, b, 4, n, acc); break;
        default: gram_columns<A, 4>(rows, count, kind, a, b, 4, n, acc);
      }
    }
    switch (na) {
      case 2: gram_tile<A, 2, 2, true>(rows, count, kind, a, a, n, acc); break;
      case 3: gram_tile<A, 3, 3, true>(rows, count, kind, a, a, n, acc); break;
      default: gram_tile<A, 4, 4, true>(rows, count, kind, a, a, n, acc);
    }
  }
}

// Many rows of one chunk: read where they lie, or converted once to the wider type, block by block in the first cache,
// because every row meets every other. `acc` begins at zero.
template <class T, class A>
void gram_blocks(const T* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  constexpr int kStep = kWidth<A>;
  if constexpr (sizeof(A) == sizeof(T)) {
    const int64_t whole = n / kStep * kStep;
    gram_tiles<A>(rows, count, kind, whole, acc);
    if (whole == n) return;
    const Tail<T, kMaxVectors> tail(rows, count, whole, n - whole);
    gram_tiles<A>(tail.rows, count, kind, kStep, acc);
  } else {
    constexpr int kBlock = 128;
    alignas(64) A block[kMaxVectors][kBlock];
    const A* at[kMaxVectors];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t m = n - begin < kBlock ? n - begin : kBlock, whole = m / kStep * kStep;
      for (int j = 0; j < count; ++j) {
        at[j] = block[j];
        for (int64_t i = 0; i < whole; i += kStep) store(block[j] + i, load_row<A>(rows[j] + begin + i));
        if (whole < m)
          for (int64_t i = whole; i < whole + kStep; ++i)
            block[j][i] = i < m ? static_cast<A>(rows[j][begin + i]) : A(0);
        // The next block travels while this one is multiplied.
        for (int64_t i = kBlock; i < 2 * kBlock; i += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(rows[j] + begin + i);
      }
      gram_tiles<A>(at, count, kind, (m + kStep - 1) / kStep * kStep, acc);
    }
  }
}

// The sums of a chunk are its own until it is done: they do not depend on what came before it.
template <class T, class A>
void gram_many(const T* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  double own[kMaxGram][kLanes];
  const int entries = entries_of(kind, count);
  __builtin_memset(own, 0, sizeof(own[0]) * static_cast<uint64_t>(entries));
  gram_blocks<T, A>(rows, count, kind, n, own);
  for (int e = 0; e < entries; ++e)
    for (int lane = 0; lane < kLanes; ++lane) acc[e][lane] += own[e][lane];
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
  if constexpr (kBytes == 64 && Pairs == 0) {  // with 32 registers all sums of six rows fit
    if (count == 5) return gram_small<T, A, 5, 0>(rows, n, acc);
    if (count == 6) return gram_small<T, A, 6, 0>(rows, n, acc);
  }
  gram_many<T, A>(rows, count, GramKind::full, n, acc);
}

template <class T, class A>
void gram_of(const T* const* rows, int count, int pairs, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  if (kind != GramKind::full) return gram_many<T, A>(rows, count, kind, n, acc);
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
