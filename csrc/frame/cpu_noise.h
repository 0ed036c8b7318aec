// Normals from Philox words, a block of counters at a time. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/philox.h"
#include "core/polynomials.h"
#include "core/simd.h"

namespace marquardt::MQ_ISA {

using Words = uint32_t __attribute__((vector_size(kBytes)));
using Ints = int32_t __attribute__((vector_size(kBytes)));
using Longs = uint64_t __attribute__((vector_size(kBytes)));

// ln x for 2⁻³³ ≤ x ≤ 1, within 1 ulp or so: x = 2^k·m with √½ ≤ m < √2, then a polynomial in m − 1.
MQ_INLINE Vec<float> logarithm(Vec<float> x) {
  const Ints bits = (Ints)x;
  const Ints shifted = bits - 0x3f3504f3;  // √½
  const Vec<float> k = __builtin_convertvector(shifted >> 23, Vec<float>);
  const Vec<float> f = (Vec<float>)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec<float> p = broadcast(logarithm_coefficient(0));
#pragma GCC unroll 9
  for (int i = 1; i < kLogarithmTerms; ++i) p = fma(p, f, broadcast(logarithm_coefficient(i)));
  const Vec<float> square = f * f;
  Vec<float> tail = f * square * p;
  tail = fma(k, broadcast(kLn2Low), tail);
  tail = fma(square, broadcast(-0.5f), tail);
  return fma(k, broadcast(kLn2High), f + tail);
}

// cos 2πv and sin 2πv for 0 ≤ v ≤ 1. 4v = q + f with |f| ≤ ½ exactly, so small results keep their relative accuracy.
MQ_INLINE void turn(Vec<float> v, Vec<float>& cosine, Vec<float>& sine) {
  const Vec<float> t = v * 4.0f;
  const Ints q = __builtin_convertvector(t + 0.5f, Ints);  // t ≥ 0: truncation rounds half up
  const Vec<float> a = (t - __builtin_convertvector(q, Vec<float>)) * kHalfPi;
  const Vec<float> s = a * a;
  const Vec<float> ps = fma(fma(broadcast(kSine[0]), s, broadcast(kSine[1])), s, broadcast(kSine[2]));
  const Vec<float> sin_a = fma(ps * s, a, a);
  const Vec<float> pc = fma(fma(broadcast(kCosine[0]), s, broadcast(kCosine[1])), s, broadcast(kCosine[2]));
  const Vec<float> cos_a = fma(pc * s, s, fma(s, broadcast(-0.5f), broadcast(1.0f)));
  const Ints swap = (q & 1) != 0;
  const Ints c = swap ? (Ints)sin_a : (Ints)cos_a, d = swap ? (Ints)cos_a : (Ints)sin_a;
  const Ints sign_c = ((q + 1) & 2) << 30, sign_s = (q & 2) << 30;
  cosine = (Vec<float>)(c ^ sign_c);
  sine = (Vec<float>)(d ^ sign_s);
}

MQ_INLINE void box_muller(Words w0, Words w1, Vec<float>& z0, Vec<float>& z1) {
  const Vec<float> u = fma(__builtin_convertvector(w0, Vec<float>), broadcast(0x1p-32f), broadcast(0x1p-33f));
  const Vec<float> radius = square_root(logarithm(u) * -2.0f);
  Vec<float> cosine, sine;
  turn(__builtin_convertvector(w1, Vec<float>) * 0x1p-32f, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// Low 32 bits times low 32 bits, 64 bits wide.
MQ_INLINE Longs multiply(Longs a, Longs b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The words of as many consecutive counters as there are 64-bit lanes. Words live in the low halves of the lanes,
// where a product leaves its high word beside them; what stands in the high halves is never looked at.
MQ_INLINE void philox_lanes(uint64_t key, uint64_t counter, uint64_t counter_high, uint32_t (*w)[kWidth<float>],
                            int at) {
  constexpr int kCounters = kWidth<double>;
  Longs c0;
  for (int i = 0; i < kCounters; ++i) c0[i] = counter + static_cast<uint64_t>(i);
  Longs c1 = c0 >> 32, c2 = Longs{} + (counter_high & 0xffffffffu), c3 = Longs{} + (counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Longs p0 = multiply(Longs{} + kPhiloxM0, c0), p1 = multiply(Longs{} + kPhiloxM1, c2);
    c0 = (p1 >> 32) ^ c1 ^ (Longs{} + k0);
    c2 = (p0 >> 32) ^ c3 ^ (Longs{} + k1);
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  using Half = uint32_t __attribute__((vector_size(kBytes / 2)));
  const Half words[4] = {__builtin_convertvector(c0, Half), __builtin_convertvector(c1, Half),
                         __builtin_convertvector(c2, Half), __builtin_convertvector(c3, Half)};
  for (int j = 0; j < 4; ++j) __builtin_memcpy(w[j] + at, &words[j], sizeof(Half));
}

// a0 b0 a1 b1 … of the first halves, or of the second.
MQ_INLINE Vec<float> interleave(Vec<float> a, Vec<float> b, bool second) {
  Ints pick;
  for (int i = 0; i < kWidth<float>; ++i) {
    pick[i] = i / 2 + (i % 2) * kWidth<float> + (second ? kWidth<float> / 2 : 0);
  }
  return __builtin_shuffle(a, b, pick);
}

// The four normals of each of kWidth<float> consecutive counters, in the order of the elements.
MQ_INLINE void normal_block(uint64_t key, uint64_t counter, uint64_t counter_high, float* block) {
  constexpr int kCounters = kWidth<float>;
  uint32_t words[4][kCounters];
  philox_lanes(key, counter, counter_high, words, 0);
  philox_lanes(key, counter + kCounters / 2, counter_high, words, kCounters / 2);
  Words w[4];
  __builtin_memcpy(w, words, sizeof(w));
  Vec<float> z0, z1, z2, z3;
  box_muller(w[0], w[1], z0, z1);
  box_muller(w[2], w[3], z2, z3);
  const Vec<float> even_first = interleave(z0, z2, false), even_second = interleave(z0, z2, true);
  const Vec<float> odd_first = interleave(z1, z3, false), odd_second = interleave(z1, z3, true);
  store(block, interleave(even_first, odd_first, false));
  store(block + kCounters, interleave(even_first, odd_first, true));
  store(block + 2 * kCounters, interleave(even_second, odd_second, false));
  store(block + 3 * kCounters, interleave(even_second, odd_second, true));
}

// Normals of the elements first … first + n − 1.
inline void fill_noise(uint64_t key, uint64_t counter_high, uint64_t first, float* to, int64_t n) {
  constexpr int kCounters = kWidth<float>, kBlock = 4 * kCounters;
  uint64_t counter = first / 4;
  int64_t skip = static_cast<int64_t>(first % 4), done = 0;
  if (skip == 0) {
    for (; done + kBlock <= n; done += kBlock, counter += kCounters)
      normal_block(key, counter, counter_high, to + done);
  }
  float block[kBlock];
  for (; done < n; counter += kCounters, skip = 0) {
    normal_block(key, counter, counter_high, block);
    const int64_t count = kBlock - skip < n - done ? kBlock - skip : n - done;
    __builtin_memcpy(to + done, block + skip, static_cast<size_t>(count) * 4);
    done += count;
  }
}

inline void fill_noise(uint64_t key, uint64_t counter_high, uint64_t first, double* to, int64_t n) {
  float part[256];
  for (int64_t done = 0; done < n; done += 256) {
    const int64_t count = n - done < 256 ? n - done : 256;
    fill_noise(key, counter_high, first + static_cast<uint64_t>(done), part, count);
    for (int64_t i = 0; i < count; ++i) to[done + i] = part[i];
  }
}

}  // namespace marquardt::MQ_ISA
