#include "translate_labels.h"

#include <algorithm>

#include "pages.h"
#include "row_target.h"

namespace cotuning::cpu {
namespace {

struct Task {
  const TranslateProblem& p;
  std::vector<RowTarget> targets;

  void run(int64_t begin, int64_t end) const {
    const RowKernels& kernels = row_kernels();
    const bool in_double = p.relationship.type == ScalarType::kFloat64;
    const int64_t columns = p.relationship.columns, row_bytes = columns * size_of(p.relationship.type);
    for (int64_t i = begin; i < end; ++i) {
      auto* out = static_cast<char*>(p.out.row(i));
      const RowTarget& target = targets[i];
      if (target.count == 0) {
        std::fill(out, out + row_bytes, char(0));
        continue;
      }
      const void* first = p.relationship.row(target.index[0]);
      const void* second = target.count == 2 ? p.relationship.row(target.index[1]) : nullptr;
      const bool is_a_row = target.count == 1 && target.share[0] == 1.0;
      const void* q = is_a_row ? first
                               : mixed_row(kernels, p.relationship, in_double, first, target.share[0], second,
                                           target.count == 2 ? target.share[1] : 0);
      if (is_a_row || in_double) {
        std::copy(static_cast<const char*>(q), static_cast<const char*>(q) + row_bytes, out);
      } else {
        kernels.store_float[static_cast<int>(p.relationship.type)](static_cast<const float*>(q), columns, out);
      }
    }
  }
};

}  // namespace

BadLabel translate_labels(const TranslateProblem& problem, ParallelFor parallel_for) {
  Task task{problem, {}};
  if (BadLabel bad = read_row_targets(problem, problem.out.rows, problem.relationship.rows, &task.targets)) return bad;
  prefer_huge_pages(problem.out.data, problem.out.rows * problem.out.columns * size_of(problem.out.type));
  parallel_for(
      0, problem.out.rows, grain_rows(problem.out.columns),
      [](int64_t begin, int64_t end, void* context) { static_cast<Task*>(context)->run(begin, end); }, &task);
  return {};
}

}  // namespace cotuning::cpu
