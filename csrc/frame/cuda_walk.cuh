// The two ways over the tiles of a CTA's share: all of them lie in shared memory, or they pass through a ring of
// stages, so that the loads of the next tiles are in flight while one is worked on.
#pragma once

#include "frame/cuda_plain.cuh"
#include "frame/cuda_step.cuh"

namespace marquardt {

template <FrameAccess A>
MQ_DEVICE inline int64_t first_of_tile(const Share& share, int64_t tile) {
  return share.begin + (tile * blockDim.x + threadIdx.x) * Access<A>::V;
}

// Where a ring takes its tiles from: any call.
template <FrameAccess A, bool G>
struct AnySource {
  static constexpr int kStreams = 0;
  const FrameArguments<G>& a;
  const Share& share;
  uint32_t vectors;

  MQ_DEVICE void fetch(int tile, unsigned char* stage) const {
    marquardt::fetch<A>(a, share, first_of_tile<A>(share, tile), vectors, stage);
  }
};

// f(source) with the source that suits: of a plain call of `plain` streams, else of any.
template <FrameAccess A, bool G, class F>
MQ_DEVICE inline void with_source(const FrameArguments<G>& a, const Share& share, uint32_t vectors, int plain,
                                  const F& f) {
  if constexpr (has_plain<A, G>) {
    switch (plain) {
      case 2: return f(PlainSource<A, 2>(a, share));
      case 3: return f(PlainSource<A, 3>(a, share));
      default: break;
    }
  }
  f(AnySource<A, G>{a, share, vectors});
}

// f(tile, stage) for every tile. `fetch_all` was called, and its copies have landed.
template <FrameAccess A, bool G>
struct HeldWalk {
  const FrameArguments<G>& a;
  const Share& share;
  unsigned char* shared;

  MQ_DEVICE void fetch_all(uint32_t vectors) const {
    if (plain_streams<A>(a, vectors) != 0) {
      if constexpr (has_plain<A, G>) fetch_plain<A>(a, share, shared + a.layout.stages_at);
    } else {
      MQ_UNROLL(1)
      for (int t = 0; t < tiles(); ++t) fetch<A>(a, share, first_of_tile<A>(share, t), vectors, stage(t));
    }
    ptx::copy_async_commit();
  }
  MQ_DEVICE void start() const {}  // nothing to fetch for another walk
  MQ_DEVICE int tiles() const { return static_cast<int>(a.tiles); }
  MQ_DEVICE unsigned char* stage(int tile) const { return shared + a.layout.stages_at + tile * a.layout.stage_bytes; }
  template <class F>
  MQ_DEVICE void each(const F& f) const {
    // There are registers for 8 elements of three vectors, or twice 4.
    [[maybe_unused]] constexpr int kAtOnce = A == FrameAccess::half ? 1 : 2;
    MQ_UNROLL(kAtOnce)
    for (int t = 0; t < tiles(); ++t) f(t, stage(t));
  }
};

// The same, fetching from a source on the way, Stages tiles ahead. Where f lets threads read each other's slots it ends
// with a barrier: the stage is filled anew after that.
template <FrameAccess A, bool G, class Source>
struct RingWalk {
  static constexpr int kStages = G ? kGeneralRingStages : kRingStages;
  static_assert((kStages & (kStages - 1)) == 0);
  const FrameArguments<G>& a;
  const Source& source;
  unsigned char* shared;

  MQ_DEVICE void start() const {
    MQ_UNROLL(1)
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < static_cast<int>(a.tiles)) source.fetch(t, stage(t));
      ptx::copy_async_commit();  // empty groups keep the count
    }
  }
  MQ_DEVICE unsigned char* stage(int tile) const {
    return shared + a.layout.stages_at + (tile & (kStages - 1)) * a.layout.stage_bytes;
  }
  // After start().
  template <class F>
  MQ_DEVICE void each(const F& f) const {
    const int tiles = static_cast<int>(a.tiles);
    MQ_UNROLL(1)
    for (int t = 0; t < tiles; ++t) {
      const int next = t + kStages - 1;
      if (next < tiles) source.fetch(next, stage(next));
      ptx::copy_async_commit();
      ptx::copy_async_wait<kStages - 1>();
      f(t, stage(t));
    }
  }
};

}  // namespace marquardt
