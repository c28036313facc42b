// How a kernel's rows are spread over threads. The threads are the caller's.
#pragma once

#include <cstdint>

namespace cotuning::cpu {

// Splits [begin, end) over threads in chunks of at least `grain`, and calls `body` with each; returns when all are
// done.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Elements a thread must have to be worth waking: below about two of these a call runs serially (measured).
inline constexpr int64_t kGrainElements = 64 * 1024;

inline int64_t grain_rows(int64_t columns) {
  return columns >= kGrainElements ? 1 : kGrainElements / (columns + 1) + 1;
}

}  // namespace cotuning::cpu
