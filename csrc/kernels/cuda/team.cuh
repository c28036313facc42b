// The threads that share one row: a warp, or the whole block.
#pragma once

#include "plan.h"
#include "scalars.cuh"

namespace cotuning::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kMostWarps = kLargestBlock / kWarpThreads;
inline constexpr int kMostSums = 6;  // numbers that are reduced at once

// If one argument is NaN, returns the other.
struct Largest {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ double of(double a, double b) { return fmax(a, b); }
};
struct Sum {
  template <class C>
  static __device__ __forceinline__ C of(C a, C b) {
    return a + b;
  }
};

// The row that a thread works on in an item, and its index among the item's rows.
struct RowSlot {
  int index;
  int64_t row;
};

__device__ __forceinline__ RowSlot slot_in(const RowPlan& plan, int64_t item) {
  const int index = static_cast<int>(threadIdx.x) / plan.threads_per_row;
  return {index, item * (static_cast<int>(blockDim.x) / plan.threads_per_row) + index};
}

class Team {
 public:
  // `scratch`: kMostWarps * kMostSums doubles of the block's shared memory.
  __device__ Team(int threads, double* scratch)
      : threads_(threads), rank_(static_cast<int>(threadIdx.x) & (threads - 1)), scratch_(scratch) {}

  __device__ int threads() const { return threads_; }
  __device__ int rank() const { return rank_; }
  // A thread takes the vectors rank(), rank() + threads(), and so on. Returns its last vector below `count`, or a
  // negative number if it has none.
  __device__ int last_of(int count) const { return rank_ + ((count - 1 - rank_) & -threads_); }

  // Every thread gets the same bits. If the team is a block, all its threads must call this.
  template <class Operation, class C, int kCount>
  __device__ __forceinline__ void reduce(C (&values)[kCount]) const {
    static_assert(kCount <= kMostSums);
    over_lanes<Operation>(values, kWarpThreads);
    if (threads_ == kWarpThreads) return;
    const int warps = threads_ / kWarpThreads, lane = rank_ % kWarpThreads;
    auto* shared = reinterpret_cast<C*>(scratch_);
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) shared[rank_ / kWarpThreads * kCount + k] = values[k];
    }
    __syncthreads();
    // The number of warps is a power of two, so lanes beyond it read the same values again.
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = shared[(lane & (warps - 1)) * kCount + k];
    over_lanes<Operation>(values, warps);
    __syncthreads();  // before a thread writes to `shared` again
  }

 private:
  template <class Operation, class C, int kCount>
  static __device__ __forceinline__ void over_lanes(C (&values)[kCount], int lanes) {
    for (int other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = Operation::of(values[k], __shfl_xor_sync(kAllLanes, values[k], other));
      }
    }
  }

  int threads_, rank_;
  double* scratch_;
};

// Adds up `totals` (shared memory, kCount numbers per warp) over the warps of all blocks, in an order that depends only
// on the shape of the launch. Returns true in the last block to finish; only there does `totals` hold the sums.
template <int kCount>
__device__ __forceinline__ bool sum_over_blocks(const BlockSums& sums, double* totals) {
  COTUNING_SHARED(unsigned, is_last, 1);
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarpThreads;
  __syncthreads();
  if (thread < kCount) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += totals[w * kCount + thread];
    sums.parts[blockIdx.x * kCount + thread] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    __threadfence();  // what this block wrote is seen before its number is
    const unsigned blocks = gridDim.x;
    is_last[0] = atomicAdd(sums.finished, 1u) == blocks - 1;
    if (is_last[0]) atomicAdd(sums.finished, 0u - blocks);  // 0 again, for the next launch
    __threadfence();                                        // and what the others wrote is seen from here on
  }
  __syncthreads();
  if (!is_last[0]) return false;
  // All other blocks have finished, and the device waits for this one: all its threads read, several parts at once.
  double sum[kCount] = {};
#pragma unroll 4
  for (unsigned b = thread; b < gridDim.x; b += blockDim.x) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] += sums.parts[b * kCount + k];
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int other = kWarpThreads / 2; other > 0; other /= 2) sum[k] += __shfl_xor_sync(kAllLanes, sum[k], other);
    if (thread % kWarpThreads == 0) totals[thread / kWarpThreads * kCount + k] = sum[k];
  }
  __syncthreads();
  if (thread < kCount) {  // no other thread reads what it writes
    for (int w = 1; w < warps; ++w) totals[thread] += totals[w * kCount + thread];
  }
  __syncthreads();
  return true;
}

}  // namespace cotuning::cuda
