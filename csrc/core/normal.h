// Standard normals from Philox words by Box–Muller, one counter at a time, for host and device. The polynomials are
// those of the vectorised CPU kernels (frame/cpu_noise.h), so that backends agree within rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/macros.h"
#include "core/philox.h"
#include "core/polynomials.h"

namespace marquardt {

MQ_HOST_DEVICE MQ_INLINE int32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

MQ_HOST_DEVICE MQ_INLINE float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// ln x for 2⁻³³ ≤ x ≤ 1: x = 2^k·m with √½ ≤ m < √2, then a polynomial in m − 1.
MQ_HOST_DEVICE MQ_INLINE float logarithm(float x) {
  const int32_t shifted = bits_of(x) - 0x3f3504f3;  // √½
  const float k = static_cast<float>(shifted >> 23);
  const float f = float_of((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  float p = logarithm_coefficient(0);
  for (int i = 1; i < kLogarithmTerms; ++i) p = fmaf(p, f, logarithm_coefficient(i));
  const float square = f * f;
  float tail = f * square * p;
  tail = fmaf(k, kLn2Low, tail);
  tail = fmaf(square, -0.5f, tail);
  return fmaf(k, kLn2High, f + tail);
}

// cos 2πv and sin 2πv for 0 ≤ v ≤ 1. 4v = q + f with |f| ≤ ½ exactly, so small results keep their relative accuracy.
MQ_HOST_DEVICE MQ_INLINE void turn(float v, float& cosine, float& sine) {
  const float t = v * 4.0f;
  const int32_t q = static_cast<int32_t>(t + 0.5f);  // t ≥ 0: truncation rounds half up
  const float a = (t - static_cast<float>(q)) * kHalfPi;
  const float s = a * a;
  const float ps = fmaf(fmaf(kSine[0], s, kSine[1]), s, kSine[2]);
  const float sin_a = fmaf(ps * s, a, a);
  const float pc = fmaf(fmaf(kCosine[0], s, kCosine[1]), s, kCosine[2]);
  const float cos_a = fmaf(pc * s, s, fmaf(s, -0.5f, 1.0f));
  const bool swap = (q & 1) != 0;
  cosine = swap ? sin_a : cos_a;
  sine = swap ? cos_a : sin_a;
  if (((q + 1) & 2) != 0) cosine = -cosine;
  if ((q & 2) != 0) sine = -sine;
}

MQ_HOST_DEVICE MQ_INLINE void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float u = fmaf(static_cast<float>(w0), 0x1p-32f, 0x1p-33f);
  const float radius = sqrtf(logarithm(u) * -2.0f);
  float cosine, sine;
  turn(static_cast<float>(w1) * 0x1p-32f, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// The four normals of one counter: elements 4·counter … 4·counter + 3.
MQ_HOST_DEVICE MQ_INLINE void normals_of(uint64_t key, uint64_t counter, uint64_t counter_high, float* z) {
  const PhiloxWords words = philox(key, counter, counter_high);
  box_muller(words.w[0], words.w[1], z[0], z[1]);
  box_muller(words.w[2], words.w[3], z[2], z[3]);
}

}  // namespace marquardt
