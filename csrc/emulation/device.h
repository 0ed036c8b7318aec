// What a running thread asks of the machine: where it is, and to meet others. For cuda.h and ptx.h.
//
// Order of memory, as ThreadSanitizer is told: __syncthreads, __syncwarp and the cluster barrier (arrive: release,
// wait: acquire) order; shuffles, votes and matrix instructions do not; atomics do where fences stand beside them. The
// launch orders the host before all threads, and all threads before the host. CTAs of different clusters are never
// ordered, although they run one after another: what one of them writes and another touches is a race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace marquardt::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// A copy that cp.async has begun. `group` counts the commits of the thread.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
};

struct Seat {
  Index thread, block, block_size, grid_size;
  unsigned char* shared = nullptr;  // the CTA's; null where the launch asked for none
  unsigned lane = 0, rank = 0, cluster = 1;
  std::vector<PendingCopy> copies;  // oldest first
  int64_t committed = 0;            // groups of copies
  bool fenced = false;              // there was a fence: atomics release
  void* last_atomic = nullptr;
};

extern constinit thread_local Seat* current;  // of the thread that runs

using Place = std::source_location;

void sync_block(const Place& at);
void sync_warp(uint32_t mask, const Place& at);
void yield();

void arrive_cluster(const Place& at);
void wait_cluster(const Place& at);
// The address in CTA `rank` of the cluster that `shared` has in this one.
void* map_shared(const void* shared, size_t bytes, unsigned rank, const Place& at);

// The warp's lanes of `mask` meet, each with `words` words, and see each other's: all[lane · words …]. Orders no memory.
constexpr int kMostWords = 12;
void exchange(const char* what, uint32_t mask, const uint32_t* mine, int words, uint32_t* all, const Place& at);
// The same for one value: what lane `source` brought.
uint64_t shuffle(uint32_t mask, uint64_t mine, unsigned source, const Place& at);
uint32_t vote(uint32_t mask, bool mine, const Place& at);

void fence();
void atomic_done(void* address);

// Ends the run with this message, and where it happened.
[[noreturn]] void misuse(const std::string& message, const Place& at);

inline void check_aligned(const void* address, size_t bytes, const char* what, const Place& at) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  misuse(std::string(what) + " no multiple of " + std::to_string(bytes), at);
}

}  // namespace marquardt::emulation
