// softmax_head_hvp for a handful of classes, where products of a library wait for memory: rows are taken from it once and
// both products made of them while they are near. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "lowrank/cpu_kernels.h"
#include "lowrank/cpu_products.h"
#include "lowrank/cpu_softmax.h"

namespace marquardt::MQ_ISA {

// z[r][c] = ⟨x_r, g_c⟩ for Rows × Classes of them; `features` is a multiple of the vector's width.
// With `First` the rows behind are asked for: the processor's own prefetching stops at every page, a row or two.
template <class T, int Rows, int Classes, bool First>
void logits_tile(const T* x, int64_t x_stride, const T* g, int64_t features, T* z, int64_t z_stride) {
  Vec<T> sum[Rows][Classes] = {};
  for (int64_t f = 0; f < features; f += kWidth<T>) {
    Vec<T> row[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      if (First) __builtin_prefetch(x + (r + Rows) * x_stride + f);
      row[r] = load(x + r * x_stride + f);
    }
#pragma GCC unroll 4
    for (int c = 0; c < Classes; ++c) {
      const Vec<T> direction = load(g + c * features + f);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r][c] = fma(row[r], direction, sum[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Classes; ++c) z[r * z_stride + c] = static_cast<T>(sum_of(sum[r][c]));
}

template <class T, int Rows, bool First>
void logits_classes(const T* x, int64_t x_stride, const T* g, int64_t features, int64_t count, T* z, int64_t classes) {
  switch (count) {
    case 1: return logits_tile<T, Rows, 1, First>(x, x_stride, g, features, z, classes);
    case 2: return logits_tile<T, Rows, 2, First>(x, x_stride, g, features, z, classes);
    case 3: return logits_tile<T, Rows, 3, First>(x, x_stride, g, features, z, classes);
    default: return logits_tile<T, Rows, 4, First>(x, x_stride, g, features, z, classes);
  }
}

template <class T, int Rows>
void logits_rows(const T* x, int64_t x_stride, const T* g, int64_t features, int64_t classes, T* z) {
  logits_classes<T, Rows, true>(x, x_stride, g, features, classes, z, classes);
  for (int64_t c = 4; c < classes; c += 4)
    logits_classes<T, Rows, false>(x, x_stride, g + c * features, features, classes - c, z + c, classes);
}

// block[c] += Σ_r z[r][c] x_r over Rows rows, Vectors vectors of features at a time: a row is loaded once for all classes.
template <class T, int Rows, int Vectors>
void outer_columns(const T* x, int64_t x_stride, const T* z, int64_t classes, int64_t features, T* block) {
  Vec<T> row[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) row[r][v] = load(x + r * x_stride + v * kWidth<T>);
  for (int64_t c = 0; c < classes; ++c, block += features) {
    Vec<T> sum[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[v] = load(block + v * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> factor = broadcast(z[r * classes + c]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[v] = fma(factor, row[r][v], sum[v]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(block + v * kWidth<T>, sum[v]);
  }
}

template <class T, int Rows>
void outer_rows(const T* x, int64_t x_stride, const T* z, int64_t classes, int64_t features, T* block) {
  constexpr int kVectors = kBytes == 64 ? 2 : 1;  // Rows · kVectors rows stay in registers
  int64_t f = 0;
  for (; f + kVectors * kWidth<T> <= features; f += kVectors * kWidth<T>)
    outer_columns<T, Rows, kVectors>(x + f, x_stride, z, classes, features, block + f);
  for (; f < features; f += kWidth<T>) outer_columns<T, Rows, 1>(x + f, x_stride, z, classes, features, block + f);
}

// Group after group of rows, so that one is still in the first cache when its second product is made.
template <class T>
void few_classes(const T* x, int64_t x_stride, const T* p, int64_t p_stride, const T* g, int64_t rows, int64_t classes,
                 int64_t features, T* z, T* block, double* sums) {
  constexpr int64_t kGroup = kHeadGroup;
  __builtin_memset(block, 0, static_cast<uint64_t>(classes * features) * sizeof(T));
  for (; rows >= kGroup; rows -= kGroup, x += kGroup * x_stride, p += kGroup * p_stride) {
    for (int64_t r = 0; r < kGroup; r += 4)
      logits_rows<T, 4>(x + r * x_stride, x_stride, g, features, classes, z + r * classes);
    softmax_jvp(p, p_stride, z, classes, kGroup, classes);
    outer_rows<T, kGroup>(x, x_stride, z, classes, features, block);
  }
  for (; rows > 0; --rows, x += x_stride, p += p_stride) {
    logits_rows<T, 1>(x, x_stride, g, features, classes, z);
    softmax_jvp(p, p_stride, z, classes, 1, classes);
    outer_rows<T, 1>(x, x_stride, z, classes, features, block);
  }
  for (int64_t i = 0; i < classes * features; i += kWidth<T>) add_as_double(load(block + i), sums + i);
}

}  // namespace marquardt::MQ_ISA
