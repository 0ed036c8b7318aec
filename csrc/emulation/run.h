// One run of a grid, from the inside. Compiled without ThreadSanitizer (sanitizers.h).
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "emulation/device.h"
#include "emulation/machine.h"
#include "emulation/turn.h"

namespace marquardt::emulation {

constexpr unsigned kWarp = 32;

// Lanes of one warp that meet under one mask, again and again. What they bring and the address by which they are ordered
// alternate between two: a lane that is early for the next meeting disturbs nobody who has not left this one.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  unsigned count = 0;          // of meetings that are over
  const char* what = nullptr;  // of the one that gathers
  char order[2] = {};
  uint32_t words[2][kWarp][kMostWords];
};

struct Warp {
  uint32_t lanes = 0;  // that exist
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Thread;

struct Block {
  unsigned char* memory = nullptr;             // the guards and what lies between them: the shared memory
  unsigned arrived = 0, ended = 0, count = 0;  // at the barrier; and how many barriers are over
  Place at;                                    // of the barrier that gathers
  const Thread* first = nullptr;               // to arrive there
  char order[2] = {}, ends = 0;
  std::vector<Warp> warps;
};

enum class State { ready, waiting, ended };

class Run;

struct Thread : Seat {
  Context context;
  Run* run = nullptr;
  Block* home = nullptr;
  Warp* warp = nullptr;
  State state = State::ready;
  const char* what = "";  // it waits for
  uint32_t mask = 0;      // with these lanes; 0: with all of the CTA or the cluster
  Place at;
  bool in_cluster_barrier = false;
  unsigned cluster_count = 0;  // barriers of the cluster that were over when it arrived
};

// One cluster at work. Made anew for each: memory that two clusters share would be a race in the eyes of ThreadSanitizer,
// and an address by which both are ordered would hide one.
struct Cluster {
  std::vector<Block> blocks;
  std::unique_ptr<Thread[]> threads;
  unsigned arrived = 0, count = 0;
  char order[2] = {};
  std::unique_ptr<Thread*[]> ready;  // a ring with room for all threads; a thread is there once at most
  size_t head = 0, waiting = 0;
  size_t live = 0, started = 0;
};

class Run {
 public:
  Run(const char* name, const Grid& grid, const Machine& machine, const std::function<void()>& body);
  void all();

  // By the running thread `self`:
  void sync_block(Thread& self, const Place& at);
  const uint32_t (*meet(Thread& self, const char* what, uint32_t mask, const uint32_t* mine, int words, bool orders,
                        const Place& at))[kMostWords];
  void arrive_cluster(Thread& self, const Place& at);
  void wait_cluster(Thread& self, const Place& at);
  void* map_shared(Thread& self, const void* shared, size_t bytes, unsigned rank, const Place& at);
  void yield(Thread& self);
  [[noreturn]] void misuse(const Thread& self, const std::string& message, const Place& at) const;

 private:
  struct Stopped {};  // unwinds the other threads once one has failed

  void cluster_at(int64_t index);
  void finish(size_t keep);
  void seat(Thread& thread, unsigned rank, unsigned number, int64_t first_block);
  void take_memory(Block& block) const;
  void give_memory(Block& block);
  static void enter(void* thread);
  void end(Thread& self);
  void fail(std::exception_ptr error);

  void wake(Thread& thread);
  void wait(Thread& self, const char* what, uint32_t mask, const Place& at);
  void pass_on(Thread& self);
  Thread* next();
  uint64_t draw();
  std::string in_vain() const;

  const char* name_;
  Grid grid_;
  Machine machine_;
  const std::function<void()>& body_;
  uint64_t random_;
  Context host_;
  std::unique_ptr<Cluster> cluster_;
  std::vector<std::unique_ptr<Cluster>> over_;  // clusters that have run, the first `finished_` without their contexts
  size_t finished_ = 0;
  std::exception_ptr failure_;
  char finish_ = 0;
};

std::string text_of(const Place& at);

}  // namespace marquardt::emulation
