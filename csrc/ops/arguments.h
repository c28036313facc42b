// Turns torch's tensors into the views and problems that the kernels take. Serves the CPU and CUDA operations and the
// fast path, with tensors of the stable ABI and ordinary ones.
//
// A Place says where tensors must lie: check(tensor, name) refuses others, and kMostColumns is the longest row that its
// kernels can count. The Python layer has already checked its arguments, with messages for users. The checks here keep
// a direct caller from reading or writing outside a tensor.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "../kernels/loss_problem.h"
#include "dtypes.h"

namespace cotuning::ops {

struct OnTheCpu {
  static constexpr int64_t kMostColumns = std::numeric_limits<int64_t>::max();

  template <class Tensor>
  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  }
};

template <class Place, class Tensor>
void check_matrix(const Place& place, const Tensor& tensor, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(1) > 0, name, " must have columns");
  STD_TORCH_CHECK(tensor.size(1) <= Place::kMostColumns, name, " must have at most ", Place::kMostColumns, " columns");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name, " must have dense columns (stride(1) == 1)");
}

template <class Place, class Tensor>
ConstMatrix const_matrix(const Place& place, const Tensor& tensor, const char* name) {
  check_matrix(place, tensor, name);
  return {tensor.const_data_ptr(), kernel_type(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// Rows that overlap cannot hold separate gradients.
template <class Place, class Tensor>
Matrix matrix(const Place& place, const Tensor& tensor, const char* name) {
  check_matrix(place, tensor, name);
  STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1), name, " has rows that overlap");
  return {tensor.mutable_data_ptr(), kernel_type(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

template <class Place, class Tensor>
Labels labels(const Place& place, const Tensor& tensor, int64_t rows, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, name, " must have shape (", rows, ",)");
  const bool is_int32 = tensor.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(is_int32 || tensor.scalar_type() == ScalarType::Long, name, " must be int64 or int32");
  return {tensor.const_data_ptr(), is_int32, tensor.stride(0)};
}

// The tensors of the loss, but for the trade-off. A null pointer stands for one that is left out.
template <class Tensor>
struct LossTensors {
  const Tensor* source_logits;
  const Tensor* target_logits;  // may be left out
  const Tensor* target;
  const Tensor* target_b;      // may be left out
  const Tensor* mix;           // may be left out
  const Tensor* relationship;  // left out if sparse
  const Tensor* weight;        // may be left out
  // A sparse relationship, else left out.
  const Tensor* crow_indices = nullptr;
  const Tensor* col_indices = nullptr;
  const Tensor* values = nullptr;
};

template <class Tensor>
const Tensor* pointer_to(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Reads each row's target; shared by the loss and by translate_labels.
template <class Place, class Tensor>
void read_target(const Place& place, const Tensor& target, const Tensor* target_b, const Tensor* mix, int64_t batch,
                 TargetInputs* inputs) {
  const bool probabilities = is_floating(target);
  STD_TORCH_CHECK((mix != nullptr) == (probabilities || target_b != nullptr) && !(probabilities && target_b != nullptr),
                  "mix goes with target_b, or with probabilities");
  if (probabilities) {
    inputs->probabilities = const_matrix(place, target, "target");
    STD_TORCH_CHECK(target.size(0) == batch, "target must have ", batch, " rows");
  } else {
    inputs->labels = labels(place, target, batch, "target");
    if (target_b != nullptr) {
      inputs->labels_b = labels(place, *target_b, batch, "target_b");
      STD_TORCH_CHECK(target_b->scalar_type() == target.scalar_type(), "target_b must have target's dtype");
    }
  }
  if (mix == nullptr) return;
  place.check(*mix, "mix");
  const bool one = mix->dim() == 1 && mix->size(0) == 1;
  STD_TORCH_CHECK(
      mix->scalar_type() == ScalarType::Double && mix->dim() == 1 && (mix->size(0) == batch || (one && !probabilities)),
      "mix must be float64 of shape (", batch, ",) or (1,)");
  inputs->mix = static_cast<const double*>(mix->const_data_ptr());
  inputs->mix_stride = one ? 0 : mix->stride(0);
}

template <class Place, class Tensor>
SparseMatrix sparse_matrix(const Place& place, const Tensor& crow_indices, const Tensor& col_indices,
                           const Tensor& values) {
  STD_TORCH_CHECK(crow_indices.dim() == 1 && crow_indices.size(0) >= 2 && values.dim() == 1 && values.is_contiguous(),
                  "a sparse relationship needs crow_indices (N_t + 1,) and contiguous values (entries,)");
  STD_TORCH_CHECK(crow_indices.scalar_type() == col_indices.scalar_type(),
                  "crow_indices and col_indices must have one dtype");
  place.check(values, "values");
  const int64_t rows = crow_indices.size(0) - 1, entries = values.size(0);
  return {labels(place, crow_indices, rows + 1, "crow_indices"),
          labels(place, col_indices, entries, "col_indices"),
          values.const_data_ptr(),
          kernel_type(values, "values"),
          rows,
          entries};
}

// Reads the loss's tensors except weight and trade_off, which CPU and CUDA kernels take differently. Returns the number
// of target classes.
template <class Place, class Tensor>
int64_t read_loss(const Place& place, const LossTensors<Tensor>& tensors, LossInputs* inputs) {
  inputs->source_logits = const_matrix(place, *tensors.source_logits, "source_logits");
  const int64_t batch = inputs->source_logits.rows;
  read_target(place, *tensors.target, tensors.target_b, tensors.mix, batch, inputs);
  const bool probabilities = static_cast<bool>(inputs->probabilities);
  if (tensors.relationship != nullptr) {
    inputs->relationship = const_matrix(place, *tensors.relationship, "relationship");
    STD_TORCH_CHECK(inputs->relationship.columns == inputs->source_logits.columns,
                    "relationship must have one column a source class");
    STD_TORCH_CHECK(!probabilities || inputs->relationship.rows == batch,
                    "with probabilities, relationship must have one row a row of the batch");
  } else {
    STD_TORCH_CHECK(!probabilities, "with a sparse relationship, target must be class indices");
    inputs->sparse = sparse_matrix(place, *tensors.crow_indices, *tensors.col_indices, *tensors.values);
  }
  const int64_t classes = inputs->target_classes();
  if (tensors.target_logits != nullptr) {
    inputs->target_logits = const_matrix(place, *tensors.target_logits, "target_logits");
    STD_TORCH_CHECK(inputs->target_logits.rows == batch && inputs->target_logits.columns == classes,
                    "target_logits must have shape (", batch, ", ", classes, ")");
  }
  return classes;
}

// Accepts only float64: every layer above passes it.
template <class Place, class Tensor>
const double* read_trade_off(const Place& place, const Tensor& trade_off) {
  place.check(trade_off, "trade_off");
  STD_TORCH_CHECK(trade_off.dim() == 0 && trade_off.scalar_type() == ScalarType::Double,
                  "trade_off must be a float64 number");
  return static_cast<const double*>(trade_off.const_data_ptr());
}

// Whether the loss and its terms are float64 instead of float32.
inline bool has_double_results(const LossInputs& inputs) {
  return inputs.source_logits.type == cotuning::ScalarType::kFloat64 ||
         (inputs.target_logits && inputs.target_logits.type == cotuning::ScalarType::kFloat64);
}

// The memory that add_class_sums adds to.
template <class Place, class Tensor>
Matrix read_class_sums(const Place& place, const Tensor& sums, const Tensor& counts, const ConstMatrix& logits) {
  const Matrix view = matrix(place, sums, "sums");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float || sums.scalar_type() == ScalarType::Double,
                  "sums must be float32 or float64");
  STD_TORCH_CHECK(view.columns == logits.columns, "sums must have one column a column of logits");
  place.check(counts, "counts");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 1 &&
                      counts.size(0) == view.rows,
                  "counts must be contiguous int64 of shape (", view.rows, ",)");
  return view;
}

}  // namespace cotuning::ops
