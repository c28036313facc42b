#include "statistics.h"

#include <cmath>
#include <vector>

#include "rows.h"
#include "scratch.h"

namespace cotuning::cpu {
namespace {

BadLabel find_bad_label(Labels labels, int64_t rows, int64_t num_classes, int64_t ignore_index) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = labels[i];
    if (label != ignore_index && (label < 0 || label >= num_classes)) return {i, label, false};
  }
  return {};
}

struct ClassSums {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index;
  double b;
  Matrix sums;
  int64_t* counts;
  // Classes [first_class[k], first_class[k + 1]) are part k.
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
        rows.add_softmax_to_double[type](logits.row(i), logits.columns, b, exponentials, next_logits,
                                         static_cast<double*>(sums.row(label)));
      } else {
        rows.add_softmax_to_float[type](logits.row(i), logits.columns, b, exponentials, next_logits,
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

// Consecutive classes with about the same number of rows each.
std::vector<int64_t> split_classes(Labels labels, int64_t rows, int64_t num_classes, int64_t ignore_index,
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

struct Temperature {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index;
  double b;
  std::vector<double> nll, first, second;
  std::vector<char> valid;

  void run(int64_t begin, int64_t end) {
    const RowKernels& rows = row_kernels();
    const int type = static_cast<int>(logits.type);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t label = labels[i];
      if (label == ignore_index) continue;
      const void* next = i + 1 < end ? logits.row(i + 1) : nullptr;
      const void* at_label = static_cast<const char*>(logits.row(i)) + label * size_of(logits.type);
      double logit;
      rows.mix_to_double[type](at_label, 1.0, nullptr, 0.0, 1, &logit);
      // Relative to the label's logit where that is high: of a confident row, log sum and mean are nearly that logit.
      const MomentResult m = rows.moments[type](logits.row(i), logits.columns, b, next, logit);
      const double x = logit - m.shift, mean = m.first / m.sum;
      nll[i] = std::log(m.sum) - b * x;
      first[i] = mean - x;
      second[i] = m.second / m.sum - mean * mean;
      valid[i] = 1;
    }
  }
};

}  // namespace

BadLabel add_class_sums(ConstMatrix logits, Labels labels, int64_t num_classes, int64_t ignore_index, double b,
                        Matrix sums, int64_t* counts, ParallelFor parallel_for) {
  if (BadLabel bad = find_bad_label(labels, logits.rows, num_classes, ignore_index)) return bad;
  // More parts than threads even out classes of different sizes; every part reads all the labels.
  const int64_t work = logits.rows * logits.columns / kGrainElements;
  const int64_t parts = work < 1 ? 1 : work < 16 ? work : 16;
  ClassSums task{logits,
                 labels,
                 ignore_index,
                 b,
                 sums,
                 counts,
                 split_classes(labels, logits.rows, num_classes, ignore_index, parts)};
  parallel_for(
      0, static_cast<int64_t>(task.first_class.size()) - 1, 1,
      [](int64_t begin, int64_t end, void* context) { static_cast<ClassSums*>(context)->run(begin, end); }, &task);
  return {};
}

BadLabel temperature_terms(ConstMatrix logits, Labels labels, int64_t ignore_index, double b, double terms[4],
                           ParallelFor parallel_for) {
  if (BadLabel bad = find_bad_label(labels, logits.rows, logits.columns, ignore_index)) return bad;
  const std::vector<double> zeros(logits.rows, 0.0);
  Temperature task{logits, labels, ignore_index, b, zeros, zeros, zeros, std::vector<char>(logits.rows, 0)};
  parallel_for(
      0, logits.rows, grain_rows(logits.columns),
      [](int64_t begin, int64_t end, void* context) { static_cast<Temperature*>(context)->run(begin, end); }, &task);
  // In the order of rows, whatever the threads.
  for (int k = 0; k < 4; ++k) terms[k] = 0;
  for (int64_t i = 0; i < logits.rows; ++i) {
    terms[0] += task.nll[i];
    terms[1] += task.first[i];
    terms[2] += task.second[i];
    terms[3] += task.valid[i];
  }
  return {};
}

}  // namespace cotuning::cpu
