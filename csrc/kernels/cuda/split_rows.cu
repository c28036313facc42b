#include "launch.h"
#include "split_rows.cuh"

namespace cotuning::cuda {

namespace {

template <class T>
void launch_both(const LossProblem& problem, const SplitPlan& plan, void* stream) {
  launch(split_sums_kernel<T>, plan.blocks, kLargestBlock, 0, stream, problem, plan);
  launch(split_gradients_kernel<T>, plan.blocks, kLargestBlock, 0, stream, problem, plan);
}

}  // namespace

void launch_split_rows(const LossProblem& problem, const SplitPlan& plan, void* stream) {
  switch (problem.source_logits.type) {
    case ScalarType::kFloat32: return launch_both<float>(problem, plan, stream);
    case ScalarType::kBFloat16: return launch_both<BFloat16>(problem, plan, stream);
    case ScalarType::kFloat16: return launch_both<Float16>(problem, plan, stream);
    case ScalarType::kFloat64: return launch_both<double>(problem, plan, stream);
  }
}

}  // namespace cotuning::cuda
