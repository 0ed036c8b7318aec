// The usual call, where is_plain: two or three streams (with more, registers run out), all of whose slots are 16 bytes,
// aligned and whole. The same numbers in the same order as everywhere else, without anything that is asked slot by slot.
#pragma once

#include "frame/cuda_rows.cuh"

namespace marquardt {

template <FrameAccess A, bool G>
inline constexpr bool has_plain = !G && A != FrameAccess::mixed;

// How many streams a plain call has whose sample reads `vectors`; 0 where the call is not plain.
template <FrameAccess A, bool G>
MQ_DEVICE inline int plain_streams(const FrameArguments<G>& a, uint32_t vectors) {
  if constexpr (!has_plain<A, G>) return 0;
  const int n = a.call.streams;
  return a.plain && (n == 2 || n == 3) && vectors == (1u << n) - 1u ? n : 0;
}

// Slots of a share.
template <FrameAccess A>
MQ_DEVICE inline int plain_slots(const Share& share) {
  return static_cast<int>(share.end - share.begin) / Access<A>::V;
}

// Where this thread's slot of tile 0 lies. A tile of a vector is 16 bytes times the threads, here and in its stage.
template <FrameAccess A>
MQ_DEVICE inline const unsigned char* plain_start(const Stream& s, const Share& share) {
  const auto size = static_cast<int64_t>(size_of(Access<A>::type_of(s.dtype)));
  return static_cast<const unsigned char*>(s.data) + (share.sample * s.batch_stride + share.begin) * size +
         threadIdx.x * 16;
}

MQ_DEVICE inline void clear_plain_slot(unsigned char* slot) {
  *reinterpret_cast<float4*>(slot) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// All tiles of a share, stream by stream; behind the end of the sample zeros.
template <FrameAccess A>
MQ_DEVICE inline void fetch_plain(const FrameArguments<false>& a, const Share& share, unsigned char* stages) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int slots = plain_slots<A>(share), all = static_cast<int>(a.tiles) * threads;
  MQ_UNROLL(1)
  for (int j = 0; j < a.call.streams; ++j) {
    const unsigned char* from = plain_start<A>(a.call.stream[j], share);
    unsigned char* slot = stages + (j * threads + thread) * 16;
    int i = thread;
    MQ_UNROLL(4)
    for (; i < slots; i += threads) {
      ptx::copy_async_16(slot, from);
      from += threads * 16;
      slot += a.layout.stage_bytes;
    }
    MQ_UNROLL(1)
    for (; i < all; i += threads) {
      clear_plain_slot(slot);
      slot += a.layout.stage_bytes;
    }
  }
}

// Where a ring takes the tiles of N streams from.
template <FrameAccess A, int N>
struct PlainSource {
  static constexpr int kStreams = N;
  const unsigned char* from[N];
  int slots;

  MQ_DEVICE PlainSource(const FrameArguments<false>& a, const Share& share) : slots(plain_slots<A>(share)) {
    for (int j = 0; j < N; ++j) from[j] = plain_start<A>(a.call.stream[j], share);
  }
  MQ_DEVICE void fetch(int tile, unsigned char* stage) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int begin = tile * threads;
    unsigned char* slot = stage + thread * 16;
    if (begin + thread < slots) {
      for (int j = 0; j < N; ++j)
        ptx::copy_async_16(slot + j * threads * 16, from[j] + static_cast<unsigned>(begin) * 16u);
    } else {
      for (int j = 0; j < N; ++j) clear_plain_slot(slot + j * threads * 16);
    }
  }
};

// One slot of 16 bytes as numbers.
template <FrameAccess A>
MQ_DEVICE inline void read_plain_slot(const unsigned char* slot, DType dtype, typename Access<A>::C* x) {
  if constexpr (A == FrameAccess::f64) {
    const double2 q = *reinterpret_cast<const double2*>(slot);
    x[0] = q.x, x[1] = q.y;
  } else if constexpr (A == FrameAccess::f32) {
    const float4 q = *reinterpret_cast<const float4*>(slot);
    x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
  } else {
    const uint4 q = *reinterpret_cast<const uint4*>(slot);
    const uint32_t word[4] = {q.x, q.y, q.z, q.w};
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = dtype == DType::bf16 ? ptx::low_bf16(word[i]) : ptx::low_f16(word[i]);
      x[2 * i + 1] = dtype == DType::bf16 ? ptx::high_bf16(word[i]) : ptx::high_f16(word[i]);
    }
  }
}

// The rows of one tile, this thread's slots.
template <FrameAccess A, int N>
struct PlainRows {
  const FrameCall& call;
  const unsigned char* stage;

  // The streams themselves.
  MQ_DEVICE void read_raw(typename Access<A>::C (*x)[Access<A>::V]) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int j = 0; j < N; ++j)
      read_plain_slot<A>(stage + (j * threads + thread) * 16, Access<A>::type_of(call.stream[j].dtype), x[j]);
  }
  MQ_DEVICE void read(typename Access<A>::C (*x)[Access<A>::V]) const {
    read_raw(x);
    for (int j = 1; j < N; j += 2) {  // residuals against the vector before
      if (j < 2 * call.pairs)
        for (int v = 0; v < Access<A>::V; ++v) x[j][v] -= x[j - 1][v];
    }
  }
};

}  // namespace marquardt
