// The Co-Tuning loss of a batch: both heads, both gradients, labels, options, reduction.
#pragma once

#include <vector>

#include "types.h"

namespace cotuning::cpu {

struct LossProblem {
  ConstMatrix source_logits;  // (B, N_s)
  ConstMatrix target_logits;  // (B, N_t); no matrix: the source term alone

  // Exactly one of the two: class indices (labels_b as well in a mixup pair), or probabilities (B, N_t).
  Labels labels, labels_b;
  ConstMatrix probabilities;
  // Mixup: the share of `labels`, row i at mix[i * mix_stride]. Probabilities: the supervised share of each row.
  const double* mix = nullptr;
  int64_t mix_stride = 0;

  ConstMatrix relationship;    // (N_t, N_s); with probabilities (B, N_s), row i for row i
  std::vector<double> weight;  // (N_t) or empty

  double trade_off = 1;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::kMean;
  bool kl_divergence = false;

  Matrix source_gradient, target_gradient;  // no data: not wanted; may be the logits themselves
};

struct LossResult {
  // One entry, or one a row without reduction.
  std::vector<double> target_term, source_term;
  // The gradient of the loss is factor * what was written.
  double source_factor = 1, target_factor = 1;
};

// Nothing is written where a label is bad.
BadLabel co_tuning_loss(const LossProblem& problem, ParallelFor parallel_for, LossResult* result);

// row *= factor * upstream, upstream being one number or one a row (upstream_stride 0 or more). Rows in threads.
void scale_rows(Matrix rows, int64_t count, int64_t columns, double factor, const double* upstream,
                int64_t upstream_stride, ParallelFor parallel_for);

// out[i] = the translated label of row i: (B, N_s) in the relationship's type, contiguous.
BadLabel translate_labels(const LossProblem& problem, int64_t batch, void* out, ParallelFor parallel_for);

}  // namespace cotuning::cpu
