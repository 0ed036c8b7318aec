#include "emulation/turn.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "emulation/sanitizers.h"

namespace marquardt::emulation {
namespace {

constexpr size_t kStack = 256 * 1024, kPage = 4096;

// Stacks of fibers, kept for the next run of this thread of the system. Memory is taken as it is touched.
class Stacks {
 public:
  ~Stacks() {
    for (char* stack : free_) munmap(stack - kPage, kStack + kPage);
  }
  void* take() {
    if (!free_.empty()) {
      char* stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* place =
        mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED || mprotect(place, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(place) + kPage;
  }
  void give(void* stack) {
#if defined(MARQUARDT_TSAN)
    munmap(static_cast<char*>(stack) - kPage, kStack + kPage);  // two fibers on one stack would be a race
#else
    free_.push_back(static_cast<char*>(stack));
#endif
  }

 private:
  std::vector<char*> free_;
};

thread_local Stacks stacks;
thread_local Context* starting = nullptr;  // the fiber that begins, for fiber_entry

}  // namespace

// --- the switch of stacks --------------------------------------------------------------------------------------------

#if !defined(MARQUARDT_UCONTEXT)

// Saves what a called function must keep, and goes on where `to` was left.
extern "C" void marquardt_switch_stack(void** from, void* to);
asm(R"(
  .text
  .p2align 4
  .hidden marquardt_switch_stack
  .globl marquardt_switch_stack
  .type marquardt_switch_stack, @function
marquardt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size marquardt_switch_stack, . - marquardt_switch_stack
)");

static void prepare(Context& context, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(static_cast<char*>(context.stack) + kStack);
  *--top = nullptr;                              // where entry would return to: 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);       // where the switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers
  context.top = top;
}

static void switch_stack(Context& from, Context& to) {
  marquardt_switch_stack(&from.top, to.top);
}

#else

static void prepare(Context& context, void (*entry)()) {
  ucontext_t& registers = context.registers;
  getcontext(&registers);
  registers.uc_stack.ss_sp = context.stack;
  registers.uc_stack.ss_size = kStack;
  registers.uc_link = nullptr;
  makecontext(&registers, entry, 0);
}

static void switch_stack(Context& from, Context& to) {
  swapcontext(&from.registers, &to.registers);
}

#endif

// --- fibers ----------------------------------------------------------------------------------------------------------

// Between the two calls of a sanitizer no instrumented code may run.
static void switch_fiber(Context& from, Context& to, [[maybe_unused]] bool last) {
  starting = &to;
#if defined(MARQUARDT_TSAN)
  constexpr unsigned kNoSync = 1;  // the switch orders nothing
  __tsan_switch_to_fiber(to.tsan, kNoSync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan, to.asan_bottom, to.asan_size);
#endif
  switch_stack(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan, nullptr, nullptr);
#endif
}

static void fiber_entry() {
  Context& self = *starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  self.entry(self.argument);
  std::abort();  // entry ends by leave()
}

void Fibers::adopt([[maybe_unused]] Context& host) {
#if defined(MARQUARDT_TSAN)
  host.tsan = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* bottom = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &bottom, &host.asan_size);
    pthread_attr_destroy(&attributes);
  }
  host.asan_bottom = bottom;
#endif
}

bool Fibers::start(Context& context) {
  if (context.stack == nullptr) context.stack = stacks.take();
  prepare(context, &fiber_entry);
  context.asan = nullptr;
  context.asan_bottom = context.stack;
  context.asan_size = kStack;
#if defined(MARQUARDT_TSAN)
  context.tsan = __tsan_create_fiber(0);  // ordered behind the caller of run() alone
#endif
  return true;
}

void Fibers::pass(Context& from, Context& to) {
  switch_fiber(from, to, false);
}

void Fibers::leave(Context& from, Context& to) {
  switch_fiber(from, to, true);
  std::abort();
}

void Fibers::finish(Context& context) {
#if defined(MARQUARDT_TSAN)
  if (context.tsan != nullptr) __tsan_destroy_fiber(context.tsan);
  context.tsan = nullptr;
#endif
  if (context.stack != nullptr) stacks.give(context.stack);
  context.stack = nullptr;
}

// --- threads ---------------------------------------------------------------------------------------------------------
// Raw system calls: a mutex would order memory in the eyes of ThreadSanitizer.

static std::atomic<int> finishing{0};  // threads that were told to end and have not let go of their contexts

static void give_turn(Context& to) {
  to.turn.store(1, std::memory_order_release);
  syscall(SYS_futex, &to.turn, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

static void await_turn(Context& self) {
  while (self.turn.load(std::memory_order_acquire) == 0)
    syscall(SYS_futex, &self.turn, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
  self.turn.store(0, std::memory_order_relaxed);
}

// A fresh thread for every emulated one, never joined: a thread that served two CTAs, or a join, would order them.
bool Threads::start(Context& context) {
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return false;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 4 * kStack);
  const auto entry = [](void* argument) -> void* {
    Context& self = *static_cast<Context*>(argument);
    await_turn(self);
    self.entry(self.argument);
    return nullptr;
  };
  pthread_t id;
  context.turn.store(0, std::memory_order_relaxed);
  const bool made = pthread_create(&id, &attributes, entry, &context) == 0;
  pthread_attr_destroy(&attributes);
  return made;
}

void Threads::pass(Context& from, Context& to) {
  give_turn(to);
  await_turn(from);
}

// A thread that has left stays: of one that is gone ThreadSanitizer does not remember what it did.
void Threads::leave(Context& from, Context& to) {
  give_turn(to);
  await_turn(from);
  finishing.fetch_sub(1, std::memory_order_release);
}

void Threads::finish(Context& context) {
  finishing.fetch_add(1, std::memory_order_relaxed);
  give_turn(context);
}

void Threads::gather() {
  while (finishing.load(std::memory_order_acquire) > 0) sched_yield();
}

}  // namespace marquardt::emulation
