// The rows of a sampler step (step.h): e, r, a and y of this thread's slots, from vectors in their stage.
#pragma once

#include "frame/cuda_rows.cuh"
#include "frame/step.h"

namespace marquardt {

// Where the numbers of a step lie in shared memory, in the compute type: D and A + (w·D) of the sources and the noise, Y of
// the sources, then D_y, A_y and the bound.
constexpr int kStepVectors = kMaxSources + 1;
enum StepNumber : int { kStepD = 0, kStepA = kStepVectors, kStepY = 2 * kStepVectors, kStepOfY = 3 * kStepVectors };
static_assert(kStepOfY + 3 == kStepNumbers);

// The numbers of one sample, for all threads.
template <FrameAccess A>
MQ_DEVICE inline void load_step(const FrameArguments<true>& a, const double* p, unsigned char* shared) {
  using C = typename Access<A>::C;
  auto* to = reinterpret_cast<C*>(shared + a.layout.prologue_at);
  const StepShape s = step_shape(a.call);
  const bool reads = step_reads_prev(a.call, s, p), direction = step_needs_direction(a.call, reads);
  const int drawn = s.sources + (s.noisy ? 1 : 0);
  for (int j = static_cast<int>(threadIdx.x); j < kStepVectors; j += static_cast<int>(blockDim.x)) {
    const bool there = j < drawn;
    const int d = j < s.sources ? s.d(j) : s.d_noise();
    to[kStepD + j] = there && direction ? static_cast<C>(p[d]) : C(0);
    to[kStepA + j] = there ? static_cast<C>(step_base(s, p, j, reads)) : C(0);
    to[kStepY + j] = s.clipped && j < s.sources ? static_cast<C>(p[s.y(j)]) : C(0);
    if (j == 0) {
      to[kStepOfY] = s.clipped && direction ? static_cast<C>(p[s.d_y()]) : C(0);
      to[kStepOfY + 1] = s.clipped ? static_cast<C>(step_base_y(s, p, reads)) : C(0);
      to[kStepOfY + 2] = s.clipped ? static_cast<C>(p[s.bound()]) : C(0);
    }
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

// `first` as in fetch.
template <FrameAccess A>
MQ_DEVICE inline void make_step_rows(const FrameArguments<true>& a, const Share& share, int64_t first,
                                     const unsigned char* stage, unsigned char* shared) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  const FrameCall& call = a.call;
  const StepShape s = step_shape(call);
  const auto* number = reinterpret_cast<const C*>(shared + a.layout.prologue_at);
  const double* p = call.host_parameters ? a.parameters : call.parameters + share.sample * call.parameter_stride;
  const bool reads = step_reads_prev(call, s, p);
  const int slot = static_cast<int>(threadIdx.x), plane_bytes = static_cast<int>(blockDim.x) * 16;
  const int drawn = s.sources + (s.noisy ? 1 : 0);
  for (int plane = 0; plane < Access<A>::planes; ++plane) {
    const auto read = [&](int j, C* x) {
      const int v = j < s.sources ? j : s.noise();
      read_quad<A>(stage + a.layout.offset[v], v < call.streams ? call.stream[v].dtype : Access<A>::compute, plane,
                   slot, x);
    };
    C e[W] = {}, r[W] = {}, base[W] = {}, y[W] = {};
    bool any_e = false, any_a = false, any_y = false;
    MQ_UNROLL(1)
    for (int j = 0; j < drawn; ++j) {
      const C d = number[kStepD + j], on_a = number[kStepA + j], on_y = number[kStepY + j];
      if (d == C(0) && on_a == C(0) && on_y == C(0)) continue;
      C x[W];
      read(j, x);
      add_term<C, W>(d, x, e, any_e);
      add_term<C, W>(on_a, x, base, any_a);
      add_term<C, W>(on_y, x, y, any_y);
    }
    if (s.clipped) {  // comparisons that leave a NaN as it is
      const C bound = number[kStepOfY + 2];
      for (int w = 0; w < W; ++w) {
        y[w] = y[w] < -bound ? -bound : y[w];
        y[w] = y[w] > bound ? bound : y[w];
      }
      add_term<C, W>(number[kStepOfY], y, e, any_e);
      add_term<C, W>(number[kStepOfY + 1], y, base, any_a);
    }
    if (reads) {
      const int v = s.prev();
      read_quad<A>(stage + a.layout.offset[v], v < call.streams ? call.stream[v].dtype : Access<A>::compute, plane,
                   slot, r);
      if (call.mode != kSnr)
        for (int w = 0; w < W; ++w) r[w] -= e[w];
    }
    const int64_t left = share.end - first - plane * W;
    const auto write = [&](int row, C* x) {
      for (int w = 0; w < W; ++w) x[w] = w < left ? x[w] : C(0);
      write_quad(shared + a.layout.rows_at + row * a.layout.row_bytes + plane * plane_bytes + slot * 16, x);
    };
    write(0, e);
    write(1, r);
    write(2, base);
    write(3, y);
  }
}

template <FrameAccess A>
MQ_DEVICE inline void make_any_rows(const FrameArguments<true>& a, const Share& share, int64_t first,
                                    const unsigned char* stage, unsigned char* shared) {
  if (a.call.op == FrameOp::lm_step) return make_step_rows<A>(a, share, first, stage, shared);
  make_rows<A>(a, share, first, stage, shared);
}

}  // namespace marquardt
