// Sums of softmax outputs by class, from which the relationship is computed.
#pragma once

#include "../views.h"
#include "bad_label.h"
#include "parallel.h"

namespace cotuning::cpu {

// The sums of the softmax of each class, one row a class in float or double, and the number of rows in them.
struct ClassSums {
  Matrix sums;
  int64_t* counts;
};

// after.sums[t] = before.sums[t] + the sum of softmax(inverse_temperature * logits[i]) over the rows i of class t, and
// after.counts likewise. Both may be the same memory. Otherwise a class whose counts are equal must have the same row
// in both: then only the rows of other classes, and of the batch's, are read and written.
//
// Rows are added in order for any number of threads: no two threads share a class. A thread needs one scratch row. If a
// label is bad, nothing is written. `first_bad_row`: of the logits, the first row without a softmax, or -1. The sums of
// its class are NaN.
BadLabel add_class_sums(const ConstMatrix& logits, const Labels& labels, int64_t ignore_index,
                        double inverse_temperature, const ClassSums& before, const ClassSums& after,
                        ParallelFor parallel_for, int64_t* first_bad_row);

}  // namespace cotuning::cpu
