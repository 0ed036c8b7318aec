// What running threads ask for: to meet, and to be told of mistakes.
#include "emulation/device.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "emulation/run.h"
#include "emulation/sanitizers.h"

namespace marquardt::emulation {

// file.cu:12, with the folder it lies in
std::string text_of(const Place& at) {
  const std::string file = at.file_name();
  size_t slash = file.rfind('/');
  if (slash != std::string::npos && slash > 0) slash = file.rfind('/', slash - 1);
  return file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" + std::to_string(at.line());
}

void Run::misuse(const Thread& self, const std::string& message, const Place& at) const {
  throw std::runtime_error(std::string(name_) + ": block " + std::to_string(self.block.x) + ", thread " +
                           std::to_string(self.thread.x) + ": " + message +
                           (at.line() == 0 ? "" : " (" + text_of(at) + ")"));
}

// --- barriers --------------------------------------------------------------------------------------------------------

void Run::sync_block(Thread& self, const Place& at) {
  Block& home = *self.home;
  if (home.arrived == 0) {
    home.at = at;
    home.first = &self;
  } else if (home.at.line() != at.line() || std::strcmp(home.at.file_name(), at.file_name()) != 0) {
    misuse(self,
           "divergent __syncthreads: thread " + std::to_string(home.first->thread.x) + " waits at another (" +
               text_of(home.at) + ")",
           at);
  }
  char* order = &home.order[home.count % 2];
  release(order);
  if (++home.arrived < grid_.block) {
    wait(self, "__syncthreads", 0, at);
  } else {
    home.arrived = 0;
    ++home.count;
    const size_t number = static_cast<size_t>(&home - cluster_->blocks.data()) * grid_.block;
    for (unsigned i = 0; i < grid_.block; ++i) wake(cluster_->threads[number + i]);
    pass_on(self);
  }
  acquire(order);
}

const uint32_t (*Run::meet(Thread& self, const char* what, uint32_t mask, const uint32_t* mine, int words, bool orders,
                           const Place& at)) [kMostWords] {
  const uint32_t lane = 1u << self.lane;
  if ((mask & lane) == 0) misuse(self, std::string(what) + ": the mask does not name the lane that calls", at);
  Meeting* found = nullptr;
  for (const auto& m : self.warp->meetings)
    if (m->mask == mask) found = m.get();
  if (found == nullptr) {
    self.warp->meetings.push_back(std::make_unique<Meeting>());
    found = self.warp->meetings.back().get();
    found->mask = mask;
  }
  Meeting& m = *found;
  if (m.arrived == 0) {
    m.what = what;
  } else if (std::strcmp(m.what, what) != 0) {
    misuse(self, std::string(what) + ": other lanes of the mask wait at " + m.what, at);
  }
  const unsigned side = m.count % 2;
  for (int i = 0; i < words; ++i) m.words[side][self.lane][i] = mine[i];
  if (orders) release(&m.order[side]);
  m.arrived |= lane;
  if (m.arrived != (mask & self.warp->lanes)) {
    wait(self, what, mask, at);
  } else {
    m.arrived = 0;
    ++m.count;
    Thread* first = &self - self.lane;
    for (unsigned i = 0; i < kWarp; ++i)
      if ((mask & self.warp->lanes) >> i & 1u) wake(first[i]);
    pass_on(self);
  }
  if (orders) acquire(&m.order[side]);
  return m.words[side];
}

void Run::arrive_cluster(Thread& self, const Place& at) {
  if (self.in_cluster_barrier) misuse(self, "cluster_arrive without a cluster_wait after the one before", at);
  self.in_cluster_barrier = true;
  if (grid_.cluster == 1) return;
  Cluster& c = *cluster_;
  self.cluster_count = c.count;
  release(&c.order[c.count % 2]);
  const size_t threads = static_cast<size_t>(grid_.cluster) * grid_.block;
  if (++c.arrived < threads) return;
  c.arrived = 0;
  ++c.count;
  for (size_t i = 0; i < threads; ++i)
    if (c.threads[i].state == State::waiting && c.threads[i].in_cluster_barrier && c.threads[i].mask == 0 &&
        std::strcmp(c.threads[i].what, "cluster_wait") == 0)
      wake(c.threads[i]);
}

void Run::wait_cluster(Thread& self, const Place& at) {
  if (!self.in_cluster_barrier) misuse(self, "cluster_wait without a cluster_arrive", at);
  if (grid_.cluster > 1) {
    if (self.cluster_count == cluster_->count) {
      wait(self, "cluster_wait", 0, at);
    } else {
      yield(self);
    }
    acquire(&cluster_->order[self.cluster_count % 2]);
  }
  self.in_cluster_barrier = false;
}

void* Run::map_shared(Thread& self, const void* shared, size_t bytes, unsigned rank, const Place& at) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(shared) - self.shared);
  if (self.shared == nullptr || offset > grid_.shared || bytes > grid_.shared - offset) {
    misuse(self, "an address outside of the CTA's " + std::to_string(grid_.shared) + " bytes of shared memory", at);
  }
  if (offset % bytes != 0) misuse(self, "an address of the cluster that is not a multiple of the size", at);
  if (rank >= grid_.cluster) {
    misuse(self, "there is no CTA " + std::to_string(rank) + " in a cluster of " + std::to_string(grid_.cluster), at);
  }
  const Thread& there = cluster_->threads[static_cast<size_t>(rank) * grid_.block];
  if (there.home->memory == nullptr) {
    misuse(self, "the CTA of rank " + std::to_string(rank) + " has ended, and its shared memory is gone", at);
  }
  return there.shared + offset;
}

void Run::yield(Thread& self) {
  wake(self);
  pass_on(self);
}

// --- by whoever runs -------------------------------------------------------------------------------------------------

namespace {

Thread& self() {
  if (current == nullptr) throw std::logic_error("a device function was called outside of a kernel");
  return *static_cast<Thread*>(current);
}

}  // namespace

void sync_block(const Place& at) {
  Thread& t = self();
  t.run->sync_block(t, at);
}

void sync_warp(uint32_t mask, const Place& at) {
  Thread& t = self();
  t.run->meet(t, "__syncwarp", mask, nullptr, 0, true, at);
}

void yield() {
  Thread& t = self();
  t.run->yield(t);
}

void arrive_cluster(const Place& at) {
  Thread& t = self();
  t.run->arrive_cluster(t, at);
}

void wait_cluster(const Place& at) {
  Thread& t = self();
  t.run->wait_cluster(t, at);
}

void* map_shared(const void* shared, size_t bytes, unsigned rank, const Place& at) {
  Thread& t = self();
  return t.run->map_shared(t, shared, bytes, rank, at);
}

void exchange(const char* what, uint32_t mask, const uint32_t* mine, int words, uint32_t* all, const Place& at) {
  Thread& t = self();
  if ((mask & ~t.warp->lanes) != 0) t.run->misuse(t, std::string(what) + ": the warp has not all of these lanes", at);
  const auto* brought = t.run->meet(t, what, mask, mine, words, false, at);
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < words; ++i)
      all[lane * static_cast<unsigned>(words) + static_cast<unsigned>(i)] = brought[lane][i];
}

uint64_t shuffle(uint32_t mask, uint64_t mine, unsigned source, const Place& at) {
  Thread& t = self();
  if (((mask & t.warp->lanes) >> source & 1u) == 0) {
    t.run->misuse(t, "a shuffle reads lane " + std::to_string(source) + ", which does not take part", at);
  }
  const uint32_t words[2] = {static_cast<uint32_t>(mine), static_cast<uint32_t>(mine >> 32)};
  const auto* brought = t.run->meet(t, "a shuffle", mask, words, 2, false, at);
  return brought[source][0] | static_cast<uint64_t>(brought[source][1]) << 32;
}

uint32_t vote(uint32_t mask, bool mine, const Place& at) {
  Thread& t = self();
  const uint32_t word = mine ? 1u : 0u;
  const auto* brought = t.run->meet(t, "a vote", mask, &word, 1, false, at);
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if ((mask & t.warp->lanes) >> lane & 1u) ballot |= brought[lane][0] << lane;
  return ballot;
}

// An atomic behind a fence releases all that was before it, itself included; a fence behind an atomic acquires.
void fence() {
  Thread& t = self();
  t.fenced = true;
  if (t.last_atomic != nullptr) acquire(t.last_atomic);
  t.last_atomic = nullptr;
}

void atomic_done(void* address) {
  Thread& t = self();
  if (t.fenced) release(address);
  t.last_atomic = address;
}

void misuse(const std::string& message, const Place& at) {
  Thread& t = self();
  t.run->misuse(t, message, at);
}

}  // namespace marquardt::emulation
