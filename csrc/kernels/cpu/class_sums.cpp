#include "class_sums.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "rows.h"
#include "scratch.h"

namespace cotuning::cpu {
namespace {

struct Addition {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index;
  double inverse_temperature;
  ClassSums before, after;
  std::vector<int64_t> rows_of;  // the batch's rows of each class
  // Part k has the classes [first_class[k], first_class[k + 1]).
  std::vector<int64_t> first_class;
  std::atomic<int64_t> first_bad_row;

  void run(int64_t part_begin, int64_t part_end) {
    const RowKernels& rows = row_kernels();
    const int type = static_cast<int>(logits.type);
    void* exponentials = Scratch::get(0, logits.columns * (logits.type == ScalarType::kFloat64 ? 8 : 4));
    const int64_t first = first_class[part_begin], last = first_class[part_end];
    for (int64_t t = first; t < last; ++t) bring_up_to_date(t);
    int64_t i = next_row(-1, first, last);
    while (i < logits.rows) {
      const int64_t next = next_row(i, first, last);
      const void* next_logits = next < logits.rows ? logits.row(next) : nullptr;
      const int64_t label = labels[i];
      // The class's first row of the batch is added to the sums before it, the others to the sums after it.
      const void* old = (after.counts[label] == before.counts[label] ? before : after).sums.row(label);
      void* sums = after.sums.row(label);
      const bool good =
          after.sums.type == ScalarType::kFloat64
              ? rows.add_softmax_to_double[type](logits.row(i), logits.columns, inverse_temperature, exponentials,
                                                 next_logits, static_cast<const double*>(old),
                                                 static_cast<double*>(sums))
              : rows.add_softmax_to_float[type](logits.row(i), logits.columns, inverse_temperature, exponentials,
                                                next_logits, static_cast<const float*>(old), static_cast<float*>(sums));
      if (!good) note_bad_row(i);
      ++after.counts[label];
      i = next;
    }
  }

  void bring_up_to_date(int64_t t) const {
    if (after.counts[t] == before.counts[t]) return;
    after.counts[t] = before.counts[t];
    if (rows_of[t] > 0) return;  // the first row writes the sums
    std::memcpy(after.sums.row(t), before.sums.row(t), logits.columns * size_of(after.sums.type));
  }

  void note_bad_row(int64_t i) {
    int64_t earlier = first_bad_row;
    while (i < earlier && !first_bad_row.compare_exchange_weak(earlier, i)) {
    }
  }

  int64_t next_row(int64_t i, int64_t first, int64_t last) const {
    for (++i; i < logits.rows; ++i) {
      const int64_t label = labels[i];
      if (label != ignore_index && label >= first && label < last) break;
    }
    return i;
  }
};

// Splits the classes into consecutive parts with about the same number of rows each.
std::vector<int64_t> split_classes(const std::vector<int64_t>& rows_of, int64_t rows, int64_t parts) {
  std::vector<int64_t> first_class{0};
  const auto num_classes = static_cast<int64_t>(rows_of.size());
  int64_t seen = 0;
  for (int64_t t = 0; t < num_classes; ++t) {
    seen += rows_of[t];
    const auto part = static_cast<int64_t>(first_class.size());
    if (part < parts && seen * parts >= part * rows) first_class.push_back(t + 1);
  }
  first_class.push_back(num_classes);
  return first_class;
}

}  // namespace

BadLabel add_class_sums(const ConstMatrix& logits, const Labels& labels, int64_t ignore_index,
                        double inverse_temperature, const ClassSums& before, const ClassSums& after,
                        ParallelFor parallel_for, int64_t* first_bad_row) {
  const int64_t num_classes = after.sums.rows;
  if (BadLabel bad = find_bad_label(labels, logits.rows, num_classes, ignore_index)) return bad;
  std::vector<int64_t> rows_of(num_classes, 0);
  for (int64_t i = 0; i < logits.rows; ++i) {
    if (labels[i] != ignore_index) ++rows_of[labels[i]];
  }
  // Having more parts than threads evens out classes of different sizes. Not too many: each part reads all labels.
  const int64_t work = logits.rows * logits.columns / kGrainElements;
  const int64_t parts = work < 1 ? 1 : work < 16 ? work : 16;
  std::vector<int64_t> first_class = split_classes(rows_of, logits.rows, parts);
  Addition addition{logits,     labels, ignore_index,       inverse_temperature,
                    before,     after,  std::move(rows_of), std::move(first_class),
                    logits.rows};
  parallel_for(
      0, static_cast<int64_t>(addition.first_class.size()) - 1, 1,
      [](int64_t begin, int64_t end, void* context) { static_cast<Addition*>(context)->run(begin, end); }, &addition);
  *first_bad_row = addition.first_bad_row < logits.rows ? addition.first_bad_row.load() : -1;
  return {};
}

}  // namespace cotuning::cpu
