// The operations' arguments as the CUDA kernels take them. All memory is the device's.
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

// Sums over blocks in a fixed order: every block leaves its part in `parts`, and the last one to finish, which it
// learns from `finished`, adds them up. `finished` is 0 before the launch and 0 again after it.
struct BlockSums {
  double* parts = nullptr;
  unsigned* finished = nullptr;
};

struct LossProblem : LossInputs {
  int64_t target_classes = 0;
  ConstVector weight;  // (N_t)
  const double* trade_off = nullptr;
  double per_row = 1;  // in a mean, 1 / B: the factor of a row where all of them take part

  // () or (B); (2) or (2, B), the target's first; (2), the source's first. All float, or all double. The gradient of
  // the loss is factor * the stored one (co_tuning_loss.cuh, stored_factor).
  void *loss = nullptr, *terms = nullptr, *factors = nullptr;
  bool results_in_double = false;

  BlockSums sums;
  double* first_sums = nullptr;  // kLossSums numbers: of the first of two launches
};
inline constexpr int kLossSums = 5;

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
  Matrix sums;  // float32 or float64, a row a class
  int64_t* counts = nullptr;
};

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
