// The negative log-likelihood of logits at a temperature, and its derivatives, from which the temperature is fitted.
#pragma once

#include "../views.h"
#include "bad_label.h"
#include "parallel.h"

namespace cotuning::cpu {

// terms = [NLL, its first and second derivative in the inverse temperature, number of rows], summed over rows that are
// not ignored.
BadLabel temperature_terms(const ConstMatrix& logits, const Labels& labels, int64_t ignore_index,
                           double inverse_temperature, double terms[4], ParallelFor parallel_for);

}  // namespace cotuning::cpu
