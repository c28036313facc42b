#include "co_tuning_loss.cuh"
#include "launch.h"

namespace cotuning::cuda {

namespace {

// A kernel's default limit is 48 KB less its static memory. If two threads both raise it, they set the same number.
template <class T>
void launch_loss_kernel(const LossProblem& problem, const LossPlan& plan, Device& device, std::atomic<bool>* allowed,
                        void* stream) {
  const auto kernel = loss_kernel<T>;
  if (!*allowed) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(device.dynamic_shared_bytes)),
          "asking for shared memory");
    *allowed = true;
  }
  launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, problem, plan);
}

void launch_rows_of(ScalarType type, const LossProblem& problem, const LossPlan& plan, Device& device, void* stream) {
  std::atomic<bool>* allowed = &device.allowed[static_cast<int>(type)];
  switch (type) {
    case ScalarType::kFloat32: return launch_loss_kernel<float>(problem, plan, device, allowed, stream);
    case ScalarType::kBFloat16: return launch_loss_kernel<BFloat16>(problem, plan, device, allowed, stream);
    case ScalarType::kFloat16: return launch_loss_kernel<Float16>(problem, plan, device, allowed, stream);
    case ScalarType::kFloat64: return launch_loss_kernel<double>(problem, plan, device, allowed, stream);
  }
}

}  // namespace

void launch_co_tuning_loss(LossProblem problem, const LossPlan& plan, Device& device, double* sums, void* stream) {
  problem.sums.parts = sums;
  problem.part_sums = sums + shared_sums(plan) - plan.split.items * kPartSums;
  problem.first_sums = problem.part_sums - kLossSums;
  const ScalarType source = problem.source_logits.type, target = problem.target_logits.type;
  if (plan.split.parts > 0) {
    launch_split_rows(problem, plan.split, stream);
    LossPlan rest = plan;
    rest.part = LossPart::kLast;
    return launch_rows_of(problem.target_logits.columns > 0 ? target : source, problem, rest, device, stream);
  }
  if (problem.target_logits.columns == 0 || source == target) {
    return launch_rows_of(source, problem, plan, device, stream);
  }
  LossPlan first = plan, second = plan;
  first.target = second.source = {};
  first.part = LossPart::kFirst;
  second.part = LossPart::kLast;
  launch_rows_of(source, problem, first, device, stream);
  launch_rows_of(target, problem, second, device, stream);
}

}  // namespace cotuning::cuda
