// The arguments of the loss's operations, as torch's stable ABI passes them.
//
// TORCH_BOX needs a function with one parameter for each argument. These operations take the options of the loss
// through LossInputs::visit_options instead, so that no operation lists them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "arguments.h"

namespace cotuning::ops {

// Takes the arguments of a call one after another; who takes one owns it. Visits LossInputs::visit_options.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  template <class T>
  T take() {
    STD_TORCH_CHECK(next_ != end_, "the operation's schema has fewer arguments than its kernel takes");
    return torch::stable::detail::to<T>(*next_++);
  }

  void check_all_taken() const {
    STD_TORCH_CHECK(next_ == end_, "the operation's schema has more arguments than its kernel takes");
  }

  void operator()(const char* name, double& value, const Range& range) {
    value = take<double>();
    STD_TORCH_CHECK(range.holds(value), name, " must be in [", range.low, ", ", range.high, "]");
  }
  void operator()(const char*, int64_t& value) { value = take<int64_t>(); }
  void operator()(const char*, bool& value, const Words&) { value = take<bool>(); }
  template <class Enumeration>
  void operator()(const char* name, Enumeration& value, const Words& words) {
    const auto index = take<int64_t>(), count = static_cast<int64_t>(words.size());
    STD_TORCH_CHECK(index >= 0 && index < count, name, " must be in [0, ", count - 1, "]");
    value = static_cast<Enumeration>(index);
  }

 private:
  StableIValue *next_, *end_;
};

// The tensors among the arguments of co_tuning_loss and co_tuning_loss_, in the order of their schemas.
struct StableLossTensors {
  torch::stable::Tensor source_logits;
  std::optional<torch::stable::Tensor> target_logits;
  torch::stable::Tensor target;
  std::optional<torch::stable::Tensor> target_b, mix;
  std::optional<torch::stable::Tensor> relationship;  // or the three tensors of a sparse one
  std::optional<torch::stable::Tensor> crow_indices, col_indices, values;
  std::optional<torch::stable::Tensor> weight;
  torch::stable::Tensor trade_off;

  LossTensors<torch::stable::Tensor> pointers() const {
    return {&source_logits,       pointer_to(target_logits), &target,
            pointer_to(target_b), pointer_to(mix),           pointer_to(relationship),
            pointer_to(weight),   pointer_to(crow_indices),  pointer_to(col_indices),
            pointer_to(values)};
  }
};

// `sparse`: those of sparse_co_tuning_loss and sparse_co_tuning_loss_.
inline StableLossTensors take_loss_tensors(Arguments& arguments, bool sparse = false) {
  const auto tensor = [&] { return arguments.take<torch::stable::Tensor>(); };
  const auto optional = [&] { return arguments.take<std::optional<torch::stable::Tensor>>(); };
  const auto tensor_if = [&](bool there) {
    return there ? std::optional<torch::stable::Tensor>(tensor()) : std::nullopt;
  };
  return {tensor(),          optional(),        tensor(),          optional(), optional(), tensor_if(!sparse),
          tensor_if(sparse), tensor_if(sparse), tensor_if(sparse), optional(), tensor()};  // from left to right
}

// Puts an operation's results where torch expects them.
template <class... Tensors>
void put_results(StableIValue* stack, const Tensors&... results) {
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

}  // namespace cotuning::ops
