// Runs CUDA grids on the CPU. Clusters run one after another; the threads of a cluster take turns, one at a time, and
// the turn changes where they meet: at barriers, shuffles, and ends. So a run repeats exactly, a grid that cannot go on
// is noticed rather than waited for, and a wrong order shows.
//
// What tells right from wrong is kept apart from who runs when: to ThreadSanitizer the turn is invisible, and only what
// orders memory on a GPU orders it here (device.h). Shared memory has exactly the size that was asked for, starts as
// NaN, and is gone as soon as the last thread of its CTA has ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace marquardt::emulation {

enum class Mode {
  fibers,   // all threads in one thread of the system: quick
  threads,  // every thread is one of the system
};

struct Machine {
  Mode mode = Mode::fibers;
  // Order of clusters, and of threads where they meet: 0 in the order of their numbers, else drawn.
  uint64_t seed = 0;
  // Only CTAs first_block ≤ i < first_block + blocks run, rounded to clusters; −1: to the end of the grid.
  int64_t first_block = 0, blocks = -1;
};

// For runs from now on, of every thread. The initial machine is a Machine{}.
void set_machine(const Machine& machine);
void set_machine(Mode mode, uint64_t seed);
Machine machine();

struct Grid {
  unsigned grid = 1;     // CTAs
  unsigned block = 32;   // threads of a CTA
  unsigned cluster = 1;  // CTAs of a cluster
  size_t shared = 0;     // bytes of shared memory of a CTA
};

// Calls `body` once for every thread of the grid, and returns when all have ended. Throws what a body threw first, or a
// std::runtime_error that says what no GPU would have survived: a grid out of range, threads that wait for each other
// in vain, shared memory out of bounds.
void run(const char* name, const Grid& grid, const std::function<void()>& body);

}  // namespace marquardt::emulation
