#include "class_sums.h"

#include <vector>

#include "rows.h"
#include "scratch.h"

namespace cotuning::cpu {
namespace {

struct ClassSums {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index;
  double inverse_temperature;
  Matrix sums;
  int64_t* counts;
  // Part k has the classes [first_class[k], first_class[k + 1]).
  std::vector<int64_t> first_class;

  void run(int64_t part_begin, int64_t part_end) const {
    const RowKernels& rows = row_kernels();
    const int type = static_cast<int>(logits.type);
    const bool in_double = sums.type == ScalarType::kFloat64;
    void* exponentials = Scratch::get(0, logits.columns * (logits.type == ScalarType::kFloat64 ? 8 : 4));
    const int64_t first = first_class[part_begin], last = first_class[part_end];
    int64_t i = next_row(-1, first, last);
    while (i < logits.rows) {
      const int64_t next = next_row(i, first, last);
      const void* next_logits = next < logits.rows ? logits.row(next) : nullptr;
      const int64_t label = labels[i];
      if (in_double) {
        rows.add_softmax_to_double[type](logits.row(i), logits.columns, inverse_temperature, exponentials, next_logits,
                                         static_cast<double*>(sums.row(label)));
      } else {
        rows.add_softmax_to_float[type](logits.row(i), logits.columns, inverse_temperature, exponentials, next_logits,
                                        static_cast<float*>(sums.row(label)));
      }
      ++counts[label];
      i = next;
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
std::vector<int64_t> split_classes(const Labels& labels, int64_t rows, int64_t num_classes, int64_t ignore_index,
                                   int64_t parts) {
  std::vector<int64_t> rows_of(num_classes, 0), first_class{0};
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] != ignore_index) ++rows_of[labels[i]];
  }
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
                        double inverse_temperature, const Matrix& sums, int64_t* counts, ParallelFor parallel_for) {
  const int64_t num_classes = sums.rows;
  if (BadLabel bad = find_bad_label(labels, logits.rows, num_classes, ignore_index)) return bad;
  // Having more parts than threads evens out classes of different sizes. Not too many: each part reads all labels.
  const int64_t work = logits.rows * logits.columns / kGrainElements;
  const int64_t parts = work < 1 ? 1 : work < 16 ? work : 16;
  ClassSums task{logits,
                 labels,
                 ignore_index,
                 inverse_temperature,
                 sums,
                 counts,
                 split_classes(labels, logits.rows, num_classes, ignore_index, parts)};
  parallel_for(
      0, static_cast<int64_t>(task.first_class.size()) - 1, 1,
      [](int64_t begin, int64_t end, void* context) { static_cast<ClassSums*>(context)->run(begin, end); }, &task);
  return {};
}

}  // namespace cotuning::cpu
