#include "core/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#endif

namespace marquardt {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

// Below this a call's own memory is mostly recycled by the allocator, and the advice costs as much as it brings.
constexpr int64_t kLargeBytes = 4 << 20;

bool wanted() {
  static const bool on = [] {
    const char* set = std::getenv("MARQUARDT_HUGE_PAGES");
    return set == nullptr || std::strcmp(set, "0") != 0;
  }();
  return on;
}

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
  if (bytes < kLargeBytes || !wanted()) return;
  // Whole pages inside the memory: its neighbours are somebody else's.
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  // A kernel without huge pages refuses, and nothing is lost.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

void advise_huge_pages(void*, int64_t) {}

#endif

}  // namespace marquardt
