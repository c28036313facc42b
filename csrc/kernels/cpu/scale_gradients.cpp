#include "scale_gradients.h"

#include "rows.h"

namespace cotuning::cpu {
namespace {

struct Task {
  Matrix rows;
  double factor;
  const double* upstream;
  int64_t upstream_stride;
  void (*scale)(void* row, int64_t n, double factor);

  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) scale(rows.row(i), rows.columns, factor * upstream[i * upstream_stride]);
  }
};

}  // namespace

void scale_gradients(const Matrix& rows, double factor, const double* upstream, int64_t upstream_stride,
                     ParallelFor parallel_for) {
  if (upstream_stride == 0 && factor * upstream[0] == 1.0) return;
  Task task{rows, factor, upstream, upstream_stride, row_kernels().scale[static_cast<int>(rows.type)]};
  parallel_for(
      0, rows.rows, grain_rows(rows.columns),
      [](int64_t begin, int64_t end, void* context) { static_cast<Task*>(context)->run(begin, end); }, &task);
}

}  // namespace cotuning::cpu
