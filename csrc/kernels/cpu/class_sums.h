// Sums of softmax outputs by class, of which the relationship is made.
#pragma once

#include "../views.h"
#include "bad_label.h"
#include "parallel.h"

namespace cotuning::cpu {

// sums[t] += softmax(inverse_temperature * logits[i]) and counts[t] += 1 for each row i of class t. `sums` has a row a
// class, in float or double. Nothing is written where a label is bad. Rows are added in their order, whatever the
// number of threads: each thread has classes of its own, and no memory of its own but one scratch row.
BadLabel add_class_sums(const ConstMatrix& logits, const Labels& labels, int64_t ignore_index,
                        double inverse_temperature, const Matrix& sums, int64_t* counts, ParallelFor parallel_for);

}  // namespace cotuning::cpu
