// The pages of memory that a large output lies on: to have them large, and when to write around the cache.
#pragma once

#include <cstdint>

namespace cotuning::cpu {

// To be called before `output` is written. Memory fresh from the system has no pages yet, and glibc's is fresh in every
// step from 32 MB on: the first store to each 4 KB is a fault, for which the system finds a page and zeroes it. With a
// gradient of 131 MB that is five times the work of the loss (measured). Pages of 2 MB make it 512 times fewer faults,
// so that little more than the zeroing is left; where the system leaves their use to programs (Linux:
// transparent_hugepage is `madvise`, as is usual), this asks for them. Advice: nothing else depends on it.
void prefer_huge_pages(void* output, int64_t bytes);

// An ordinary store to memory that is not in the cache first reads it: for an output that does not fit in the cache
// that is a third of all the traffic. A streaming store does not read, but on pages that the process has never touched
// (a large block fresh from the system) it is the slower one, 1.3 times (measured): the kernel has just brought the
// zeroed page into the cache. So: large outputs on memory that is already there.
bool worth_streaming(const void* output, int64_t bytes);

// Has the processor look up where the pages that begin in this part of an output are, before it is written. Stores are
// done in their order: without it the first one to each 4 KB waits for the look-up, and everything behind it as well
// (streamed rows of 4000 bytes took 280 ns instead of 200, measured on a virtual machine). A prefetch does not wait.
inline void look_up_pages(const void* output, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(output), end = begin + static_cast<uintptr_t>(bytes);
  for (uintptr_t page = (begin + kPage - 1) / kPage * kPage; page < end; page += kPage) {
    __builtin_prefetch(reinterpret_cast<const void*>(page), 1);
  }
}

}  // namespace cotuning::cpu
