// Few long rows of the source head: several blocks do a row, a part of its columns each (plan.h, SplitPlan).
//
// Two launches. In the first, a block finds the maximum t_k of its part and the sums below it. In the second, each
// block of a row puts the parts together,
//   m = max t_k    s = sum s_k exp(t_k - m)    Q = sum Q_k    sum q (z - m) = sum (c_k + (t_k - m) Q_k)
// and stores the gradient of its part. The parts are combined in an order that the plan decides. Then loss_kernel does
// the target head, and finishes the loss as after the first of two launches.
#pragma once

#include "co_tuning_loss.cuh"

namespace cotuning::cuda {

// A part's sums; in double, since they are few.
struct PartSums {
  double top, exponentials, mass, cross, supervised[2];
};
static_assert(sizeof(PartSums) == sizeof(double) * kPartSums);

// The columns of a part, as a row that starts there.
struct PartOfRow {
  int64_t row;
  int part, first, columns;

  __device__ PartOfRow(const SplitPlan& plan, int64_t item, int64_t columns_of_row)
      : row(item / plan.parts), part(static_cast<int>(item % plan.parts)), first(part * plan.columns) {
    const int left = static_cast<int>(columns_of_row) - first;
    columns = left < plan.columns ? left : plan.columns;
  }
  template <class C>
  __device__ void cut(TranslatedTarget<C>* q) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (q->rows[k] != nullptr) q->rows[k] = static_cast<const char*>(q->rows[k]) + first * size_of(q->type);
    }
  }
};

// A part of nothing but -inf has no maximum below which it could be summed.
__device__ __forceinline__ double shift_of(double top) { return top == -static_cast<double>(INFINITY) ? 0 : top; }

template <class T>
__global__ void __launch_bounds__(kLargestBlock, 1) split_sums_kernel(LossProblem p, SplitPlan plan) {
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  using C = ComputeType<T>;
  const Team team(kLargestBlock, scratch);
  const Stage<T> stage(nullptr, RowPlan{});
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const PartOfRow part(plan, item, p.source_logits.columns);
    SourceTarget<C> target(p, part.row);
    if (!target.has_rows()) continue;
    part.cut(&target.q);
    const T* logits = static_cast<const T*>(p.source_logits.row(part.row)) + part.first;
    target.q.find_plain(logits, part.columns);
    const C top = row_maximum<T>(team, logits, part.columns, nullptr);
    RegisterStack<C, kLanes<T>> rest;
    const auto sums = sum_row(team, logits, part.columns, target.q, static_cast<C>(shift_of(top)), stage, &rest);
    if (team.rank() != 0) continue;
    PartSums out{top, sums.exponentials, sums.mass, sums.cross, {0, 0}};
    if (sums.exact) {
      out.exponentials = sums.exact_exponentials;
      out.mass = sums.exact_mass;
      out.cross = sums.exact_cross;
    }
    for (int k = 0; k < 2; ++k) out.supervised[k] = sums.supervised[k] ? 1 : 0;
    reinterpret_cast<PartSums*>(p.part_sums)[item] = out;
  }
}

// Puts the parts of a row together: thread k has part k. Every thread gets the same sums.
__device__ __forceinline__ PartSums combined(const Team& team, const PartSums* parts, int count) {
  PartSums mine{-static_cast<double>(INFINITY), 0, 0, 0, {0, 0}};
  if (team.rank() < count) mine = parts[team.rank()];
  double top[1] = {mine.top};
  team.reduce<Largest>(top);
  const double below = shift_of(mine.top) - top[0];
  // 0 times an infinite factor would be NaN. A row of nothing but -inf is NaN.
  double sums[5] = {mine.exponentials == 0 ? 0 : mine.exponentials * exp(below), mine.mass,
                    mine.cross + (mine.mass == 0 ? 0 : below * mine.mass), mine.supervised[0], mine.supervised[1]};
  team.reduce<Sum>(sums);
  if (top[0] == -static_cast<double>(INFINITY)) sums[0] = static_cast<double>(NAN);
  return {top[0], sums[0], sums[1], sums[2], {sums[3], sums[4]}};
}

template <class T>
__global__ void __launch_bounds__(kLargestBlock, 1) split_gradients_kernel(LossProblem p, SplitPlan plan) {
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  COTUNING_SHARED(double, all_totals, kMostWarps* kLossSums);
  using C = ComputeType<T>;
  const Team team(kLargestBlock, scratch);
  const Stage<T> stage(nullptr, RowPlan{});
  double* totals = all_totals + threadIdx.x / kWarpThreads * kLossSums;
  if (threadIdx.x % kWarpThreads == 0) {
    for (int k = 0; k < kLossSums; ++k) totals[k] = 0;
  }
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const PartOfRow part(plan, item, p.source_logits.columns);
    SourceTarget<C> target(p, part.row);
    T* gradient = row_of<T>(p.source_gradient, part.row);
    if (gradient != nullptr) gradient += part.first;
    RowResult<C> result{};
    PartSums sums{};
    if (target.has_rows()) {
      sums = combined(team, reinterpret_cast<const PartSums*>(p.part_sums) + part.row * plan.parts, plan.parts);
      for (int k = 0; k < 2; ++k) result.supervised[k] = sums.supervised[k] != 0;
    }
    const bool takes_part = result.supervised[0] || result.supervised[1];
    if (takes_part) result.loss = static_cast<C>(sums.mass * log(sums.exponentials) - sums.cross);
    if (part.part == 0) {
      const bool valid = target.valid(p, team, part.row);
      if (team.rank() == 0) add_source_row(p, part.row, target, valid, result, totals);
    }
    if (gradient == nullptr) continue;
    if (!takes_part) {
      zero_row(team, gradient, part.columns);
      continue;
    }
    part.cut(&target.q);
    const T* logits = static_cast<const T*>(p.source_logits.row(part.row)) + part.first;
    if (same_cut(gradient, logits)) target.q.find_plain(logits, part.columns);
    RegisterStack<C, kLanes<T>> rest;
    store_gradient(team, logits, part.columns, target.q, static_cast<C>(sums.top),
                   static_cast<C>(sums.mass / sums.exponentials), stored_factor<T>(p, true), gradient, stage, &rest);
  }
  if (sum_over_blocks<kLossSums>(p.sums, all_totals) && threadIdx.x < kLossSums) {
    p.first_sums[threadIdx.x] = all_totals[threadIdx.x];
  }
}

}  // namespace cotuning::cuda
