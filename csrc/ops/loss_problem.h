// The arguments of the loss, from torch's tensors to the problem that the kernels solve, and its numbers back into
// tensors: shared by the operations (cpu.cpp) and by the fast path (csrc/fast_path).
//
// The Python layer has already checked its arguments, in words for people. What is checked here again is what would
// let a direct caller read or write outside a tensor.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <vector>

#include "../kernels/cpu/loss.h"
#include "tensor_views.h"

namespace cotuning::ops {

// A floating tensor of one dimension, or none, as doubles.
template <class Tensor>
std::vector<double> read_numbers(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() <= 1, name, " must be on the CPU, of one dimension at most");
  const int64_t count = tensor.dim() == 0 ? 1 : tensor.size(0);
  const int64_t stride = tensor.dim() == 0 ? 0 : tensor.stride(0);
  std::vector<double> values(count);
  const auto read = [&](const auto* data) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(data[i * stride]);
  };
  const void* data = tensor.const_data_ptr();
  switch (kernel_type(tensor, name)) {
    case cpu::ScalarType::kFloat32: read(static_cast<const float*>(data)); break;
    case cpu::ScalarType::kBFloat16: read(static_cast<const c10::BFloat16*>(data)); break;
    case cpu::ScalarType::kFloat16: read(static_cast<const c10::Half*>(data)); break;
    case cpu::ScalarType::kFloat64: read(static_cast<const double*>(data)); break;
  }
  return values;
}

// Only float64 is read: it is what every layer above passes.
template <class Tensor>
double read_trade_off(const Tensor& trade_off) {
  STD_TORCH_CHECK(trade_off.is_cpu() && trade_off.dim() == 0 && trade_off.scalar_type() == ScalarType::Double,
                  "trade_off must be a float64 number on the CPU");
  return *static_cast<const double*>(trade_off.const_data_ptr());
}

// The part of the problem that says what each row's target is; shared by the loss and by translate_labels.
template <class Tensor>
void read_target(const Tensor& target, const std::optional<Tensor>& target_b, const std::optional<Tensor>& mix,
                 int64_t batch, cpu::LossProblem* problem) {
  const bool probabilities = is_floating(target);
  STD_TORCH_CHECK(mix.has_value() == (probabilities || target_b.has_value()) && !(probabilities && target_b),
                  "mix goes with target_b, or with probabilities");
  if (probabilities) {
    problem->probabilities = const_matrix(target, "target");
    STD_TORCH_CHECK(target.size(0) == batch, "target must have ", batch, " rows");
  } else {
    problem->labels = labels(target, batch, "target");
    if (target_b) problem->labels_b = labels(*target_b, batch, "target_b");
    STD_TORCH_CHECK(!target_b || target_b->scalar_type() == target.scalar_type(), "target_b must have target's dtype");
  }
  if (!mix) return;
  const bool one = mix->dim() == 1 && mix->size(0) == 1;
  STD_TORCH_CHECK(mix->is_cpu() && mix->scalar_type() == ScalarType::Double && mix->dim() == 1 &&
                      (mix->size(0) == batch || (one && !probabilities)),
                  "mix must be float64 on the CPU, of shape (", batch, ",) or (1,)");
  problem->mix = static_cast<const double*>(mix->const_data_ptr());
  problem->mix_stride = one ? 0 : mix->stride(0);
}

template <class Tensor>
cpu::LossProblem read_problem(const Tensor& source_logits, const std::optional<Tensor>& target_logits,
                              const Tensor& target, const std::optional<Tensor>& target_b,
                              const std::optional<Tensor>& mix, const Tensor& relationship,
                              const std::optional<Tensor>& weight, double trade_off, double label_smoothing,
                              int64_t ignore_index, int64_t reduction, bool kl_divergence) {
  cpu::LossProblem problem;
  problem.source_logits = const_matrix(source_logits, "source_logits");
  const int64_t batch = problem.source_logits.rows;
  read_target(target, target_b, mix, batch, &problem);
  problem.relationship = const_matrix(relationship, "relationship");
  STD_TORCH_CHECK(problem.relationship.columns == problem.source_logits.columns,
                  "relationship must have one column a source class");
  const bool probabilities = static_cast<bool>(problem.probabilities);
  STD_TORCH_CHECK(!probabilities || problem.relationship.rows == batch,
                  "with probabilities, relationship must have one row a row of the batch");
  const int64_t classes = probabilities ? problem.probabilities.columns : problem.relationship.rows;
  if (target_logits) {
    problem.target_logits = const_matrix(*target_logits, "target_logits");
    STD_TORCH_CHECK(problem.target_logits.rows == batch && problem.target_logits.columns == classes,
                    "target_logits must have shape (", batch, ", ", classes, ")");
  }
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction must be 0, 1 or 2");
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1]");
  if (weight) problem.weight = read_numbers(*weight, "weight");
  STD_TORCH_CHECK(!weight || static_cast<int64_t>(problem.weight.size()) == classes, "weight must have shape (",
                  classes, ",)");
  problem.trade_off = trade_off;
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  problem.reduction = static_cast<cpu::Reduction>(reduction);
  problem.kl_divergence = kl_divergence;
  return problem;
}

// The dtype of the loss and its terms.
inline ScalarType loss_type(const cpu::LossProblem& problem) {
  const bool in_double = problem.source_logits.type == cpu::ScalarType::kFloat64 ||
                         (problem.target_logits && problem.target_logits.type == cpu::ScalarType::kFloat64);
  return in_double ? ScalarType::Double : ScalarType::Float;
}

template <class Tensor>
void store(const Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

// The loss, and the terms [target, source] where they are wanted: one number each, or one a row.
template <class Tensor>
void store_losses(const cpu::LossProblem& problem, const cpu::LossResult& result, const Tensor& loss,
                  const Tensor* terms) {
  const bool both = static_cast<bool>(problem.target_logits);
  const auto entries = static_cast<int64_t>(result.source_term.size());
  for (int64_t i = 0; i < entries; ++i) {
    const double source = result.source_term[i];
    const double target = both ? result.target_term[i] : 0.0;
    store(loss, i, both ? target + problem.trade_off * source : source);
    if (terms == nullptr) continue;
    store(*terms, i, target);
    store(*terms, entries + i, source);
  }
}

}  // namespace cotuning::ops
