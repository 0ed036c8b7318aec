// bfloat16 and float16 as bits, to and from float, for the host. Rounded to nearest even. Always inlined and without the
// standard library: translation units of different instruction sets must not share a copy.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace marquardt {

MQ_INLINE float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

MQ_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

MQ_INLINE float float_of_bf16(uint16_t h) {
  return float_of_bits(static_cast<uint32_t>(h) << 16);
}

MQ_INLINE uint16_t bf16_of(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const uint32_t quiet = (bits >> 16) | 0x40u;                            // a NaN must not round to infinity
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

MQ_INLINE float float_of_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is moved by a multiplication, which also normalises subnormals.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * float_of_bits(0x77800000u)));
}

MQ_INLINE uint16_t f16_of(float x) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds beyond 65504
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 round
    h = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
}

}  // namespace marquardt
