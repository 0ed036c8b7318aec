// The three kernels of the frame engine.
#pragma once

#include "frame/cuda_apply.cuh"
#include "frame/cuda_gram.cuh"

namespace marquardt {

template <bool G>
MQ_DEVICE inline const double* parameters_of(const FrameArguments<G>& a, int64_t sample) {
  return a.call.host_parameters ? a.parameters : a.call.parameters + sample * a.call.parameter_stride;
}

// Vectors that the rows in `rows` are made of; of a step, those that its numbers ask for.
template <FrameAccess A, bool G>
MQ_DEVICE inline uint32_t vectors_of(const FrameArguments<G>& a, uint32_t rows, [[maybe_unused]] const double* p,
                                     [[maybe_unused]] bool outputs) {
  const FrameCall& call = a.call;
  if constexpr (G) {
    if (call.op == FrameOp::lm_step) return vectors_of_step<A>(call, p, outputs);
    if (call.prologue != nullptr) return (1u << a.layout.vectors) - 1u;
  }
  uint32_t base = 0u;
  for (int j = 0; j < call.pairs; ++j) base |= (rows >> (2 * j + 1) & 1u) << 2 * j;
  return rows | base;
}

// The prologue in the compute type, or the table of a step, for all threads. `vectors` are those that were fetched.
template <FrameAccess A, bool G>
MQ_DEVICE inline void load_prologue(const FrameArguments<G>& a, int64_t sample, [[maybe_unused]] uint32_t vectors,
                                    unsigned char* shared) {
  if constexpr (G) {
    if (a.call.op == FrameOp::lm_step) return load_step<A>(a, parameters_of(a, sample), vectors, shared);
    if (a.call.prologue == nullptr) return;
    auto* to = reinterpret_cast<typename Access<A>::C*>(shared + a.layout.prologue_at);
    const double* from = a.call.prologue_stride == 0 ? a.prologue : a.call.prologue + sample * a.call.prologue_stride;
    for (int i = static_cast<int>(threadIdx.x); i < a.call.rows * a.layout.vectors; i += static_cast<int>(blockDim.x))
      to[i] = static_cast<typename Access<A>::C>(from[i]);
    __syncthreads();
  }
}

// The first warp of a CTA as a team (core/small.h); a type for each sort of kernels, whose code then is their own.
template <FrameAccess>
struct FirstWarp {
  MQ_HOST_DEVICE static int lane() {
#if defined(__CUDA_ARCH__) || defined(MARQUARDT_EMULATION)
    return static_cast<int>(threadIdx.x) % 32;
#else
    return 0;
#endif
  }
  MQ_HOST_DEVICE static constexpr int lanes() { return 32; }
  MQ_HOST_DEVICE static void sync() {
#if defined(__CUDA_ARCH__) || defined(MARQUARDT_EMULATION)
    __syncwarp();
#endif
  }
};

// sums_cancel(). A function of its own: the registers of the kernels are those of their loops.
template <bool G>
MQ_DEVICE __noinline__ bool outputs_cancel(const FrameArguments<G>& a) {
  const unsigned char* shared = shared_memory();
  return sums_cancel(a.call, reinterpret_cast<const double*>(shared + a.layout.gram_at),
                     *reinterpret_cast<const FrameMap*>(shared + a.layout.map_at));
}

// The scalar stage: one warp, a few numbers. The Gram lies at gram_at; scalars are returned once per sample.
template <FrameAccess A, bool G>
MQ_DEVICE inline void decide(const FrameArguments<G>& a, const Share& share, const double* p, unsigned char* shared) {
  using C = typename Access<A>::C;
  const FrameCall& call = a.call;
  auto& map = *reinterpret_cast<FrameMap*>(shared + a.layout.map_at);
  const auto* total = reinterpret_cast<const double*>(shared + a.layout.gram_at);
  // Asked for anew: kept since the beginning it would cost the Gram a register.
  const bool first_split = share_of<A>(a).split == 0;
  double* returned =
      call.scalars != nullptr && first_split ? call.scalars + share.sample * call.scalar_stride : nullptr;
  bool mapped = false;
  if constexpr (G) {
    mapped = is_lowrank(call.op);
    if (mapped && threadIdx.x < 32) {
      if (threadIdx.x == 0) begin_lowrank(call, map);  // it alone changes what this sets
      lowrank_map(FirstWarp<A>{}, call, total, p, map, returned,
                  *reinterpret_cast<LowRankWork*>(shared + a.layout.work_at));
    }
    if (call.op == FrameOp::lm_step) {
      mapped = true;
      if (threadIdx.x == 0) {
        step_map(call, total, p, map);
        if (map.wide) begin_wide_step(call, map);
      }
    }
  }
  if (!mapped && threadIdx.x < 32) {
    const int parts = map_parts(call, p);
    if (static_cast<int>(threadIdx.x) < parts) map_part(call, total, p, static_cast<int>(threadIdx.x), map);
    __syncwarp();
    if (threadIdx.x == 0) {
      finish_map(call, total, p, map, returned);
      if constexpr (sizeof(C) == 4) {
        if (is_direction(call.op)) map.wide = outputs_cancel(a);
      }
    }
  }
  __syncthreads();
  auto* matrix = reinterpret_cast<C*>(shared + a.layout.matrix_at);
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < call.outputs; i += warps)  // a warp a row: no divisions
    if (lane < call.rows) matrix[i * call.rows + lane] = static_cast<C>(map.c[i][lane]);
  __syncthreads();
}

// What the compiler's report and the machine code must show (tests/static): three CTAs on a multiprocessor (16-bit
// Grams: two; general kernels: one), and 16 bytes at a time from memory into shared memory and out (8 of the 16-bit
// vectors of a mixed call).
// promise: frame_held threads=256 shared=74K ctas>=3 shared=53K@80 wide=LDGSTS.128,STG.128 has=DFMA
// promise: frame_held has=UCGABAR_ARV,UCGABAR_WAIT@90+
// promise: frame_held<*, true> shared=100K ctas>=1
// promise: frame_gram threads=256 shared=74K ctas>=3 shared=53K@80 wide=LDGSTS.128 has=DFMA
// promise: frame_gram<1, false> ctas>=2
// promise: frame_gram<*, true> shared=100K ctas>=1
// promise: frame_apply threads=256 shared=74K ctas>=3 shared=53K@80 wide=LDGSTS.128,STG.128
// promise: frame_apply<*, true> shared=100K ctas>=1

// One read of device memory: the frame waits in shared memory, of one CTA or of a cluster, while its Gram is taken.
template <FrameAccess A, bool G>
MQ_KERNEL(kMaxThreads, G ? 1 : 3)
frame_held(const __grid_constant__ FrameArguments<G> a) {
  unsigned char* shared = shared_memory();
  const Share share = share_of<A>(a);
  const double* p = parameters_of(a, share.sample);
  const uint32_t wanted = gram_rows(a.call, p);
  const HeldWalk<A, G> walk{a, share, shared};
  const uint32_t vectors = vectors_of<A>(a, rows_read(a.call, p), p, true);
  walk.fetch_all(vectors);
  load_prologue<A>(a, share.sample, vectors, shared);
  ptx::copy_async_wait<0>();

  auto* own = reinterpret_cast<double*>(shared + a.layout.own_at);
  auto* total = reinterpret_cast<double*>(shared + a.layout.gram_at);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool together = wanted != 0u && a.splits > 1;  // the same for all CTAs of a sample
  const int entries = a.layout.entries, ranks = static_cast<int>(a.splits);
  if (wanted != 0u && !gram_plain<A>(a, share, wanted, walk, shared)) gram<A>(a, share, wanted, walk, shared);
  if (together) {
    ptx::cluster_sync();  // everybody's own sums are there
    for (int e = thread; e < entries; e += threads) {
      double sum = 0.0;
      MQ_UNROLL(8)  // loads in flight
      for (int rank = 0; rank < ranks; ++rank) sum += ptx::load_cluster(own + e, static_cast<unsigned>(rank));
      total[e] = sum;
    }
  } else {
    for (int e = thread; e < entries; e += threads) total[e] = wanted != 0u ? own[e] : 0.0;
  }
  __syncthreads();
  if (together) ptx::cluster_arrive_relaxed();  // what this CTA wanted of the others is here
  decide<A>(a, share, p, shared);
  if (!apply_plain<A>(a, share, walk, shared)) apply<A>(a, share, walk, shared);
  if (together) ptx::cluster_wait();  // shared memory that others read must not go away
}

// The first of two sweeps: parts of the Gram into the workspace.
template <FrameAccess A, bool G>
MQ_KERNEL(kMaxThreads, G                        ? 1
                       : A == FrameAccess::half ? 2
                                                : 3)
frame_gram(const __grid_constant__ FrameArguments<G> a) {
  unsigned char* shared = shared_memory();
  const Share share = share_of<A>(a);
  const double* p = parameters_of(a, share.sample);
  const uint32_t wanted = gram_rows(a.call, p);
  if (wanted == 0u) return;  // nobody reads the workspace of this sample
  const uint32_t vectors = vectors_of<A>(a, wanted, p, false);
  const int plain = a.call.gram == GramKind::full ? plain_streams<A>(a, vectors) : 0;
  with_source<A>(a, share, vectors, plain, [&](const auto& source) {
    constexpr int kStreams = std::decay_t<decltype(source)>::kStreams;
    const RingWalk<A, G, std::decay_t<decltype(source)>> walk{a, source, shared};
    walk.start();
    load_prologue<A>(a, share.sample, vectors, shared);
    if constexpr (kStreams != 0) {
      gram_own<A, G, kStreams, false, true>(a, share, walk, shared);
    } else {
      gram<A>(a, share, wanted, walk, shared);
    }
  });
  const auto* own = reinterpret_cast<const double*>(shared + a.layout.own_at);
  double* to = a.workspace + ((share.sample - a.first_sample) * a.splits + share.split) * a.layout.entries;
  for (int e = static_cast<int>(threadIdx.x); e < a.layout.entries; e += static_cast<int>(blockDim.x)) to[e] = own[e];
}

// The sums of all CTAs of a sample, one warp an entry, in a fixed order.
template <bool G>
MQ_DEVICE inline void merge_parts(const FrameArguments<G>& a, const Share& share, unsigned char* shared) {
  auto* total = reinterpret_cast<double*>(shared + a.layout.gram_at);
  const double* from = a.workspace + (share.sample - a.first_sample) * a.splits * a.layout.entries;
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int e = static_cast<int>(threadIdx.x) / 32; e < a.layout.entries; e += warps) {
    double sum = 0.0;
    for (int64_t s = lane; s < a.splits; s += 32) sum += from[s * a.layout.entries + e];
    sum = warp_sum(sum);
    if (lane == 0) total[e] = sum;
  }
}

// The outputs: after frame_gram, or alone where no Gram is asked for.
template <FrameAccess A, bool G>
MQ_KERNEL(kMaxThreads, G ? 2 : 3)
frame_apply(const __grid_constant__ FrameArguments<G> a) {
  unsigned char* shared = shared_memory();
  const Share share = share_of<A>(a);
  const double* p = parameters_of(a, share.sample);
  const uint32_t rows = a.call.outputs == 0 ? 0u : rows_read(a.call, p);
  const uint32_t vectors = rows == 0u ? 0u : vectors_of<A>(a, rows, p, true);
  with_source<A>(a, share, vectors, plain_streams<A>(a, vectors), [&](const auto& source) {
    RingWalk<A, G, std::decay_t<decltype(source)>>{a, source, shared}.start();
  });
  load_prologue<A>(a, share.sample, vectors, shared);
  if (a.layout.entries > 0) {
    if (gram_rows(a.call, p) != 0u) {
      merge_parts(a, share, shared);
    } else {
      auto* total = reinterpret_cast<double*>(shared + a.layout.gram_at);
      for (int e = static_cast<int>(threadIdx.x); e < a.layout.entries; e += static_cast<int>(blockDim.x))
        total[e] = 0.0;
    }
    __syncthreads();
  }
  decide<A>(a, share, p, shared);
  with_source<A>(a, share, vectors, applied_streams<A>(a, shared), [&](const auto& source) {
    constexpr int kStreams = std::decay_t<decltype(source)>::kStreams;
    const RingWalk<A, G, std::decay_t<decltype(source)>> walk{a, source, shared};
    if constexpr (kStreams != 0) {
      apply_streams<A, kStreams>(a, share, walk, shared);
    } else {
      apply<A>(a, share, walk, shared);
    }
  });
}

}  // namespace marquardt
