// The polynomials behind Box–Muller, highest power first: one set of numbers for the vectorised CPU kernels and the GPU.
#pragma once

#include "core/macros.h"

namespace marquardt {

constexpr int kLogarithmTerms = 9;

// ln(1 + f) = f − f²/2 + f³·p(f) for √½ ≤ 1 + f < √2.
MQ_HOST_DEVICE MQ_INLINE constexpr float logarithm_coefficient(int i) {
  constexpr float c[kLogarithmTerms] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                        -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                        2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  return c[i];
}
// ln 2 in two parts: the first has few bits, so that k·kLn2High is exact.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// sin a = a + a³·p(a²), cos a = 1 − a²/2 + a⁴·p(a²) for |a| ≤ π/4.
constexpr float kSine[3] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
constexpr float kCosine[3] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};

constexpr float kHalfPi = 1.57079632679489662f;

}  // namespace marquardt
