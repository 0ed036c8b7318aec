// The Hessian of the mean loss of a softmax head times a direction, in one pass over the rows.
#pragma once

#include "core/tensor.h"

namespace marquardt {

// x [n, d], p [n, C], g [C, d] in one dtype, with contiguous rows; out [C, d], contiguous.
struct SoftmaxHead {
  View x, p, g, out;
};

void softmax_head_hvp(const SoftmaxHead& call);

}  // namespace marquardt
