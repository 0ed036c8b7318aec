// Narrow types in and out of the compute type, a chunk at a time. See cpu_kernels.h; included once per
// instruction set.
#pragma once

#include "core/half.h"
#include "core/simd.h"
#include "frame/cpu_kernels.h"

namespace marquardt::MQ_ISA {

inline void load_bf16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
#endif
  for (; i < n; ++i) to[i] = float_of_bf16(from[i]);
}

inline void store_bf16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m512 x = _mm512_loadu_ps(from + i);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
#endif
  for (; i < n; ++i) to[i] = bf16_of(from[i]);
}

inline void load_f16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; ++i) to[i] = float_of_f16(from[i]);
}

inline void store_f16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < n; ++i) to[i] = f16_of(from[i]);
}

inline void load_chunk(DType dtype, const void* from, float* to, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case DType::bf16: return load_bf16(half, to, n);
    case DType::f16: return load_f16(half, to, n);
    case DType::f32: __builtin_memcpy(to, from, static_cast<size_t>(n) * 4); return;
    case DType::f64: return;  // never computed in float
  }
}

inline void load_chunk(DType, const void* from, double* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * 8);
}

inline void store_chunk(DType dtype, const float* from, void* to, int64_t n) {
  uint16_t* half = static_cast<uint16_t*>(to);
  switch (dtype) {
    case DType::bf16: return store_bf16(from, half, n);
    case DType::f16: return store_f16(from, half, n);
    case DType::f32: __builtin_memcpy(to, from, static_cast<size_t>(n) * 4); return;
    case DType::f64: return;
  }
}

inline void store_chunk(DType, const double* from, void* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * 8);
}

}  // namespace marquardt::MQ_ISA
