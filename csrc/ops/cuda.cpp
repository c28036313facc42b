// The operations of cotuning_kernels/backends/operations.py for the CUDA dispatch key: checks, views, allocation,
// launches. The mathematics is in csrc/kernels/cuda. Nothing here waits for the device or reads from it, so a CUDA
// graph can capture all of it.
//
// The tests compile this file with COTUNING_EMULATE and the emulator's CUDA headers. Tensors then lie on the CPU, where
// torch has no stream and no device to guard, and the operations are registered in another namespace.
#include "stable_abi.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../kernels/cuda/launch.h"
#include "arguments.h"
#include "stable_arguments.h"
#include "stable_empty.h"

#ifdef COTUNING_EMULATE
#define COTUNING_LIBRARY_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(cotuning_kernels_emulated, CPU, library)
#else
#define COTUNING_LIBRARY_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(cotuning_kernels, CUDA, library)
#endif

namespace cotuning::ops {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifndef COTUNING_EMULATE
// The handle of a device's current stream. It comes from libtorch_cuda, which is looked up instead of linked, so that
// this library loads beside a CPU build of torch. (The stable ABI has Stream::nativeHandle from torch 2.13 on.)
void* current_stream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream != nullptr && get_stream(device_index, &stream) == TORCH_SUCCESS,
                  "libtorch_cuda.so does not tell the current stream of device ", device_index);
  return stream;
}
#endif

// The device that holds all tensors of a call, and the stream of its launches.
class DeviceContext {
 public:
  static constexpr int64_t kMostColumns = std::numeric_limits<int>::max() / 2 - 1;

#ifdef COTUNING_EMULATE
  explicit DeviceContext(const Tensor& tensor) : device_(tensor.device()), device_type_(aoti_torch_device_type_cpu()) {}
  void* stream() const { return nullptr; }
  cuda::Device& state() const { return cuda::device_at(0); }
#else
  explicit DeviceContext(const Tensor& tensor)
      : device_(tensor.device()),
        device_type_(aoti_torch_device_type_cuda()),
        guard_(tensor.get_device_index()),
        stream_(current_stream(tensor.get_device_index())) {}
  void* stream() const { return stream_; }
  cuda::Device& state() const { return cuda::device_at(device_.index()); }
#endif

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.device() == device_, name, " must be on the logits' device");
  }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
    Tensor tensor = stable_empty(sizes, type, device_type_, device_.index());
#ifdef COTUNING_EMULATE
    std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());  // NaN, until it is written
#endif
    return tensor;
  }

 private:
  torch::stable::Device device_;
  int32_t device_type_;
#ifndef COTUNING_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
#endif
};

ConstVector vector(const DeviceContext& device, const Tensor& tensor, int64_t size, const char* name) {
  device.check(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape (", size, ",)");
  return {tensor.const_data_ptr(), kernel_type(tensor, name), tensor.stride(0)};
}

// The arguments of a call of the loss. The problem's views are of the tensors' memory.
struct LossCall {
  explicit LossCall(Arguments& arguments) : tensors(take_loss_tensors(arguments)), device(tensors.source_logits) {
    problem.visit_options(arguments);
    problem.target_classes = read_loss(device, tensors.pointers(), &problem);
    if (tensors.weight) problem.weight = vector(device, *tensors.weight, problem.target_classes, "weight");
    problem.trade_off = read_trade_off(device, tensors.trade_off);
    const int64_t batch = problem.source_logits.rows;
    if (problem.reduction == Reduction::kMean && batch > 0) problem.per_row = 1.0 / static_cast<double>(batch);
  }
  StableLossTensors tensors;
  DeviceContext device;
  cuda::LossProblem problem;
};

// A result of the last block and, behind it in the same allocation, the sums over blocks that it is computed from. The
// allocator hands out memory in stream order: freed by the host, it is not written before the launch is done with it.
class ResultWithSums {
 public:
  ResultWithSums(const DeviceContext& device, int64_t results, ScalarType type, int64_t sums) {
    const int64_t element = type == ScalarType::Double ? 8 : 4;
    const int64_t first = (results * element + 7) / 8 * 8;  // bytes; sums are in double
    const Tensor memory = device.empty({(first + 8 * (sums + 1)) / element}, type);
    result_ = first_elements(memory, results);
    sums_.parts = reinterpret_cast<double*>(static_cast<char*>(memory.mutable_data_ptr()) + first);
    void* own = cuda::is_capturing(device.stream()) ? sums_.parts + sums : nullptr;
    sums_.finished = cuda::finished_counter(device.state(), static_cast<unsigned*>(own), device.stream());
  }
  const Tensor& result() const { return result_; }
  const cuda::BlockSums& sums() const { return sums_; }

 private:
  Tensor result_;
  cuda::BlockSums sums_;
};

// Launches the loss and returns (loss, terms, factors).
std::tuple<Tensor, Tensor, Tensor> solve(const DeviceContext& device, cuda::LossProblem problem) {
  problem.results_in_double = has_double_results(problem);
  const ScalarType type = problem.results_in_double ? ScalarType::Double : ScalarType::Float;
  const bool by_row = problem.reduction == Reduction::kNone;
  const int64_t rows = problem.source_logits.rows;
  Tensor loss = by_row ? device.empty({rows}, type) : device.empty({}, type);
  Tensor terms = by_row ? device.empty({2, rows}, type) : device.empty({2}, type);
  problem.loss = loss.mutable_data_ptr();
  problem.terms = terms.mutable_data_ptr();
  const cuda::LossPlan plan =
      cuda::plan_loss(rows, problem.source_logits.columns, problem.source_logits.type, problem.target_logits.columns,
                      problem.target_logits.type, device.state().rules);
  // A caller may keep the loss, but only the backward pass needs the factors, so the sums share the factors' memory.
  // Results of an operation may not share memory with each other.
  const ResultWithSums factors(device, 2, type, cuda::shared_sums(plan));
  problem.factors = factors.result().mutable_data_ptr();
  problem.sums = factors.sums();
  cuda::launch_co_tuning_loss(problem, plan, device.state(), problem.sums.parts, device.stream());
  return {loss, terms, factors.result()};
}

// Uninitialised memory for a gradient, or an empty tensor if none is wanted.
Tensor new_gradient(const DeviceContext& device, const Tensor* logits, bool wanted, Matrix* view) {
  if (logits == nullptr || !wanted) return device.empty({0, 0}, ScalarType::Float);
  Tensor gradient = device.empty({logits->size(0), logits->size(1)}, logits->scalar_type());
  *view = matrix(device, gradient, "gradient");
  return gradient;
}

void co_tuning_loss(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments arguments(stack, count);
  LossCall call(arguments);
  const bool source_gradient = arguments.take<bool>(), target_gradient = arguments.take<bool>();
  arguments.check_all_taken();
  auto& [tensors, device, problem] = call;
  Tensor source_grad = new_gradient(device, &tensors.source_logits, source_gradient, &problem.source_gradient);
  Tensor target_grad =
      new_gradient(device, pointer_to(tensors.target_logits), target_gradient, &problem.target_gradient);
  const auto [loss, terms, factors] = solve(device, problem);
  put_results(stack, loss, terms, factors, source_grad, target_grad);
}

void co_tuning_loss_inplace(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments arguments(stack, count);
  LossCall call(arguments);
  arguments.check_all_taken();
  auto& [tensors, device, problem] = call;
  problem.source_gradient = matrix(device, tensors.source_logits, "source_logits");
  if (tensors.target_logits) problem.target_gradient = matrix(device, *tensors.target_logits, "target_logits");
  const auto [loss, terms, factors] = solve(device, problem);
  put_results(stack, loss, terms, factors);
}

void scale_gradients(const Tensor& source_grad, const Tensor& target_grad, const Tensor& factors,
                     const Tensor& upstream) {
  const DeviceContext device(factors);
  cuda::ScaleProblem problem;
  problem.factors = vector(device, factors, 2, "factors");
  device.check(upstream, "upstream");
  STD_TORCH_CHECK(upstream.dim() <= 1, "upstream must have one dimension at most");
  problem.upstream = {upstream.const_data_ptr(), kernel_type(upstream, "upstream"),
                      upstream.dim() == 0 ? 0 : upstream.stride(0)};
  const Tensor* gradients[2] = {&source_grad, &target_grad};
  for (int k = 0; k < 2; ++k) {
    if (gradients[k]->numel() == 0) continue;
    STD_TORCH_CHECK(upstream.dim() == 0 || upstream.size(0) == gradients[k]->size(0),
                    "upstream must have one entry a row");
    problem.gradients[k] = matrix(device, *gradients[k], "gradient");
  }
  cuda::launch_scale_gradients(problem, device.state().rules, device.stream());
}

Tensor translate_labels(const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix,
                        const Tensor& relationship, int64_t ignore_index) {
  STD_TORCH_CHECK(!is_floating(target), "target must be class indices");
  const DeviceContext device(relationship);
  cuda::TranslateProblem problem;
  const int64_t batch = target.dim() == 1 ? target.size(0) : -1;
  problem.ignore_index = ignore_index;
  read_target(device, target, pointer_to(target_b), pointer_to(mix), batch, &problem);
  problem.relationship = const_matrix(device, relationship, "relationship");
  Tensor out = device.empty({batch, relationship.size(1)}, relationship.scalar_type());
  problem.out = matrix(device, out, "out");
  cuda::launch_translate_labels(problem, device.state().rules, device.stream());
  return out;
}

void add_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& logits, const Tensor& target,
                    double inverse_temperature, int64_t ignore_index) {
  const DeviceContext device(logits);
  cuda::ClassSumsProblem problem;
  problem.logits = const_matrix(device, logits, "logits");
  problem.labels = labels(device, target, problem.logits.rows, "labels");
  problem.sums = read_class_sums(device, sums, counts, problem.logits);
  problem.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  problem.ignore_index = ignore_index;
  problem.inverse_temperature = inverse_temperature;
  const auto plan = cuda::plan_class_sums(problem.logits.rows, problem.logits.columns, problem.logits.type,
                                          problem.sums.rows, device.state().rules);
  const Tensor norms = device.empty({problem.logits.rows * cuda::kRowNormBytes / 8}, ScalarType::Double);
  problem.norms = norms.mutable_data_ptr();
  cuda::launch_class_sums(problem, plan, device.stream());
}

Tensor temperature_terms(const Tensor& logits, const Tensor& target, double inverse_temperature, int64_t ignore_index) {
  const DeviceContext device(logits);
  cuda::TemperatureProblem problem;
  problem.logits = const_matrix(device, logits, "logits");
  problem.labels = labels(device, target, problem.logits.rows, "labels");
  problem.ignore_index = ignore_index;
  problem.inverse_temperature = inverse_temperature;
  const cuda::PassPlan plan =
      cuda::plan_pass(problem.logits.rows, problem.logits.columns, problem.logits.type, device.state().rules);
  const ResultWithSums terms(device, cuda::kTemperatureSums, ScalarType::Double, plan.blocks * cuda::kTemperatureSums);
  problem.terms = static_cast<double*>(terms.result().mutable_data_ptr());
  problem.sums = terms.sums();
  cuda::launch_temperature_terms(problem, plan, device.stream());
  return terms.result();
}

COTUNING_LIBRARY_IMPL(library) {
  library.impl("co_tuning_loss", &co_tuning_loss);
  library.impl("co_tuning_loss_", &co_tuning_loss_inplace);
  library.impl("scale_gradients_", TORCH_BOX(&scale_gradients));
  library.impl("translate_labels", TORCH_BOX(&translate_labels));
  library.impl("add_class_sums_", TORCH_BOX(&add_class_sums));
  library.impl("temperature_terms", TORCH_BOX(&temperature_terms));
}

}  // namespace
}  // namespace cotuning::ops

#ifndef COTUNING_EMULATE
// For the environment report, such as "nvcc 13.0: 8.0 9.0+PTX".
extern "C" __attribute__((visibility("default"))) const char* cotuning_kernels_cuda_build() {
  return COTUNING_CUDA_BUILD;
}
#endif
