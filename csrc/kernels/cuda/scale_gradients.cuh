// The backward pass: gradients times the upstream gradient.
#pragma once

#include "team.cuh"
#include "vectors.cuh"

namespace cotuning::cuda {

// grad *= factor * upstream, in place. A 0 stays 0 whatever the factor: a row that takes no part has gradient 0, even
// if a mean over no rows makes the factor infinite.
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
  const RowSlot slot = slot_in(plan, item);
  if (slot.row >= gradient.rows) return;
  const double factor = number_at(factors.data, factors.type, head * factors.stride) *
                        number_at(upstream.data, upstream.type, slot.row * upstream.stride);
  if (factor == 1) return;
  const Team team(plan.threads_per_row, nullptr);
  with_type(gradient.type, [&](auto element) {
    using T = decltype(element);
    scale_row(team, static_cast<T*>(gradient.row(slot.row)), static_cast<int>(gradient.columns), factor);
  });
}

// Two branches instead of indexing by head: an array indexed by a variable would lie in local memory.
__global__ void __launch_bounds__(kLargestBlock) scale_kernel(ScaleProblem p, ScalePlan plan) {
  for (int64_t item = blockIdx.x; item < plan.rows[0].items + plan.rows[1].items; item += gridDim.x) {
    if (item < plan.rows[0].items) {
      scale_item(p.gradients[0], plan.rows[0], item, p.factors, 0, p.upstream);
    } else {
      scale_item(p.gradients[1], plan.rows[1], item - plan.rows[0].items, p.factors, 1, p.upstream);
    }
  }
}

}  // namespace cotuning::cuda
