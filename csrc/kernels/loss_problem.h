// The inputs of the loss that the CPU and the CUDA kernels share.
#pragma once

#include <initializer_list>

#include "views.h"

namespace cotuning {

// The smallest and the largest value of an option.
struct Range {
  double low, high;
  bool holds(double value) const { return value >= low && value <= high; }
};

// What an option is called in Python; its value is the word's index.
using Words = std::initializer_list<const char*>;

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
  SparseMatrix sparse;        // (N_t, N_s) instead of `relationship`, never with probabilities

  double label_smoothing = 0;
  Reduction reduction = Reduction::kMean;
  bool kl_divergence = false;

  // Visits every option that is a number or a word, in the order of cotuning_kernels/options.py. Operations and the
  // fast path read the options with it.
  template <class Visitor>
  void visit_options(Visitor&& visit) {
    visit("label_smoothing", label_smoothing, Range{0, 1});
    visit("ignore_index", ignore_index);
    visit("reduction", reduction, Words{"none", "mean", "sum"});
    visit("kl_divergence", kl_divergence, Words{"cross_entropy", "kl"});
  }

  Matrix source_gradient, target_gradient;  // may be the logits themselves

  int64_t target_classes() const {
    return probabilities ? probabilities.columns : sparse ? sparse.rows : relationship.rows;
  }
};

}  // namespace cotuning
