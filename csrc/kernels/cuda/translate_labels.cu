#include "launch.h"
#include "translate_labels.cuh"

namespace cotuning::cuda {

void launch_translate_labels(const TranslateProblem& problem, const PlanRules& rules, void* stream) {
  if (problem.out.rows == 0) return;
  const PassPlan plan = plan_pass(problem.out.rows, problem.out.columns, problem.out.type, rules);
  launch(translate_kernel, plan.blocks, plan.threads, 0, stream, problem, plan);
}

}  // namespace cotuning::cuda
