// Views of device memory, and the operations' arguments as the kernels take them.
#pragma once

#include "../types.h"

namespace cotuning::cuda {

using cotuning::BFloat16;
using cotuning::ComputeType;
using cotuning::Float16;
using cotuning::Labels;
using cotuning::Reduction;
using cotuning::ScalarType;
using cotuning::size_of;

// A matrix with dense columns and rows at any distance (0: every row is the same one). No columns: no matrix.
struct ConstMatrix {
  const void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;  // in elements

  COTUNING_BOTH const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * row_stride * size_of(type);
  }
};

// No data: not wanted.
struct Matrix {
  void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;

  COTUNING_BOTH void* row(int64_t i) const { return static_cast<char*>(data) + i * row_stride * size_of(type); }
};

// A vector at any distance (0: one number for all).
struct ConstVector {
  const void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t stride = 0;
};

// Sums over blocks in a fixed order: every block leaves its part in `parts`, and the last one to finish, which it
// learns from `finished`, adds them up. `finished` is 0 before the launch and 0 again after it.
struct BlockSums {
  double* parts = nullptr;
  unsigned* finished = nullptr;
};

struct LossProblem {
  ConstMatrix source_logits;  // (B, N_s)
  ConstMatrix target_logits;  // (B, N_t); no matrix: the source term alone
  int64_t target_classes = 0;

  // Class indices (labels_b as well in a mixup pair), or probabilities (B, N_t).
  Labels labels, labels_b;
  ConstMatrix probabilities;
  // Mixup: the share of `labels`. Probabilities: the supervised share of each row.
  const double* mix = nullptr;
  int64_t mix_stride = 0;

  ConstMatrix relationship;  // (N_t, N_s); with probabilities (B, N_s), row i for row i
  ConstVector weight;        // (N_t)

  const double* trade_off = nullptr;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::kMean;
  double per_row = 1;  // in a mean, 1 / B: what a row counts where all of them take part
  bool kl_divergence = false;

  // May be the logits themselves. The gradient of the loss is factor * what is written (loss.cuh, stored_factor).
  Matrix source_gradient, target_gradient;
  // () or (B); (2) or (2, B), the target's first; (2), the source's first. All float, or all double.
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

struct TranslateProblem {
  Labels labels, labels_b;
  const double* mix = nullptr;
  int64_t mix_stride = 0;
  ConstMatrix relationship;
  int64_t ignore_index = -100;
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
