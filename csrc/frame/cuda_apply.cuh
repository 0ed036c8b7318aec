// outputs = C·rows over the share of one CTA; every thread takes its own slots.
#pragma once

#include "frame/cuda_walk.cuh"

namespace marquardt {

// The first `valid` elements of a quad one by one, where it lies astray or is cut short. By value, and a function of its
// own: the loops that store whole slots hold no narrow access.
MQ_DEVICE __noinline__ inline void store_words(unsigned char* to, DType dtype, int valid, float4 q) {
  const float x[4] = {q.x, q.y, q.z, q.w};
  for (int i = 0; i < 4; ++i) {
    if (i >= valid) continue;
    switch (dtype) {
      case DType::bf16: reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(ptx::pack_bf16(x[i], 0.0f)); break;
      case DType::f16: reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(ptx::pack_f16(x[i], 0.0f)); break;
      default: reinterpret_cast<float*>(to)[i] = x[i];
    }
  }
}

MQ_DEVICE __noinline__ inline void store_words(unsigned char* to, DType, int valid, double2 q) {
  if (valid > 0) reinterpret_cast<double*>(to)[0] = q.x;
  if (valid > 1) reinterpret_cast<double*>(to)[1] = q.y;
}

MQ_DEVICE inline float4 quad_of(const float* x) {
  return make_float4(x[0], x[1], x[2], x[3]);
}
MQ_DEVICE inline double2 quad_of(const double* x) {
  return make_double2(x[0], x[1]);
}

MQ_DEVICE inline uint32_t pack(DType dtype, float low, float high) {
  return dtype == DType::bf16 ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
}

// A whole slot, aligned: 16 or 8 bytes at once.
template <FrameAccess A>
MQ_DEVICE inline void store_whole(unsigned char* to, DType dtype, const typename Access<A>::C* x) {
  if constexpr (A == FrameAccess::f64) {
    *reinterpret_cast<double2*>(to) = quad_of(x);
  } else if constexpr (A == FrameAccess::f32) {
    *reinterpret_cast<float4*>(to) = quad_of(x);
  } else if constexpr (A == FrameAccess::half) {
    ptx::store_16(to, make_uint4(pack(dtype, x[0], x[1]), pack(dtype, x[2], x[3]), pack(dtype, x[4], x[5]),
                                 pack(dtype, x[6], x[7])));
  } else if (dtype == DType::f32) {
    *reinterpret_cast<float4*>(to) = quad_of(x);
  } else {
    ptx::store_8(to, make_uint2(pack(dtype, x[0], x[1]), pack(dtype, x[2], x[3])));
  }
}

// A slot of V elements, wherever it lies.
template <FrameAccess A>
MQ_DEVICE inline void store_slot(const Output& o, int64_t sample, int64_t first, int valid,
                                 const typename Access<A>::C* x) {
  constexpr int V = Access<A>::V;
  const DType dtype = Access<A>::type_of(o.dtype);
  const int size = static_cast<int>(size_of(dtype));
  auto* to = static_cast<unsigned char*>(o.data) + (sample * o.batch_stride + first) * size;
  if (valid < V || reinterpret_cast<uintptr_t>(to) % static_cast<unsigned>(V * size) != 0) {
    constexpr int W = Access<A>::W;
    for (int p = 0; p < Access<A>::planes; ++p)
      store_words(to + p * W * size, dtype, valid - p * W, quad_of(x + p * W));
    return;
  }
  store_whole<A>(to, dtype, x);
}

// Outputs i … i + M − 1 of one slot, summed in S; `matrix` has rows of `stride` numbers.
template <FrameAccess A, bool G, int M, class S>
MQ_DEVICE inline void combine(const Rows<A, G>& rows, const Share& share, uint32_t used, const S* matrix, int stride,
                              int i, int64_t first) {
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W, P = Access<A>::planes;
  const FrameCall& call = rows.a.call;
  S sum[M][P * W] = {};
  bool begun = false;
  MQ_UNROLL(2)
  for (int j = 0; j < call.rows; ++j) {
    if (!(used >> j & 1u)) continue;
    for (int p = 0; p < P; ++p) {
      C x[W];
      rows.quad(j, p, static_cast<int>(threadIdx.x), x);
      for (int m = 0; m < M; ++m) {
        const S c = matrix[(i + m) * stride + j];
        for (int w = 0; w < W; ++w) {
          const S value = static_cast<S>(x[w]);
          sum[m][p * W + w] = begun ? fused(c, value, sum[m][p * W + w]) : c * value;
        }
      }
    }
    begun = true;
  }
  const int64_t left = share.end - first;
  const int valid = left >= Access<A>::V ? Access<A>::V : left > 0 ? static_cast<int>(left) : 0;
  for (int m = 0; m < M; ++m) {
    C out[P * W];
    for (int w = 0; w < P * W; ++w) out[w] = static_cast<C>(sum[m][w]);
    store_slot<A>(call.output[i + m], share.sample, first, valid, out);
  }
}

// All outputs of one slot, M at a time where none of them is zero.
template <FrameAccess A, bool G, int M, class S>
MQ_DEVICE inline void combine_all(const Rows<A, G>& rows, const Share& share, const FrameMap& map, const S* matrix,
                                  int stride, int64_t first) {
  MQ_UNROLL(1)
  for (int i = 0; i < rows.a.call.outputs;) {
    const bool apart = G && map.apart;
    const uint32_t group = map.zero >> i & ((1u << M) - 1u);
    if (group == 0u && !apart && i + M <= rows.a.call.outputs) {
      combine<A, G, M>(rows, share, map.used, matrix, stride, i, first);
      i += M;
    } else {
      uint32_t used = group & 1u ? 0u : map.used;
      if (apart)
        for (int j = 0; j < rows.a.call.rows; ++j)
          if (matrix[i * stride + j] == S(0)) used &= ~(1u << j);
      combine<A, G, 1>(rows, share, used, matrix, stride, i, first);
      ++i;
    }
  }
}

// M outputs of a plain call of N streams, every row of which counts: C stays in registers. The sums of combine().
template <FrameAccess A, int N, int M, class Walk>
MQ_DEVICE inline void apply_outputs(const FrameArguments<false>& a, const Share& share, const Walk& walk,
                                    unsigned char* shared) {
  using C = typename Access<A>::C;
  constexpr int V = Access<A>::V;
  const auto* matrix = reinterpret_cast<const C*>(shared + a.layout.matrix_at);
  C c[M][N];
  unsigned char* to[M];
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < N; ++j) c[m][j] = matrix[m * N + j];
    const Output& o = a.call.output[m];
    const auto size = static_cast<int64_t>(size_of(Access<A>::type_of(o.dtype)));
    to[m] = static_cast<unsigned char*>(o.data) + (share.sample * o.batch_stride + first_of_tile<A>(share, 0)) * size;
  }
  const int slots = plain_slots<A>(share), threads = static_cast<int>(blockDim.x);
  walk.each([&](int tile, const unsigned char* stage) {
    const int begin = tile * threads;
    if (begin + static_cast<int>(threadIdx.x) >= slots) return;
    C x[N][V];
    PlainRows<A, N>{a.call, stage}.read(x);
    for (int m = 0; m < M; ++m) {
      C out[V];
      for (int v = 0; v < V; ++v) {
        out[v] = c[m][0] * x[0][v];
        for (int j = 1; j < N; ++j) out[v] = fused(c[m][j], x[j][v], out[v]);
      }
      store_whole<A>(to[m] + static_cast<unsigned>(begin) * 16u, Access<A>::type_of(a.call.output[m].dtype), out);
    }
  });
}

// How many streams a plain call has whose map apply_outputs can take; else 0.
template <FrameAccess A, bool G>
MQ_DEVICE inline int applied_streams(const FrameArguments<G>& a, const unsigned char* shared) {
  const auto& map = *reinterpret_cast<const FrameMap*>(shared + a.layout.map_at);
  if ((map.zero & ((1u << a.call.outputs) - 1u)) != 0u || map.wide) return 0;
  const int streams = plain_streams<A>(a, map.used);
  return a.call.outputs == 1 || (a.call.outputs == 2 && streams == 3) ? streams : 0;
}

template <FrameAccess A, int N, class Walk>
MQ_DEVICE inline void apply_streams(const FrameArguments<false>& a, const Share& share, const Walk& walk,
                                    unsigned char* shared) {
  if constexpr (N == 3) {  // the derivatives of two vectors
    if (a.call.outputs == 2) return apply_outputs<A, N, 2>(a, share, walk, shared);
  }
  apply_outputs<A, N, 1>(a, share, walk, shared);
}

// All outputs of a plain call, held. False where it is another.
template <FrameAccess A, bool G, class Walk>
MQ_DEVICE inline bool apply_plain(const FrameArguments<G>& a, const Share& share, const Walk& walk,
                                  unsigned char* shared) {
  if constexpr (has_plain<A, G>) {
    switch (applied_streams<A>(a, shared)) {
      case 2: apply_streams<A, 2>(a, share, walk, shared); return true;
      case 3: apply_streams<A, 3>(a, share, walk, shared); return true;
      default: break;
    }
  }
  return false;
}

// All outputs of one slot with sums in double, of the vectors themselves: r = p − e is rounded nowhere. A function of its
// own, for the few samples that ask for it.
template <FrameAccess A, bool G>
MQ_DEVICE __noinline__ void wide_slot(const FrameArguments<G>& a, int stage_at, int tile) {
  const Share share = share_of<A>(a);
  const int64_t first = first_of_tile<A>(share, tile), left = share.end - first;
  const int valid = left >= Access<A>::V ? Access<A>::V : left > 0 ? static_cast<int>(left) : 0;
  using C = typename Access<A>::C;
  constexpr int W = Access<A>::W;
  const FrameCall& call = a.call;
  const unsigned char* shared = shared_memory();
  const auto& map = *reinterpret_cast<const FrameMap*>(shared + a.layout.map_at);
  const auto number = [&](int i, int j) {
    return (map.used >> j & 1u) != 0u && (map.zero >> i & 1u) == 0u ? map.c[i][j] : 0.0;
  };
  MQ_UNROLL(1)
  for (int i = 0; i < call.outputs; ++i) {
    const DType dtype = Access<A>::type_of(call.output[i].dtype);
    const int size = static_cast<int>(size_of(dtype));
    auto* to =
        static_cast<unsigned char*>(call.output[i].data) + (share.sample * call.output[i].batch_stride + first) * size;
    MQ_UNROLL(1)
    for (int p = 0; p < Access<A>::planes; ++p) {
      double sum[W] = {};
      MQ_UNROLL(1)
      for (int j = 0; j < call.rows; ++j) {
        double c = number(i, j);
        if (j < 2 * call.pairs && j % 2 == 0) c -= number(i, j + 1);
        if (c == 0.0) continue;
        C x[W];
        read_quad<A>(shared + stage_at + a.layout.offset[j], call.stream[j].dtype, p, static_cast<int>(threadIdx.x), x);
        for (int w = 0; w < W; ++w) sum[w] = fused(c, static_cast<double>(x[w]), sum[w]);
      }
      MQ_UNROLL(8)  // or the sums are no registers
      for (int w = 0; w < W; ++w) {
        if (p * W + w >= valid) continue;
        const C x = static_cast<C>(sum[w]);
        unsigned char* at = to + (p * W + w) * size;
        if constexpr (sizeof(C) == 8) {
          *reinterpret_cast<double*>(at) = x;
        } else if (dtype == DType::f32) {
          *reinterpret_cast<float*>(at) = x;
        } else {
          *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(pack(dtype, x, 0.0f));
        }
      }
    }
  }
}

// All outputs over the walk, with the map of the sample. walk.start() was called.
template <FrameAccess A, bool G, class Walk>
MQ_DEVICE inline void apply(const FrameArguments<G>& a, const Share& share, const Walk& walk, unsigned char* shared) {
  using C = typename Access<A>::C;
  constexpr int M = G ? 4 : 2;
  const auto& map = *reinterpret_cast<const FrameMap*>(shared + a.layout.map_at);
  const auto* matrix = reinterpret_cast<const C*>(shared + a.layout.matrix_at);
  if constexpr (sizeof(C) == 4) {
    if (map.wide && is_direction(a.call.op)) {
      return walk.each(
          [&](int tile, const unsigned char* stage) { wide_slot<A>(a, static_cast<int>(stage - shared), tile); });
    }
  }
  walk.each([&](int tile, const unsigned char* stage) {
    const int64_t first = first_of_tile<A>(share, tile);
    if constexpr (G) {
      if (a.layout.staged) make_any_rows<A>(a, share, first, stage, shared, true);
    }
    const Rows<A, G> rows{a, stage, shared + a.layout.rows_at};
    if constexpr (G && sizeof(C) == 4) {
      if (map.wide) return combine_all<A, G, M>(rows, share, map, &map.c[0][0], kMaxVectors, first);
    }
    combine_all<A, G, M>(rows, share, map, matrix, a.call.rows, first);
  });
}

}  // namespace marquardt
