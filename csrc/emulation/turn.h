// The turn: of all contexts of a run exactly one goes on, until it passes the turn to another.
#pragma once

#include <atomic>
#include <cstddef>

// Where the switch of stacks is not written out, the C library's takes its place.
#if !defined(__x86_64__)
#define MARQUARDT_UCONTEXT 1
#endif
#if defined(MARQUARDT_UCONTEXT)
#include <ucontext.h>
#endif

namespace marquardt::emulation {

// Of one emulated thread, or of whoever called run().
struct Context {
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  void* stack = nullptr;  // fibers: lowest byte, and where it was left
  void* top = nullptr;
#if defined(MARQUARDT_UCONTEXT)
  ucontext_t registers;
#endif
  std::atomic<int> turn{0};  // threads: a futex
  void* asan = nullptr;      // what the sanitizers keep of a fiber
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
  void* tsan = nullptr;
};

// Contexts share one thread of the system and switch stacks.
class Fibers {
 public:
  static void adopt(Context& host);  // the caller's own
  // `entry(argument)` waits for its turn; it never returns, but ends by leave().
  static bool start(Context& context);
  static void pass(Context& from, Context& to);
  [[noreturn]] static void leave(Context& from, Context& to);
  static void finish(Context& context);  // after it has left
};

// Contexts are threads of the system and wake each other.
class Threads {
 public:
  static bool start(Context& context);  // false if the system has no thread to give
  static void pass(Context& from, Context& to);
  static void leave(Context& from, Context& to);  // waits for finish(), then the entry may return
  static void finish(Context& context);
  static void gather();  // until all that were finished have let go of their contexts
};

}  // namespace marquardt::emulation
