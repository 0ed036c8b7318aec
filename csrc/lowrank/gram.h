// xᵀx and gᵀx of matrices with many rows and few columns, both in one pass over the rows, summed in double.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "lowrank/cpu_kernels.h"

namespace marquardt {

// A matrix with contiguous rows; strides in elements.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride, columns;
};

// The best table this processor can run.
const LowrankKernels& lowrank_kernels();

template <class T>
const TypedLowrankKernels<T>& typed_lowrank_kernels();

// The sums of one call, allocated by `run`: a few hundred kilobytes at 147 × (147 + 64), whatever the number of rows.
class GramPair {
 public:
  // x [rows, i], g [rows, o], in one dtype.
  GramPair(const Rows& x, const Rows& g, int64_t rows);
  ~GramPair();
  GramPair(const GramPair&) = delete;
  GramPair& operator=(const GramPair&) = delete;

  // The pass over the rows.
  void run();
  // gram [i, i] = xᵀx, cross [o, i] = gᵀx, both in double.
  void write(double* gram, double* cross) const;

 private:
  struct Plan;
  Plan* plan_;
};

}  // namespace marquardt
