#include "launch.h"
#include "loss.cuh"

namespace cotuning::cuda {

namespace {

template <class T>
void launch_loss_kernel(const LossProblem& problem, const LossPlan& plan, void* stream) {
  const auto kernel = loss_kernel<T>;
  allow_dynamic_shared(kernel, plan.shared_bytes);
  COTUNING_LAUNCH(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)),
                  static_cast<size_t>(plan.shared_bytes), static_cast<Stream>(stream), problem, plan);
  check_launch();
}

void launch_rows_of(ScalarType type, const LossProblem& problem, const LossPlan& plan, void* stream) {
  switch (type) {
    case ScalarType::kFloat32: return launch_loss_kernel<float>(problem, plan, stream);
    case ScalarType::kBFloat16: return launch_loss_kernel<BFloat16>(problem, plan, stream);
    case ScalarType::kFloat16: return launch_loss_kernel<Float16>(problem, plan, stream);
    case ScalarType::kFloat64: return launch_loss_kernel<double>(problem, plan, stream);
  }
}

}  // namespace

void launch_loss(const LossProblem& problem, const LossPlan& plan, void* stream) {
  const ScalarType source = problem.source_logits.type, target = problem.target_logits.type;
  if (problem.target_logits.columns == 0 || source == target) return launch_rows_of(source, problem, plan, stream);
  LossPlan first = plan, second = plan;
  first.target = second.source = {};
  first.part = LossPart::kFirst;
  second.part = LossPart::kLast;
  launch_rows_of(source, problem, first, stream);
  launch_rows_of(target, problem, second, stream);
}

}  // namespace cotuning::cuda
