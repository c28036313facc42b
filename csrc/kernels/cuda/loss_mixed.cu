// The loss of two heads that differ in type. (One kernel that looks the types up took nvcc 1.7 times as long.)
#include <type_traits>

#include "loss.cuh"

namespace cotuning::cuda {
namespace {

template <class Source, class Target>
void launch_if_mixed(const LossProblem& problem, const LossPlan& plan, void* stream) {
  if constexpr (!std::is_same_v<Source, Target>) launch_loss_kernel<Source, Target>(problem, plan, stream);
}

template <class Source>
void launch_from(const LossProblem& problem, const LossPlan& plan, void* stream) {
  switch (problem.target_logits.type) {
    case ScalarType::kFloat32: return launch_if_mixed<Source, float>(problem, plan, stream);
    case ScalarType::kBFloat16: return launch_if_mixed<Source, BFloat16>(problem, plan, stream);
    case ScalarType::kFloat16: return launch_if_mixed<Source, Float16>(problem, plan, stream);
    case ScalarType::kFloat64: return launch_if_mixed<Source, double>(problem, plan, stream);
  }
}

}  // namespace

void launch_mixed_loss(const LossProblem& problem, const LossPlan& plan, void* stream) {
  switch (problem.source_logits.type) {
    case ScalarType::kFloat32: return launch_from<float>(problem, plan, stream);
    case ScalarType::kBFloat16: return launch_from<BFloat16>(problem, plan, stream);
    case ScalarType::kFloat16: return launch_from<Float16>(problem, plan, stream);
    case ScalarType::kFloat64: return launch_from<double>(problem, plan, stream);
  }
}

}  // namespace cotuning::cuda
