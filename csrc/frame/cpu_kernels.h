// The heavy stages on the CPU, as a table of functions for one instruction set. They know rows and numbers, no op.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "frame/frame.h"

namespace marquardt {

// Gram sums are kept as this many partial sums per entry until the sample is done.
constexpr int kLanes = 8;

// Terms of a step (step.h) over a stretch of elements: e = Σ_j d_j s_j over the first `in_direction` of them (at least
// one), a = Σ_j a_j s_j over all, r = p − e. With `pair` s_1 is the residual row[1] − row[0].
template <class T>
struct StepTerms {
  const T* row[kMaxVectors];
  T a[kMaxVectors], d[kMaxVectors];
  int count, in_direction;
  bool pair;
  const T* prev;
};

// Terms that step_gram and step_apply take.
constexpr int kStepTerms = 5, kDirectionTerms = 3;

template <class T>
struct TypedFrameKernels {
  // acc[e][lane] += products of the rows over n elements, for the entries of `kind`, folded after every kChunk.
  // `pairs` as in FrameCall, for up to four rows. `exact` takes products and sums in double.
  void (*gram)(const T* const* rows, int count, int pairs, GramKind kind, bool exact, int64_t n, double (*acc)[kLanes]);
  // outs[i][:n] = Σ_j c[i·count + j]·rows[j][:n]. `streaming` writes past the caches.
  void (*apply)(const T* const* rows, int count, int pairs, const T* c, int outputs, T* const* outs, int64_t n,
                bool streaming);
  // The same, without pairs, with sums in double.
  void (*apply_wide)(const T* const* rows, int count, const double* c, int outputs, T* const* outs, int64_t n,
                     bool streaming);
  // out[:n] = Σ_j c[j]·rows[j][:n], not rounded to T at all.
  void (*sum_in_double)(const T* const* rows, int count, const double* c, double* out, int64_t n);
  // acc += ⟨e,e⟩, ⟨e,r⟩, ⟨r,r⟩, folded after every kChunk, of up to kDirectionTerms terms in the direction.
  void (*step_gram)(const StepTerms<T>& terms, int64_t n, double (*acc)[kLanes]);
  // out = a + c0·e + c1·r, also to `copy` if it is there, and e to `direction` if that is. False for terms of a number
  // that has no kernel.
  bool (*step_apply)(const StepTerms<T>& terms, T c0, T c1, T* out, T* copy, T* direction, int64_t n, bool streaming);
  void (*clamp)(T* row, T low, T high, int64_t n);
  void (*load)(DType dtype, const void* from, T* to, int64_t n);
  void (*store)(DType dtype, const T* from, void* to, int64_t n);
  void (*noise)(uint64_t key, uint64_t counter_high, uint64_t first, T* to, int64_t n);
};

struct FrameKernels {
  const char* isa;
  TypedFrameKernels<float> f32;
  TypedFrameKernels<double> f64;
};

namespace avx512 {
extern const FrameKernels frame_kernels;
}
namespace avx2 {
extern const FrameKernels frame_kernels;
}
namespace baseline {
extern const FrameKernels frame_kernels;
}

// The best table this processor can run.
const FrameKernels& frame_kernels();

}  // namespace marquardt
