// Sums over a data set of logits: what the relationship and the temperature are made of.
#pragma once

#include "types.h"

namespace cotuning::cpu {

// sums[t] += softmax(b * logits[i]) and counts[t] += 1 for each row i of class t. `sums` is (num_classes, N) in float
// or double. Nothing is written where a label is bad. Rows are added in their order, whatever the number of threads: a
// thread has classes of its own, and no memory of its own but one scratch row.
BadLabel add_class_sums(ConstMatrix logits, Labels labels, int64_t num_classes, int64_t ignore_index, double b,
                        Matrix sums, int64_t* counts, ParallelFor parallel_for);

// terms = [NLL, its first and second derivative in b, rows], summed over rows that are not ignored.
BadLabel temperature_terms(ConstMatrix logits, Labels labels, int64_t ignore_index, double b, double terms[4],
                           ParallelFor parallel_for);

}  // namespace cotuning::cpu
