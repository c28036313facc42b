// The memory pages of a large output: asks for huge pages, and tells when streaming stores pay.
#pragma once

#include <cstdint>

namespace cotuning::cpu {

// Call it before writing `output`. Memory fresh from the system has no pages yet, and glibc returns fresh memory in
// every step for blocks of 32 MB and more. The first store to each 4 KB faults, and the system finds a page and zeroes
// it. For a gradient of 131 MB that takes five times as long as the loss (measured). Pages of 2 MB fault 512 times less
// often and leave little more than the zeroing. Where programs must ask for them (Linux: transparent_hugepage is
// `madvise`, the usual setting), this asks. It is only advice: no result depends on it.
void prefer_huge_pages(void* output, int64_t bytes);

// Whether streaming stores pay: for large outputs on pages that are already in memory. An ordinary store to memory
// outside the cache first reads it, which is a third of all traffic for an output that does not fit in the cache. A
// streaming store does not read. But on pages that the process has never touched (a large block fresh from the system)
// it takes 1.3 times as long (measured): the operating system has just brought the zeroed page into the cache.
bool worth_streaming(const void* output, int64_t bytes);

// Makes the processor translate the addresses of the pages that begin in this part of an output before it is written.
// Stores complete in order: otherwise the first store to each 4 KB waits for the translation, and all later stores wait
// for it (streamed rows of 4000 bytes took 280 ns instead of 200, measured on a virtual machine). A prefetch does not
// wait.
inline void look_up_pages(const void* output, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(output), end = begin + static_cast<uintptr_t>(bytes);
  for (uintptr_t page = (begin + kPage - 1) / kPage * kPage; page < end; page += kPage) {
    __builtin_prefetch(reinterpret_cast<const void*>(page), 1);
  }
}

}  // namespace cotuning::cpu
