// Vectors into shared memory, rows out of it. A thread fills and reads its own slots: no barrier is needed until
// somebody else's are read.
#pragma once

#include <type_traits>

#include "core/cuda.h"
#include "core/normal.h"
#include "core/ptx.h"
#include "frame/cuda_layout.h"

// How often a loop over tiles or vectors is unrolled: its body is large, and the compiler's own choice of four would
// triple the code.
#if defined(__CUDACC__)
#define MQ_UNROLL(times) _Pragma(MQ_TEXT(unroll times))
#define MQ_TEXT(x) #x
#else
#define MQ_UNROLL(times)
#endif

namespace marquardt {

// a·b + c, rounded once.
MQ_DEVICE inline float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
MQ_DEVICE inline double fused(double a, double b, double c) {
  return fma(a, b, c);
}

// What a launch carries: the call, its layout, and the numbers that lie on the host.
template <bool General>
struct FrameArguments {
  FrameCall call;
  FrameLayout layout;
  int64_t first_sample;  // of this launch
  int64_t splits;        // CTAs per sample
  int64_t tiles;         // tiles per CTA
  bool plain;            // is_plain
  bool backwards;        // the last CTA first, for what L2 kept of the sweep before
  double* workspace;     // [samples of the group, splits, entries]
  double parameters[General ? kManyParameters : kSmallParameters];
  double prologue[General ? kMaxVectors * kMaxVectors : 1];
  double clamp[General ? 2 * kMaxVectors : 1];
};

// The types of an access. C: what is computed with; a quad is 16 bytes of it.
template <FrameAccess A>
struct Access {
  using C = std::conditional_t<A == FrameAccess::f64, double, float>;
  static constexpr int V = slot_elements(A);                  // elements of a slot
  static constexpr int W = 16 / static_cast<int>(sizeof(C));  // elements of a quad
  static constexpr int planes = V / W;                        // quads of a slot
  static constexpr DType compute = A == FrameAccess::f64 ? DType::f64 : DType::f32;
  // The type of a stream, known at compile time where all are the same.
  MQ_DEVICE static DType type_of(DType dtype) {
    return A == FrameAccess::f32 ? DType::f32 : A == FrameAccess::f64 ? DType::f64 : dtype;
  }
};

// The share of one CTA: sample b, elements [begin, end).
struct Share {
  int64_t sample, split, begin, end;
};

template <FrameAccess A, bool G>
MQ_DEVICE inline Share share_of(const FrameArguments<G>& a) {
  // A grid has less than 2³¹ CTAs, and a division of 64 bits takes a hundred instructions.
  const auto block = static_cast<unsigned>(a.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const auto splits = static_cast<unsigned>(a.splits);
  Share s;
  s.sample = a.first_sample + block / splits;
  s.split = block % splits;
  const int64_t length = a.tiles * blockDim.x * Access<A>::V;
  s.begin = s.split * length < a.call.size ? s.split * length : a.call.size;
  s.end = s.begin + length < a.call.size ? s.begin + length : a.call.size;
  return s;
}

// --- in ----------------------------------------------------------------------------------------------------------

template <class Word>
MQ_DEVICE __noinline__ void copy_words(void* slot, const void* from, int count, int valid) {
  for (int i = 0; i < count; ++i) {
    static_cast<Word*>(slot)[i] = i < valid ? static_cast<const Word*>(from)[i] : Word(0);
  }
}

// A whole slot that lies astray, word by word; still in flight while others are fetched.
template <int Bytes>
MQ_DEVICE __noinline__ void copy_words_async(unsigned char* slot, const unsigned char* from, int count) {
  for (int i = 0; i < count; ++i) {
    if constexpr (Bytes == 4) {
      ptx::copy_async_4(slot + 4 * i, from + 4 * i);
    } else {
      ptx::copy_async_8(slot + 8 * i, from + 8 * i);
    }
  }
}

// One slot of a stream: 16 or 8 bytes at once where they lie aligned, else word by word; at the end of a sample padded
// with zeros.
template <FrameAccess A>
MQ_DEVICE inline void fetch_stream(const Stream& s, int64_t first, int valid, unsigned char* slot) {
  constexpr int V = Access<A>::V;
  const DType dtype = Access<A>::type_of(s.dtype);
  const int size = static_cast<int>(size_of(dtype));
  const auto* from = static_cast<const unsigned char*>(s.data) + first * size;
  const bool whole = valid == V && reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(V * size) == 0;
  if (whole) {
    if (V * size == 16) {
      ptx::copy_async_16(slot, from);
    } else {
      ptx::copy_async_8(slot, from);
    }
  } else if (valid == V && size == 4) {
    copy_words_async<4>(slot, from, V);
  } else if (valid == V && size == 8) {
    copy_words_async<8>(slot, from, V);
  } else if (size == 2) {
    copy_words<uint16_t>(slot, from, V, valid);
  } else if (size == 4) {
    copy_words<uint32_t>(slot, from, V, valid);
  } else {
    copy_words<uint64_t>(slot, from, V, valid);
  }
}

template <class C>
MQ_DEVICE inline void write_quad(unsigned char* to, const C* x) {
  if constexpr (sizeof(C) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    *reinterpret_cast<double2*>(to) = make_double2(x[0], x[1]);
  }
}

// Normals of W elements from logical index `first` on, which need not begin a counter.
template <FrameAccess A>
MQ_DEVICE __noinline__ void normal_quad(const int64_t* seed, int64_t first, int valid, unsigned char* to) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  const auto key = static_cast<uint64_t>(seed[0]), high = static_cast<uint64_t>(seed[1]);
  const uint64_t counter = static_cast<uint64_t>(first) / 4;
  const int skip = static_cast<int>(first & 3);
  float z[8];
  normals_of(key, counter, high, z);
  z[4] = z[5] = z[6] = z[7] = 0.0f;
  if (skip + W > 4) normals_of(key, counter + 1, high, z + 4);
  C x[W];
  for (int i = 0; i < W; ++i) {
    float value = z[i];
    value = skip == 1 ? z[i + 1] : value;
    value = skip == 2 ? z[i + 2] : value;
    value = skip == 3 ? z[i + 3] : value;
    x[i] = i < valid ? static_cast<C>(value) : C(0);
  }
  write_quad(to, x);
}

// Vectors of `wanted` over one tile, this thread's slots: element `first` of the sample and those behind it.
template <FrameAccess A, bool G>
MQ_DEVICE inline void fetch(const FrameArguments<G>& a, const Share& share, int64_t first, uint32_t wanted,
                            unsigned char* stage) {
  constexpr int V = Access<A>::V, W = Access<A>::W;
  const FrameCall& call = a.call;
  const int64_t left = share.end - first;
  const int valid = left >= V ? V : left > 0 ? static_cast<int>(left) : 0;
  MQ_UNROLL(1)
  for (int j = 0; j < call.streams; ++j) {
    if (!(wanted >> j & 1u)) continue;
    const Stream& s = call.stream[j];
    const int bytes = V * static_cast<int>(size_of(Access<A>::type_of(s.dtype)));
    unsigned char* slot = stage + a.layout.offset[j] + static_cast<int>(threadIdx.x) * bytes;
    fetch_stream<A>(s, share.sample * s.batch_stride + first, valid, slot);
  }
  const int virtual_plane = static_cast<int>(blockDim.x) * 16;
  int j = call.streams;
  if (G && call.ones) {
    if (wanted >> j & 1u) {
      for (int p = 0; p < Access<A>::planes; ++p) {
        typename Access<A>::C x[W];
        for (int i = 0; i < W; ++i) x[i] = p * W + i < valid ? 1 : 0;
        write_quad(stage + a.layout.offset[j] + p * virtual_plane + static_cast<int>(threadIdx.x) * 16, x);
      }
    }
    ++j;
  }
  if (call.seed != nullptr && (wanted >> j & 1u)) {
    const int64_t* seed = call.seed + share.sample * call.seed_stride;
    const int64_t index = first + (call.seed_stride == 0 ? share.sample * call.size : 0);
    for (int p = 0; p < Access<A>::planes; ++p) {
      normal_quad<A>(seed, index + p * W, valid - p * W,
                     stage + a.layout.offset[j] + p * virtual_plane + static_cast<int>(threadIdx.x) * 16);
    }
  }
}

// --- out ---------------------------------------------------------------------------------------------------------

// Quad `plane` of slot `slot` of a row that lies at `row`.
template <FrameAccess A>
MQ_DEVICE inline void read_quad(const unsigned char* row, DType dtype, int plane, int slot, typename Access<A>::C* x) {
  if constexpr (A == FrameAccess::f64) {
    const double2 q = *reinterpret_cast<const double2*>(row + slot * 16);
    x[0] = q.x, x[1] = q.y;
  } else {
    if (A == FrameAccess::f32 || dtype == DType::f32) {
      const float4 q = *reinterpret_cast<const float4*>(row + (plane * static_cast<int>(blockDim.x) + slot) * 16);
      x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
    } else {
      const uint2 q = *reinterpret_cast<const uint2*>(row + slot * 2 * Access<A>::V + plane * 8);
      if (dtype == DType::bf16) {
        x[0] = ptx::low_bf16(q.x), x[1] = ptx::high_bf16(q.x), x[2] = ptx::low_bf16(q.y), x[3] = ptx::high_bf16(q.y);
      } else {
        x[0] = ptx::low_f16(q.x), x[1] = ptx::high_f16(q.x), x[2] = ptx::low_f16(q.y), x[3] = ptx::high_f16(q.y);
      }
    }
  }
}

// The rows of one tile: vectors in their stage, or rows made of them.
template <FrameAccess A, bool G>
struct Rows {
  const FrameArguments<G>& a;
  const unsigned char* stage;
  unsigned char* made;

  // Whether row j is its vector less the one before.
  MQ_DEVICE bool is_residual(int j) const { return j < 2 * a.call.pairs && j % 2 == 1 && !(G && a.layout.staged); }
  // The row, or the vector of which it is the residual.
  MQ_DEVICE void raw_quad(int j, int plane, int slot, typename Access<A>::C* x) const {
    if (G && a.layout.staged) {
      read_quad<A>(made + j * a.layout.row_bytes, Access<A>::compute, plane, slot, x);
      return;
    }
    const DType dtype = j < a.call.streams ? a.call.stream[j].dtype : Access<A>::compute;
    read_quad<A>(stage + a.layout.offset[j], dtype, plane, slot, x);
  }
  MQ_DEVICE void quad(int j, int plane, int slot, typename Access<A>::C* x) const {
    raw_quad(j, plane, slot, x);
    if (is_residual(j)) {
      typename Access<A>::C base[Access<A>::W];
      read_quad<A>(stage + a.layout.offset[j - 1], a.call.stream[j - 1].dtype, plane, slot, base);
      for (int i = 0; i < Access<A>::W; ++i) x[i] -= base[i];
    }
  }
};

// Rows behind a prologue or a clamp, this thread's slots of one tile. `first` as in fetch.
template <FrameAccess A>
MQ_DEVICE inline void make_rows(const FrameArguments<true>& a, const Share& share, int64_t first,
                                const unsigned char* stage, unsigned char* shared) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  const FrameCall& call = a.call;
  const auto* matrix = reinterpret_cast<const C*>(shared + a.layout.prologue_at);
  const int slot = static_cast<int>(threadIdx.x), plane_bytes = static_cast<int>(blockDim.x) * 16;
  for (int plane = 0; plane < Access<A>::planes; ++plane) {
    const int64_t left = share.end - first - plane * W;
    MQ_UNROLL(1)
    for (int i = 0; i < call.rows; ++i) {
      C row[W];
      if (call.prologue == nullptr) {
        const DType dtype = i < call.streams ? call.stream[i].dtype : Access<A>::compute;
        read_quad<A>(stage + a.layout.offset[i], dtype, plane, slot, row);
      } else {
        MQ_UNROLL(2)
        for (int j = 0; j < a.layout.vectors; ++j) {
          C x[W];
          const DType dtype = j < call.streams ? call.stream[j].dtype : Access<A>::compute;
          read_quad<A>(stage + a.layout.offset[j], dtype, plane, slot, x);
          const C l = matrix[i * a.layout.vectors + j];
          for (int w = 0; w < W; ++w) row[w] = j == 0 ? l * x[w] : fused(l, x[w], row[w]);
        }
      }
      if (call.clamp != nullptr) {  // comparisons that leave a NaN as it is
        const C low = static_cast<C>(a.clamp[2 * i]), high = static_cast<C>(a.clamp[2 * i + 1]);
        for (int w = 0; w < W; ++w) {
          row[w] = row[w] < low ? low : row[w];
          row[w] = row[w] > high ? high : row[w];
        }
      }
      for (int w = 0; w < W; ++w) row[w] = w < left ? row[w] : C(0);
      write_quad(shared + a.layout.rows_at + i * a.layout.row_bytes + plane * plane_bytes + slot * 16, row);
    }
  }
}

}  // namespace marquardt
