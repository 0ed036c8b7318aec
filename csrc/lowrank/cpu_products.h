// Products of columns, summed over rows: the inner loops of xᵀx and gᵀx. See cpu_kernels.h; included once per
// instruction set.
#pragma once

#include "core/simd.h"
#include "frame/cpu_convert.h"
#include "lowrank/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// A tile's sums stay in registers, beside its vectors of the right side and a broadcast: 24 of 32 with AVX-512, 12 of 16
// with AVX2. A height that divides the width of a vector wastes least along the diagonal.
constexpr int kTileHeight = kBytes == 64 ? 8 : 4;
constexpr int kTileVectors = kBytes == 16 ? 2 : 3;

// Packed rows come from the second cache, a stride apart; in so many rows' time they have come.
constexpr int64_t kRowsAhead = 4;

MQ_INLINE void add_as_double(Vec<double> v, double* to) {
  store(to, load(to) + v);
}

MQ_INLINE void add_as_double(Vec<float> v, double* to) {
  float lanes[kWidth<float>];
  store(lanes, v);
  store(to, load(to) + load_as_double(lanes));
  store(to + kWidth<double>, load(to + kWidth<double>) + load_as_double(lanes + kWidth<double>));
}

// One tile over all rows: Height broadcasts and Vectors loads a row for Height · Vectors fused multiply-adds.
template <class T, int Height, int Vectors>
void product_tile(const T* left, const T* right, int64_t stride, int64_t rows, double* sums) {
  const int64_t later = kRowsAhead * stride;
  Vec<T> sum[Height][Vectors] = {};
  for (int64_t r = 0; r < rows; ++r, left += stride, right += stride) {
    __builtin_prefetch(left + later);
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(right + later + v * kWidth<T>);
    Vec<T> b[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) b[v] = load(right + v * kWidth<T>);
#pragma GCC unroll 8
    for (int m = 0; m < Height; ++m) {
      const Vec<T> a = broadcast(left[m]);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sum[m][v] = fma(a, b[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Height; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) add_as_double(sum[m][v], sums + (m * Vectors + v) * kWidth<T>);
}

template <class T>
using TileFunction = void (*)(const T*, const T*, int64_t, int64_t, double*);

// Tiles of every size, since the last ones of a block of columns are seldom full.
template <class T, int Vectors>
MQ_INLINE TileFunction<T> tile_of_height(int height) {
  static constexpr TileFunction<T> kTable[8] = {
      product_tile<T, 1, Vectors>, product_tile<T, 2, Vectors>,
      product_tile<T, 3, Vectors>, product_tile<T, 4, Vectors>,
#if defined(__AVX512F__)
      product_tile<T, 5, Vectors>, product_tile<T, 6, Vectors>,
      product_tile<T, 7, Vectors>, product_tile<T, 8, Vectors>,
#endif
  };
  return kTable[height - 1];
}

template <class T>
MQ_INLINE TileFunction<T> tile_function(int height, int vectors) {
#if defined(__AVX2__)
  if (vectors == 3) return tile_of_height<T, 3>(height);
#endif
  return vectors == 2 ? tile_of_height<T, 2>(height) : tile_of_height<T, 1>(height);
}

// The share of tile k of what lies ahead, into the second cache.
MQ_INLINE void prefetch_share(const Ahead& ahead, int64_t k, int64_t count) {
  for (int i = 0; i < 2; ++i) {
    const int64_t begin = ahead.bytes[i] * k / count, end = ahead.bytes[i] * (k + 1) / count;
    for (int64_t b = begin; b < end; b += kLineBytes) __builtin_prefetch(ahead.from[i] + b, 0, 2);
  }
}

template <class T>
void products(const ProductTile* tiles, int64_t count, const T* y, int64_t stride, int64_t rows, double* sums,
              const Ahead& ahead) {
  for (int64_t k = 0; k < count; ++k) {
    const ProductTile& t = tiles[k];
    prefetch_share(ahead, k, count);
    tile_function<T>(t.height, t.vectors)(y + t.left, y + t.right, stride, rows, sums + t.sums);
  }
}

MQ_INLINE void load_numbers(DType dtype, const void* from, float* to, int64_t n) {
  load_chunk(dtype, from, to, n);
}

MQ_INLINE void load_numbers(DType dtype, const void* from, double* to, int64_t n) {
  const auto* half = static_cast<const uint16_t*>(from);
  const auto* single = static_cast<const float*>(from);
  switch (dtype) {
    case DType::bf16:
      for (int64_t c = 0; c < n; ++c) to[c] = static_cast<double>(float_of_bf16(half[c]));
      return;
    case DType::f16:
      for (int64_t c = 0; c < n; ++c) to[c] = static_cast<double>(float_of_f16(half[c]));
      return;
    case DType::f32:
      for (int64_t c = 0; c < n; ++c) to[c] = static_cast<double>(single[c]);
      return;
    case DType::f64: __builtin_memcpy(to, from, static_cast<size_t>(n) * 8); return;
  }
}

template <class T>
void pack_rows(DType dtype, const void* from, int64_t from_stride, int64_t rows, int64_t columns, int64_t padded, T* to,
               int64_t stride) {
  const char* row = static_cast<const char*>(from);
  for (int64_t r = 0; r < rows; ++r, row += from_stride * size_of(dtype), to += stride) {
    load_numbers(dtype, row, to, columns);
    for (int64_t c = columns; c < padded; ++c) to[c] = T(0);
  }
}

}  // namespace marquardt::MQ_ISA
