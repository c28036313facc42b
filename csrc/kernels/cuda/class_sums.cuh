// Sums of softmax outputs by class.
#pragma once

#include "row.cuh"

namespace cotuning::cuda {

// sums[t] += softmax(z / T) over the rows of class t, counts[t] += the number of those rows. One block handles one
// class: it scans all labels and adds its rows in order, so no two blocks write to one place and the order is always
// the same.
template <class T, class S>
__device__ void add_softmax(const Team& team, const T* logits, int columns, ComputeType<T> inverse_temperature,
                            S* sums) {
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
  // By column, not by vector: rows of one class may start anywhere, and one thread must own a column.
  for (int j = team.rank(); j < columns; j += team.threads()) {
    sums[j] += static_cast<S>(exponential(inverse_temperature * (widen(logits[j]) - top)) / total[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kLargestBlock) class_sums_kernel(ClassSumsProblem p) {
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  COTUNING_SHARED(unsigned, found, kMostWarps);
  const Team team(static_cast<int>(blockDim.x), scratch);
  const int warps = static_cast<int>(blockDim.x) / kWarpThreads, columns = static_cast<int>(p.logits.columns);
  const auto inverse_temperature = static_cast<ComputeType<T>>(p.inverse_temperature);
  for (int64_t t = blockIdx.x; t < p.sums.rows; t += gridDim.x) {
    int64_t count = 0;
    for (int64_t start = 0; start < p.logits.rows; start += blockDim.x) {
      const int64_t mine = start + threadIdx.x;
      const int64_t label = mine < p.logits.rows ? p.labels[mine] : p.ignore_index;
      const bool ignored = label == p.ignore_index;
      device_assert(ignored || (label >= 0 && label < p.sums.rows));
      const unsigned ballot = __ballot_sync(kAllLanes, !ignored && label == t);
      if (threadIdx.x % kWarpThreads == 0) found[threadIdx.x / kWarpThreads] = ballot;
      __syncthreads();
      for (int w = 0; w < warps; ++w) {
        for (unsigned rest = found[w]; rest != 0; rest &= rest - 1) {
          const int64_t row = start + w * kWarpThreads + __ffs(rest) - 1;
          const T* logits = static_cast<const T*>(p.logits.row(row));
          if (p.sums.type == ScalarType::kFloat64) {
            add_softmax(team, logits, columns, inverse_temperature, static_cast<double*>(p.sums.row(t)));
          } else {
            add_softmax(team, logits, columns, inverse_temperature, static_cast<float*>(p.sums.row(t)));
          }
          ++count;
        }
      }
      __syncthreads();  // before `found` is written again
    }
    if (threadIdx.x == 0) p.counts[t] += count;
  }
}

}  // namespace cotuning::cuda
