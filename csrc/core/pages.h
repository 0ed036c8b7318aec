// Pages under large outputs on the CPU.
#pragma once

#include <cstdint>

namespace marquardt {

// Asks the system for huge pages under memory that is about to be written for the first time: one fault per 2 MB in place
// of one per 4 kB, which take longer than a memory-bound kernel does. An advice, as NumPy gives it for its arrays: memory
// that is mapped already, small memory and other systems stay as they are. MARQUARDT_HUGE_PAGES=0 turns it off.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace marquardt
