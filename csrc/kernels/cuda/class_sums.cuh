// Sums of softmax outputs by class: sums[t] += softmax(z / T) over the rows of class t, counts[t] += their number.
//
// Two launches. The first finds each row's largest logit and its sum of exponentials. In the second, a block handles
// some columns of one class: it scans all labels and adds its rows in order. A thread owns its columns, so no two
// threads write to one place, and every number is summed in the order of the rows, however the columns are divided.
#pragma once

#include "row.cuh"

namespace cotuning::cuda {

template <class C>
struct RowNorm {
  C top, total;  // max z, sum exp((z - max z) / T)
};

template <class T>
__device__ void row_norm(const Team& team, const T* logits, int columns, ComputeType<T> inverse_temperature,
                         RowNorm<ComputeType<T>>* norm) {
  using C = ComputeType<T>;
  const C top = row_maximum<T>(team, logits, columns, nullptr);
  const Columns cut = columns_of(logits, columns);
  C total[1] = {0};
  C z[kLanes<T>];
  for (int k = team.rank(); k < cut.vectors; k += team.threads()) {
    const int first = cut.first + k * kLanes<T>;
    widen_all<T>(load_logits(logits, columns, first), z);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) total[0] += exponential(inverse_temperature * (z[i] - top));
  }
  team.reduce<Sum>(total);
  if (team.rank() == 0) *norm = {top, total[0]};
}

template <class T>
__global__ void __launch_bounds__(kLargestBlock) row_norms_kernel(ClassSumsProblem p, PassPlan plan) {
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  const Team team(plan.rows.threads_per_row, scratch);
  for (int64_t item = blockIdx.x; item < plan.rows.items; item += gridDim.x) {
    const int64_t row = slot_in(plan.rows, item).row;
    if (row >= p.logits.rows) continue;
    const int64_t label = p.labels[row];
    if (label == p.ignore_index) continue;
    device_assert(label >= 0 && label < p.sums.rows);
    row_norm(team, static_cast<const T*>(p.logits.row(row)), static_cast<int>(p.logits.columns),
             static_cast<ComputeType<T>>(p.inverse_temperature), static_cast<RowNorm<ComputeType<T>>*>(p.norms) + row);
  }
}

// Adds the listed rows to the sums of a thread's columns. It loads several rows before it adds the first.
template <class T, class S>
__device__ __forceinline__ void add_rows(const ClassSumsProblem& p, const int64_t* rows, int count, int column, int end,
                                         S (&sums)[kMostColumns]) {
  using C = ComputeType<T>;
  constexpr int kAtOnce = sizeof(C) == 8 ? 2 : 4;  // for float64, nvcc takes 148 registers with 4 on 12.0
  const auto inverse_temperature = static_cast<C>(p.inverse_temperature);
  for (int start = 0; start < count; start += kAtOnce) {
    RowNorm<C> norms[kAtOnce] = {};
    C z[kAtOnce][kMostColumns] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (start + i >= count) continue;
      const int64_t row = rows[start + i];
      norms[i] = static_cast<const RowNorm<C>*>(p.norms)[row];
#pragma unroll
      for (int k = 0; k < kMostColumns; ++k) {
        const int j = column + k * kSmallestBlock;
        if (j < end) z[i][k] = widen(static_cast<const T*>(p.logits.row(row))[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (start + i >= count) continue;
#pragma unroll
      for (int k = 0; k < kMostColumns; ++k) {
        if (column + k * kSmallestBlock >= end) continue;
        sums[k] += static_cast<S>(exponential(inverse_temperature * (z[i][k] - norms[i].top)) / norms[i].total);
      }
    }
  }
}

// The sums of class t in the columns [first, end).
template <class T, class S>
__device__ void sum_class(const ClassSumsProblem& p, int64_t t, int first, int end, int64_t* rows, unsigned* found) {
  const int column = first + static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  S* const out = static_cast<S*>(p.sums.row(t));
  S sums[kMostColumns];
#pragma unroll
  for (int k = 0; k < kMostColumns; ++k) {
    const int j = column + k * kSmallestBlock;
    sums[k] = j < end ? out[j] : S{0};
  }
  int64_t count = 0;
  for (int64_t start = 0; start < p.logits.rows; start += kSmallestBlock) {
    const int64_t mine = start + threadIdx.x;
    const int64_t label = mine < p.logits.rows ? p.labels[mine] : p.ignore_index;
    const bool counts = label != p.ignore_index && label == t;
    const unsigned ballot = __ballot_sync(kAllLanes, counts);
    if (lane == 0) found[warp] = ballot;
    __syncthreads();
    int before = 0, listed = 0;
#pragma unroll
    for (int w = 0; w < kSmallestBlock / kWarpThreads; ++w) {
      if (w == warp) before = listed;
      listed += __popc(found[w]);
    }
    if (counts) rows[before + __popc(ballot & ((1u << lane) - 1))] = mine;
    __syncthreads();
    // No barrier after this: the list is written again after the next turn's first barrier.
    add_rows<T>(p, rows, listed, column, end, sums);
    count += listed;
  }
#pragma unroll
  for (int k = 0; k < kMostColumns; ++k) {
    const int j = column + k * kSmallestBlock;
    if (j < end) out[j] = sums[k];
  }
  if (first == 0 && threadIdx.x == 0) p.counts[t] += count;
}

// The 4 asks for four blocks per multiprocessor: without it, nvcc keeps to 72 registers and spills in float64 on 12.0.
template <class T>
__global__ void __launch_bounds__(kSmallestBlock, 4) class_sums_kernel(ClassSumsProblem p, ClassSumsPlan plan) {
  COTUNING_SHARED(int64_t, rows, kSmallestBlock);
  COTUNING_SHARED(unsigned, found, kSmallestBlock / kWarpThreads);
  const int columns = static_cast<int>(p.logits.columns);
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const int64_t t = item / plan.parts;
    const int first = static_cast<int>(item % plan.parts) * plan.columns;
    const int end = columns - first < plan.columns ? columns : first + plan.columns;
    if (p.sums.type == ScalarType::kFloat64) {
      sum_class<T, double>(p, t, first, end, rows, found);
    } else {
      sum_class<T, float>(p, t, first, end, rows, found);
    }
  }
}

}  // namespace cotuning::cuda
