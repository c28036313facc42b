// The inputs of the loss that the CPU and the CUDA kernels share.
#pragma once

#include "views.h"

namespace cotuning {

// Each row's target: class indices (labels_b as well in a mixup pair), or probabilities (B, N_t).
struct TargetInputs {
  Labels labels, labels_b;
  ConstMatrix probabilities;
  // Mixup: the share of `labels` in row i is mix[i * mix_stride]. Probabilities: the supervised share of each row.
  const double* mix = nullptr;
  int64_t mix_stride = 0;
  int64_t ignore_index = -100;
};

struct LossInputs : TargetInputs {
  ConstMatrix source_logits;  // (B, N_s)
  ConstMatrix target_logits;  // (B, N_t); no matrix: only the source term
  ConstMatrix relationship;   // (N_t, N_s); with probabilities (B, N_s), one row per example

  double label_smoothing = 0;
  Reduction reduction = Reduction::kMean;
  bool kl_divergence = false;

  Matrix source_gradient, target_gradient;  // may be the logits themselves
};

}  // namespace cotuning
