// The heavy stages of the lowrank engine on the CPU, as a table of functions for one instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace marquardt {

// Rows whose products are summed in the compute type; their sum is then added to sums in double.
constexpr int64_t kProductRows = 256;
// Rows of a softmax head of few classes: summed in the compute type, and taken together.
constexpr int64_t kHeadRows = 256, kHeadGroup = 8;
// Columns per vector of the widest set, to which packed rows are padded, so that one layout serves all sets.
constexpr int64_t kPadBytes = 64;

// A rectangle of products: `height` columns of the packed rows, from `left` on, against `vectors` vectors of columns
// from `right` on. The sums, [height, vectors · width] in double, stand from `sums` on.
struct ProductTile {
  int64_t left, right, sums;
  int height, vectors;
};

// Memory that the next rows will be packed from: two stretches that are asked for while products are taken.
struct Ahead {
  const char* from[2] = {nullptr, nullptr};
  int64_t bytes[2] = {0, 0};
};

template <class T>
struct TypedLowrankKernels {
  int width;    // columns per vector
  int height;   // columns that a tile takes from the left at most
  int vectors;  // vectors that it takes from the right at most
  // sums[t.sums + m·(vectors·width) + j] += Σ_r y[r][t.left + m]·y[r][t.right + j], for up to kProductRows rows of
  // `stride` elements, aligned to kPadBytes.
  void (*products)(const ProductTile* tiles, int64_t count, const T* y, int64_t stride, int64_t rows, double* sums,
                   const Ahead& ahead);
  // Rows into packed rows: `columns` numbers, then zeros up to `padded`.
  void (*pack)(DType dtype, const void* from, int64_t from_stride, int64_t rows, int64_t columns, int64_t padded, T* to,
               int64_t stride);
  // z = p ⊙ (z − Σ p ⊙ z), row by row of `columns` numbers, in place: the Jacobian of a softmax times z.
  void (*softmax_jvp)(const T* p, int64_t p_stride, T* z, int64_t z_stride, int64_t rows, int64_t columns);
  // sums[c] += Σ_r z[r][c] x_r in double, with z = the softmax's Jacobian times x gᵀ, for up to kHeadRows rows x and a few
  // rows g of `features` numbers (a multiple of kPadBytes); z [kHeadGroup, classes] and block [classes, features] are scratch.
  void (*few_classes)(const T* x, int64_t x_stride, const T* p, int64_t p_stride, const T* g, int64_t rows,
                      int64_t classes, int64_t features, T* z, T* block, double* sums);
};

struct LowrankKernels {
  const char* isa;
  TypedLowrankKernels<float> f32;
  TypedLowrankKernels<double> f64;
};

namespace avx512 {
extern const LowrankKernels lowrank_kernels;
}
namespace avx2 {
extern const LowrankKernels lowrank_kernels;
}
namespace baseline {
extern const LowrankKernels lowrank_kernels;
}

}  // namespace marquardt
