// The functions of core/ptx.h on the CPU.
#pragma once

#include "core/cuda.h"
#include "core/half.h"

namespace marquardt::ptx {

using emulation::Place;

// --- cp.async --------------------------------------------------------------------------------------------------------
// As late as can be: the bytes arrive when the thread waits for them. Until then NaN lies there, so that somebody who
// still reads what was there before, or reads too early, gets that.

template <int Bytes>
inline void begin_copy(void* shared, const void* global, const Place& at) {
  emulation::check_aligned(shared, Bytes, "cp.async to an address that is", at);
  emulation::check_aligned(global, Bytes, "cp.async from an address that is", at);
  const volatile unsigned char* from = static_cast<const unsigned char*>(global);
  (void)from[0];
  (void)from[Bytes - 1];  // out of bounds shows here, not at the wait
  std::memset(shared, 0xff, Bytes);
  emulation::current->copies.push_back({shared, global, Bytes, emulation::current->committed});
}
inline void copy_async_16(void* shared, const void* global, Place at = Place::current()) {
  begin_copy<16>(shared, global, at);
}
inline void copy_async_8(void* shared, const void* global, Place at = Place::current()) {
  begin_copy<8>(shared, global, at);
}
inline void copy_async_4(void* shared, const void* global, Place at = Place::current()) {
  begin_copy<4>(shared, global, at);
}
inline void copy_async_commit() {
  ++emulation::current->committed;
}
template <int Left>
inline void copy_async_wait() {
  auto& copies = emulation::current->copies;
  const int64_t end = emulation::current->committed - Left;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < end; ++done)
    std::memcpy(copies[done].to, copies[done].from, static_cast<size_t>(copies[done].bytes));
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

// --- clusters --------------------------------------------------------------------------------------------------------
// In a launch without clusters the barrier does nothing, as on sm_80.

inline unsigned cluster_rank() {
  return emulation::current->rank;
}
inline unsigned cluster_size() {
  return emulation::current->cluster;
}
inline void cluster_arrive(Place at = Place::current()) {
  emulation::arrive_cluster(at);
}
inline void cluster_arrive_relaxed(Place at = Place::current()) {
  emulation::arrive_cluster(at);
}
inline void cluster_wait(Place at = Place::current()) {
  emulation::wait_cluster(at);
}
inline void cluster_sync(Place at = Place::current()) {
  emulation::arrive_cluster(at);
  emulation::wait_cluster(at);
}

template <class T>
concept InCluster = std::is_same_v<T, double> || std::is_same_v<T, float> || std::is_same_v<T, uint32_t>;

template <InCluster T>
inline T load_cluster(const T* shared, unsigned rank, Place at = Place::current()) {
  return *static_cast<const T*>(emulation::map_shared(shared, sizeof(T), rank, at));
}
template <InCluster T>
inline void store_cluster(T* shared, unsigned rank, std::type_identity_t<T> x, Place at = Place::current()) {
  *static_cast<T*>(emulation::map_shared(shared, sizeof(T), rank, at)) = x;
}

// --- global memory that is touched once ------------------------------------------------------------------------------

inline uint4 load_16(const void* global, Place at = Place::current()) {
  emulation::check_aligned(global, 16, "16 bytes are read from an address that is", at);
  return *static_cast<const uint4*>(global);
}
inline uint2 load_8(const void* global, Place at = Place::current()) {
  emulation::check_aligned(global, 8, "8 bytes are read from an address that is", at);
  return *static_cast<const uint2*>(global);
}
inline void store_16(void* global, uint4 v, Place at = Place::current()) {
  emulation::check_aligned(global, 16, "16 bytes are written to an address that is", at);
  *static_cast<uint4*>(global) = v;
}
inline void store_8(void* global, uint2 v, Place at = Place::current()) {
  emulation::check_aligned(global, 8, "8 bytes are written to an address that is", at);
  *static_cast<uint2*>(global) = v;
}

// --- two 16-bit numbers in a word ------------------------------------------------------------------------------------

inline uint32_t packed(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  const auto half = [](float x) { return std::isnan(x) ? uint16_t{0x7fff} : bf16_of(x); };
  return packed(half(low), half(high));
}
inline uint32_t pack_f16(float low, float high) {
  const auto half = [](float x) { return std::isnan(x) ? uint16_t{0x7fff} : f16_of(x); };
  return packed(half(low), half(high));
}
inline float low_bf16(uint32_t word) {
  return float_of_bf16(static_cast<uint16_t>(word));
}
inline float high_bf16(uint32_t word) {
  return float_of_bf16(static_cast<uint16_t>(word >> 16));
}
inline float low_f16(uint32_t word) {
  return float_of_f16(static_cast<uint16_t>(word));
}
inline float high_f16(uint32_t word) {
  return float_of_f16(static_cast<uint16_t>(word >> 16));
}

}  // namespace marquardt::ptx
