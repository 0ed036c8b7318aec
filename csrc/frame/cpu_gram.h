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

// How far ahead of a sweep rows are asked for: the processor's own prefetching stops at every page, and rows have many.
constexpr int64_t kAheadBytes = 1024;

// Asks for what `Bytes` (whole cache lines) at `at` of each row will be followed by.
template <int N, int Bytes, class T>
MQ_INLINE void prefetch_rows(const T* const* rows, int64_t at) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
    for (int64_t b = 0; b < Bytes; b += kLineBytes)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[j] + at) + kAheadBytes + b);
}

// All N(N+1)/2 entries of up to six rows in one sweep, with enough independent sums to hide the latency of fma.
template <class T, class A, int N, int Pairs>
void gram_small(const T* const* rows, int64_t n, double (*acc)[kLanes]) {
  constexpr int kEntries = N * (N + 1) / 2, kUnroll = kEntries == 1 ? 8 : kEntries <= 3 ? 4 : kEntries <= 6 ? 2 : 1;
  constexpr int kStep = kWidth<A>, kLine = kLineBytes / (kStep * static_cast<int>(sizeof(T)));
  constexpr int kSteps = kUnroll > kLine ? kUnroll : kLine, kBytesRead = kSteps * kStep * static_cast<int>(sizeof(T));
  Vec<A> sum[kUnroll][kEntries] = {};
  Vec<A> frame[N];
  int64_t i = 0;
  for (; i + kSteps * kStep <= n; i += kSteps * kStep) {
    prefetch_rows<N, kBytesRead>(rows, i);
#pragma GCC unroll 8
    for (int u = 0; u < kSteps; ++u) {
      load_frame<N, Pairs, A>(rows, i + u * kStep, frame);
#pragma GCC unroll 8
      for (int a = 0; a < N; ++a)
#pragma GCC unroll 8
        for (int b = 0; b <= a; ++b) {
          Vec<A>& entry = sum[u % kUnroll][a * (a + 1) / 2 + b];
          entry = fma(frame[a], frame[b], entry);
        }
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

// Row 0, or rows 0 and 1, with those behind.
template <class A>
void gram_heads(const A* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  if (kind == GramKind::two) {
    gram_columns<A, 1>(rows, count, kind, 0, 1, 1, n, acc);
    for (int b = 2; b < count; b += 4)
      gram_columns<A, 2>(rows, count, kind, 0, b, count - b < 4 ? count - b : 4, n, acc);
  } else {
    for (int b = 1; b < count; b += 8)
      gram_columns<A, 1>(rows, count, kind, 0, b, count - b < 8 ? count - b : 8, n, acc);
  }
}

// A lone last row with all rows: more sums than four at a time, or it would wait for each fma.
template <class A>
void gram_lone(const A* const* rows, int last, int64_t n, double (*acc)[kLanes]) {
  constexpr GramKind kFull = GramKind::full;
  for (int b = 0; b <= last; b += 8) {
    if (last - b == 8) return gram_tile<A, 1, 9, false>(rows, last + 1, kFull, last, b, n, acc);
    gram_columns<A, 1>(rows, last + 1, kFull, last, b, last + 1 - b < 8 ? last + 1 - b : 8, n, acc);
  }
}

// All entries of a larger Gram, 4 × 4 at a time, group of rows by group: `first(a, na)` makes rows a … a + na − 1 ready and
// takes their products with each other.
template <class A, class First>
void gram_tiles(const A* const* rows, int count, int64_t n, double (*acc)[kLanes], const First& first) {
  constexpr GramKind kFull = GramKind::full;
  for (int a = 0; a < count; a += 4) {
    const int na = count - a < 4 ? count - a : 4;
    first(a, na);
    if (na == 1) return gram_lone<A>(rows, a, n, acc);
    for (int b = 0; b < a; b += 4) {
      switch (na) {
        case 2: gram_columns<A, 2>(rows, count, kFull, a, b, 4, n, acc); break;
        case 3: gram_columns<A, 3>(rows, count, kFull, a, b, 4, n, acc); break;
        default: gram_columns<A, 4>(rows, count, kFull, a, b, 4, n, acc);
      }
    }
  }
}

template <class A>
void gram_diagonal(const A* const* rows, int count, int a, int na, int64_t n, double (*acc)[kLanes]) {
  switch (na) {
    case 1: return;  // with its row
    case 2: return gram_tile<A, 2, 2, true>(rows, count, GramKind::full, a, a, n, acc);
    case 3: return gram_tile<A, 3, 3, true>(rows, count, GramKind::full, a, a, n, acc);
    default: return gram_tile<A, 4, 4, true>(rows, count, GramKind::full, a, a, n, acc);
  }
}

// The same for n elements of four rows of T at `from`, which are kept as A at `to`: conversion in the shadow of the fmas.
template <class T, class A>
void gram_diagonal_converted(const T* const* from, int64_t at, A* const* to, int a, int64_t n, double (*acc)[kLanes]) {
  Vec<A> sum[10];
#pragma GCC unroll 10
  for (int e = 0; e < 10; ++e) sum[e] = Vec<A>{};
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    Vec<A> row[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      row[p] = load_row<A>(from[a + p] + at + i);
      store(to[a + p] + i, row[p]);
#pragma GCC unroll 4
      for (int q = 0; q <= p; ++q) sum[p * (p + 1) / 2 + q] = fma(row[p], row[q], sum[p * (p + 1) / 2 + q]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p)
#pragma GCC unroll 4
    for (int q = 0; q <= p; ++q) add_lanes(sum[p * (p + 1) / 2 + q], acc[entry_of(GramKind::full, 0, a + p, a + q)]);
}

// A stretch of a row in the wider type, padded with zeros to whole vectors.
template <class T, class A>
void convert_row(const T* from, int64_t m, A* to) {
  const int64_t whole = m / kWidth<A> * kWidth<A>;
  for (int64_t i = 0; i < whole; i += kWidth<A>) store(to + i, load_row<A>(from + i));
  if (whole < m)
    for (int64_t i = whole; i < whole + kWidth<A>; ++i) to[i] = i < m ? static_cast<A>(from[i]) : A(0);
}

// Many rows of one chunk in their own type. `acc` begins at zero.
template <class T>
void gram_in_place(const T* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  const auto all = [&](const T* const* from, int64_t length) {
    if (kind != GramKind::full) return gram_heads<T>(from, count, kind, length, acc);
    gram_tiles<T>(from, count, length, acc, [&](int a, int na) { gram_diagonal<T>(from, count, a, na, length, acc); });
  };
  const int64_t whole = n / kWidth<T> * kWidth<T>;
  all(rows, whole);
  if (whole == n) return;
  const Tail<T, kMaxVectors> tail(rows, count, whole, n - whole);
  all(tail.rows, kWidth<T>);
}

// The same in a wider type: rows are converted once, block by block in the first cache, because every row meets every other.
// A longer block has fewer sums to put away; one this long leaves half of a cache of 48 kB to what streams through it.
template <class T, class A>
void gram_converted(const T* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  constexpr int kBlock = kBytes == 64 ? 192 : 128;
  alignas(64) A block[kMaxVectors][kBlock];
  A* at[kMaxVectors];
  for (int j = 0; j < count; ++j) at[j] = block[j];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = n - begin < kBlock ? n - begin : kBlock, padded = (m + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
    const auto convert = [&](int a, int na) {
      for (int j = a; j < a + na; ++j) convert_row(rows[j] + begin, m, at[j]);
    };
    if (kind != GramKind::full) {
      convert(0, count);
      gram_heads<A>(at, count, kind, padded, acc);
      continue;
    }
    gram_tiles<A>(at, count, padded, acc, [&](int a, int na) {
      if (na == 4 && m == padded) return gram_diagonal_converted<T, A>(rows, begin, at, a, m, acc);
      convert(a, na);
      gram_diagonal<A>(at, count, a, na, padded, acc);
    });
  }
}

// The sums of a chunk are its own until it is done: they do not depend on what came before it.
template <class T, class A>
void gram_many(const T* const* rows, int count, GramKind kind, int64_t n, double (*acc)[kLanes]) {
  alignas(64) double own[kMaxGram][kLanes];
  const int entries = entries_of(kind, count);
  __builtin_memset(own, 0, sizeof(own[0]) * static_cast<uint64_t>(entries));
  if constexpr (sizeof(A) == sizeof(T)) {
    gram_in_place<T>(rows, count, kind, n, own);
  } else {
    gram_converted<T, A>(rows, count, kind, n, own);
  }
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
