// The backward pass: gradients times the upstream gradient.
#pragma once

#include "../views.h"
#include "parallel.h"

namespace cotuning::cpu {

// row *= factor * upstream. `upstream` has one number for all rows (upstream_stride 0) or one per row.
void scale_gradients(const Matrix& rows, double factor, const double* upstream, int64_t upstream_stride,
                     ParallelFor parallel_for);

}  // namespace cotuning::cpu
