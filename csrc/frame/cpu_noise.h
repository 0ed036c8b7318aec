// Normals from Philox words, a block of counters at a time. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/philox.h"
#include "core/simd.h"

namespace marquardt::MQ_ISA {

using Words = uint32_t __attribute__((vector_size(kBytes)));
using Ints = int32_t __attribute__((vector_size(kBytes)));

// ln x for 2⁻³³ ≤ x ≤ 1, within 1 ulp or so: x = 2^k·m with √½ ≤ m < √2, then a polynomial in m − 1.
MQ_INLINE Vec<float> logarithm(Vec<float> x) {
  const Ints bits = (Ints)x;
  const Ints shifted = bits - 0x3f3504f3;  // √½
  const Vec<float> k = __builtin_convertvector(shifted >> 23, Vec<float>);
  const Vec<float> f = (Vec<float>)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec<float> p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  const Vec<float> square = f * f;
  Vec<float> tail = f * square * p;
  tail = fma(k, broadcast(-2.12194440e-4f), tail);
  tail = fma(square, broadcast(-0.5f), tail);
  return fma(k, broadcast(0.693359375f), f + tail);
}

// cos 2πv and sin 2πv for 0 ≤ v ≤ 1. 4v = q + f with |f| ≤ ½ exactly, so small results keep their relative accuracy.
MQ_INLINE void turn(Vec<float> v, Vec<float>& cosine, Vec<float>& sine) {
  const Vec<float> t = v * 4.0f;
  const Ints q = __builtin_convertvector(t + 0.5f, Ints);  // t ≥ 0: truncation rounds half up
  const Vec<float> a = (t - __builtin_convertvector(q, Vec<float>)) * 1.57079632679489662f;
  const Vec<float> s = a * a;
  Vec<float> ps = broadcast(-1.9515295891e-4f);
  ps = fma(ps, s, broadcast(8.3321608736e-3f));
  ps = fma(ps, s, broadcast(-1.6666654611e-1f));
  const Vec<float> sin_a = fma(ps * s, a, a);
  Vec<float> pc = broadcast(2.443315711809948e-5f);
  pc = fma(pc, s, broadcast(-1.388731625493765e-3f));
  pc = fma(pc, s, broadcast(4.166664568298827e-2f));
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

// The words of kWidth<float> consecutive counters.
inline void philox_block(uint64_t key, uint64_t counter, uint64_t counter_high, Words* w) {
  constexpr int kCounters = kWidth<float>;
  // Words live in the low halves of 64-bit lanes, where a multiplication leaves the high word beside them.
  uint64_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = (counter + static_cast<uint64_t>(i)) & 0xffffffffu;
    c1[i] = (counter + static_cast<uint64_t>(i)) >> 32;
    c2[i] = counter_high & 0xffffffffu;
    c3[i] = counter_high >> 32;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * static_cast<uint32_t>(c0[i]);
      const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * static_cast<uint32_t>(c2[i]);
      c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = p1 & 0xffffffffu;
      c3[i] = p0 & 0xffffffffu;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int i = 0; i < kCounters; ++i) {
    w[0][i] = static_cast<uint32_t>(c0[i]);
    w[1][i] = static_cast<uint32_t>(c1[i]);
    w[2][i] = static_cast<uint32_t>(c2[i]);
    w[3][i] = static_cast<uint32_t>(c3[i]);
  }
}

// Normals of the elements first … first + n − 1.
inline void fill_noise(uint64_t key, uint64_t counter_high, uint64_t first, float* to, int64_t n) {
  constexpr int kCounters = kWidth<float>, kBlock = 4 * kCounters;
  uint64_t counter = first / 4;
  int64_t skip = static_cast<int64_t>(first % 4);
  Words w[4] = {};
  Vec<float> z[4] = {};
  float columns[4][kCounters], block[kBlock];
  for (int64_t done = 0; done < n; counter += kCounters, skip = 0) {
    philox_block(key, counter, counter_high, w);
    box_muller(w[0], w[1], z[0], z[1]);
    box_muller(w[2], w[3], z[2], z[3]);
    for (int j = 0; j < 4; ++j) store(columns[j], z[j]);
    for (int i = 0; i < kCounters; ++i)
      for (int j = 0; j < 4; ++j) block[4 * i + j] = columns[j][i];
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
