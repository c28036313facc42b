#include "launch.h"
#include "temperature_terms.cuh"

namespace cotuning::cuda {

void launch_temperature_terms(const TemperatureProblem& problem, const PassPlan& plan, void* stream) {
  const int64_t blocks = plan.blocks;
  switch (problem.logits.type) {
    case ScalarType::kFloat32: return launch(temperature_kernel<float>, blocks, plan.threads, 0, stream, problem, plan);
    case ScalarType::kBFloat16:
      return launch(temperature_kernel<BFloat16>, blocks, plan.threads, 0, stream, problem, plan);
    case ScalarType::kFloat16:
      return launch(temperature_kernel<Float16>, blocks, plan.threads, 0, stream, problem, plan);
    case ScalarType::kFloat64:
      return launch(temperature_kernel<double>, blocks, plan.threads, 0, stream, problem, plan);
  }
}

}  // namespace cotuning::cuda
