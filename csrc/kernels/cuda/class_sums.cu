#include "class_sums.cuh"
#include "launch.h"

namespace cotuning::cuda {

namespace {

template <class T>
void launch_both(const ClassSumsProblem& problem, const ClassSumsPlan& plan, void* stream) {
  launch(row_norms_kernel<T>, plan.rows.blocks, plan.rows.threads, 0, stream, problem, plan.rows);
  launch(class_sums_kernel<T>, plan.blocks, kSmallestBlock, 0, stream, problem, plan);
}

}  // namespace

void launch_class_sums(const ClassSumsProblem& problem, const ClassSumsPlan& plan, void* stream) {
  if (plan.items == 0) return;
  switch (problem.logits.type) {
    case ScalarType::kFloat32: return launch_both<float>(problem, plan, stream);
    case ScalarType::kBFloat16: return launch_both<BFloat16>(problem, plan, stream);
    case ScalarType::kFloat16: return launch_both<Float16>(problem, plan, stream);
    case ScalarType::kFloat64: return launch_both<double>(problem, plan, stream);
  }
}

}  // namespace cotuning::cuda
