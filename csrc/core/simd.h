// Vectors of one instruction set. Included by translation units that set MQ_ISA to a namespace of their own:
// the same source, compiled with other flags, must not share a symbol, or the linker could hand AVX-512 code to a
// processor without it. For the same reason nothing here uses the standard library beyond <cstdint>.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#pragma GCC diagnostic push
// GCC warns in its own header: https://gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "core/macros.h"

namespace marquardt::MQ_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int kLineBytes = 64;  // of the caches

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

// Elements of T per vector.
template <class T>
constexpr int kWidth = kBytes / static_cast<int>(sizeof(T));

template <class T>
MQ_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, kBytes);
  return v;
}

template <class T>
MQ_INLINE void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, kBytes);
}

// A store past the caches; `to` is aligned to kBytes.
MQ_INLINE void stream(float* to, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)v);
#else
  store(to, v);
#endif
}

MQ_INLINE void stream(double* to, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(to, (__m512d)v);
#elif defined(__AVX2__)
  _mm256_stream_pd(to, (__m256d)v);
#elif defined(__SSE2__)
  _mm_stream_pd(to, (__m128d)v);
#else
  store(to, v);
#endif
}

// Makes streamed stores visible before anything that follows.
MQ_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
MQ_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// a·b + c, rounded once where the instruction set has it. Contraction is off for the whole build, so this is the
// only place where rounding may differ between instruction sets.
MQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

MQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

MQ_INLINE Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kWidth<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// kWidth<double> floats as doubles.
MQ_INLINE Vec<double> load_as_double(const float* from) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  Vec<double> v;
  for (int i = 0; i < kWidth<double>; ++i) v[i] = from[i];
  return v;
#endif
}

// Two vectors of doubles as one of floats.
MQ_INLINE Vec<float> narrow(Vec<double> low, Vec<double> high) {
#if defined(__AVX512DQ__)
  return (Vec<float>)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low)),
                                        _mm512_cvtpd_ps((__m512d)high), 1);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)low)),
                                          _mm256_cvtpd_ps((__m256d)high), 1);
#else
  Vec<float> v;
  for (int i = 0; i < kWidth<double>; ++i) {
    v[i] = static_cast<float>(low[i]);
    v[kWidth<double> + i] = static_cast<float>(high[i]);
  }
  return v;
#endif
}

// Lower half + upper half of a float vector, in double.
MQ_INLINE Vec<double> fold_to_double(Vec<float> v) {
#if defined(__AVX512DQ__)
  const __m512 x = (__m512)v;
  return (Vec<double>)_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                                    _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
  const __m256 x = (__m256)v;
  return (Vec<double>)_mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                                    _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
#else
  float lanes[kWidth<float>];
  store(lanes, v);
  return load_as_double(lanes) + load_as_double(lanes + kWidth<double>);
#endif
}

// The sum of all lanes.
MQ_INLINE double sum_of(Vec<double> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__AVX2__)
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
#else
  double sum = 0.0;
  for (int i = 0; i < kWidth<double>; ++i) sum += v[i];
  return sum;
#endif
}

MQ_INLINE double sum_of(Vec<float> v) {
  return sum_of(fold_to_double(v));
}

}  // namespace marquardt::MQ_ISA
