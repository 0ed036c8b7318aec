// The two ways over the tiles of a CTA's share: all of them lie in shared memory, or they pass through a ring of
// stages, so that the loads of the next tiles are in flight while one is worked on.
#pragma once

#include "frame/cuda_rows.cuh"

namespace marquardt {

template <FrameAccess A>
MQ_DEVICE inline int64_t first_of_tile(const Share& share, int64_t tile) {
  return share.begin + (tile * blockDim.x + threadIdx.x) * Access<A>::V;
}

// f(first element of this thread's slots, stage) for every tile. `fetch_all` was called, and its copies have landed.
template <FrameAccess A, bool G>
struct HeldWalk {
  const FrameArguments<G>& a;
  const Share& share;
  unsigned char* shared;

  MQ_DEVICE void fetch_all(uint32_t vectors) const {
    MQ_UNROLL(1)
    for (int64_t t = 0; t < a.tiles; ++t) fetch<A>(a, share, first_of_tile<A>(share, t), vectors, stage(t));
    ptx::copy_async_commit();
  }
  MQ_DEVICE void start() const {}  // nothing to fetch for another walk
  MQ_DEVICE unsigned char* stage(int64_t tile) const {
    return shared + a.layout.stages_at + static_cast<int>(tile) * a.layout.stage_bytes;
  }
  template <class F>
  MQ_DEVICE void each(const F& f) const {
    MQ_UNROLL(2)
    for (int64_t t = 0; t < a.tiles; ++t) f(first_of_tile<A>(share, t), stage(t));
  }
};

// The same, fetching `vectors` on the way, Stages tiles ahead. Where f lets threads read each other's slots it ends
// with a barrier: the stage is filled anew after that.
template <FrameAccess A, bool G>
struct RingWalk {
  static constexpr int kStages = G ? kGeneralRingStages : kRingStages;
  const FrameArguments<G>& a;
  const Share& share;
  uint32_t vectors;
  unsigned char* shared;

  MQ_DEVICE void start() const {
    MQ_UNROLL(1)
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < a.tiles) fetch<A>(a, share, first_of_tile<A>(share, t), vectors, stage(t));
      ptx::copy_async_commit();  // empty groups keep the count
    }
  }
  MQ_DEVICE unsigned char* stage(int64_t tile) const {
    return shared + a.layout.stages_at + static_cast<int>(tile % kStages) * a.layout.stage_bytes;
  }
  // After start().
  template <class F>
  MQ_DEVICE void each(const F& f) const {
    MQ_UNROLL(1)
    for (int64_t t = 0; t < a.tiles; ++t) {
      const int64_t next = t + kStages - 1;
      if (next < a.tiles) fetch<A>(a, share, first_of_tile<A>(share, next), vectors, stage(next));
      ptx::copy_async_commit();
      ptx::copy_async_wait<kStages - 1>();
      f(first_of_tile<A>(share, t), stage(t));
    }
  }
};

}  // namespace marquardt
