#include "launch.h"
#include "scale_gradients.cuh"

namespace cotuning::cuda {

void launch_scale_gradients(const ScaleProblem& problem, const PlanRules& rules, void* stream) {
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

}  // namespace cotuning::cuda
