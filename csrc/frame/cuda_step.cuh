// The rows of a sampler step (step.h): e, r, a and y of this thread's slots, from vectors in their stage.
#pragma once

#include "frame/cuda_rows.cuh"
#include "frame/step.h"

namespace marquardt {

// Vectors that count. Functions of their own: the registers of the kernels are those of their loops.
template <FrameAccess>
MQ_DEVICE __noinline__ uint32_t vectors_of_step(const FrameCall& call, const double* p, bool outputs) {
  return step_vectors(call, p, outputs);
}

// The table of one sample, for all threads. `vectors` are those that were fetched.
template <FrameAccess A>
MQ_DEVICE __noinline__ void load_step(const FrameArguments<true>& a, const double* p, uint32_t vectors,
                                      unsigned char* shared) {
  using C = typename Access<A>::C;
  const FrameCall& call = a.call;
  auto& table = *reinterpret_cast<StepTable<C>*>(shared + a.layout.prologue_at);
  const StepShape s = step_shape(call);
  const bool reads = step_reads_prev(call, s, p), direction = step_needs_direction(call, reads);
  const auto dtype_of = [&](int v) { return v < call.streams ? call.stream[v].dtype : Access<A>::compute; };
  const int terms = s.sources + (s.noisy ? 1 : 0);
  for (int j = static_cast<int>(threadIdx.x); j < terms; j += static_cast<int>(blockDim.x)) {
    const bool source = j < s.sources;
    const int v = source ? j : s.noise();
    const bool there = (vectors >> v & 1u) != 0u;
    auto& term = table.term[j];
    term.offset = a.layout.offset[v];
    term.dtype = dtype_of(v);
    term.d = there && direction ? p[source ? s.d(j) : s.d_noise()] : 0.0;
    term.a = there ? static_cast<C>(step_base(s, p, j, reads)) : C(0);
    term.y = there && source && s.clipped ? p[s.y(j)] : 0.0;
  }
  if (threadIdx.x == 0) {
    table.terms = terms;
    table.guided = s.guided;
    table.clipped = s.clipped;
    table.d_y = s.clipped && direction ? p[s.d_y()] : 0.0;
    table.a_y = s.clipped ? static_cast<C>(step_base_y(s, p, reads)) : C(0);
    table.bound = s.clipped ? p[s.bound()] : 0.0;
    table.residual = call.mode != kSnr;
    table.prev = reads ? a.layout.offset[s.prev()] : -1;
    table.prev_dtype = reads ? dtype_of(s.prev()) : Access<A>::compute;
  }
  __syncthreads();
}

// sum += c·x, or the product itself where nothing was added yet; nothing at all for c = 0.
template <class C, int W>
MQ_DEVICE inline void add_term(C c, const C* x, C* sum, bool& begun) {
  if (c == C(0)) return;
  for (int w = 0; w < W; ++w) sum[w] = begun ? fused(c, x[w], sum[w]) : c * x[w];
  begun = true;
}

// A step over one slot. Sums behind e and r are double: r = p − e may be small beside e, and x' a large multiple of both.
template <FrameAccess A>
struct StepSlot {
  using C = typename Access<A>::C;
  static constexpr int W = Access<A>::W;
  static_assert(Access<A>::planes == 1);
  double e[W] = {}, y[W] = {}, r[W] = {};
  C base[W] = {};

  // From the vectors in their stage; `outputs`: a and y too.
  MQ_DEVICE inline StepSlot(const StepTable<C>& table, const unsigned char* stage, bool outputs) {
    const auto read = [&](int offset, DType dtype, C* x) {
      read_quad<A>(stage + offset, dtype, 0, static_cast<int>(threadIdx.x), x);
    };
    bool any_e = false, any_a = false, any_y = false;
    MQ_UNROLL(1)
    for (int j = 0; j < table.terms; ++j) {
      const auto& term = table.term[j];
      const double d = term.d, on_y = term.y;
      const C on_a = outputs ? term.a : C(0);
      if (d == 0.0 && on_a == C(0) && on_y == 0.0) continue;
      C x[W];
      double wide[W];
      read(term.offset, term.dtype, x);
      for (int w = 0; w < W; ++w) wide[w] = static_cast<double>(x[w]);
      if (j == 1 && table.guided) {
        read(table.term[2].offset, table.term[2].dtype, x);
        for (int w = 0; w < W; ++w) wide[w] -= static_cast<double>(x[w]);
        for (int w = 0; w < W; ++w) x[w] = static_cast<C>(wide[w]);
      }
      add_term<double, W>(d, wide, e, any_e);
      add_term<C, W>(on_a, x, base, any_a);
      add_term<double, W>(on_y, wide, y, any_y);
    }
    if (table.clipped) {  // comparisons that leave a NaN as it is
      const double bound = table.bound;
      C rounded[W];
      for (int w = 0; w < W; ++w) {
        y[w] = y[w] < -bound ? -bound : y[w];
        y[w] = y[w] > bound ? bound : y[w];
        rounded[w] = static_cast<C>(y[w]);
      }
      add_term<double, W>(table.d_y, y, e, any_e);
      if (outputs) add_term<C, W>(table.a_y, rounded, base, any_a);
    }
    if (table.prev >= 0) {
      C p[W];
      read(table.prev, table.prev_dtype, p);
      for (int w = 0; w < W; ++w) r[w] = table.residual ? static_cast<double>(p[w]) - e[w] : static_cast<double>(p[w]);
    }
  }
};

// Then row 2 is made to be x', and the outputs take it as it is.
MQ_DEVICE inline void begin_wide_step(const FrameCall& call, FrameMap& map) {
  for (int j = 0; j < 2; ++j) map.work[j] = map.c[0][j];
  for (int i = 0; i < call.step_outputs; ++i) map.c[i][0] = map.c[i][1] = 0.0;
}

// The rows of one slot, of which `valid` elements are there; with a map that says so row 2 is x' itself. A function of
// its own, called by every sweep; places are in shared memory, so that the compiler knows what it reads.
template <FrameAccess A>
MQ_DEVICE __noinline__ void step_slot(int table_at, int map_at, int stage_at, int rows_at, int row_bytes, int valid) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  unsigned char* shared = shared_memory();
  const auto& table = *reinterpret_cast<const StepTable<C>*>(shared + table_at);
  unsigned char* rows = shared + rows_at + static_cast<int>(threadIdx.x) * 16;
  const auto write = [&](int row, const auto* x) {
    C rounded[W];
    for (int w = 0; w < W; ++w) rounded[w] = w < valid ? static_cast<C>(x[w]) : C(0);
    write_quad(rows + row * row_bytes, rounded);
  };
  StepSlot<A> s(table, shared + stage_at, true);
  if (map_at >= 0) {
    const auto& map = *reinterpret_cast<const FrameMap*>(shared + map_at);
    if (map.wide) {
      const double c0 = map.work[0], c1 = map.work[1];
      for (int w = 0; w < W; ++w)
        s.base[w] = static_cast<C>(fused(c1, s.r[w], fused(c0, s.e[w], static_cast<double>(s.base[w]))));
    }
  }
  if (table.clipped) write(3, s.y);
  if (table.prev >= 0) write(1, s.r);
  write(0, s.e);
  write(2, s.base);
}

// `first` as in fetch; `mapped`: the map of the sample is there.
template <FrameAccess A>
MQ_DEVICE inline void make_any_rows(const FrameArguments<true>& a, const Share& share, int64_t first,
                                    const unsigned char* stage, unsigned char* shared, bool mapped = false) {
  if (a.call.op != FrameOp::lm_step) return make_rows<A>(a, share, first, stage, shared);
  const int64_t left = share.end - first;
  const int valid = left >= Access<A>::V ? Access<A>::V : left > 0 ? static_cast<int>(left) : 0;
  step_slot<A>(a.layout.prologue_at, mapped ? a.layout.map_at : -1, static_cast<int>(stage - shared), a.layout.rows_at,
               a.layout.row_bytes, valid);
}

// sum += ⟨e,e⟩, ⟨e,r⟩, ⟨r,r⟩ of one slot.
template <FrameAccess A>
MQ_DEVICE inline void add_step(const FrameArguments<true>& a, const Share& share, int64_t first,
                               const unsigned char* stage, const unsigned char* shared, double* sum) {
  const auto& table = *reinterpret_cast<const StepTable<typename Access<A>::C>*>(shared + a.layout.prologue_at);
  const StepSlot<A> s(table, stage, false);
  for (int w = 0; w < Access<A>::W; ++w) {
    if (first + w >= share.end) continue;  // a bound below 0 leaves y outside the sample
    sum[0] = fused(s.e[w], s.e[w], sum[0]);
    sum[1] = fused(s.e[w], s.r[w], sum[1]);
    sum[2] = fused(s.r[w], s.r[w], sum[2]);
  }
}

}  // namespace marquardt
