// The relationship's row of each label, or the mixture of two rows for a mixup pair.
#pragma once

#include "../loss_problem.h"
#include "bad_label.h"
#include "parallel.h"

namespace cotuning::cpu {

struct TranslateProblem : TargetInputs {
  ConstMatrix relationship;
  Matrix out;  // (B, N_s), contiguous, in the relationship's type
};

// If a label is bad, nothing is written.
BadLabel translate_labels(const TranslateProblem& problem, ParallelFor parallel_for);

}  // namespace cotuning::cpu
