// A row's target as classes and shares, and the row of the relationship that it selects.
#pragma once

#include <vector>

#include "../loss_problem.h"
#include "bad_label.h"
#include "rows.h"
#include "scratch.h"

namespace cotuning::cpu {

// Up to two classes and their shares. Ignored labels are left out.
struct RowTarget {
  int64_t index[2];
  double share[2];
  int count = 0;

  void add(int64_t class_index, double part) {
    if (part == 0) return;
    index[count] = class_index;
    share[count++] = part;
  }
  double total() const { return count == 0 ? 0 : count == 1 ? share[0] : share[0] + share[1]; }
};

// Reads the targets of all rows in order, up to the first bad label.
inline BadLabel read_row_targets(const TargetInputs& p, int64_t rows, int64_t classes,
                                 std::vector<RowTarget>* targets) {
  targets->resize(rows);
  const Labels labels = p.labels, labels_b = p.labels_b;
  const int64_t ignore_index = p.ignore_index;
  const auto is_bad = [=](int64_t label) { return label != ignore_index && (label < 0 || label >= classes); };
  const bool mixed = labels_b.data != nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    RowTarget& target = (*targets)[i];
    const double share = mixed ? p.mix[i * p.mix_stride] : 1.0;
    const int64_t label = labels[i];
    if (is_bad(label)) return {i, label, false};
    if (label != ignore_index) target.add(label, share);
    if (!mixed) continue;
    const int64_t second = labels_b[i];
    if (is_bad(second)) return {i, second, true};
    if (second != ignore_index) target.add(second, 1.0 - share);
  }
  return {};
}

// share_a * a + share_b * b for two rows of a matrix, in float or double; `b` may be null. Returns the row itself where
// it already is the result, else this thread's scratch.
inline const void* mixed_row(const RowKernels& kernels, const ConstMatrix& matrix, bool in_double, const void* a,
                             double share_a, const void* b, double share_b) {
  const ScalarType wanted = in_double ? ScalarType::kFloat64 : ScalarType::kFloat32;
  if (b == nullptr && share_a == 1.0 && matrix.type == wanted) return a;
  void* scratch = Scratch::get(1, matrix.columns * size_of(wanted));
  const int type = static_cast<int>(matrix.type);
  if (in_double) {
    kernels.mix_to_double[type](a, share_a, b, share_b, matrix.columns, static_cast<double*>(scratch));
  } else {
    kernels.mix_to_float[type](a, share_a, b, share_b, matrix.columns, static_cast<float*>(scratch));
  }
  return scratch;
}

}  // namespace cotuning::cpu
