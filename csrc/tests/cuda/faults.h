// A textbook kernel in the vocabulary of csrc/kernels/cuda, and faults to plant in it. They show what each layer of
// checks finds. Without a fault every layer is silent.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <string>
#include <vector>

#include "../check.h"

namespace cotuning::test {

struct Textbook {
  const float* rows;
  int count, columns;
  float* sums;         // one per row
  float* parts;        // one per block
  unsigned* finished;  // 0 before and after
  unsigned* tickets;
  float* total;
  float* careless_total;
};

struct Faults {
  bool no_barrier_before_read, no_barrier_before_reuse, overread, early_return, careless_update, misaligned,
      missing_lane, divergent_barrier, unwritten, order_of_arrival, no_fence, lane_returned, label;

  static Faults planted() {
    using test::planted;
    return {planted("no-barrier-before-read"),
            planted("no-barrier-before-reuse"),
            planted("overread"),
            planted("early-return"),
            planted("careless-update"),
            planted("misaligned"),
            planted("missing-lane"),
            planted("divergent-barrier"),
            planted("unwritten"),
            planted("order-of-arrival"),
            planted("no-fence"),
            planted("lane-returned"),
            planted("label")};
  }
};

struct alignas(16) FourFloats {
  float at[4];
};

// sums[r] = sum of row r, through shared memory; total = sum over blocks, by the last block to finish.
inline void textbook_kernel(Textbook p, Faults fault) {
  COTUNING_DYNAMIC_SHARED(dynamic);
  COTUNING_SHARED(float, of_warps, 32);
  COTUNING_SHARED(unsigned, last, 1);
  auto* staged = reinterpret_cast<float*>(dynamic);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warps = static_cast<int>(blockDim.x) / 32;
  float of_block = 0;
  if (fault.early_return && thread == 77) return;
  device_assert(!fault.label || thread != 3);
  for (int row = static_cast<int>(blockIdx.x); row < p.count; row += static_cast<int>(gridDim.x)) {
    const float* from = p.rows + row * p.columns;
    for (int c = thread; c < p.columns + (fault.overread ? 1 : 0); c += static_cast<int>(blockDim.x)) {
      const bool left_out = fault.unwritten && c == p.columns - 1;
      if (!left_out && c < p.columns) staged[c] = from[c];
      if (c >= p.columns) of_block += 0 * from[c];
    }
    if (fault.misaligned && thread == 0) of_block += 0 * reinterpret_cast<const FourFloats*>(from + 1)->at[0];
    if (!fault.no_barrier_before_read) __syncthreads();
    float sum = 0;  // of all columns but the last, which thread 0 adds
    for (int c = thread; c < p.columns - 1; c += static_cast<int>(blockDim.x)) sum += staged[p.columns - 2 - c];
    if (fault.lane_returned && thread == 37) return;
    for (int other = 16; other > 0; other /= 2) {
      if (fault.missing_lane && lane == 5) continue;
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (lane == 0) of_warps[thread / 32] = sum;
    if (fault.divergent_barrier && thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
    if (thread == 0) {
      float of_row = staged[p.columns - 1];
      for (int w = 0; w < warps; ++w) of_row += of_warps[w];
      p.sums[row] = of_row;
      of_block += of_row;
    }
    if (!fault.no_barrier_before_reuse) __syncthreads();
  }
  if (thread == 0) {
    if (fault.careless_update) *p.careless_total += of_block;
    const unsigned slot = fault.order_of_arrival ? atomicAdd(p.tickets, 1u) : blockIdx.x;
    p.parts[slot] = of_block;
    if (!fault.no_fence) __threadfence();
    last[0] = atomicAdd(p.finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last[0] && thread == 0) {
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += p.parts[b];
    *p.total = total;
  }
}

}  // namespace cotuning::test
