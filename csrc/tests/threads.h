// A ParallelFor on std::thread. Each calling thread sets its own number of threads.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "check.h"

namespace cotuning::test {

inline thread_local int number_of_threads = 1;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  const int64_t chunk = std::max(grain, (end - begin + number_of_threads - 1) / number_of_threads);
  // The faults: a row that no thread takes, and rows that two threads take.
  const int64_t last = planted("forgotten-row") ? end - 1 : end;
  const int64_t overlap = planted("race") ? 1 : 0;
  std::vector<std::thread> threads;
  for (int64_t start = begin; start < last; start += chunk) {
    threads.emplace_back(body, start, std::min(start + chunk + overlap, last), context);
  }
  for (std::thread& thread : threads) thread.join();
}

// Runs in the calling thread, for problems too small to split.
inline void serial_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin < end) body(begin, planted("forgotten-row") ? end - 1 : end, context);
}

}  // namespace cotuning::test
