// Launch plans by shape. They are pure functions of numbers, so a plan can be computed and tested without a device, and
// a captured graph stays valid as long as the shapes stay.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "problems.h"

namespace cotuning::cuda {

// The thresholds. A launch uses these with the shared memory and multiprocessors of its device.
struct PlanRules {
  int64_t shared_bytes = 46 << 10;  // per block, beside kStaticSharedBytes, once the limit is raised
  // A warp handles a row of up to this many 16-byte vectors: 4 per lane.
  int64_t warp_vectors = 128;
  // About this many vectors per thread, where a block handles a row.
  int64_t vectors_per_thread = 4;
  // Beyond this many, blocks take further rows instead: the last block adds up one part per block.
  int64_t max_blocks = 4096;
  // 0: unknown.
  int64_t multiprocessors = 0;
  // Several blocks do a row where each has at least this many vectors, and there is a multiprocessor for each.
  int64_t split_vectors = 4096;
};

// Upper bound of static shared memory per block, independent of the plan: sums over warps and blocks.
inline constexpr int64_t kStaticSharedBytes = 2 << 10;

inline constexpr int kWarpThreads = 32;
inline constexpr int kSmallestBlock = 128;
inline constexpr int kLargestBlock = 512;

// Vectors of the target that a thread can keep in registers, 4 registers each. With one more, float64 spills on 12.0.
inline constexpr int kKeptVectors = 2;

// How the rows of one matrix are divided among threads.
struct RowPlan {
  int threads_per_row = kWarpThreads;  // a warp, or the whole block
  // How many of a row's 16-byte vectors, counted from the first, stay in shared memory between sweeps: all or none of
  // the logits, and as many of the target distribution as fit beside them.
  int staged_logits = 0, staged_target = 0;
  // The remaining vectors of the target if the row's threads can keep all of them in registers; else 0.
  int kept_target = 0;
  int64_t staged_bytes = 0;  // per row
  int64_t items = 0;         // a block handles one item at a time: a row per warp, or one row
};

// The part of the loss that a launch computes: all of it, or the rows of one head.
enum class LossPart : int { kWhole, kFirst, kLast };

// How few long rows of the source head are divided among blocks of kLargestBlock threads.
struct SplitPlan {
  int parts = 0;    // of a row; 0: rows are not split
  int columns = 0;  // of a part; the last one may have fewer
  int64_t items = 0, blocks = 0;
};

struct LossPlan {
  LossPart part = LossPart::kWhole;
  int threads = kSmallestBlock;  // per block
  int64_t blocks = 1;
  int64_t shared_bytes = 0;  // per block
  RowPlan source, target;    // no items in `source` if `split` has some
  SplitPlan split;
};

COTUNING_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Vectors of 16 bytes that a row touches, wherever it starts.
COTUNING_HOST_DEVICE constexpr int64_t row_vectors(int64_t columns, ScalarType type) {
  return ceil_div(columns * size_of(type), 16) + 1;
}

// Bytes of target distribution per 16-byte vector of logits, in the compute type.
COTUNING_HOST_DEVICE constexpr int64_t target_vector_bytes(ScalarType type) {
  return 16 / size_of(type) * (type == ScalarType::kFloat64 ? 8 : 4);
}

// How many vectors of the target a row's threads can keep in registers. None beside 16-bit logits: each vector would
// take 8 registers, those kernels have few left, and shared memory has room for longer rows.
inline int64_t most_kept(int threads, ScalarType type) {
  return target_vector_bytes(type) == 16 ? int64_t{threads} * kKeptVectors : 0;
}

inline bool fits_a_warp(int64_t columns, ScalarType type, const PlanRules& rules) {
  return ceil_div(columns * size_of(type), 16) <= rules.warp_vectors;
}

// Threads of a block that handles a row: a power of two.
inline int block_threads(int64_t columns, ScalarType type, const PlanRules& rules) {
  int threads = kSmallestBlock;
  while (threads < kLargestBlock && threads * rules.vectors_per_thread < ceil_div(columns * size_of(type), 16)) {
    threads *= 2;
  }
  return threads;
}

// Threads of a block that handles a row of the loss. If two rows fit in the shared memory of a multiprocessor, two
// blocks of half as many threads overlap their loads, sums and stores. A batch with fewer rows than that keeps large
// blocks.
inline int loss_threads(int64_t rows, int64_t columns, ScalarType type, const PlanRules& rules) {
  const int threads = block_threads(columns, type, rules);
  const int64_t bytes = row_vectors(columns, type) * (16 + target_vector_bytes(type));
  // The system keeps 1 KB of a block, and static memory counts twice too.
  const bool two_fit = 2 * bytes <= rules.shared_bytes - kStaticSharedBytes - 1024;
  return threads == kLargestBlock && two_fit && rows >= 2 * rules.multiprocessors ? threads / 2 : threads;
}

inline int64_t blocks_for(int64_t items, const PlanRules& rules) {
  return items < 1 ? 1 : items < rules.max_blocks ? items : rules.max_blocks;
}

// `staged`: whether the kernel reads a row more than once and can keep it.
inline RowPlan plan_rows(int64_t rows, int64_t columns, ScalarType type, int threads, bool staged,
                         const PlanRules& rules) {
  RowPlan plan;
  const bool warp = fits_a_warp(columns, type, rules);
  plan.threads_per_row = warp ? kWarpThreads : threads;
  const int64_t rows_per_item = threads / plan.threads_per_row;
  plan.items = ceil_div(rows, rows_per_item);
  const int64_t vectors = row_vectors(columns, type), room = rules.shared_bytes / rows_per_item;
  if (!staged || vectors * 16 > room) return plan;
  // A row with less room than it needs has the largest block, whose registers leave none for a second block on the
  // multiprocessor: it may take all the shared memory.
  int64_t of_target = (room - vectors * 16) / target_vector_bytes(type);
  if (of_target > vectors) of_target = vectors;
  plan.staged_logits = static_cast<int>(vectors);
  plan.staged_target = static_cast<int>(of_target);
  const int64_t rest = vectors - of_target;
  if (rest <= most_kept(plan.threads_per_row, type)) plan.kept_target = static_cast<int>(rest);
  plan.staged_bytes = vectors * 16 + of_target * target_vector_bytes(type);
  return plan;
}

// With a warp per row, a small batch would leave multiprocessors idle: 48 rows of 1000 bfloat16 logits would occupy 12.
// These rules then give each row a block, unless it has only one vector per lane.
inline PlanRules rules_of_batch(int64_t rows, bool both, const PlanRules& rules) {
  PlanRules own = rules;
  const int64_t items = ceil_div(rows, kSmallestBlock / kWarpThreads) * (both ? 2 : 1);
  if (items < 2 * rules.multiprocessors && own.warp_vectors > kWarpThreads) own.warp_vectors = kWarpThreads;
  return own;
}

// Splits rows if they leave at least half of the multiprocessors idle and each part is long enough. A part costs two
// launches and a second reading of the logits and of R.
inline SplitPlan plan_split(int64_t rows, int64_t columns, ScalarType type, const PlanRules& rules) {
  SplitPlan plan;
  if (rows == 0) return plan;
  int64_t parts = columns * size_of(type) / 16 / rules.split_vectors;
  if (parts > rules.multiprocessors / rows) parts = rules.multiprocessors / rows;
  if (parts > kLargestBlock) parts = kLargestBlock;
  if (parts < 2) return plan;
  // Parts start at a multiple of 16 bytes after the row's start, and none is empty.
  const int64_t lanes = 16 / size_of(type);
  plan.columns = static_cast<int>(ceil_div(ceil_div(columns, parts), lanes) * lanes);
  plan.parts = static_cast<int>(ceil_div(columns, plan.columns));
  plan.items = rows * plan.parts;
  plan.blocks = blocks_for(plan.items, rules);
  return plan;
}

// `target_columns` 0: the source term alone.
inline LossPlan plan_loss(int64_t rows, int64_t source_columns, ScalarType source_type, int64_t target_columns,
                          ScalarType target_type, const PlanRules& device) {
  LossPlan plan;
  const bool both = target_columns > 0;
  const PlanRules rules = rules_of_batch(rows, both, device);
  plan.split = plan_split(rows, source_columns, source_type, rules);
  const bool whole = plan.split.parts == 0;
  if (whole && !fits_a_warp(source_columns, source_type, rules)) {
    plan.threads = loss_threads(rows, source_columns, source_type, rules);
  }
  if (both && !fits_a_warp(target_columns, target_type, rules)) {
    const int threads = loss_threads(rows, target_columns, target_type, rules);
    if (threads > plan.threads) plan.threads = threads;
  }
  if (whole) plan.source = plan_rows(rows, source_columns, source_type, plan.threads, true, rules);
  if (both) plan.target = plan_rows(rows, target_columns, target_type, plan.threads, true, rules);
  for (const RowPlan* head : {&plan.source, &plan.target}) {
    const int64_t bytes = head->staged_bytes * (plan.threads / head->threads_per_row);
    if (bytes > plan.shared_bytes) plan.shared_bytes = bytes;
  }
  plan.blocks = blocks_for(plan.source.items + plan.target.items, rules);
  return plan;
}

// Doubles of memory that the launches of a plan share: sums over blocks, those of the first of two launches, and those
// of parts of rows.
inline int64_t shared_sums(const LossPlan& plan) {
  const int64_t blocks = plan.blocks > plan.split.blocks ? plan.blocks : plan.split.blocks;
  return (blocks + 1) * kLossSums + plan.split.items * kPartSums;
}

struct PassPlan {
  int threads = kSmallestBlock;
  int64_t blocks = 1;
  RowPlan rows;
};

// The plan of one pass over the rows of a matrix, which keeps nothing.
inline PassPlan plan_pass(int64_t rows, int64_t columns, ScalarType type, const PlanRules& rules) {
  PassPlan plan;
  if (!fits_a_warp(columns, type, rules)) plan.threads = block_threads(columns, type, rules);
  plan.rows = plan_rows(rows, columns, type, plan.threads, false, rules);
  plan.blocks = blocks_for(plan.rows.items, rules);
  return plan;
}

// Class sums: a pass for the rows' maxima and sums, then an item for each class and part of the columns.
struct ClassSumsPlan {
  PassPlan rows;
  int columns = kSmallestBlock;  // of an item: one to kMostColumns for each thread
  int64_t parts = 1;             // items of a class
  int64_t items = 0, blocks = 1;
};
inline constexpr int kMostColumns = 4;

// The fewer items, the less often labels are scanned. But with few classes, as many items as fill the device.
inline ClassSumsPlan plan_class_sums(int64_t rows, int64_t columns, ScalarType type, int64_t classes,
                                     const PlanRules& rules) {
  ClassSumsPlan plan;
  plan.rows = plan_pass(rows, columns, type, rules);
  plan.columns = kMostColumns * kSmallestBlock;
  while (plan.columns > kSmallestBlock && classes * ceil_div(columns, plan.columns) < 4 * rules.multiprocessors) {
    plan.columns /= 2;
  }
  plan.parts = ceil_div(columns, plan.columns);
  plan.items = classes * plan.parts;
  plan.blocks = blocks_for(plan.items, rules);
  return plan;
}

}  // namespace cotuning::cuda
