// The negative log-likelihood of logits at a temperature, and its derivatives.
#pragma once

#include "row.cuh"

namespace cotuning::cuda {

// NLL and its two derivatives in b = 1/T, summed over rows: with x = z - max z and e = exp(b x),
//   NLL = log sum e - b x_y    E = sum e x / sum e    first = E - x_y    second = sum e x^2 / sum e - E^2
template <class T>
__device__ void temperature_row(const Team& team, const T* logits, int columns, int64_t label,
                                double inverse_temperature, double* totals) {
  using C = ComputeType<T>;
  const C top = row_maximum<T>(team, logits, columns, nullptr);
  const Columns cut = columns_of(logits, columns);
  C moments[3] = {};
  C z[kLanes<T>];
  for (int k = team.rank(); k < cut.vectors; k += team.threads()) {
    const int first = cut.first + k * kLanes<T>;
    widen_all<T>(load_logits(logits, columns, first), z);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const C x = z[i] - top, e = exponential(static_cast<C>(inverse_temperature) * x);
      moments[0] += e;
      if (e != 0) {  // a logit of -inf contributes nothing
        moments[1] += e * x;
        moments[2] += e * x * x;
      }
    }
  }
  team.reduce<Sum>(moments);
  if (team.rank() != 0) return;
  const double sum = moments[0], mean = moments[1] / sum, x = static_cast<double>(widen(logits[label])) - top;
  totals[0] += logarithm(sum) - inverse_temperature * x;
  totals[1] += mean - x;
  totals[2] += moments[2] / sum - mean * mean;
  totals[3] += 1;
}

// The 1 asks for one block per multiprocessor: without it, nvcc spills 8 bytes here for sm_120.
template <class T>
__global__ void __launch_bounds__(kLargestBlock, 1) temperature_kernel(TemperatureProblem p, PassPlan plan) {
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  COTUNING_SHARED(double, all_totals, kMostWarps* kTemperatureSums);
  double* totals = all_totals + threadIdx.x / kWarpThreads * kTemperatureSums;
  if (threadIdx.x % kWarpThreads == 0) {
    for (int k = 0; k < kTemperatureSums; ++k) totals[k] = 0;
  }
  for (int64_t item = blockIdx.x; item < plan.rows.items; item += gridDim.x) {
    const Team team(plan.rows.threads_per_row, scratch);
    const int64_t row = slot_in(plan.rows, item).row;
    if (row >= p.logits.rows) continue;
    const int64_t label = p.labels[row];
    if (label == p.ignore_index) continue;
    device_assert(label >= 0 && label < p.logits.columns);
    temperature_row(team, static_cast<const T*>(p.logits.row(row)), static_cast<int>(p.logits.columns), label,
                    p.inverse_temperature, totals);
  }
  if (sum_over_blocks<kTemperatureSums>(p.sums, all_totals) && threadIdx.x < kTemperatureSums) {
    p.terms[threadIdx.x] = all_totals[threadIdx.x];
  }
}

}  // namespace cotuning::cuda
