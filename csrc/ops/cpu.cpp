// Implements the operations of cotuning_kernels/backends/operations.py for the CPU dispatch key, through torch's stable
// ABI: checks, views, allocation. The mathematics is in csrc/kernels/cpu.
#include "stable_abi.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "../kernels/cpu/class_sums.h"
#include "../kernels/cpu/temperature_terms.h"
#include "../kernels/cpu/translate_labels.h"
#include "arguments.h"
#include "cpu_loss.h"
#include "kernel_table.h"
#include "stable_arguments.h"
#include "stable_empty.h"

namespace cotuning::ops {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr OnTheCpu kCpu;

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return stable_empty(sizes, type, aoti_torch_device_type_cpu(), 0);
}

// Uses torch's threads, so that torch.set_num_threads applies.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (end - begin <= grain) {
    if (begin < end) body(begin, end, context);
    return;
  }
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

// torch turns std::out_of_range into Python's IndexError. `pair`: the labels belong to a mixup pair.
void throw_if_bad(const cpu::BadLabel& bad, const char* name, bool pair, int64_t classes, int64_t ignore_index) {
  if (!bad) return;
  const char* part = !pair ? "" : bad.second ? "[1]" : "[0]";
  throw std::out_of_range(std::string(name) + part + "[" + std::to_string(bad.row) + "] is " +
                          std::to_string(bad.value) + ", expected a class index in [0, " + std::to_string(classes) +
                          ") or ignore_index=" + std::to_string(ignore_index));
}

// Runs the problem and turns its result into (loss, terms, factors).
std::tuple<Tensor, Tensor, Tensor> solve(const cpu::LossProblem& problem) {
  cpu::LossResult result;
  const cpu::BadLabel bad = cpu::co_tuning_loss(problem, parallel_for, &result);
  throw_if_bad(bad, "target", problem.mix != nullptr, problem.target_classes(), problem.ignore_index);
  STD_TORCH_CHECK(result.bad_row < 0, "relationship is no valid sparse_csr matrix: row ", result.bad_row,
                  " has offsets or columns that are out of range or do not ascend; "
                  "torch.sparse_coo_tensor(...).coalesce().to_sparse_csr() makes a valid one");
  const ScalarType type = loss_type(problem);
  const bool by_row = problem.reduction == Reduction::kNone;
  const int64_t rows = problem.source_logits.rows;
  Tensor loss = by_row ? empty({rows}, type) : empty({}, type);
  Tensor terms = by_row ? empty({2, rows}, type) : empty({2}, type);
  Tensor factors = empty({2}, type);
  store_losses(problem, result, loss, &terms);
  store(factors, 0, result.source_factor);
  store(factors, 1, result.target_factor);
  return {loss, terms, factors};
}

// Fresh memory for a gradient, or an empty tensor if no gradient is wanted.
Tensor new_gradient(const Tensor* logits, bool wanted, Matrix* view) {
  if (logits == nullptr || !wanted) return empty({0, 0}, ScalarType::Float);
  Tensor gradient = empty({logits->size(0), logits->size(1)}, logits->scalar_type());
  *view = matrix(kCpu, gradient, "gradient");
  return gradient;
}

// The arguments of a call of the loss. The problem's views are of the tensors' memory.
struct LossCall {
  LossCall(Arguments& arguments, bool sparse) : tensors(take_loss_tensors(arguments, sparse)) {
    problem.visit_options(arguments);
    read_tensors(tensors.pointers(), &problem);
    problem.trade_off = *read_trade_off(kCpu, tensors.trade_off);
  }
  StableLossTensors tensors;
  cpu::LossProblem problem;
};

template <bool kSparse>
void co_tuning_loss(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments arguments(stack, count);
  LossCall call(arguments, kSparse);
  const bool source_gradient = arguments.take<bool>(), target_gradient = arguments.take<bool>();
  arguments.check_all_taken();
  Tensor source_grad = new_gradient(&call.tensors.source_logits, source_gradient, &call.problem.source_gradient);
  Tensor target_grad =
      new_gradient(pointer_to(call.tensors.target_logits), target_gradient, &call.problem.target_gradient);
  const auto [loss, terms, factors] = solve(call.problem);
  put_results(stack, loss, terms, factors, source_grad, target_grad);
}

template <bool kSparse>
void co_tuning_loss_inplace(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments arguments(stack, count);
  LossCall call(arguments, kSparse);
  arguments.check_all_taken();
  auto& [tensors, problem] = call;
  problem.source_gradient = matrix(kCpu, tensors.source_logits, "source_logits");
  if (tensors.target_logits) problem.target_gradient = matrix(kCpu, *tensors.target_logits, "target_logits");
  const auto [loss, terms, factors] = solve(problem);
  put_results(stack, loss, terms, factors);
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
    cpu::scale_gradients(matrix(kCpu, gradient, "gradient"), factor[k], by_row.data(), stride, parallel_for);
  }
}

Tensor translate_labels(const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix,
                        const Tensor& relationship, int64_t ignore_index) {
  STD_TORCH_CHECK(!is_floating(target), "target must be class indices");
  cpu::TranslateProblem problem;
  const int64_t batch = target.dim() == 1 ? target.size(0) : -1;
  problem.ignore_index = ignore_index;
  read_target(kCpu, target, pointer_to(target_b), pointer_to(mix), batch, &problem);
  problem.relationship = const_matrix(kCpu, relationship, "relationship");
  Tensor out = empty({batch, relationship.size(1)}, relationship.scalar_type());
  problem.out = matrix(kCpu, out, "out");
  const cpu::BadLabel bad = cpu::translate_labels(problem, parallel_for);
  throw_if_bad(bad, "target", target_b.has_value(), problem.relationship.rows, ignore_index);
  return out;
}

int64_t add_to_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& sums_before,
                          const Tensor& counts_before, const Tensor& logits, const Tensor& target,
                          double inverse_temperature, int64_t ignore_index) {
  const ConstMatrix view = const_matrix(kCpu, logits, "logits");
  const auto read = [&](const Tensor& some_sums, const Tensor& some_counts) {
    const Matrix matrix = read_class_sums(kCpu, some_sums, some_counts, view);
    return cpu::ClassSums{matrix, static_cast<int64_t*>(some_counts.mutable_data_ptr())};
  };
  const cpu::ClassSums before = read(sums_before, counts_before), after = read(sums, counts);
  STD_TORCH_CHECK(before.sums.rows == after.sums.rows && before.sums.type == after.sums.type,
                  "sums_before must have the shape and dtype of sums");
  int64_t first_bad_row = -1;
  const cpu::BadLabel bad = cpu::add_class_sums(view, labels(kCpu, target, view.rows, "labels"), ignore_index,
                                                inverse_temperature, before, after, parallel_for, &first_bad_row);
  throw_if_bad(bad, "labels", false, after.sums.rows, ignore_index);
  return first_bad_row;
}

void add_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& logits, const Tensor& target,
                    double inverse_temperature, int64_t ignore_index) {
  add_to_class_sums(sums, counts, sums, counts, logits, target, inverse_temperature, ignore_index);
}

Tensor temperature_terms(const Tensor& logits, const Tensor& target, double inverse_temperature, int64_t ignore_index) {
  const ConstMatrix view = const_matrix(kCpu, logits, "logits");
  Tensor terms = empty({4}, ScalarType::Double);
  const cpu::BadLabel bad =
      cpu::temperature_terms(view, labels(kCpu, target, view.rows, "labels"), ignore_index, inverse_temperature,
                             static_cast<double*>(terms.mutable_data_ptr()), parallel_for);
  throw_if_bad(bad, "labels", false, view.columns, ignore_index);
  return terms;
}

STABLE_TORCH_LIBRARY_IMPL(cotuning_kernels, CPU, library) {
  library.impl("co_tuning_loss", &co_tuning_loss<false>);
  library.impl("co_tuning_loss_", &co_tuning_loss_inplace<false>);
  library.impl("sparse_co_tuning_loss", &co_tuning_loss<true>);
  library.impl("sparse_co_tuning_loss_", &co_tuning_loss_inplace<true>);
  library.impl("scale_gradients_", TORCH_BOX(&scale_gradients));
  library.impl("translate_labels", TORCH_BOX(&translate_labels));
  library.impl("add_class_sums_", TORCH_BOX(&add_class_sums));
  library.impl("add_to_class_sums_", TORCH_BOX(&add_to_class_sums));
  library.impl("temperature_terms", TORCH_BOX(&temperature_terms));
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table{sizeof(cpu::LossProblem), &cpu::co_tuning_loss, &cpu::scale_gradients, &parallel_for};
  return table;
}

}  // namespace cotuning::ops
