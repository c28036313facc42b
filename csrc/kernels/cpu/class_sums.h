// Sums of softmax outputs by class, from which the relationship is computed.
#pragma once

#include "../views.h"
#include "bad_label.h"
#include "parallel.h"

namespace cotuning::cpu {

// sums[t] += softmax(inverse_temperature * logits[i]) and counts[t] += 1 for each row i of class t. `sums` has one row
// per class, in float or double. If a label is bad, nothing is written. Rows are added in order for any number of
// threads: no two threads share a class. A thread needs one scratch row.
BadLabel add_class_sums(const ConstMatrix& logits, const Labels& labels, int64_t ignore_index,
                        double inverse_temperature, const Matrix& sums, int64_t* counts, ParallelFor parallel_for);

}  // namespace cotuning::cpu
