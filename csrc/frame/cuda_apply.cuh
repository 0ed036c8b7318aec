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

// A slot of V elements: 16 or 8 bytes at once where it lies aligned and whole.
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
    const uint32_t group = map.zero >> i & ((1u << M) - 1u);
    if (group == 0u && i + M <= rows.a.call.outputs) {
      combine<A, G, M>(rows, share, map.used, matrix, stride, i, first);
      i += M;
    } else {
      combine<A, G, 1>(rows, share, group & 1u ? 0u : map.used, matrix, stride, i, first);
      ++i;
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
  walk.each([&](int64_t first, const unsigned char* stage) {
    if constexpr (G) {
      if (a.layout.staged) make_rows<A>(a, share, first, stage, shared);
    }
    const Rows<A, G> rows{a, stage, shared + a.layout.rows_at};
    if constexpr (G && sizeof(C) == 4) {
      if (map.wide) return combine_all<A, G, M>(rows, share, map, &map.c[0][0], kMaxVectors, first);
    }
    combine_all<A, G, M>(rows, share, map, matrix, a.call.rows, first);
  });
}

}  // namespace marquardt
