#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cotuning::cpu {
namespace {

constexpr int64_t kStreamingBytes = int64_t{32} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Whether the pages of a block are in memory, judged by a sample.
bool is_resident(const void* block, int64_t bytes) {
#if defined(__linux__)
  constexpr int kSamples = 8;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(block);
  for (int k = 0; k < kSamples; ++k) {
    const uintptr_t address = (start + static_cast<uintptr_t>(bytes) / kSamples * k) / page * page;
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(address), page, &resident) != 0 || (resident & 1) == 0) return false;
  }
  return true;
#else
  (void)block, (void)bytes;
  return false;
#endif
}

}  // namespace

void prefer_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole huge pages only: those at the ends may hold other data too.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin >= end || is_resident(output, bytes)) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)output, (void)bytes;
#endif
}

bool worth_streaming(const void* output, int64_t bytes) {
  return bytes >= kStreamingBytes && is_resident(output, bytes);
}

}  // namespace cotuning::cpu
