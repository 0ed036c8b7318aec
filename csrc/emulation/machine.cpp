// Who runs when. What the threads ask for while they run is in device.cpp.
#include "emulation/machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "emulation/run.h"
#include "emulation/sanitizers.h"

namespace marquardt::emulation {

constinit thread_local Seat* current = nullptr;

namespace {

std::mutex machine_mutex;
Machine the_machine;

constexpr int64_t kMostBlocks = 2147483647;
constexpr unsigned kMostThreads = 1024, kMostInCluster = 16;
constexpr size_t kMostShared = 227 * 1024;

// Bytes on both sides of shared memory that nobody may write; AddressSanitizer has its own.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 128;
#endif
constexpr unsigned char kGuardByte = 0xa5;

// Threads of clusters that have run which stay until the run is over, for what ThreadSanitizer remembers of them.
#if defined(MARQUARDT_TSAN)
constexpr size_t kKeptThreads = 512;
#else
constexpr size_t kKeptThreads = 0;
#endif

void check(const char* name, const Grid& g) {
  const char* wrong = g.grid < 1 || g.grid > kMostBlocks            ? "a grid has 1 to 2147483647 CTAs"
                      : g.block < 1 || g.block > kMostThreads       ? "a CTA has 1 to 1024 threads"
                      : g.cluster < 1 || g.cluster > kMostInCluster ? "a cluster has 1 to 16 CTAs"
                      : g.grid % g.cluster != 0                     ? "a grid consists of whole clusters"
                      : g.shared > kMostShared                      ? "a CTA has up to 232448 bytes of shared memory"
                                                                    : nullptr;
  if (wrong == nullptr) return;
  throw std::runtime_error(std::string(name) + ": launch failed: " + wrong + " (grid " + std::to_string(g.grid) +
                           ", block " + std::to_string(g.block) + ", cluster " + std::to_string(g.cluster) +
                           ", shared " + std::to_string(g.shared) + ")");
}

}  // namespace

void set_machine(const Machine& machine) {
  const std::lock_guard<std::mutex> lock(machine_mutex);
  the_machine = machine;
}

void set_machine(Mode mode, uint64_t seed) {
  set_machine(Machine{.mode = mode, .seed = seed});
}

Machine machine() {
  const std::lock_guard<std::mutex> lock(machine_mutex);
  return the_machine;
}

void run(const char* name, const Grid& grid, const std::function<void()>& body) {
  if (current != nullptr) throw std::logic_error(std::string(name) + ": a kernel cannot launch another");
  check(name, grid);
  Run(name, grid, machine(), body).all();
}

Run::Run(const char* name, const Grid& grid, const Machine& machine, const std::function<void()>& body)
    : name_(name), grid_(grid), machine_(machine), body_(body), random_(machine.seed) {}

// --- the grid --------------------------------------------------------------------------------------------------------

void Run::all() {
  const int64_t size = grid_.cluster, clusters = grid_.grid / size;
  const int64_t first = std::clamp<int64_t>(machine_.first_block / size, 0, clusters);
  const int64_t last = machine_.blocks < 0 ? clusters : (machine_.first_block + machine_.blocks + size - 1) / size;
  const int64_t count = std::clamp<int64_t>(last - first, 0, clusters - first);
  // With a seed: from a drawn cluster on, in drawn steps that reach every one.
  int64_t start = 0, step = 1;
  if (machine_.seed != 0 && count > 1) {
    start = static_cast<int64_t>(draw() % static_cast<uint64_t>(count));
    do {
      step = 1 + static_cast<int64_t>(draw() % static_cast<uint64_t>(count));
    } while (std::gcd(step, count) != 1);
  }
  if (machine_.mode == Mode::fibers) Fibers::adopt(host_);
  for (int64_t i = 0, at = start; i < count && failure_ == nullptr; ++i, at = (at + step) % count)
    cluster_at(first + at);
  finish(0);
  acquire(&finish_);
  if (failure_ != nullptr) std::rethrow_exception(failure_);
}

void Run::cluster_at(int64_t index) {
  const bool fibers = machine_.mode == Mode::fibers;
  const size_t threads = static_cast<size_t>(grid_.cluster) * grid_.block;
  cluster_ = std::make_unique<Cluster>();
  Cluster& c = *cluster_;
  c.blocks.resize(grid_.cluster);
  c.threads = std::make_unique<Thread[]>(threads);
  c.ready = std::make_unique<Thread*[]>(threads);
  for (unsigned rank = 0; rank < grid_.cluster; ++rank) {
    take_memory(c.blocks[rank]);
    c.blocks[rank].warps.resize((grid_.block + kWarp - 1) / kWarp);
    for (unsigned i = 0; i < grid_.block; ++i)
      seat(c.threads[static_cast<size_t>(rank) * grid_.block + i], rank, i, index * grid_.cluster);
  }
  for (size_t i = 0; i < threads && failure_ == nullptr; ++i) {
    Thread& t = c.threads[i];
    if (!(fibers ? Fibers::start(t.context) : Threads::start(t.context))) {
      fail(std::make_exception_ptr(std::runtime_error(std::string(name_) + ": the system gives no more than " +
                                                      std::to_string(i) + " threads")));
      break;
    }
    ++c.live, ++c.started;
    wake(t);
  }
  if (Thread* begin = next(); begin != nullptr)
    fibers ? Fibers::pass(host_, begin->context) : Threads::pass(host_, begin->context);
  current = nullptr;
  if (failure_ != nullptr) {
    acquire(&finish_);
    for (Block& block : c.blocks) give_memory(block);
  }
  over_.push_back(std::move(cluster_));
  finish(kKeptThreads / threads);
#if !defined(MARQUARDT_TSAN)
  over_.clear();
  finished_ = 0;
#endif
}

// Ends the contexts of clusters that have run, but for the last `keep`. Their memory stays if ThreadSanitizer watches:
// threads took some of it, and the host may give it back only when it is ordered behind them.
void Run::finish(size_t keep) {
  for (; finished_ + keep < over_.size(); ++finished_) {
    Cluster& c = *over_[finished_];
    for (size_t i = 0; i < c.started; ++i) {
      if (machine_.mode == Mode::fibers) {
        Fibers::finish(c.threads[i].context);
      } else {
        Threads::finish(c.threads[i].context);
      }
    }
  }
  Threads::gather();
}

void Run::seat(Thread& t, unsigned rank, unsigned number, int64_t first_block) {
  t.run = this;
  t.home = &cluster_->blocks[rank];
  t.warp = &t.home->warps[number / kWarp];
  t.thread.x = number;
  t.block.x = static_cast<unsigned>(first_block) + rank;
  t.block_size = {grid_.block, 1, 1};
  t.grid_size = {grid_.grid, 1, 1};
  t.shared = t.home->memory == nullptr ? nullptr : t.home->memory + kGuard;
  t.lane = number % kWarp;
  t.rank = rank;
  t.cluster = grid_.cluster;
  t.warp->lanes |= 1u << t.lane;
  t.context.entry = &Run::enter;
  t.context.argument = &t;
}

// --- shared memory ---------------------------------------------------------------------------------------------------

void Run::take_memory(Block& block) const {
  if (grid_.shared == 0) return;
  void* place = nullptr;
  if (posix_memalign(&place, 128, grid_.shared + 2 * kGuard) != 0) throw std::bad_alloc();
  block.memory = static_cast<unsigned char*>(place);
  std::memset(block.memory, kGuardByte, grid_.shared + 2 * kGuard);
  std::memset(block.memory + kGuard, 0xff, grid_.shared);
}

void Run::give_memory(Block& block) {
  if (block.memory == nullptr) return;
  for (size_t i = 0; i < kGuard && failure_ == nullptr; ++i) {
    const bool before = block.memory[i] != kGuardByte;
    if (!before && block.memory[kGuard + grid_.shared + i] == kGuardByte) continue;
    const auto number = static_cast<size_t>(&block - cluster_->blocks.data());
    fail(std::make_exception_ptr(std::runtime_error(
        std::string(name_) + ": block " + std::to_string(cluster_->threads[number * grid_.block].block.x) + " has " +
        std::to_string(grid_.shared) + " bytes of shared memory and wrote to byte " +
        (before ? "-" + std::to_string(kGuard - i) : std::to_string(grid_.shared + i)))));
  }
  std::free(block.memory);
  block.memory = nullptr;
}

// --- a thread's life -------------------------------------------------------------------------------------------------

void Run::enter(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  Run& run = *self.run;
  current = &self;
  try {
    if (run.failure_ == nullptr) {
      run.body_();
      const bool copies = !self.copies.empty();
      if (copies) run.misuse(self, "ends before its copies have arrived (cp.async without a wait)", Place());
      if (self.in_cluster_barrier) run.misuse(self, "ends between cluster_arrive and cluster_wait", Place());
    }
  } catch (const Stopped&) {
  } catch (...) {
    run.fail(std::current_exception());
  }
  run.end(self);
}

// The last thread of a CTA takes the shared memory with it. For ThreadSanitizer that is a write behind all that the CTA
// itself did, but not behind what other CTAs of the cluster do without a barrier.
void Run::end(Thread& self) {
  Block& home = *self.home;
  self.state = State::ended;
  --cluster_->live;
  release(&home.ends);
  if (++home.ended == grid_.block) {
    acquire(&home.ends);
    give_memory(home);
  }
  Thread* after = next();
  if (after == nullptr && cluster_->live > 0) {
    fail(std::make_exception_ptr(std::runtime_error(in_vain())));
    after = next();
  }
  release(&finish_);
  Context& to = after == nullptr ? host_ : after->context;
  if (machine_.mode == Mode::fibers) Fibers::leave(self.context, to);
  Threads::leave(self.context, to);
}

// Keeps the first failure and lets everybody go on, to unwind.
void Run::fail(std::exception_ptr error) {
  if (failure_ != nullptr) return;
  failure_ = std::move(error);
  const size_t threads = static_cast<size_t>(grid_.cluster) * grid_.block;
  for (size_t i = 0; i < threads; ++i)
    if (cluster_->threads[i].state == State::waiting) wake(cluster_->threads[i]);
}

// --- the turn --------------------------------------------------------------------------------------------------------

void Run::wake(Thread& thread) {
  Cluster& c = *cluster_;
  thread.state = State::ready;
  c.ready[(c.head + c.waiting++) % (c.blocks.size() * grid_.block)] = &thread;
}

Thread* Run::next() {
  Cluster& c = *cluster_;
  if (c.waiting == 0) return nullptr;
  const size_t room = c.blocks.size() * grid_.block;
  if (machine_.seed != 0) std::swap(c.ready[c.head], c.ready[(c.head + draw() % c.waiting) % room]);
  Thread* thread = c.ready[c.head];
  c.head = (c.head + 1) % room;
  --c.waiting;
  return thread;
}

void Run::wait(Thread& self, const char* what, uint32_t mask, const Place& at) {
  self.state = State::waiting;
  self.what = what;
  self.mask = mask;
  self.at = at;
  pass_on(self);
}

void Run::pass_on(Thread& self) {
  Thread* to = next();
  if (to == nullptr) {
    fail(std::make_exception_ptr(std::runtime_error(in_vain())));
    to = next();
  }
  if (to != &self) {
    if (machine_.mode == Mode::fibers) {
      Fibers::pass(self.context, to->context);
    } else {
      Threads::pass(self.context, to->context);
    }
    current = &self;
  }
  if (failure_ != nullptr) throw Stopped();
}

// xorshift64*
uint64_t Run::draw() {
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  return (random_ * 0x2545f4914f6cdd1dull) >> 16;
}

// Says of everybody where he stands, neighbours together.
std::string Run::in_vain() const {
  const auto place = [](const Thread& t) {
    char mask[32] = "";
    if (t.mask != 0) std::snprintf(mask, sizeof(mask), " of lanes 0x%08x", t.mask);
    return t.state == State::ended ? "" : std::string(t.what) + mask + " (" + text_of(t.at) + ")";
  };
  constexpr int kMostGroups = 12;
  std::string text = std::string(name_) + ": no thread can go on";
  int groups = 0;
  for (unsigned rank = 0; rank < grid_.cluster; ++rank) {
    const Thread* t = &cluster_->threads[static_cast<size_t>(rank) * grid_.block];
    for (unsigned i = 0; i < grid_.block;) {
      const std::string here = place(t[i]);
      unsigned end = i + 1;
      while (end < grid_.block && place(t[end]) == here) ++end;
      if (++groups > kMostGroups) return text + "; ...";
      const bool one = end == i + 1;
      text += i == 0 ? "; block " + std::to_string(t[i].block.x) + ": " : ", ";
      text += one ? "thread " + std::to_string(i) : "threads " + std::to_string(i) + "-" + std::to_string(end - 1);
      text += here.empty() ? " ended" : (one ? " waits at " : " wait at ") + here;
      i = end;
    }
  }
  return text;
}

}  // namespace marquardt::emulation
