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
    const SplitPlan& split = plan.split;
    if (split.parts > 0) {
      CHECK(split.items == rows * split.parts && split.items <= rules.multiprocessors, "%lld parts",
            static_cast<long long>(split.items));
      CHECK(split.parts <= kLargestBlock && int64_t{split.columns} * split.parts >= source &&
                int64_t{split.columns} * (split.parts - 1) < source,
            "%d parts of %d columns", split.parts, split.columns);
      CHECK(plan.source.items == 0, "split rows are done twice");
    }
    for (const RowPlan* head : {&plan.source, &plan.target}) {
      if (head == &plan.target ? target == 0 : split.parts > 0) continue;
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

// From 8192 vectors of 16 bytes a row, and half as many rows as multiprocessors.
TEST(plans_of_few_long_rows) {
  PlanRules hopper;
  hopper.shared_bytes = (227 << 10) - kStaticSharedBytes;
  hopper.multiprocessors = 132;
  const auto parts_of = [&](int64_t rows, int64_t columns, ScalarType type) {
    return plan_loss(rows, columns, type, 9, type, hopper).split.parts;
  };
  CHECK(parts_of(8, 262144, ScalarType::kFloat32) == 16, "8 x 16 blocks");
  CHECK(parts_of(8, 262144, ScalarType::kBFloat16) == 8, "8 x 8 blocks");
  CHECK(parts_of(66, 32768, ScalarType::kFloat32) == 2 && parts_of(67, 32768, ScalarType::kFloat32) == 0, "2 a row");
  CHECK(parts_of(8, 32767, ScalarType::kFloat32) == 0 && parts_of(48, 30522, ScalarType::kFloat32) == 0, "too short");
  hopper.multiprocessors = 0;
  CHECK(parts_of(8, 262144, ScalarType::kFloat32) == 0, "a device that is not known");
}

// Rows that fit twice in the shared memory of a multiprocessor have blocks of half the size.
TEST(plans_of_two_blocks_a_multiprocessor) {
  PlanRules hopper;
  hopper.shared_bytes = (227 << 10) - kStaticSharedBytes;
  hopper.multiprocessors = 132;
  const auto plan_of = [&](int64_t rows, int64_t columns) {
    return plan_loss(rows, columns, ScalarType::kFloat32, 200, ScalarType::kFloat32, hopper);
  };
  CHECK(plan_of(2048, 10000).threads == 256 && plan_of(263, 10000).threads == 512, "too few rows for two blocks");
  CHECK(plan_of(2048, 4096).threads == 256 && plan_of(2048, 30522).threads == 512, "another plan");
  for (int64_t columns = 4097; columns < 16000; ++columns) {
    const LossPlan plan = plan_of(2048, columns);
    const int64_t of_multiprocessor = 228 << 10, of_block = plan.shared_bytes + kStaticSharedBytes + 1024;
    CHECK((plan.threads == 256) == (2 * of_block <= of_multiprocessor), "%lld columns",
          static_cast<long long>(columns));
  }
}

// Few classes divide their columns among blocks.
TEST(plans_of_class_sums) {
  PlanRules hopper;
  hopper.multiprocessors = 132;
  const auto plan_of = [&](int64_t columns, int64_t classes) {
    return plan_class_sums(256, columns, ScalarType::kFloat32, classes, hopper);
  };
  CHECK(plan_of(1000, 9).items == 9 * 8 && plan_of(1000, 9).columns == 128, "another plan");
  CHECK(plan_of(30522, 9).items == 9 * 60 && plan_of(30522, 9).columns == 512, "another plan");
  CHECK(plan_of(1000, 200).items == 200 * 4 && plan_of(1000, 200).columns == 256, "another plan");
  CHECK(plan_of(1000, 1000).items == 1000 * 2 && plan_of(1, 1).items == 1, "another plan");
}

TEST(a_plan_of_no_rows_launches_one_block) {
  const LossPlan plan = plan_loss(0, 40, ScalarType::kFloat32, 7, ScalarType::kFloat32, {});
  CHECK(plan.blocks == 1 && plan.source.items == 0 && plan.target.items == 0, "%lld blocks",
        static_cast<long long>(plan.blocks));
}

}  // namespace
}  // namespace cotuning::test
