// The Co-Tuning loss of a batch: both heads, both gradients, labels, options, reduction.
#pragma once

#include <vector>

#include "../loss_problem.h"
#include "bad_label.h"
#include "parallel.h"

namespace cotuning::cpu {

struct LossProblem : LossInputs {
  std::vector<double> weight;  // (N_t) or empty
  double trade_off = 1;
};

struct LossResult {
  // One entry, or one per row without reduction.
  std::vector<double> target_term, source_term;
  // The gradient of the loss is the factor times the stored gradient.
  double source_factor = 1, target_factor = 1;
  // A row of the sparse relationship with wrong indices, which a label chose: then nothing else is written.
  int64_t bad_row = -1;
};

// If a label is bad, nothing is written.
BadLabel co_tuning_loss(const LossProblem& problem, ParallelFor parallel_for, LossResult* result);

}  // namespace cotuning::cpu
