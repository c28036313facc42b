#include "class_sums.cuh"
#include "launch.h"

namespace cotuning::cuda {

void launch_class_sums(const ClassSumsProblem& problem, const PlanRules& rules, void* stream) {
  const int64_t classes = problem.sums.rows;
  if (classes == 0) return;
  const int threads = block_threads(problem.logits.columns, problem.logits.type, rules);
  const int64_t blocks = classes < rules.max_blocks ? classes : rules.max_blocks;
  switch (problem.logits.type) {
    case ScalarType::kFloat32: return launch(class_sums_kernel<float>, blocks, threads, 0, stream, problem);
    case ScalarType::kBFloat16: return launch(class_sums_kernel<BFloat16>, blocks, threads, 0, stream, problem);
    case ScalarType::kFloat16: return launch(class_sums_kernel<Float16>, blocks, threads, 0, stream, problem);
    case ScalarType::kFloat64: return launch(class_sums_kernel<double>, blocks, threads, 0, stream, problem);
  }
}

}  // namespace cotuning::cuda
