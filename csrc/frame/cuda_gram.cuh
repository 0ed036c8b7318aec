// G = r rᵀ over the share of one CTA. Products and sums are double: they cannot leave the range, nor lose the
// determinant of nearly parallel vectors, and their cost hides behind memory on chips with full-rate double.
//
// Order of sums, fixed: elements of a thread, lanes of a warp (butterfly), warps, CTAs.
#pragma once

#include "frame/cuda_walk.cuh"

namespace marquardt {

constexpr unsigned kFullWarp = 0xffffffffu;

MQ_DEVICE inline double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// --- up to four rows: every thread takes its own slots -------------------------------------------------------------

// All pairs of R rows (first: row 0 with the others), packed like the Gram itself.
template <FrameAccess A, bool G, int R, bool First>
MQ_DEVICE inline void add_own(const Rows<A, G>& rows, double* sum) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  const int slot = static_cast<int>(threadIdx.x);
  for (int plane = 0; plane < Access<A>::planes; ++plane) {
    C x[R][W];
    for (int j = 0; j < R; ++j) rows.raw_quad(j, plane, slot, x[j]);
    for (int w = 0; w < W; ++w) {
      double d[R];
      for (int j = 0; j < R; ++j) d[j] = static_cast<double>(x[j][w]);
      for (int j = 1; j < R; j += 2)  // nothing is lost to the residual of almost parallel vectors
        if (rows.is_residual(j)) d[j] -= d[j - 1];
      if constexpr (First) {
        for (int j = 1; j < R; ++j) sum[j - 1] = fused(d[0], d[j], sum[j - 1]);
      } else {
        for (int i = 0; i < R; ++i)
          for (int j = 0; j <= i; ++j) sum[i * (i + 1) / 2 + j] = fused(d[i], d[j], sum[i * (i + 1) / 2 + j]);
      }
    }
  }
}

// The same of a plain call.
template <FrameAccess A, int N>
MQ_DEVICE inline void add_plain(const PlainRows<A, N>& rows, double* sum) {
  typename Access<A>::C x[N][Access<A>::V];
  rows.read_raw(x);
  for (int v = 0; v < Access<A>::V; ++v) {
    double d[N];
    for (int j = 0; j < N; ++j) d[j] = static_cast<double>(x[j][v]);
    for (int j = 1; j < N; j += 2)
      if (j < 2 * rows.call.pairs) d[j] -= d[j - 1];
    for (int i = 0; i < N; ++i)
      for (int j = 0; j <= i; ++j) sum[i * (i + 1) / 2 + j] = fused(d[i], d[j], sum[i * (i + 1) / 2 + j]);
  }
}

// `add` adds a tile to the sums.
template <int kEntries, bool G, class Walk, class Add>
MQ_DEVICE inline void sum_own(const FrameArguments<G>& a, const Walk& walk, unsigned char* shared, const Add& add) {
  double sum[kEntries] = {};
  walk.each([&](int tile, const unsigned char* stage) { add(tile, stage, sum); });
  auto* parts = reinterpret_cast<double*>(shared + a.layout.parts_at);
  auto* own = reinterpret_cast<double*>(shared + a.layout.own_at);
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  for (int e = 0; e < kEntries; ++e) {
    const double total = warp_sum(sum[e]);
    if (thread % 32 == 0) parts[thread / 32 * kBlockEntries + e] = total;
  }
  __syncthreads();
  for (int e = thread; e < a.layout.entries; e += static_cast<int>(blockDim.x)) {
    double total = 0.0;  // entries of rows that were not asked for
    if (e < kEntries)
      for (int w = 0; w < warps; ++w) total += parts[w * kBlockEntries + e];
    own[e] = total;  // read next by this very thread, or behind a barrier of the cluster
  }
}

template <FrameAccess A, bool G, int R, bool First, bool Plain, class Walk>
MQ_DEVICE inline void gram_own(const FrameArguments<G>& a, const Share& share, const Walk& walk,
                               unsigned char* shared) {
  sum_own<First ? R - 1 : R * (R + 1) / 2>(a, walk, shared, [&](int tile, const unsigned char* stage, double* sum) {
    if constexpr (Plain) {
      add_plain(PlainRows<A, R>{a.call, stage}, sum);
    } else {
      if constexpr (G) {
        if (a.layout.staged) make_any_rows<A>(a, share, first_of_tile<A>(share, tile), stage, shared);
      }
      add_own<A, G, R, First>(Rows<A, G>{a, stage, shared + a.layout.rows_at}, sum);
    }
  });
}

// --- more rows: 4 × 4 blocks of entries, dealt to the warps --------------------------------------------------------

struct GramBlock {
  int rows, columns;  // the first of each
};

// Blocks of the lower triangle row by row; else row 0, or rows 0 and 1, against 1 + 4·block …
MQ_DEVICE inline GramBlock block_at(GramKind kind, int block) {
  if (kind != GramKind::full) return {0, 1 + kBlockRows * block};
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= block) ++row;
  return {kBlockRows * row, kBlockRows * (block - row * (row + 1) / 2)};
}

template <FrameAccess A>
MQ_DEVICE inline void add_block(const Rows<A, true>& rows, GramBlock at, int height, int count, int slot,
                                double (*sum)[kBlockRows]) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  const bool diagonal = at.rows == at.columns;  // the same rows twice: read once
  for (int plane = 0; plane < Access<A>::planes; ++plane) {
    C x[kBlockRows][W], y[kBlockRows][W];
    for (int i = 0; i < kBlockRows; ++i) {
      for (int w = 0; w < W; ++w) x[i][w] = C(0);
      if (i < height) rows.quad(at.rows + i, plane, slot, x[i]);
      for (int w = 0; w < W; ++w) y[i][w] = diagonal ? x[i][w] : C(0);
      if (!diagonal && at.columns + i < count) rows.quad(at.columns + i, plane, slot, y[i]);
    }
    for (int w = 0; w < W; ++w) {
      double d[kBlockRows];
      for (int j = 0; j < kBlockRows; ++j) d[j] = static_cast<double>(y[j][w]);
      for (int i = 0; i < kBlockRows; ++i)
        for (int j = 0; j < kBlockRows; ++j) sum[i][j] = fused(static_cast<double>(x[i][w]), d[j], sum[i][j]);
    }
  }
}

// Each pass takes as many blocks as there are warps; warps beyond them share the slots of a tile.
template <FrameAccess A, class Walk>
MQ_DEVICE inline void gram_blocks(const FrameArguments<true>& a, const Share& share, const Walk& walk,
                                  unsigned char* shared) {
  const FrameCall& call = a.call;
  auto* parts = reinterpret_cast<double*>(shared + a.layout.parts_at);
  auto* own = reinterpret_cast<double*>(shared + a.layout.own_at);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int at_once = a.layout.blocks < warps ? a.layout.blocks : warps, shares = warps / at_once;
  const bool is_full = call.gram == GramKind::full;
  const int heads = call.gram == GramKind::two ? 2 : 1;

  for (int base = 0; base < a.layout.blocks; base += at_once) {
    const int mine = warp % at_once, part = warp / at_once;
    const GramBlock at = block_at(call.gram, base + mine);
    const int height = !is_full ? heads : call.rows - at.rows < kBlockRows ? call.rows - at.rows : kBlockRows;
    const bool busy = base + mine < a.layout.blocks && part < shares;
    double sum[kBlockRows][kBlockRows] = {};
    if (base > 0) walk.start();
    walk.each([&](int tile, const unsigned char* stage) {
      if (a.layout.staged) make_any_rows<A>(a, share, first_of_tile<A>(share, tile), stage, shared);
      __syncthreads();  // other threads' slots from here on
      const Rows<A, true> rows{a, stage, shared + a.layout.rows_at};
      if (busy)
        for (int slots = part * 32; slots < static_cast<int>(blockDim.x); slots += shares * 32)
          add_block<A>(rows, at, height, call.rows, slots + lane, sum);
      __syncthreads();  // before they are filled anew
    });
    for (int i = 0; i < kBlockRows; ++i)
      for (int j = 0; j < kBlockRows; ++j) {
        const double total = warp_sum(sum[i][j]);
        if (lane == 0) parts[warp * kBlockEntries + i * kBlockRows + j] = total;
      }
    __syncthreads();
    for (int e = thread; e < at_once * kBlockEntries; e += static_cast<int>(blockDim.x)) {
      const int block = base + e / kBlockEntries;
      if (block >= a.layout.blocks) continue;
      const GramBlock of = block_at(call.gram, block);
      const int row = of.rows + e % kBlockEntries / kBlockRows, column = of.columns + e % kBlockRows;
      if (is_full ? row >= call.rows || column > row : row >= heads || column <= row || column >= call.rows) continue;
      double total = 0.0;
      for (int s = 0; s < shares; ++s)
        total += parts[(s * at_once + e / kBlockEntries) * kBlockEntries + e % kBlockEntries];
      own[is_full ? row * (row + 1) / 2 + column : row == 0 ? column - 1 : call.rows + column - 3] = total;
    }
    __syncthreads();
  }
}

// The Gram of a plain call that wants all rows, held. False where it is another.
template <FrameAccess A, bool G, class Walk>
MQ_DEVICE inline bool gram_plain(const FrameArguments<G>& a, const Share& share, uint32_t wanted, const Walk& walk,
                                 unsigned char* shared) {
  if constexpr (has_plain<A, G>) {
    if (a.call.gram != GramKind::full) return false;
    switch (plain_streams<A>(a, wanted)) {
      case 2: gram_own<A, G, 2, false, true>(a, share, walk, shared); return true;
      case 3: gram_own<A, G, 3, false, true>(a, share, walk, shared); return true;
      default: break;
    }
  }
  return false;
}

// The Gram of the rows in `wanted` (a prefix: row 0, rows 0 and 1, or all) into own_at, by all threads. walk.start() was called.
template <FrameAccess A, bool G, class Walk>
MQ_DEVICE inline void gram(const FrameArguments<G>& a, const Share& share, uint32_t wanted, const Walk& walk,
                           unsigned char* shared) {
  const int count = wanted == 1u ? 1 : wanted == 3u ? 2 : a.call.rows;
  if (a.layout.entries == 0) return;
  if constexpr (G) {
    if (a.call.op == FrameOp::lm_step) {
      return sum_own<3>(a, walk, shared, [&](int tile, const unsigned char* stage, double* sum) {
        add_step<A>(a, share, first_of_tile<A>(share, tile), stage, shared, sum);
      });
    }
    if (a.layout.blocks > 1 || a.call.gram == GramKind::two) return gram_blocks<A>(a, share, walk, shared);
  }
  if (a.call.gram == GramKind::first) {
    switch (count) {
      case 2: return gram_own<A, G, 2, true, false>(a, share, walk, shared);
      case 3: return gram_own<A, G, 3, true, false>(a, share, walk, shared);
      case 4: return gram_own<A, G, 4, true, false>(a, share, walk, shared);
      default: return gram_own<A, G, 5, true, false>(a, share, walk, shared);
    }
  }
  switch (count) {
    case 1: return gram_own<A, G, 1, false, false>(a, share, walk, shared);
    case 2: return gram_own<A, G, 2, false, false>(a, share, walk, shared);
    case 3: return gram_own<A, G, 3, false, false>(a, share, walk, shared);
    default: return gram_own<A, G, 4, false, false>(a, share, walk, shared);
  }
}

}  // namespace marquardt
