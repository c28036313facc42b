#include "launch.h"
#include "loss.cuh"

namespace cotuning::cuda {
namespace {

template <class T>
void launch(const LossProblem& problem, const LossPlan& plan, LossItems items, int64_t blocks, const BlockSums& sums,
            void* stream) {
  allow_dynamic_shared(loss_kernel<T>, plan.shared_bytes);
  COTUNING_LAUNCH(loss_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(plan.threads)),
                  static_cast<size_t>(plan.shared_bytes), static_cast<Stream>(stream), problem, plan, items, sums);
  check_launch();
}

void launch_head(ScalarType type, const LossProblem& problem, const LossPlan& plan, LossItems items, int64_t blocks,
                 const BlockSums& sums, void* stream) {
  switch (type) {
    case ScalarType::kFloat32: return launch<float>(problem, plan, items, blocks, sums, stream);
    case ScalarType::kBFloat16: return launch<BFloat16>(problem, plan, items, blocks, sums, stream);
    case ScalarType::kFloat16: return launch<Float16>(problem, plan, items, blocks, sums, stream);
    case ScalarType::kFloat64: return launch<double>(problem, plan, items, blocks, sums, stream);
  }
}

}  // namespace

void launch_loss(const LossProblem& problem, const LossPlan& plan, void* stream) {
  const int64_t source_items = plan.source.items, items = source_items + plan.target.items;
  BlockSums sums = problem.sums;
  sums.blocks = plan.blocks;
  if (plan.launches == 1) {
    return launch_head(problem.source_logits.type, problem, plan, {0, items}, plan.blocks, sums, stream);
  }
  launch_head(problem.source_logits.type, problem, plan, {0, source_items}, plan.source_blocks, sums, stream);
  sums.first_block = plan.source_blocks;
  launch_head(problem.target_logits.type, problem, plan, {source_items, items}, plan.blocks - plan.source_blocks, sums,
              stream);
}

}  // namespace cotuning::cuda
