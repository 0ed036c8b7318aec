// Two neighbouring order statistics of a sample's keys by one CTA: a histogram of eleven bits a pass, from the top, among
// the keys that share the bits found so far. Counts are integers, so the order of the CTA's threads does not matter.
#pragma once

#include <type_traits>

#include "core/cuda.h"
#include "core/ptx.h"
#include "select/select.h"

namespace marquardt {

using Key = unsigned long long;

constexpr int kSelectThreads = 512;  // of a CTA, at most
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// The shared memory of a CTA.
struct SelectShared {
  unsigned bins[kBins];
  Key largest;      // key
  Key prefix;       // the bits of key k found so far
  Key above;        // the smallest key above key k
  int64_t rank;     // of key k among those with this prefix
  unsigned in_bin;  // keys with this prefix
};

// U: an unsigned type as wide as the numbers.
template <class U>
MQ_DEVICE inline Key key_of(U bits) {
  return static_cast<Key>(bits) & (~Key{0} >> (65 - 8 * static_cast<int>(sizeof(U))));
}

// Calls f(key) for every number of a sample, the numbers shared out among the threads.
template <class U, class F>
MQ_DEVICE inline void for_each_key(const U* x, int64_t n, const F& f) {
  constexpr int V = 16 / static_cast<int>(sizeof(U));
  const int64_t thread = threadIdx.x, threads = blockDim.x;
  const int64_t vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? n / V : 0;
  for (int64_t i = thread; i < vectors; i += threads) {
    const uint4 q = ptx::load_16(x + i * V);
    if constexpr (sizeof(U) == 8) {
      f(key_of<U>(static_cast<U>(q.y) << 32 | q.x));
      f(key_of<U>(static_cast<U>(q.w) << 32 | q.z));
    } else if constexpr (sizeof(U) == 4) {
      f(key_of<U>(q.x)), f(key_of<U>(q.y)), f(key_of<U>(q.z)), f(key_of<U>(q.w));
    } else {
      f(key_of<U>(static_cast<U>(q.x))), f(key_of<U>(static_cast<U>(q.x >> 16)));
      f(key_of<U>(static_cast<U>(q.y))), f(key_of<U>(static_cast<U>(q.y >> 16)));
      f(key_of<U>(static_cast<U>(q.z))), f(key_of<U>(static_cast<U>(q.z >> 16)));
      f(key_of<U>(static_cast<U>(q.w))), f(key_of<U>(static_cast<U>(q.w >> 16)));
    }
  }
  for (int64_t i = vectors * V + thread; i < n; i += threads) f(key_of<U>(x[i]));
}

// The largest key into shared.largest, which is 0 before; seen by all threads.
template <class U>
MQ_DEVICE inline void find_largest(const U* x, int64_t n, SelectShared& shared) {
  Key largest = 0;
  for_each_key<U>(x, n, [&](Key key) { largest = key > largest ? key : largest; });
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Key other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % 32 == 0) atomicMax(&shared.largest, largest);
  __syncthreads();
}

// By the first warp: the bin that holds the key of shared.rank, whose `width` bits are added to the prefix.
MQ_DEVICE inline void choose_bin(SelectShared& shared, int width) {
  constexpr int kEach = kBins / 32;  // bins of a lane
  const int lane = static_cast<int>(threadIdx.x);
  int64_t own = 0;
  for (int j = 0; j < kEach; ++j) own += shared.bins[lane * kEach + (j + lane) % kEach];  // lanes in different banks
  int64_t end = own;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, end, static_cast<unsigned>(lanes));
    if (lane >= lanes) end += other;
  }
  const int64_t rank = shared.rank;
  int64_t before = end - own;
  __syncwarp();  // everyone has read the rank
  if (rank < before || rank >= end) return;
  int bin = lane * kEach;
  while (rank >= before + shared.bins[bin]) before += shared.bins[bin++];
  shared.rank = rank - before;
  shared.in_bin = shared.bins[bin];
  shared.prefix = shared.prefix << width | static_cast<Key>(bin);
}

// Key k, by all threads; shared.rank and shared.in_bin then say how many keys are equal to it.
template <class U>
MQ_DEVICE inline Key find_key(const U* x, int64_t n, int64_t k, SelectShared& shared) {
  if (threadIdx.x == 0) shared.prefix = 0, shared.rank = k;
  int left = 8 * static_cast<int>(sizeof(U)) - 1;  // bits below the prefix
  while (left > 0) {
    const int width = left < kDigitBits ? left : kDigitBits, shift = left - width;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) shared.bins[i] = 0;
    __syncthreads();
    const Key prefix = shared.prefix;
    for_each_key<U>(x, n, [&](Key key) {
      if (key >> left == prefix) atomicAdd(&shared.bins[(key >> shift) & (kBins - 1) & ((1 << width) - 1)], 1u);
    });
    __syncthreads();
    if (threadIdx.x < 32) choose_bin(shared, width);
    __syncthreads();
    left = shift;
  }
  return shared.prefix;
}

// The smallest key above `key`, by all threads; there is one.
template <class U>
MQ_DEVICE inline Key find_above(const U* x, int64_t n, Key key, SelectShared& shared) {
  Key above = ~Key{0};
  for_each_key<U>(x, n, [&](Key other) { above = other > key && other < above ? other : above; });
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Key other = __shfl_xor_sync(0xffffffffu, above, lanes);
    above = other < above ? other : above;
  }
  if (threadIdx.x % 32 == 0) atomicMin(&shared.above, above);
  __syncthreads();
  return shared.above;
}

}  // namespace marquardt
