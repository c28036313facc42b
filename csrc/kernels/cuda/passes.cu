#include "launch.h"
#include "passes.cuh"

namespace cotuning::cuda {

void launch_scale(const ScaleProblem& problem, const PlanRules& rules, void* stream) {
  ScalePlan plan{kSmallestBlock, {}};
  for (const Matrix& gradient : problem.gradients) {
    if (gradient.data == nullptr || fits_a_warp(gradient.columns, gradient.type, rules)) continue;
    const int threads = block_threads(gradient.columns, gradient.type, rules);
    if (threads > plan.threads) plan.threads = threads;
  }
  for (int k = 0; k < 2; ++k) {
    const Matrix& gradient = problem.gradients[k];
    if (gradient.data == nullptr) continue;
    plan.rows[k] = plan_rows(gradient.rows, gradient.columns, gradient.type, plan.threads, false, rules);
  }
  const int64_t items = plan.rows[0].items + plan.rows[1].items;
  if (items == 0) return;
  launch(scale_kernel, items < rules.max_blocks ? items : rules.max_blocks, plan.threads, 0, stream, problem, plan);
}

void launch_translate(const TranslateProblem& problem, const PlanRules& rules, void* stream) {
  if (problem.out.rows == 0) return;
  const PassPlan plan = plan_pass(problem.out.rows, problem.out.columns, problem.out.type, rules);
  launch(translate_kernel, plan.blocks, plan.threads, 0, stream, problem, plan);
}

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

void launch_temperature(const TemperatureProblem& problem, const PassPlan& plan, void* stream) {
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
