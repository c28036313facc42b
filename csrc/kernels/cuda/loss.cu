#include "launch.h"
#include "loss.cuh"

namespace cotuning::cuda {

void launch_loss(const LossProblem& problem, const LossPlan& plan, void* stream) {
  const ScalarType type = problem.source_logits.type;
  const bool both = problem.target_logits.columns > 0;
  if (both && problem.target_logits.type != type) return launch_mixed_loss(problem, plan, stream);
  switch (type) {
    case ScalarType::kFloat32: return launch_loss_kernel<float, float>(problem, plan, stream);
    case ScalarType::kBFloat16: return launch_loss_kernel<BFloat16, BFloat16>(problem, plan, stream);
    case ScalarType::kFloat16: return launch_loss_kernel<Float16, Float16>(problem, plan, stream);
    case ScalarType::kFloat64: return launch_loss_kernel<double, double>(problem, plan, stream);
  }
}

}  // namespace cotuning::cuda
