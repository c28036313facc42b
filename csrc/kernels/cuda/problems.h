// The arguments of the operations, as the CUDA kernels take them. All pointers are to device memory.
#pragma once

#include "../loss_problem.h"

namespace cotuning::cuda {

using cotuning::BFloat16;
using cotuning::ComputeType;
using cotuning::ConstMatrix;
using cotuning::ConstVector;
using cotuning::Float16;
using cotuning::Labels;
using cotuning::LossInputs;
using cotuning::Matrix;
using cotuning::Reduction;
using cotuning::ScalarType;
using cotuning::size_of;
using cotuning::TargetInputs;

// Sums over blocks in a fixed order. Every block stores its part in `parts`. A block learns from `finished` that it is
// the last one, and adds up the parts. `finished` is 0 before the launch and after it.
struct BlockSums {
  double* parts = nullptr;
  unsigned* finished = nullptr;
};

struct LossProblem : LossInputs {
  int64_t target_classes = 0;
  ConstVector weight;  // (N_t)
  const double* trade_off = nullptr;
  double per_row = 1;  // 1 / B in a mean: the factor of a row if all rows take part

  // Shapes: loss () or (B); terms (2) or (2, B), target first; factors (2), source first. All float, or all double. The
  // gradient of the loss is factor * stored gradient (co_tuning_loss.cuh, stored_factor).
  void *loss = nullptr, *terms = nullptr, *factors = nullptr;
  bool results_in_double = false;

  BlockSums sums;
  double* first_sums = nullptr;  // kLossSums numbers from the first of two launches
  double* part_sums = nullptr;   // kPartSums numbers for each part of a split row
};
inline constexpr int kLossSums = 5, kPartSums = 6;

struct ScaleProblem {
  Matrix gradients[2];
  ConstVector factors, upstream;
};

struct TranslateProblem : TargetInputs {
  ConstMatrix relationship;
  Matrix out;
};

struct ClassSumsProblem {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index = -100;
  double inverse_temperature = 1;
  Matrix sums;  // float32 or float64, one row per class
  int64_t* counts = nullptr;
  void* norms = nullptr;  // memory for kRowNormBytes a row
};

inline constexpr int64_t kRowNormBytes = 16;

struct TemperatureProblem {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index = -100;
  double inverse_temperature = 1;
  double* terms = nullptr;
  BlockSums sums;
};
inline constexpr int kTemperatureSums = 4;

}  // namespace cotuning::cuda
