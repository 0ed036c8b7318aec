// What the sanitizers are told, or nothing. The machine itself is compiled without ThreadSanitizer, so that its own
// bookkeeping orders nothing; MARQUARDT_TSAN says that the kernels are not.
#pragma once

#include <cstddef>

#if defined(MARQUARDT_TSAN)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#endif

namespace marquardt::emulation {

#if defined(MARQUARDT_TSAN)
inline void release(void* address) {
  __tsan_release(address);
}
inline void acquire(void* address) {
  __tsan_acquire(address);
}
#else
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace marquardt::emulation
