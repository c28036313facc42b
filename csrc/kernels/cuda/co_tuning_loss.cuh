// The Co-Tuning loss of a batch in one launch: both heads, both gradients, labels, options, and the reduction. (Heads
// of different types take a launch each, and the second continues the first one's sums: a kernel for every pair of
// types would mean 16 kernels instead of 4, and three times nvcc's time.)
//
// A block processes items: one row per warp, or one row for the whole block (plan.h). Rows of the source head come
// first, since they are longer. Each warp adds its rows' contributions to the sums in `totals`; the last block to
// finish turns the sums of all blocks into the loss, the terms and the factors.
#pragma once

#include <type_traits>

#include "ordinary_row.cuh"
#include "row.cuh"
#include "row_target.cuh"

namespace cotuning::cuda {

enum LossSum : int { kSourceLoss = 0, kTargetLoss, kSupervised, kWeight, kValid };

__device__ __forceinline__ void store_result(void* results, bool in_double, int64_t i, double value) {
  if (in_double) {
    static_cast<double*>(results)[i] = value;
  } else {
    static_cast<float*>(results)[i] = static_cast<float>(value);
  }
}

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& matrix, int64_t row) {
  return matrix.data == nullptr ? nullptr : static_cast<T*>(matrix.row(row));
}

// The factor on one head's stored gradients: the part of the loss's factor that is known before the rows are counted.
// If every row takes part, it is the whole factor, and the backward pass's factor is exactly 1. If the upstream
// gradient is also 1, the backward pass touches no gradient, which halves a step's traffic. float16 gradients stay as
// large as probabilities: divided by a large batch, they would lose their digits.
template <class T>
constexpr bool kStoresFactor = !std::is_same_v<T, Float16>;

template <class T>
__device__ __forceinline__ ComputeType<T> stored_factor(const LossProblem& p, bool of_source) {
  if (!kStoresFactor<T>) return 1;
  return static_cast<ComputeType<T>>(of_source && p.target_logits.columns > 0 ? *p.trade_off * p.per_row : p.per_row);
}

// A trade-off of 0 takes the source supervision from every row: an infinite or NaN source term times 0 would be NaN.
__device__ __forceinline__ bool counts_source(const LossProblem& p) {
  return p.target_logits.columns == 0 || *p.trade_off != 0;
}

// Whether any probability of a row is nonzero.
__device__ __forceinline__ bool any_probability(const Team& team, const ConstMatrix& probabilities, int64_t row) {
  float any[1] = {0};
  for (int64_t j = team.rank(); j < probabilities.columns; j += team.threads()) {
    if (number_at(probabilities.row(row), probabilities.type, j) != 0) any[0] = 1;
  }
  team.reduce<Largest>(any);
  return any[0] != 0;
}

// Whether the kernel has ordinary_row.cuh's way too. On 7.5 nvcc runs out of registers with both ways.
template <class T>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kHasOrdinaryRows = false;
#else
inline constexpr bool kHasOrdinaryRows = !std::is_same_v<T, double>;
#endif

// Whether the target head has it as well. On 8.0 nvcc spills 8 bytes in float32 with both.
template <class T>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasOrdinaryTargets = kHasOrdinaryRows<T> && !std::is_same_v<T, float>;
#else
inline constexpr bool kHasOrdinaryTargets = kHasOrdinaryRows<T>;
#endif

// Does a row of the source head if it is ordinary (ordinary_row.cuh); else returns false.
template <class T>
__device__ __forceinline__ bool ordinary_source_row(const LossProblem& p, const Team& team, int64_t row,
                                                    const Stage<T>& stage, double* totals) {
  if (p.probabilities.columns > 0 || p.labels_b.data != nullptr || p.kl_divergence || !stage.has_logits() ||
      !counts_source(p) ||
      (p.relationship.type != ScalarType::kFloat32 && p.relationship.type != p.source_logits.type)) {
    return false;
  }
  const int64_t label = p.labels[row];
  if (label < 0 || label >= p.target_classes || label == p.ignore_index) return false;
  T* gradient = row_of<T>(p.source_gradient, row);
  const T* logits = static_cast<const T*>(p.source_logits.row(row));
  if (gradient != nullptr && !same_cut(gradient, logits)) return false;
  float loss;
  const auto row_with = [&](auto number) {
    using R = decltype(number);
    return ordinary_row(
        team, logits, static_cast<const R*>(p.relationship.row(label)), static_cast<int>(p.source_logits.columns),
        [&] { return stored_factor<T>(p, true); }, gradient, stage, &loss);
  };
  bool done = false;
  if (p.relationship.type == ScalarType::kFloat32) {
    done = row_with(float{});
  } else if constexpr (sizeof(T) == 2) {
    done = row_with(T{});
  }
  if (!done) return false;
  if (team.rank() != 0) return true;
  totals[kSourceLoss] += loss;
  totals[kValid] += 1;
  totals[kSupervised] += 1;
  if (p.reduction == Reduction::kNone) store_result(p.terms, p.results_in_double, p.source_logits.rows + row, loss);
  return true;
}

// A row's target in the source head.
template <class C>
struct SourceTarget {
  TranslatedTarget<C> q;
  RowTarget labels;
  bool counts;  // counts_source()

  __device__ __forceinline__ SourceTarget(const LossProblem& p, int64_t row)
      : q{{nullptr, nullptr}, {1, 0}, p.relationship.type, p.kl_divergence},
        labels{{0, 0}, {1.0, 0.0}},
        counts(counts_source(p)) {
    if (p.probabilities.columns > 0) {
      if (counts) q.rows[0] = p.relationship.row(row);
      return;
    }
    labels = read_row_target(p, p.target_classes, row);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (counts && labels.share[k] != 0) q.rows[k] = p.relationship.row(labels.index[k]);
      q.shares[k] = static_cast<C>(labels.share[k]);
    }
  }
  __device__ __forceinline__ bool has_rows() const { return q.rows[0] != nullptr || q.rows[1] != nullptr; }
  // Whether the row is valid: a label that is not ignored, or any probability. All threads of the team call this.
  __device__ __forceinline__ bool valid(const LossProblem& p, const Team& team, int64_t row) const {
    return p.probabilities.columns > 0 ? any_probability(team, p.probabilities, row) : labels.any();
  }
};

// One thread adds a source row to the sums and stores its term.
template <class C>
__device__ __forceinline__ void add_source_row(const LossProblem& p, int64_t row, const SourceTarget<C>& target,
                                               bool valid, const RowResult<C>& result, double* totals) {
  totals[kSourceLoss] += result.loss;
  totals[kValid] += valid ? 1 : 0;
  if (p.probabilities.columns > 0) {
    totals[kSupervised] += target.counts ? p.mix[row * p.mix_stride] : 0;
  } else {
    totals[kSupervised] +=
        (result.supervised[0] ? target.labels.share[0] : 0) + (result.supervised[1] ? target.labels.share[1] : 0);
  }
  if (p.reduction == Reduction::kNone) {
    store_result(p.terms, p.results_in_double, p.source_logits.rows + row, result.loss);
  }
}

template <class T>
__device__ void source_row(const LossProblem& p, const Team& team, int64_t row, const Stage<T>& stage, double* totals) {
  using C = ComputeType<T>;
  if constexpr (kHasOrdinaryRows<T>) {
    if (ordinary_source_row(p, team, row, stage, totals)) return;
  }
  const int columns = static_cast<int>(p.source_logits.columns);
  SourceTarget<C> target(p, row);
  // Not across the sums where registers are short: with it, nvcc spills on 8.0.
  constexpr bool kValidLate = kHasOrdinaryRows<T> && !kHasOrdinaryTargets<T>;
  bool valid = false;
  if constexpr (!kValidLate) valid = target.valid(p, team, row);
  T* gradient = row_of<T>(p.source_gradient, row);
  RowResult<C> result{};
  if (target.has_rows()) {
    const T* logits = static_cast<const T*>(p.source_logits.row(row));
    if (gradient == nullptr || same_cut(gradient, logits)) target.q.find_plain(logits, columns);
    result =
        soft_cross_entropy(team, logits, columns, target.q, [&] { return stored_factor<T>(p, true); }, gradient, stage);
  } else if (gradient != nullptr) {
    zero_row(team, gradient, columns);
  }
  if constexpr (kValidLate) valid = target.valid(p, team, row);
  if (team.rank() == 0) add_source_row(p, row, target, valid, result, totals);
}

// A row's weight in the mean of the target term.
__device__ inline double row_weight(const LossProblem& p, int64_t row) {
  if (p.probabilities.columns > 0) return 1;
  const RowTarget labels = read_row_target(p, p.target_classes, row);
  double weight = 0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (labels.share[k] == 0) continue;
    weight += p.weight.data == nullptr
                  ? labels.share[k]
                  : labels.share[k] * number_at(p.weight.data, p.weight.type, labels.index[k] * p.weight.stride);
  }
  return weight;
}

// Does a row of the target head if it is ordinary: one label, without weights and smoothing at once; else returns
// false.
template <class T>
__device__ __forceinline__ bool ordinary_target_row(const LossProblem& p, const Team& team, int64_t row,
                                                    const Stage<T>& stage, double* totals) {
  const bool weighted = p.weight.data != nullptr;
  if (p.probabilities.columns > 0 || p.labels_b.data != nullptr || !stage.has_logits() ||
      (weighted && p.label_smoothing != 0)) {
    return false;
  }
  const int64_t label = p.labels[row];
  if (label < 0 || label >= p.target_classes || label == p.ignore_index) return false;
  T* gradient = row_of<T>(p.target_gradient, row);
  const T* logits = static_cast<const T*>(p.target_logits.row(row));
  if (gradient != nullptr && !same_cut(gradient, logits)) return false;
  const int columns = static_cast<int>(p.target_logits.columns);
  const float smoothing = static_cast<float>(p.label_smoothing);
  OneClass q{static_cast<int>(label), smoothing / static_cast<float>(columns), 1 - smoothing};
  double weight = 1;
  if (weighted) {
    weight = number_at(p.weight.data, p.weight.type, label * p.weight.stride);
    q.peak = static_cast<float>(weight);
  }
  float loss;
  if (!ordinary_row(team, logits, q, columns, [&] { return stored_factor<T>(p, false); }, gradient, stage, &loss)) {
    return false;
  }
  if (team.rank() != 0) return true;
  totals[kTargetLoss] += loss;
  totals[kWeight] += weight;
  if (p.reduction == Reduction::kNone) store_result(p.terms, p.results_in_double, row, loss);
  return true;
}

// All threads compute in the compute type, since float64 is slow on many cards. One thread adds up in double.
template <class T>
__device__ void target_row(const LossProblem& p, const Team& team, int64_t row, const Stage<T>& stage, double* totals) {
  using C = ComputeType<T>;
  if constexpr (kHasOrdinaryTargets<T>) {
    if (ordinary_target_row(p, team, row, stage, totals)) return;
  }
  const int columns = static_cast<int>(p.target_logits.columns);
  const C smoothing = static_cast<C>(p.label_smoothing), rest = 1 - smoothing;
  ClassTarget<C> target{{-1, -1}, {0, 0}, 0, nullptr, ScalarType::kFloat32, rest, p.weight};
  C share = 1;
  if (p.probabilities.columns > 0) {
    target.probabilities = p.probabilities.row(row);
    target.type = p.probabilities.type;
  } else {
    const RowTarget labels = read_row_target(p, p.target_classes, row);
    share = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (labels.share[k] == 0) continue;
      const C of_label = static_cast<C>(labels.share[k]);
      share += of_label;
      target.classes[k] = static_cast<int>(labels.index[k]);
      target.peaks[k] = rest * of_label;
      if (p.weight.data != nullptr) {
        target.peaks[k] *= static_cast<C>(number_at(p.weight.data, p.weight.type, labels.index[k] * p.weight.stride));
      }
    }
  }
  target.base = smoothing / static_cast<C>(columns) * share;
  const T* logits = static_cast<const T*>(p.target_logits.row(row));
  const auto result = soft_cross_entropy(
      team, logits, columns, target, [&] { return stored_factor<T>(p, false); }, row_of<T>(p.target_gradient, row),
      stage);
  if (team.rank() != 0) return;
  totals[kTargetLoss] += result.loss;
  totals[kWeight] += row_weight(p, row);
  if (p.reduction == Reduction::kNone) store_result(p.terms, p.results_in_double, row, result.loss);
}

// The loss of every row, from its terms. One block handles all rows. It reads several terms before it writes a loss: a
// load that waits for a store waits for the memory.
template <int kAtOnce>
__device__ inline void finish_rows(const LossProblem& p, double trade_off) {
  const bool both = p.target_logits.columns > 0, in_double = p.results_in_double;
  const int64_t rows = p.source_logits.rows, step = blockDim.x;
  const auto term = [&](int64_t k) {
    return in_double ? static_cast<const double*>(p.terms)[k] : static_cast<const float*>(p.terms)[k];
  };
  for (int64_t start = threadIdx.x; start < rows; start += kAtOnce * step) {
    double losses[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = start + k * step;
      losses[k] = i >= rows ? 0 : both ? term(i) + trade_off * term(rows + i) : term(rows + i);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = start + k * step;
      if (i >= rows) break;
      if (!both) store_result(p.terms, in_double, i, 0);
      store_result(p.loss, in_double, i, losses[k]);
    }
  }
}

// Scalars from the sums of all rows; without a reduction, the loss of every row from its terms.
template <class T>
__device__ inline void finish_loss(const LossProblem& p, const double* sums) {
  const bool both = p.target_logits.columns > 0, in_double = p.results_in_double;
  const double trade_off = both ? *p.trade_off : 1.0;
  if (p.reduction == Reduction::kNone) {
    finish_rows<sizeof(T) == 8 ? 8 : 4>(p, trade_off);  // for float64, nvcc spills with 4 on 12.0
  }
  if (threadIdx.x != 0) return;
  const bool mean = p.reduction == Reduction::kMean, any_valid = sums[kValid] > 0;
  // A batch without a supervised row is ordinary: its source term is 0. A batch without a valid row has no mean.
  const double source_divisor = !mean || (sums[kSupervised] == 0 && any_valid) ? 1 : sums[kSupervised];
  const double target_divisor = mean ? sums[kWeight] : 1;
  // The rest of a factor, beyond the stored part. Without a valid row every gradient is 0, and the product must stay 0.
  const auto left = [&](ScalarType type, double factor, double divisor) {
    if (divisor == 0 && !any_valid) return 0.0;
    if (type == ScalarType::kFloat16) return factor / divisor;
    return mean ? static_cast<double>(p.source_logits.rows) / divisor : 1.0;
  };
  store_result(p.factors, in_double, 0, left(p.source_logits.type, trade_off, source_divisor));
  store_result(p.factors, in_double, 1, left(p.target_logits.type, 1, target_divisor));
  if (p.reduction == Reduction::kNone) return;
  const double source = sums[kSourceLoss] / source_divisor;  // no valid row: 0 / 0, as F.cross_entropy
  const double target = both ? sums[kTargetLoss] / target_divisor : 0;
  store_result(p.terms, in_double, 0, target);
  store_result(p.terms, in_double, 1, source);
  store_result(p.loss, in_double, 0, both ? target + trade_off * source : source);
}

template <class T>
__device__ __forceinline__ Stage<T> stage_of(const RowPlan& plan, char* memory, int index) {
  return {memory + index * plan.staged_bytes, plan};
}

// The most registers of a thread, by way of the largest block that a multiprocessor of 65536 must hold. 512 threads
// leave 128. 640 leave 96, with which five blocks of 128 threads fit; float32 rows of 1000 classes have such blocks.
template <class T>
inline constexpr int kBoundedThreads = std::is_same_v<T, float> && kHasOrdinaryRows<T> ? 640 : kLargestBlock;

// Handles the rows whose logits have type T. The 1 keeps nvcc from spilling to save registers for a second block.
template <class T>
__global__ void __launch_bounds__(kBoundedThreads<T>, 1) loss_kernel(LossProblem p, LossPlan plan) {
  COTUNING_DYNAMIC_SHARED(staged);
  COTUNING_SHARED(double, scratch, kMostWarps* kMostSums);
  COTUNING_SHARED(double, all_totals, kMostWarps* kLossSums);
  double* totals = all_totals + threadIdx.x / kWarpThreads * kLossSums;
  if (threadIdx.x % kWarpThreads == 0) {
    for (int k = 0; k < kLossSums; ++k) totals[k] = 0;
  }
  const int64_t items = plan.source.items + plan.target.items;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    __syncthreads();  // before the shared memory of the rows before is written again, by other threads
    // A warp may have no row in its last item. A block that handles one row at a time always has one.
    if (item < plan.source.items) {
      const RowSlot slot = slot_in(plan.source, item);
      if (slot.row >= p.source_logits.rows) continue;
      source_row(p, Team(plan.source.threads_per_row, scratch), slot.row, stage_of<T>(plan.source, staged, slot.index),
                 totals);
    } else {
      const RowSlot slot = slot_in(plan.target, item - plan.source.items);
      if (slot.row >= p.target_logits.rows) continue;
      target_row(p, Team(plan.target.threads_per_row, scratch), slot.row, stage_of<T>(plan.target, staged, slot.index),
                 totals);
    }
  }
  if (!sum_over_blocks<kLossSums>(p.sums, all_totals)) return;
  if (threadIdx.x < kLossSums && plan.part == LossPart::kFirst) p.first_sums[threadIdx.x] = all_totals[threadIdx.x];
  if (plan.part == LossPart::kFirst) return;
  if (threadIdx.x < kLossSums && plan.part == LossPart::kLast) all_totals[threadIdx.x] += p.first_sums[threadIdx.x];
  __syncthreads();
  finish_loss<T>(p, all_totals);
}

}  // namespace cotuning::cuda
