// Every PTX instruction that the kernels name, as a function. For the meaning of each on the CPU see emulation/ptx.h.
#pragma once

#include <type_traits>

#include "core/cuda.h"

#if !defined(__CUDACC__)
#include "emulation/ptx.h"
#else

namespace marquardt::ptx {

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// --- cp.async: global to shared memory, without a register in between -------------------------------------------------
// Both addresses are multiples of the size. The bytes are there for this thread after the wait, for others after a
// barrier behind it.

__device__ inline void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ inline void copy_async_8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ inline void copy_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Ends a group: the copies since the last commit, possibly none.
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most the newest `Left` groups are on their way.
template <int Left>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// --- clusters (sm_90): CTAs that meet and read each other's shared memory ---------------------------------------------
// Older chips see a cluster of one, whose barrier does nothing: it does not replace __syncthreads.
// A CTA must not end before the others have read what they want of it.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Every thread of the cluster arrives, then waits; what was written before an arrive is seen after a wait.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// For those who wrote nothing that others read: they only say that they have read. No fence, which waits for all memory of
// the chip.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline unsigned cluster_address(const void* shared, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}
// What the CTA of that rank has where `shared` points to in this one.
__device__ inline double load_cluster(const double* shared, unsigned rank) {
  double x;
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(cluster_address(shared, rank)) : "memory");
  return x;
}
__device__ inline float load_cluster(const float* shared, unsigned rank) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(cluster_address(shared, rank)) : "memory");
  return x;
}
__device__ inline uint32_t load_cluster(const uint32_t* shared, unsigned rank) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(cluster_address(shared, rank)) : "memory");
  return x;
}
__device__ inline void store_cluster(double* shared, unsigned rank, double x) {
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(cluster_address(shared, rank)), "d"(x) : "memory");
}
__device__ inline void store_cluster(float* shared, unsigned rank, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(cluster_address(shared, rank)), "f"(x) : "memory");
}
__device__ inline void store_cluster(uint32_t* shared, unsigned rank, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(shared, rank)), "r"(x) : "memory");
}

#else

__device__ inline unsigned cluster_rank() {
  return 0;
}
__device__ inline unsigned cluster_size() {
  return 1;
}
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() {}
template <class T>
__device__ inline T load_cluster(const T* shared, unsigned) {
  return *shared;
}
template <class T>
__device__ inline void store_cluster(T* shared, unsigned, std::type_identity_t<T> x) {
  *shared = x;
}

#endif

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// --- global memory that is touched once: past L1 ----------------------------------------------------------------------
// Addresses are multiples of the size; what is loaded is not written by this launch.

__device__ inline uint4 load_16(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}
__device__ inline uint2 load_8(const void* global) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global));
  return v;
}
__device__ inline void store_16(void* global, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ inline void store_8(void* global, uint2 v) {
  asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(v.x), "r"(v.y) : "memory");
}

// --- two 16-bit numbers in a word -------------------------------------------------------------------------------------
// Rounded to nearest even; a NaN becomes 0x7fff.

__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline float low_bf16(uint32_t word) {
  return __uint_as_float(word << 16);
}
__device__ inline float high_bf16(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}
__device__ inline float low_f16(uint32_t word) {
  float x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x) : "r"(word));
  return x;
}
__device__ inline float high_f16(uint32_t word) {
  float x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(x) : "r"(word));
  return x;
}

}  // namespace marquardt::ptx

#endif

#include "core/ptx_matrix.h"
