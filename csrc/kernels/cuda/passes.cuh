// The operations around the loss: each one pass over rows.
#pragma once

#include "loss.cuh"

namespace cotuning::cuda {

// grad *= factor * upstream, in place. What is 0 stays 0, whatever it is multiplied by: a row that takes no part has no
// gradient, though the divisor of a mean over no row is 0.
template <class T>
__device__ __forceinline__ void scale_row(const Team& team, T* row, int columns, double factor) {
  using C = ComputeType<T>;
  const C scale = static_cast<C>(factor);
  const Columns cut = columns_of(row, columns);
  for (int k = team.rank(); k < cut.vectors; k += team.threads()) {
    const int first = cut.first + k * kLanes<T>;
    auto pack = load_vector(row, columns, first);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const C value = widen(pack.at[i]);
      narrow(value == 0 ? value : value * scale, &pack.at[i]);
    }
    store_vector(row, columns, first, pack);
  }
}

struct ScalePlan {
  int threads;
  RowPlan rows[2];
};

__device__ __forceinline__ void scale_item(const Matrix& gradient, const RowPlan& plan, int64_t item,
                                           const ConstVector& factors, int head, const ConstVector& upstream) {
  const Place place = place_in(plan, item);
  if (place.row >= gradient.rows) return;
  const double factor = number_at(factors.data, factors.type, head * factors.stride) *
                        number_at(upstream.data, upstream.type, place.row * upstream.stride);
  if (factor == 1) return;
  const Team team(plan.threads_per_row, nullptr);
  with_type(gradient.type, [&](auto element) {
    using T = decltype(element);
    scale_row(team, static_cast<T*>(gradient.row(place.row)), static_cast<int>(gradient.columns), factor);
  });
}

// Two branches and no table of the two heads: what is indexed by a variable would have to lie in local memory.
__global__ void __launch_bounds__(kLargestBlock) scale_kernel(ScaleProblem p, ScalePlan plan) {
  for (int64_t item = blockIdx.x; item < plan.rows[0].items + plan.rows[1].items; item += gridDim.x) {
    if (item < plan.rows[0].items) {
      scale_item(p.gradients[0], plan.rows[0], item, p.factors, 0, p.upstream);
    } else {
      scale_item(p.gradients[1], plan.rows[1], item - plan.rows[0].items, p.factors, 1, p.upstream);
    }
  }
}

// out = the row of R of a label, bit for bit, or a mixture of two rows, rounded once.
template <class T>
__device__ __forceinline__ void translate_row(const Team& team, const void* const (&rows)[2], const double (&shares)[2],
                                              T* out, int columns) {
  using C = ComputeType<T>;
  const Columns cut = columns_of(out, columns);
  for (int k = team.rank(); k < cut.vectors; k += team.threads()) {
    const int first = cut.first + k * kLanes<T>;
    C q[kLanes<T>] = {};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (rows[part] == nullptr) continue;
      add_columns<T>(rows[part], columns, first, static_cast<C>(shares[part]), q);
    }
    Pack<T, kLanes<T>> pack;
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) narrow(q[i], &pack.at[i]);
    store_vector(out, columns, first, pack);
  }
}

__global__ void __launch_bounds__(kLargestBlock) translate_kernel(TranslateProblem p, PassPlan plan) {
  for (int64_t item = blockIdx.x; item < plan.rows.items; item += gridDim.x) {
    const Team team(plan.rows.threads_per_row, nullptr);
    const int64_t row = place_in(plan.rows, item).row;
    if (row >= p.out.rows) continue;
    const Parts parts =
        read_labels(p.labels, p.labels_b, p.mix, p.mix_stride, p.ignore_index, p.relationship.rows, row);
    const void* rows[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) rows[k] = parts.share[k] == 0 ? nullptr : p.relationship.row(parts.index[k]);
    with_type(p.out.type, [&](auto element) {
      using T = decltype(element);
      translate_row(team, rows, parts.share, static_cast<T*>(p.out.row(row)), static_cast<int>(p.out.columns));
    });
  }
}

// sums[t] += softmax(b z) of the rows of class t, counts[t] += their number. A block does a class: it goes through all
// labels and adds its rows in their order, so no two blocks write to one place and the order is always the same.
template <class T, class S>
__device__ void add_softmax(const Team& team, const T* logits, int columns, ComputeType<T> b, S* sums) {
  using C = ComputeType<T>;
  const C top = row_maximum<T>(team, logits, columns, nullptr);
  const Columns cut = columns_of(logits, columns);
  C total[1] = {0};
  C z[kLanes<T>];
  for (int k = team.rank(); k < cut.vectors; k += team.threads()) {
    const int first = cut.first + k * kLanes<T>;
    widen_all<T>(load_logits(logits, columns, first), z);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) total[0] += exponential(b * (z[i] - top));
  }
  team.reduce<Sum>(total);
  // By column, not by vector: rows of one class may start anywhere, and a column must stay one thread's.
  for (int j = team.rank(); j < columns; j += team.threads()) {
    sums[j] += static_cast<S>(exponential(b * (widen(logits[j]) - top)) / total[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kLargestBlock) class_sums_kernel(ClassSumsProblem p) {
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  COTUNING_SHARED(unsigned, found, kMostWarps);
  const Team team(static_cast<int>(blockDim.x), scratch);
  const int warps = static_cast<int>(blockDim.x) / kWarpThreads, columns = static_cast<int>(p.logits.columns);
  const auto b = static_cast<ComputeType<T>>(p.inverse_temperature);
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
            add_softmax(team, logits, columns, b, static_cast<double*>(p.sums.row(t)));
          } else {
            add_softmax(team, logits, columns, b, static_cast<float*>(p.sums.row(t)));
          }
          ++count;
        }
      }
      __syncthreads();  // before `found` is written again
    }
    if (threadIdx.x == 0) p.counts[t] += count;
  }
}

// NLL and its two derivatives in b = 1/T, summed over rows: with x = z - max z and e = exp(b x),
//   NLL = log sum e - b x_y    E = sum e x / sum e    first = E - x_y    second = sum e x^2 / sum e - E^2
template <class T>
__device__ void temperature_row(const Team& team, const T* logits, int columns, int64_t label, double b,
                                double* totals) {
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
      const C x = z[i] - top, e = exponential(static_cast<C>(b) * x);
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
  totals[0] += logarithm(sum) - b * x;
  totals[1] += mean - x;
  totals[2] += moments[2] / sum - mean * mean;
  totals[3] += 1;
}

// With one block a processor as its aim: left to itself, nvcc spills 8 bytes here for sm_120.
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
    const int64_t row = place_in(plan.rows, item).row;
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
