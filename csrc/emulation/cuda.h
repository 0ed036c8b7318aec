// The names of CUDA, for g++. No more than the kernels use.
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/device.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (marquardt::emulation::current->thread)
#define blockIdx (marquardt::emulation::current->block)
#define blockDim (marquardt::emulation::current->block_size)
#define gridDim (marquardt::emulation::current->grid_size)

// --- vectors ---------------------------------------------------------------------------------------------------------

#define MQ_VECTOR_2(name, T)           \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) {  \
    return {x, y};                     \
  }

#define MQ_VECTOR_4(name, T)                                     \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name { \
    T x, y, z, w;                                                \
  };                                                             \
  inline name make_##name(T x, T y, T z, T w) {                  \
    return {x, y, z, w};                                         \
  }

MQ_VECTOR_2(int2, int)
MQ_VECTOR_2(uint2, unsigned)
MQ_VECTOR_2(float2, float)
MQ_VECTOR_2(double2, double)
MQ_VECTOR_2(longlong2, long long)
MQ_VECTOR_2(ulonglong2, unsigned long long)
MQ_VECTOR_4(int4, int)
MQ_VECTOR_4(uint4, unsigned)
MQ_VECTOR_4(float4, float)
#undef MQ_VECTOR_2
#undef MQ_VECTOR_4

// --- numbers ---------------------------------------------------------------------------------------------------------

namespace marquardt::emulation {

template <class To, class From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

}  // namespace marquardt::emulation

inline int __float_as_int(float x) {
  return marquardt::emulation::same_bits<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return marquardt::emulation::same_bits<unsigned>(x);
}
inline float __int_as_float(int x) {
  return marquardt::emulation::same_bits<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return marquardt::emulation::same_bits<float>(x);
}
inline long long __double_as_longlong(double x) {
  return marquardt::emulation::same_bits<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return marquardt::emulation::same_bits<double>(x);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
template <class T>
inline T __ldg(const T* from) {
  return *from;
}

// --- barriers, shuffles, votes ---------------------------------------------------------------------------------------

using MqPlace = marquardt::emulation::Place;

inline void __syncthreads(MqPlace at = MqPlace::current()) {
  marquardt::emulation::sync_block(at);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, MqPlace at = MqPlace::current()) {
  marquardt::emulation::sync_warp(mask, at);
}
// Lets others go first; the time is not waited for.
inline void __nanosleep(unsigned) {
  marquardt::emulation::yield();
}

namespace marquardt::emulation {

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
inline T shuffled(uint32_t mask, T mine, unsigned source, const Place& at) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return same_bits<T>(static_cast<Bits>(shuffle(mask, same_bits<Bits>(mine), source, at)));
}

// The part of the warp, `width` lanes, in which a shuffle stays: its first lane.
inline unsigned part_of(unsigned lane, int width, const Place& at) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) misuse("a shuffle's width must be 1, 2, 4, ... 32", at);
  return lane & ~(static_cast<unsigned>(width) - 1u);
}

}  // namespace marquardt::emulation

template <marquardt::emulation::Shuffled T>
inline T __shfl_sync(unsigned mask, T x, int source, int width = 32, MqPlace at = MqPlace::current()) {
  const unsigned first = marquardt::emulation::part_of(marquardt::emulation::current->lane, width, at);
  return marquardt::emulation::shuffled(mask, x, first + (static_cast<unsigned>(source) & (width - 1u)), at);
}
template <marquardt::emulation::Shuffled T>
inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, MqPlace at = MqPlace::current()) {
  const unsigned lane = marquardt::emulation::current->lane, source = lane ^ static_cast<unsigned>(lanes);
  const unsigned end = marquardt::emulation::part_of(lane, width, at) + static_cast<unsigned>(width);
  return marquardt::emulation::shuffled(mask, x, source < end ? source : lane, at);
}
template <marquardt::emulation::Shuffled T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned lanes, int width = 32, MqPlace at = MqPlace::current()) {
  const unsigned lane = marquardt::emulation::current->lane;
  const unsigned end = marquardt::emulation::part_of(lane, width, at) + static_cast<unsigned>(width);
  return marquardt::emulation::shuffled(mask, x, lanes < end - lane ? lane + lanes : lane, at);
}
template <marquardt::emulation::Shuffled T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned lanes, int width = 32, MqPlace at = MqPlace::current()) {
  const unsigned lane = marquardt::emulation::current->lane;
  const unsigned first = marquardt::emulation::part_of(lane, width, at);
  return marquardt::emulation::shuffled(mask, x, lanes <= lane - first ? lane - lanes : lane, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MqPlace at = MqPlace::current()) {
  return marquardt::emulation::vote(mask, predicate != 0, at);
}
inline int __any_sync(unsigned mask, int predicate, MqPlace at = MqPlace::current()) {
  return marquardt::emulation::vote(mask, predicate != 0, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MqPlace at = MqPlace::current()) {
  return marquardt::emulation::vote(mask, predicate == 0, at) == 0;
}

// --- atomics and fences ----------------------------------------------------------------------------------------------

inline void __threadfence() {
  marquardt::emulation::fence();
}
inline void __threadfence_block() {
  marquardt::emulation::fence();
}
inline void __threadfence_system() {
  marquardt::emulation::fence();
}

namespace marquardt::emulation {

template <class T, class... Of>
concept one_of = (std::same_as<T, Of> || ...);

using Ull = unsigned long long;

// Replaces *address by f(*address), as relaxed as on a GPU.
template <class T, class F>
inline T atomically(T* address, const F& f) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  atomic_done(address);
  return old;
}

}  // namespace marquardt::emulation

template <marquardt::emulation::one_of<int, unsigned, marquardt::emulation::Ull, float, double> T>
inline T atomicAdd(T* address, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [x](T old) {
    if constexpr (std::is_same_v<T, int>) {  // wraps around
      return static_cast<T>(static_cast<unsigned>(old) + static_cast<unsigned>(x));
    } else {
      return static_cast<T>(old + x);
    }
  });
}
template <marquardt::emulation::one_of<int, unsigned, long long, marquardt::emulation::Ull> T>
inline T atomicMax(T* address, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [x](T old) { return old < x ? x : old; });
}
template <marquardt::emulation::one_of<int, unsigned, long long, marquardt::emulation::Ull> T>
inline T atomicMin(T* address, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [x](T old) { return x < old ? x : old; });
}
template <marquardt::emulation::one_of<int, unsigned, marquardt::emulation::Ull> T>
inline T atomicOr(T* address, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [x](T old) { return old | x; });
}
template <marquardt::emulation::one_of<int, unsigned, marquardt::emulation::Ull> T>
inline T atomicAnd(T* address, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [x](T old) { return old & x; });
}
template <marquardt::emulation::one_of<int, unsigned, marquardt::emulation::Ull, float> T>
inline T atomicExch(T* address, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [x](T) { return x; });
}
template <marquardt::emulation::one_of<int, unsigned, marquardt::emulation::Ull> T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return marquardt::emulation::atomically(address, [=](T old) { return old == expected ? x : old; });
}
