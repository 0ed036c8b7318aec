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
    term.d = there && direction ? static_cast<C>(p[source ? s.d(j) : s.d_noise()]) : C(0);
    term.a = there ? static_cast<C>(step_base(s, p, j, reads)) : C(0);
    term.y = there && source && s.clipped ? static_cast<C>(p[s.y(j)]) : C(0);
  }
  if (threadIdx.x == 0) {
    table.terms = terms;
    table.guided = s.guided;
    table.clipped = s.clipped;
    table.d_y = s.clipped && direction ? static_cast<C>(p[s.d_y()]) : C(0);
    table.a_y = s.clipped ? static_cast<C>(step_base_y(s, p, reads)) : C(0);
    table.bound = s.clipped ? static_cast<C>(p[s.bound()]) : C(0);
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

// The rows of one slot, of which `valid` elements are there. A function of its own, called by every sweep; places are in
// shared memory, so that the compiler knows what it reads.
template <FrameAccess A>
MQ_DEVICE __noinline__ void step_slot(int table_at, int stage_at, int rows_at, int row_bytes, int valid) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  static_assert(Access<A>::planes == 1);
  unsigned char* shared = shared_memory();
  const auto& table = *reinterpret_cast<const StepTable<C>*>(shared + table_at);
  const unsigned char* stage = shared + stage_at;
  unsigned char* rows = shared + rows_at + static_cast<int>(threadIdx.x) * 16;
  const auto read = [&](int offset, DType dtype, C* x) {
    read_quad<A>(stage + offset, dtype, 0, static_cast<int>(threadIdx.x), x);
  };
  const auto write = [&](int row, C* x) {
    for (int w = 0; w < W; ++w) x[w] = w < valid ? x[w] : C(0);
    write_quad(rows + row * row_bytes, x);
  };
  C e[W] = {}, base[W] = {}, y[W] = {};
  bool any_e = false, any_a = false, any_y = false;
  MQ_UNROLL(1)
  for (int j = 0; j < table.terms; ++j) {
    const auto& term = table.term[j];
    const C d = term.d, on_a = term.a, on_y = term.y;
    if (d == C(0) && on_a == C(0) && on_y == C(0)) continue;
    C x[W];
    read(term.offset, term.dtype, x);
    if (j == 1 && table.guided) {
      C other[W];
      read(table.term[2].offset, table.term[2].dtype, other);
      for (int w = 0; w < W; ++w) x[w] -= other[w];
    }
    add_term<C, W>(d, x, e, any_e);
    add_term<C, W>(on_a, x, base, any_a);
    add_term<C, W>(on_y, x, y, any_y);
  }
  if (table.clipped) {  // comparisons that leave a NaN as it is
    const C bound = table.bound;
    for (int w = 0; w < W; ++w) {
      y[w] = y[w] < -bound ? -bound : y[w];
      y[w] = y[w] > bound ? bound : y[w];
    }
    add_term<C, W>(table.d_y, y, e, any_e);
    add_term<C, W>(table.a_y, y, base, any_a);
    write(3, y);
  }
  if (table.prev >= 0) {
    C r[W];
    read(table.prev, table.prev_dtype, r);
    if (table.residual)
      for (int w = 0; w < W; ++w) r[w] -= e[w];
    write(1, r);
  }
  write(0, e);
  write(2, base);
}

// `first` as in fetch.
template <FrameAccess A>
MQ_DEVICE inline void make_any_rows(const FrameArguments<true>& a, const Share& share, int64_t first,
                                    const unsigned char* stage, unsigned char* shared) {
  if (a.call.op != FrameOp::lm_step) return make_rows<A>(a, share, first, stage, shared);
  const int64_t left = share.end - first;
  const int valid = left >= Access<A>::V ? Access<A>::V : left > 0 ? static_cast<int>(left) : 0;
  step_slot<A>(a.layout.prologue_at, static_cast<int>(stage - shared), a.layout.rows_at, a.layout.row_bytes, valid);
}

}  // namespace marquardt
