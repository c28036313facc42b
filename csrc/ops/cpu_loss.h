// Builds the problem that the CPU kernels take, and stores their results in tensors. Used by the operations (cpu.cpp)
// and the fast path (csrc/fast_path).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../kernels/cpu/co_tuning_loss.h"
#include "arguments.h"

namespace cotuning::ops {

// A floating-point tensor of 0 or 1 dimensions, as doubles.
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
    case cotuning::ScalarType::kFloat32: read(static_cast<const float*>(data)); break;
    case cotuning::ScalarType::kBFloat16: read(static_cast<const c10::BFloat16*>(data)); break;
    case cotuning::ScalarType::kFloat16: read(static_cast<const c10::Half*>(data)); break;
    case cotuning::ScalarType::kFloat64: read(static_cast<const double*>(data)); break;
  }
  return values;
}

// Reads the tensors of the loss, but for the trade-off.
template <class Tensor>
void read_tensors(const LossTensors<Tensor>& tensors, cpu::LossProblem* problem) {
  const int64_t classes = read_loss(OnTheCpu{}, tensors, problem);
  if (tensors.weight == nullptr) return;
  problem->weight = read_numbers(*tensors.weight, "weight");
  STD_TORCH_CHECK(static_cast<int64_t>(problem->weight.size()) == classes, "weight must have shape (", classes, ",)");
}

// The dtype of the loss and its terms.
inline ScalarType loss_type(const cpu::LossProblem& problem) {
  return has_double_results(problem) ? ScalarType::Double : ScalarType::Float;
}

template <class Tensor>
void store(const Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

// Stores the loss, and the terms [target, source] if wanted: one number each, or one per row.
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
