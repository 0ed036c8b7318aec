// Dynamic thresholding: per sample the number s = clamp(quantile(|x|, ratio), 1, maximum), then x' = clamp(x/s, −1, 1).
//
// The quantile is exact. The bits of |x|, read as an integer, order as the numbers do; these integers are called keys. Of
// n of them number k (from 0, ascending) and the one behind it are found, and a straight line between both is the
// quantile. Keys above that of infinity are NaN. This header is plain C++.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace marquardt {

struct SelectCall {
  const void* data = nullptr;  // B samples of D dense numbers, batch_stride numbers apart
  DType dtype = DType::f32;
  int64_t batch = 0, size = 0, batch_stride = 0;
  const double* parameters = nullptr;  // (ratio, maximum): [2] or [B, 2]
  int64_t parameter_stride = 0;        // 0 or 2
  bool host_parameters = false;        // on a GPU: they lie on the host (stride 0), and travel with the launch
  double* scale = nullptr;             // s, [B]
};

struct RescaleCall {
  const void* data = nullptr;  // as above
  DType dtype = DType::f32;
  int64_t batch = 0, size = 0, batch_stride = 0;
  void* out = nullptr;  // of the same dtype
  int64_t out_stride = 0;
  const double* scale = nullptr;  // [1] or [B]
  int64_t scale_stride = 0;       // 0 or 1
  bool host_scale = false;
};

// Samples that lie behind one another and share s are one long sample.
inline RescaleCall flattened(const RescaleCall& call) {
  RescaleCall flat = call;
  if (call.batch > 1 && call.scale_stride == 0 && call.batch_stride == call.size && call.out_stride == call.size) {
    flat.size *= flat.batch;
    flat.batch = 1;
  }
  return flat;
}

constexpr int64_t infinity_key(DType dtype) {
  switch (dtype) {
    case DType::f32: return 0x7f800000;
    case DType::f64: return 0x7ff0000000000000;
    case DType::bf16: return 0x7f80;
    case DType::f16: return 0x7c00;
  }
  return 0;
}

MQ_HOST_DEVICE inline bool are_parameters(double ratio, double maximum) {
  return ratio >= 0.0 && ratio <= 1.0 && maximum >= 1.0;  // false for NaN
}

// Where the quantile lies: `fraction` of the way from number k to number `next`, which is k where it lies on it.
struct Rank {
  int64_t k, next;
  double fraction;
};

MQ_HOST_DEVICE inline Rank rank_of(double ratio, int64_t n) {
  const double position = ratio * static_cast<double>(n - 1);
  const auto k = static_cast<int64_t>(position);
  const double fraction = position - static_cast<double>(k);
  return {k, fraction > 0.0 ? k + 1 : k, fraction};
}

// s from the two numbers, 0 ≤ a ≤ b. Two infinite ones have no distance.
MQ_HOST_DEVICE inline double scale_between(double a, double b, double fraction, double maximum) {
  const double q = a + (a == b ? 0.0 : b - a) * fraction;
  return q < 1.0 ? 1.0 : q > maximum ? maximum : q;
}

void select_cpu(const SelectCall& call);
void rescale_cpu(const RescaleCall& call);

}  // namespace marquardt
