// Translates labels to rows of the relationship.
#pragma once

#include "row.cuh"
#include "row_target.cuh"

namespace cotuning::cuda {

// out = the label's row of R, bit for bit, or a mixture of two rows, rounded once.
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
    const int64_t row = slot_in(plan.rows, item).row;
    if (row >= p.out.rows) continue;
    const RowTarget target = read_row_target(p, p.relationship.rows, row);
    const void* rows[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) rows[k] = target.share[k] == 0 ? nullptr : p.relationship.row(target.index[k]);
    with_type(p.out.type, [&](auto element) {
      using T = decltype(element);
      translate_row(team, rows, target.share, static_cast<T*>(p.out.row(row)), static_cast<int>(p.out.columns));
    });
  }
}

}  // namespace cotuning::cuda
