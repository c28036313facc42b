// The entries of a row's source distribution where the relationship has few entries a row.
#pragma once

#include <algorithm>
#include <vector>

#include "../loss_problem.h"
#include "row_target.h"

namespace cotuning::cpu {

// One entry of a distribution; `logit` and `exponential` are the row's at its column.
struct Entry {
  int64_t column;
  double q;
  double logit, exponential;
};

inline double value_at(const RowKernels& kernels, const void* values, ScalarType type, int64_t index) {
  const void* p = static_cast<const char*>(values) + index * size_of(type);
  if (type == ScalarType::kFloat32) return *static_cast<const float*>(p);
  double value;
  kernels.mix_to_double[static_cast<int>(type)](p, 1.0, nullptr, 0.0, 1, &value);
  return value;
}

// Whether a row's indices can be used: its entries lie in the matrix, and its columns ascend in [0, columns).
inline bool is_valid_row(const SparseMatrix& matrix, int64_t row, int64_t columns) {
  const int64_t begin = matrix.starts[row], end = matrix.starts[row + 1];
  if (begin < 0 || end < begin || end > matrix.entries) return false;
  int64_t previous = -1;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t column = matrix.columns[k];
    if (column <= previous || column >= columns) return false;
    previous = column;
  }
  return true;
}

// Calls visit(column, value) for each entry of a row that is not 0.
template <class Visit>
void visit_entries(const RowKernels& kernels, const SparseMatrix& matrix, int64_t row, Visit&& visit) {
  const int64_t end = matrix.starts[row + 1];
  for (int64_t k = matrix.starts[row]; k < end; ++k) {
    const double value = value_at(kernels, matrix.values, matrix.type, k);
    if (value != 0) visit(matrix.columns[k], value);
  }
}

// The entries of the mixture of one or two rows, in the order of their columns. A column of both rows is one entry,
// even if its parts cancel.
inline void read_entries(const RowKernels& kernels, const SparseMatrix& matrix, const RowTarget& target,
                         std::vector<Entry>* entries) {
  entries->clear();
  if (target.count == 0) return;
  visit_entries(kernels, matrix, target.index[0],
                [&](int64_t column, double value) { entries->push_back({column, target.share[0] * value, 0, 0}); });
  if (target.count == 1) return;
  const size_t first = entries->size();
  visit_entries(kernels, matrix, target.index[1],
                [&](int64_t column, double value) { entries->push_back({column, target.share[1] * value, 0, 0}); });
  const auto by_column = [](const Entry& a, const Entry& b) { return a.column < b.column; };
  std::inplace_merge(entries->begin(), entries->begin() + static_cast<std::ptrdiff_t>(first), entries->end(),
                     by_column);
  size_t last = 0;
  for (size_t k = 1; k < entries->size(); ++k) {
    if ((*entries)[k].column == (*entries)[last].column) {
      (*entries)[last].q += (*entries)[k].q;
    } else {
      (*entries)[++last] = (*entries)[k];
    }
  }
  if (!entries->empty()) entries->resize(last + 1);
}

}  // namespace cotuning::cpu
