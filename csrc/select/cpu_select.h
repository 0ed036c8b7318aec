// Keys against a band. See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "select/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// --- vectors of keys -------------------------------------------------------------------------------------------------

template <class K>
constexpr K kMagnitude = sizeof(K) == 4 ? static_cast<K>(0x7fffffff) : static_cast<K>(0x7fffffffffffffff);

typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

// The bits of |x| for kWidth<K> numbers from number i on.
template <class K, bool Half>
MQ_INLINE Vec<K> load_keys(const void* from, int64_t i) {
  if constexpr (Half) {
    Halves bits;
    __builtin_memcpy(&bits, static_cast<const uint16_t*>(from) + i, sizeof(bits));
    return __builtin_convertvector(bits, Vec<K>) & 0x7fff;
  } else {
    return load(static_cast<const K*>(from) + i) & kMagnitude<K>;
  }
}

template <class K, bool Half>
MQ_INLINE K load_key(const void* from, int64_t i) {
  if constexpr (Half) {
    return static_cast<const uint16_t*>(from)[i] & 0x7fff;
  } else {
    K bits;
    __builtin_memcpy(&bits, static_cast<const K*>(from) + i, sizeof(bits));
    return bits & kMagnitude<K>;
  }
}

// Bit j: a[j] < b[j].
template <class K>
MQ_INLINE unsigned less(Vec<K> a, Vec<K> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(K) == 4) return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b);
  if constexpr (sizeof(K) == 8) return _mm512_cmplt_epi64_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(K) == 4) return static_cast<unsigned>(_mm256_movemask_ps((__m256)(a < b)));
  if constexpr (sizeof(K) == 8) return static_cast<unsigned>(_mm256_movemask_pd((__m256d)(a < b)));
#elif defined(__SSE2__)
  if constexpr (sizeof(K) == 4) return static_cast<unsigned>(_mm_movemask_ps((__m128)(a < b)));
  if constexpr (sizeof(K) == 8) return static_cast<unsigned>(_mm_movemask_pd((__m128d)(a < b)));
#else
  unsigned mask = 0;
  for (int j = 0; j < kWidth<K>; ++j) mask |= static_cast<unsigned>(a[j] < b[j]) << j;
  return mask;
#endif
}

// Writes the lanes of `mask` behind one another; a whole vector may be written.
template <class K>
MQ_INLINE void compress(Vec<K> v, unsigned mask, K* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(K) == 4) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v));
  } else {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), (__m512i)v));
  }
#else
  for (; mask != 0; mask &= mask - 1) *to++ = v[__builtin_ctz(mask)];
#endif
}

// --- loops -----------------------------------------------------------------------------------------------------------

// Open: there is no upper bound, and what is over the lower one is inside.
template <class K, bool Half, bool Open>
void sift_keys(const void* from, int64_t n, K low, K high, K* kept, Sifted<K>& found) {
  const Vec<K> lows = broadcast(low), highs = broadcast(high);
  Vec<K> largest = broadcast(found.largest);
  int64_t over = 0, between = 0, i = 0;
  for (; i + kWidth<K> <= n; i += kWidth<K>) {
    const Vec<K> v = load_keys<K, Half>(from, i);
    const unsigned above = less<K>(lows, v), inside = Open ? above : above & less<K>(v, highs);
    largest = v > largest ? v : largest;
    compress<K>(v, inside, kept + between);
    if (!Open) over += __builtin_popcount(above);
    between += __builtin_popcount(inside);
  }
  for (int j = 0; j < kWidth<K>; ++j) found.largest = largest[j] > found.largest ? largest[j] : found.largest;
  for (; i < n; ++i) {
    const K key = load_key<K, Half>(from, i);
    found.largest = key > found.largest ? key : found.largest;
    if (!Open) over += key > low;
    if (key > low && (Open || key < high)) kept[between++] = key;
  }
  found.over += Open ? between : over;
  found.kept += between;
}

template <class K, bool Half>
void sift_band(const void* from, int64_t n, K low, K high, K* kept, Sifted<K>& found) {
  if (high == kMagnitude<K>) return sift_keys<K, Half, true>(from, n, low, high, kept, found);
  sift_keys<K, Half, false>(from, n, low, high, kept, found);
}

template <class K, bool Half>
int64_t count_keys(const void* from, int64_t n, K key) {
  const Vec<K> keys = broadcast(key);
  int64_t below = 0, i = 0;
  for (; i + kWidth<K> <= n; i += kWidth<K>) below += __builtin_popcount(less<K>(load_keys<K, Half>(from, i), keys));
  for (; i < n; ++i) below += load_key<K, Half>(from, i) < key;
  return below;
}

template <class K, bool Half>
K largest_key(const void* from, int64_t n) {
  constexpr int kChains = 4;
  Vec<K> most[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth<K> <= n; i += kChains * kWidth<K>) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Vec<K> v = load_keys<K, Half>(from, i + c * kWidth<K>);
      most[c] = v > most[c] ? v : most[c];
    }
  }
  K largest = 0;
  for (int c = 0; c < kChains; ++c)
    for (int j = 0; j < kWidth<K>; ++j) largest = most[c][j] > largest ? most[c][j] : largest;
  for (; i < n; ++i) {
    const K key = load_key<K, Half>(from, i);
    largest = key > largest ? key : largest;
  }
  return largest;
}

inline void sift(DType dtype, const void* from, int64_t n, int32_t low, int32_t high, int32_t* kept,
                 Sifted<int32_t>& found) {
  if (dtype == DType::f32) return sift_band<int32_t, false>(from, n, low, high, kept, found);
  sift_band<int32_t, true>(from, n, low, high, kept, found);
}

inline void sift_wide(DType, const void* from, int64_t n, int64_t low, int64_t high, int64_t* kept,
                      Sifted<int64_t>& found) {
  sift_band<int64_t, false>(from, n, low, high, kept, found);
}

inline int64_t count_below(DType dtype, const void* from, int64_t n, int32_t key) {
  return dtype == DType::f32 ? count_keys<int32_t, false>(from, n, key) : count_keys<int32_t, true>(from, n, key);
}

inline int64_t count_below_wide(DType, const void* from, int64_t n, int64_t key) {
  return count_keys<int64_t, false>(from, n, key);
}

inline int32_t largest(DType dtype, const void* from, int64_t n) {
  return dtype == DType::f32 ? largest_key<int32_t, false>(from, n) : largest_key<int32_t, true>(from, n);
}

inline int64_t largest_wide(DType, const void* from, int64_t n) {
  return largest_key<int64_t, false>(from, n);
}

}  // namespace marquardt::MQ_ISA
