// How a kernel spreads its rows over threads. The caller provides the threads.
#pragma once

#include <cstdint>

namespace cotuning::cpu {

// Splits [begin, end) into chunks of at least `grain`, calls `body` with each on some thread, and returns when all are
// done.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t begin, int64_t end, void* context), void* context);

// The fewest elements worth waking a thread for. Calls below about twice this many run serially (measured).
inline constexpr int64_t kGrainElements = 64 * 1024;

inline int64_t grain_rows(int64_t columns) {
  return columns >= kGrainElements ? 1 : kGrainElements / (columns + 1) + 1;
}

}  // namespace cotuning::cpu
