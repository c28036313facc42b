// The operations of cotuning_kernels/backends/schema.py for the CPU dispatch key: checks, views, allocation. The
// mathematics is in csrc/kernels/cpu.
//
// The Python layer has already checked its arguments, in words for people. What is checked here again is what would
// let a direct caller of the operation read or write outside a tensor.
#include <stdexcept>
#include <string>
#include <tuple>

#include "../kernels/cpu/loss.h"
#include "../kernels/cpu/rows.h"
#include "../kernels/cpu/statistics.h"
#include "tensor_views.h"

namespace cotuning::ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

// torch turns std::out_of_range into Python's IndexError. `pair`: the labels are those of a mixup pair.
void throw_if_bad(const cpu::BadLabel& bad, const char* name, bool pair, int64_t classes, int64_t ignore_index) {
  if (!bad) return;
  const char* part = !pair ? "" : bad.second ? "[1]" : "[0]";
  throw std::out_of_range(std::string(name) + part + "[" + std::to_string(bad.row) + "] is " +
                          std::to_string(bad.value) + ", expected a class index in [0, " + std::to_string(classes) +
                          ") or ignore_index=" + std::to_string(ignore_index));
}

// A floating tensor of one dimension, or none, as doubles.
std::vector<double> read_numbers(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() <= 1, name, " must be on the CPU, of one dimension at most");
  const auto type = static_cast<int>(kernel_type(tensor, name));
  const int64_t count = tensor.dim() == 0 ? 1 : tensor.size(0);
  const int64_t stride = tensor.dim() == 0 ? 0 : tensor.stride(0);
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t bytes = stride * static_cast<int64_t>(tensor.element_size());
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) {
    cpu::row_kernels().mix_to_double[type](data + i * bytes, 1.0, nullptr, 0.0, 1, &values[i]);
  }
  return values;
}

// The part of the problem that says what each row's target is; shared by the loss and by translate_labels.
void read_target(const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix, int64_t batch,
                 cpu::LossProblem* problem) {
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

cpu::LossProblem read_problem(const Tensor& source_logits, const OptionalTensor& target_logits, const Tensor& target,
                              const OptionalTensor& target_b, const OptionalTensor& mix, const Tensor& relationship,
                              const OptionalTensor& weight, const Tensor& trade_off, double label_smoothing,
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
  STD_TORCH_CHECK(trade_off.is_cpu() && trade_off.dim() == 0 && trade_off.scalar_type() == ScalarType::Double,
                  "trade_off must be a float64 number on the CPU");
  problem.trade_off = *static_cast<const double*>(trade_off.const_data_ptr());
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  problem.reduction = static_cast<cpu::Reduction>(reduction);
  problem.kl_divergence = kl_divergence;
  return problem;
}

void store(const Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

// Runs the problem and turns its result into (loss, terms, factors).
std::tuple<Tensor, Tensor, Tensor> solve(const cpu::LossProblem& problem) {
  cpu::LossResult result;
  const int64_t classes = problem.probabilities ? problem.probabilities.columns : problem.relationship.rows;
  const cpu::BadLabel bad = cpu::co_tuning_loss(problem, parallel_for, &result);
  throw_if_bad(bad, "target", problem.mix != nullptr, classes, problem.ignore_index);
  const bool both = static_cast<bool>(problem.target_logits);
  const bool in_double = problem.source_logits.type == cpu::ScalarType::kFloat64 ||
                         (both && problem.target_logits.type == cpu::ScalarType::kFloat64);
  const ScalarType type = in_double ? ScalarType::Double : ScalarType::Float;
  const bool by_row = problem.reduction == cpu::Reduction::kNone;
  const int64_t rows = problem.source_logits.rows;
  Tensor loss = by_row ? empty({rows}, type) : empty({}, type);
  Tensor terms = by_row ? empty({2, rows}, type) : empty({2}, type);
  Tensor factors = empty({2}, type);
  const int64_t entries = by_row ? rows : 1;
  for (int64_t i = 0; i < entries; ++i) {
    const double source = result.source_term[i];
    const double target = both ? result.target_term[i] : 0.0;
    store(loss, i, both ? target + problem.trade_off * source : source);
    store(terms, i, target);
    store(terms, entries + i, source);
  }
  store(factors, 0, result.source_factor);
  store(factors, 1, result.target_factor);
  return {loss, terms, factors};
}

// Fresh memory for a gradient, or an empty tensor where none is wanted.
Tensor new_gradient(const Tensor* logits, bool wanted, cpu::Matrix* view) {
  if (logits == nullptr || !wanted) return empty({0, 0}, ScalarType::Float);
  Tensor gradient = empty({logits->size(0), logits->size(1)}, logits->scalar_type());
  *view = matrix(gradient, "gradient");
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> co_tuning_loss(
    const Tensor& source_logits, const OptionalTensor& target_logits, const Tensor& target,
    const OptionalTensor& target_b, const OptionalTensor& mix, const Tensor& relationship, const OptionalTensor& weight,
    const Tensor& trade_off, double label_smoothing, int64_t ignore_index, int64_t reduction, bool kl_divergence,
    bool source_gradient, bool target_gradient) {
  cpu::LossProblem problem = read_problem(source_logits, target_logits, target, target_b, mix, relationship, weight,
                                          trade_off, label_smoothing, ignore_index, reduction, kl_divergence);
  Tensor source_grad = new_gradient(&source_logits, source_gradient, &problem.source_gradient);
  Tensor target_grad =
      new_gradient(target_logits ? &*target_logits : nullptr, target_gradient, &problem.target_gradient);
  auto [loss, terms, factors] = solve(problem);
  return {loss, terms, factors, source_grad, target_grad};
}

// A row that another row overlaps cannot hold a gradient of its own.
cpu::Matrix writable_rows(const Tensor& tensor, const char* name) {
  cpu::Matrix view = matrix(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) <= 1 || view.row_stride >= tensor.size(1), name, " has rows that overlap");
  return view;
}

std::tuple<Tensor, Tensor, Tensor> co_tuning_loss_inplace(Tensor source_logits, OptionalTensor target_logits,
                                                          const Tensor& target, const OptionalTensor& target_b,
                                                          const OptionalTensor& mix, const Tensor& relationship,
                                                          const OptionalTensor& weight, const Tensor& trade_off,
                                                          double label_smoothing, int64_t ignore_index,
                                                          int64_t reduction, bool kl_divergence) {
  cpu::LossProblem problem = read_problem(source_logits, target_logits, target, target_b, mix, relationship, weight,
                                          trade_off, label_smoothing, ignore_index, reduction, kl_divergence);
  problem.source_gradient = writable_rows(source_logits, "source_logits");
  if (target_logits) problem.target_gradient = writable_rows(*target_logits, "target_logits");
  return solve(problem);
}

void scale_gradients(const Tensor& source_grad, const Tensor& target_grad, const Tensor& factors,
                     const Tensor& upstream) {
  const std::vector<double> by_row = read_numbers(upstream, "upstream");
  const std::vector<double> factor = read_numbers(factors, "factors");
  STD_TORCH_CHECK(factor.size() == 2, "factors must have shape (2,)");
  const int64_t stride = upstream.dim();
  const Tensor* gradients[2] = {&source_grad, &target_grad};
  for (int k = 0; k < 2; ++k) {
    const Tensor& gradient = *gradients[k];
    if (gradient.numel() == 0) continue;
    STD_TORCH_CHECK(stride == 0 || upstream.size(0) == gradient.size(0), "upstream must have one entry a row");
    cpu::scale_rows(writable_rows(gradient, "gradient"), gradient.size(0), gradient.size(1), factor[k], by_row.data(),
                    stride, parallel_for);
  }
}

Tensor translate_labels(const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix,
                        const Tensor& relationship, int64_t ignore_index) {
  STD_TORCH_CHECK(!is_floating(target), "target must be class indices");
  cpu::LossProblem problem;
  const int64_t batch = target.dim() == 1 ? target.size(0) : -1;
  read_target(target, target_b, mix, batch, &problem);
  problem.relationship = const_matrix(relationship, "relationship");
  problem.ignore_index = ignore_index;
  // The compute type follows the logits, and there are none: take the relationship's.
  problem.source_logits.type = problem.relationship.type;
  Tensor out = empty({batch, relationship.size(1)}, relationship.scalar_type());
  const cpu::BadLabel bad = cpu::translate_labels(problem, batch, out.mutable_data_ptr(), parallel_for);
  throw_if_bad(bad, "target", target_b.has_value(), problem.relationship.rows, ignore_index);
  return out;
}

void add_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& logits, const Tensor& target,
                    double inverse_temperature, int64_t ignore_index) {
  const cpu::ConstMatrix view = const_matrix(logits, "logits");
  const cpu::Matrix sums_view = writable_rows(sums, "sums");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float || sums.scalar_type() == ScalarType::Double,
                  "sums must be float32 or float64");
  STD_TORCH_CHECK(sums.size(1) == view.columns, "sums must have one column a column of logits");
  STD_TORCH_CHECK(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() &&
                      counts.dim() == 1 && counts.size(0) == sums.size(0),
                  "counts must be contiguous int64 of shape (", sums.size(0), ",)");
  throw_if_bad(
      cpu::add_class_sums(view, labels(target, view.rows, "labels"), sums.size(0), ignore_index, inverse_temperature,
                          sums_view, static_cast<int64_t*>(counts.mutable_data_ptr()), parallel_for),
      "labels", false, sums.size(0), ignore_index);
}

Tensor temperature_terms(const Tensor& logits, const Tensor& target, double inverse_temperature, int64_t ignore_index) {
  const cpu::ConstMatrix view = const_matrix(logits, "logits");
  Tensor terms = empty({4}, ScalarType::Double);
  throw_if_bad(cpu::temperature_terms(view, labels(target, view.rows, "labels"), ignore_index, inverse_temperature,
                                      static_cast<double*>(terms.mutable_data_ptr()), parallel_for),
               "labels", false, view.columns, ignore_index);
  return terms;
}

STABLE_TORCH_LIBRARY_IMPL(cotuning_kernels, CPU, library) {
  library.impl("co_tuning_loss", TORCH_BOX(&co_tuning_loss));
  library.impl("co_tuning_loss_", TORCH_BOX(&co_tuning_loss_inplace));
  library.impl("scale_gradients_", TORCH_BOX(&scale_gradients));
  library.impl("translate_labels", TORCH_BOX(&translate_labels));
  library.impl("add_class_sums_", TORCH_BOX(&add_class_sums));
  library.impl("temperature_terms", TORCH_BOX(&temperature_terms));
}

}  // namespace
}  // namespace cotuning::ops
