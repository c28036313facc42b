// Plans: plain functions of shapes.
#include "../../kernels/cuda/plan.h"
#include "../check.h"

namespace cotuning::test {
namespace {

using namespace cuda;

TEST(plans_fit_the_device) {
  for (int i = 0; i < 3000; ++i) {
    const auto type = [] { return static_cast<ScalarType>(random_integer(0, 3)); };
    const ScalarType source_type = type(), target_type = type();
    const int64_t rows = one_in(8) ? 0 : random_integer(1, one_in(2) ? 100 : 1 << 20);
    const int64_t source = random_integer(1, one_in(2) ? 2000 : 300000);
    const int64_t target = one_in(4) ? 0 : random_integer(1, one_in(2) ? 300 : 30000);
    PlanRules rules;
    constexpr int64_t kCards[] = {48 << 10, 64 << 10, 99 << 10, 163 << 10, 227 << 10};
    rules.shared_bytes = kCards[random_integer(0, 4)] - kStaticSharedBytes;
    rules.multiprocessors = one_in(2) ? 0 : random_integer(1, 160);
    const LossPlan plan = plan_loss(rows, source, source_type, target, target_type, rules);
    CHECK(plan.shared_bytes <= rules.shared_bytes, "%lld bytes", static_cast<long long>(plan.shared_bytes));
    CHECK(plan.threads >= 128 && plan.threads <= kLargestBlock && (plan.threads & (plan.threads - 1)) == 0,
          "%d threads", plan.threads);
    CHECK(plan.blocks >= 1 && plan.blocks <= rules.max_blocks, "%lld blocks", static_cast<long long>(plan.blocks));
    for (const RowPlan* head : {&plan.source, &plan.target}) {
      if (head == &plan.target && target == 0) continue;
      const int64_t at_once = plan.threads / head->threads_per_row;
      CHECK(head->threads_per_row == kWarpThreads || head->threads_per_row == plan.threads, "%d threads a row",
            head->threads_per_row);
      CHECK(head->items * at_once >= rows && (head->items - 1) * at_once < rows, "rows left out, or too many");
      CHECK(head->staged_bytes * at_once <= plan.shared_bytes, "a row does not fit");
      CHECK(head->staged_target <= head->staged_logits, "%d vectors of the target", head->staged_target);
      const bool wide = size_of(head == &plan.source ? source_type : target_type) >= 4;
      CHECK(head->kept_target == 0 || (wide && head->staged_target + head->kept_target == head->staged_logits),
            "%d vectors of the target in registers", head->kept_target);
      CHECK(head->kept_target <= head->threads_per_row * kKeptVectors, "%d vectors in %d threads", head->kept_target,
            head->threads_per_row);
    }
  }
}

TEST(plans_of_known_heads) {
  PlanRules hopper;
  hopper.shared_bytes = (227 << 10) - kStaticSharedBytes;
  const auto plan_of = [&](int64_t columns, ScalarType type) {
    return plan_loss(256, columns, type, 200, type, hopper);
  };
  CHECK(plan_of(1000, ScalarType::kFloat32).source.threads_per_row == 128, "another plan");
  CHECK(plan_of(1000, ScalarType::kBFloat16).source.threads_per_row == kWarpThreads, "another plan");
  CHECK(plan_of(1000, ScalarType::kFloat32).target.threads_per_row == kWarpThreads, "another plan");
  const auto staged = [&](int64_t columns, ScalarType type) { return plan_of(columns, type).source; };
  CHECK(staged(21841, ScalarType::kFloat32).staged_target == row_vectors(21841, ScalarType::kFloat32), "not all of R");
  CHECK(staged(30522, ScalarType::kBFloat16).staged_target == row_vectors(30522, ScalarType::kBFloat16),
        "not all of R");
  const RowPlan most = staged(30522, ScalarType::kFloat32);
  CHECK(most.staged_logits == row_vectors(30522, ScalarType::kFloat32), "not all logits");
  CHECK(most.staged_target > most.staged_logits * 85 / 100, "%d vectors of R", most.staged_target);
  CHECK(most.staged_target + most.kept_target == most.staged_logits, "%d vectors in registers", most.kept_target);
  const RowPlan more = staged(32000, ScalarType::kFloat32);
  CHECK(more.staged_target > 0 && more.kept_target == 0, "%d vectors in registers", more.kept_target);
  const RowPlan half = staged(45000, ScalarType::kBFloat16);
  CHECK(half.staged_bytes > hopper.shared_bytes - 64, "%lld bytes", static_cast<long long>(half.staged_bytes));
  CHECK(staged(100000, ScalarType::kFloat32).staged_logits == 0, "more than there is room for");
}

// With few rows, a block per row occupies more of a card. Many rows, and short rows, have a warp each.
TEST(plans_of_few_rows) {
  PlanRules hopper;
  hopper.shared_bytes = (227 << 10) - kStaticSharedBytes;
  hopper.multiprocessors = 132;
  const auto plan_of = [&](int64_t rows) {
    return plan_loss(rows, 1000, ScalarType::kBFloat16, 200, ScalarType::kBFloat16, hopper);
  };
  const LossPlan few = plan_of(48);
  CHECK(few.source.threads_per_row == kSmallestBlock && few.source.items == 48, "%d threads a row",
        few.source.threads_per_row);
  CHECK(few.target.threads_per_row == kWarpThreads && few.target.items == 12, "%d threads a row",
        few.target.threads_per_row);
  CHECK(few.blocks == 60 && few.threads == kSmallestBlock, "%lld blocks", static_cast<long long>(few.blocks));
  CHECK(plan_of(524).source.threads_per_row == kSmallestBlock, "131 + 131 items");
  CHECK(plan_of(528).source.threads_per_row == kWarpThreads, "132 + 132 items");
  hopper.multiprocessors = 0;
  CHECK(plan_of(48).source.threads_per_row == kWarpThreads, "a device that is not known");
}

TEST(a_plan_of_no_rows_launches_one_block) {
  const LossPlan plan = plan_loss(0, 40, ScalarType::kFloat32, 7, ScalarType::kFloat32, {});
  CHECK(plan.blocks == 1 && plan.source.items == 0 && plan.target.items == 0, "%lld blocks",
        static_cast<long long>(plan.blocks));
}

}  // namespace
}  // namespace cotuning::test
