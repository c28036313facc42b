// Two bounds of the loss's kernel, with the CPU kernels' vector functions: one exponential a logit, and a copy that
// reads the logits and writes as many bytes around the cache. benchmarks/limits.py compiles and loads this file.
#include <cstring>

#define COTUNING_ISA bounds
#include "../csrc/kernels/cpu/simd.h"

using namespace cotuning::cpu::bounds;

// Returns the sum of exp(z), so that the compiler keeps every exponential. There are four sums, so that none waits for
// the last addition.
extern "C" double sum_of_exponentials(const float* z, int64_t n) {
  constexpr int kSums = 4;
  Float sums[kSums] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  int64_t i = 0;
  for (; i + kSums * Float::kLanes <= n; i += kSums * Float::kLanes) {
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + exp_in_range(load(z + i + k * Float::kLanes));
  }
  double total = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += ::exp(static_cast<double>(z[i]));
  return total;
}

// `to` is aligned to 64 bytes.
extern "C" void streaming_copy(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + Float::kLanes <= n; i += Float::kLanes) store_streaming(to + i, load(from + i));
  finish_streaming();
  std::memcpy(to + i, from + i, (n - i) * sizeof(float));
}
