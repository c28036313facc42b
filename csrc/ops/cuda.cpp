// What cotuning_kernels/backends/operations.py defines, for the CUDA dispatch key: checks, views, allocation, launches.
// The mathematics is in csrc/kernels/cuda. Nothing here waits for the device or reads from it, so a CUDA graph can
// capture all of it.
//
// For the tests the same file is compiled with COTUNING_EMULATE and an emulator's CUDA headers: tensors then lie on the
// CPU, where torch has no stream and no device to guard, and the operations are registered in a namespace of their own.
//
// The Python layer has already checked its arguments, in words for people. What is checked here again is what would let
// a direct caller of the operation read or write outside a tensor.
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
#include "dtypes.h"
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
// The handle of a device's current stream. The function that knows it is in libtorch_cuda, which is not linked, so that
// this library loads beside a torch for CPUs. (The stable ABI's own Stream::nativeHandle is there from torch 2.13 on.)
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

// Where everything of one call lies, and the stream that it is launched on.
class Place {
 public:
#ifdef COTUNING_EMULATE
  explicit Place(const Tensor& tensor) : device_(tensor.device()), device_type_(aoti_torch_device_type_cpu()) {}
  void* stream() const { return nullptr; }
  cuda::Device& device() const { return cuda::device_at(0); }
#else
  explicit Place(const Tensor& tensor)
      : device_(tensor.device()),
        device_type_(aoti_torch_device_type_cuda()),
        guard_(tensor.get_device_index()),
        stream_(current_stream(tensor.get_device_index())) {}
  void* stream() const { return stream_; }
  cuda::Device& device() const { return cuda::device_at(device_.index()); }
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

void check_matrix(const Place& place, const Tensor& tensor, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(1) > 0 && tensor.size(1) < std::numeric_limits<int>::max() / 2, name,
                  " must have columns, and fewer than 2^30");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name, " must have dense columns (stride(1) == 1)");
}

cuda::ConstMatrix const_matrix(const Place& place, const Tensor& tensor, const char* name) {
  check_matrix(place, tensor, name);
  return {tensor.const_data_ptr(), kernel_type(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// A row that another row overlaps cannot hold a gradient of its own.
cuda::Matrix matrix(const Place& place, const Tensor& tensor, const char* name) {
  check_matrix(place, tensor, name);
  STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1), name, " has rows that overlap");
  return {tensor.mutable_data_ptr(), kernel_type(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

cuda::ConstVector vector(const Place& place, const Tensor& tensor, int64_t size, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape (", size, ",)");
  return {tensor.const_data_ptr(), kernel_type(tensor, name), tensor.stride(0)};
}

cuda::Labels labels(const Place& place, const Tensor& tensor, int64_t rows, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, name, " must have shape (", rows, ",)");
  const bool is_int32 = tensor.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(is_int32 || tensor.scalar_type() == ScalarType::Long, name, " must be int64 or int32");
  return {tensor.const_data_ptr(), is_int32, tensor.stride(0)};
}

// What says what each row's target is; shared by the loss and by translate_labels.
template <class Problem>
void read_target(const Place& place, const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix,
                 int64_t batch, Problem* problem) {
  const bool probabilities = is_floating(target);
  STD_TORCH_CHECK(mix.has_value() == (probabilities || target_b.has_value()) && !(probabilities && target_b),
                  "mix goes with target_b, or with probabilities");
  if (!probabilities) {
    problem->labels = labels(place, target, batch, "target");
    if (target_b) problem->labels_b = labels(place, *target_b, batch, "target_b");
    STD_TORCH_CHECK(!target_b || target_b->scalar_type() == target.scalar_type(), "target_b must have target's dtype");
  }
  if (!mix) return;
  place.check(*mix, "mix");
  const bool one = mix->dim() == 1 && mix->size(0) == 1;
  STD_TORCH_CHECK(
      mix->scalar_type() == ScalarType::Double && mix->dim() == 1 && (mix->size(0) == batch || (one && !probabilities)),
      "mix must be float64 of shape (", batch, ",) or (1,)");
  problem->mix = static_cast<const double*>(mix->const_data_ptr());
  problem->mix_stride = one ? 0 : mix->stride(0);
}

cuda::LossProblem read_problem(const Place& place, const Tensor& source_logits, const OptionalTensor& target_logits,
                               const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix,
                               const Tensor& relationship, const OptionalTensor& weight, const Tensor& trade_off,
                               double label_smoothing, int64_t ignore_index, int64_t reduction, bool kl_divergence) {
  cuda::LossProblem problem;
  problem.source_logits = const_matrix(place, source_logits, "source_logits");
  const int64_t batch = problem.source_logits.rows;
  read_target(place, target, target_b, mix, batch, &problem);
  problem.relationship = const_matrix(place, relationship, "relationship");
  STD_TORCH_CHECK(problem.relationship.columns == problem.source_logits.columns,
                  "relationship must have one column a source class");
  if (is_floating(target)) {
    problem.probabilities = const_matrix(place, target, "target");
    STD_TORCH_CHECK(problem.probabilities.rows == batch, "target must have ", batch, " rows");
    STD_TORCH_CHECK(problem.relationship.rows == batch,
                    "with probabilities, relationship must have one row a row of the batch");
    problem.target_classes = problem.probabilities.columns;
  } else {
    problem.target_classes = problem.relationship.rows;
  }
  const int64_t classes = problem.target_classes;
  if (target_logits) {
    problem.target_logits = const_matrix(place, *target_logits, "target_logits");
    STD_TORCH_CHECK(problem.target_logits.rows == batch && problem.target_logits.columns == classes,
                    "target_logits must have shape (", batch, ", ", classes, ")");
  }
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction must be 0, 1 or 2");
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1]");
  if (weight) problem.weight = vector(place, *weight, classes, "weight");
  place.check(trade_off, "trade_off");
  STD_TORCH_CHECK(trade_off.dim() == 0 && trade_off.scalar_type() == ScalarType::Double,
                  "trade_off must be a float64 number");
  problem.trade_off = static_cast<const double*>(trade_off.const_data_ptr());
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  problem.reduction = static_cast<cuda::Reduction>(reduction);
  if (problem.reduction == cuda::Reduction::kMean && batch > 0) problem.per_row = 1.0 / static_cast<double>(batch);
  problem.kl_divergence = kl_divergence;
  return problem;
}

// Memory for sums over blocks. It is free for others when this is destroyed, in the order of the stream, like that of
// any temporary tensor.
class SumsMemory {
 public:
  SumsMemory(const Place& place, int64_t blocks, int64_t sums)
      : memory_(place.empty({blocks * sums + 1}, ScalarType::Double)) {
    auto* parts = static_cast<double*>(memory_.mutable_data_ptr());
    void* own = cuda::is_capturing(place.stream()) ? parts + blocks * sums : nullptr;
    sums_.parts = parts;
    sums_.finished = cuda::finished_counter(place.device(), static_cast<unsigned*>(own), place.stream());
  }
  const cuda::BlockSums& sums() const { return sums_; }

 private:
  Tensor memory_;
  cuda::BlockSums sums_;
};

// Launches the problem, and gives (loss, terms, factors).
std::tuple<Tensor, Tensor, Tensor> solve(const Place& place, cuda::LossProblem problem) {
  const bool both = problem.target_logits.columns > 0;
  problem.results_in_double = problem.source_logits.type == cuda::ScalarType::kFloat64 ||
                              (both && problem.target_logits.type == cuda::ScalarType::kFloat64);
  const ScalarType type = problem.results_in_double ? ScalarType::Double : ScalarType::Float;
  const bool by_row = problem.reduction == cuda::Reduction::kNone;
  const int64_t rows = problem.source_logits.rows;
  Tensor loss = by_row ? place.empty({rows}, type) : place.empty({}, type);
  Tensor terms = by_row ? place.empty({2, rows}, type) : place.empty({2}, type);
  Tensor factors = place.empty({2}, type);
  problem.loss = loss.mutable_data_ptr();
  problem.terms = terms.mutable_data_ptr();
  problem.factors = factors.mutable_data_ptr();
  const cuda::LossPlan plan =
      cuda::plan_loss(rows, problem.source_logits.columns, problem.source_logits.type, problem.target_logits.columns,
                      problem.target_logits.type, place.device().rules);
  const SumsMemory memory(place, plan.blocks + 1, cuda::kLossSums);
  problem.sums = memory.sums();
  problem.first_sums = problem.sums.parts + plan.blocks * cuda::kLossSums;
  cuda::launch_loss(problem, plan, place.device(), place.stream());
  return {loss, terms, factors};
}

// Fresh memory for a gradient, or an empty tensor where none is wanted.
Tensor new_gradient(const Place& place, const OptionalTensor& logits, bool wanted, cuda::Matrix* view) {
  if (!logits || !wanted) return place.empty({0, 0}, ScalarType::Float);
  Tensor gradient = place.empty({logits->size(0), logits->size(1)}, logits->scalar_type());
  *view = matrix(place, gradient, "gradient");
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> co_tuning_loss(
    const Tensor& source_logits, const OptionalTensor& target_logits, const Tensor& target,
    const OptionalTensor& target_b, const OptionalTensor& mix, const Tensor& relationship, const OptionalTensor& weight,
    const Tensor& trade_off, double label_smoothing, int64_t ignore_index, int64_t reduction, bool kl_divergence,
    bool source_gradient, bool target_gradient) {
  const Place place(source_logits);
  cuda::LossProblem problem = read_problem(place, source_logits, target_logits, target, target_b, mix, relationship,
                                           weight, trade_off, label_smoothing, ignore_index, reduction, kl_divergence);
  Tensor source_grad = new_gradient(place, source_logits, source_gradient, &problem.source_gradient);
  Tensor target_grad = new_gradient(place, target_logits, target_gradient, &problem.target_gradient);
  auto [loss, terms, factors] = solve(place, problem);
  return {loss, terms, factors, source_grad, target_grad};
}

std::tuple<Tensor, Tensor, Tensor> co_tuning_loss_inplace(Tensor source_logits, OptionalTensor target_logits,
                                                          const Tensor& target, const OptionalTensor& target_b,
                                                          const OptionalTensor& mix, const Tensor& relationship,
                                                          const OptionalTensor& weight, const Tensor& trade_off,
                                                          double label_smoothing, int64_t ignore_index,
                                                          int64_t reduction, bool kl_divergence) {
  const Place place(source_logits);
  cuda::LossProblem problem = read_problem(place, source_logits, target_logits, target, target_b, mix, relationship,
                                           weight, trade_off, label_smoothing, ignore_index, reduction, kl_divergence);
  problem.source_gradient = matrix(place, source_logits, "source_logits");
  if (target_logits) problem.target_gradient = matrix(place, *target_logits, "target_logits");
  return solve(place, problem);
}

void scale_gradients(const Tensor& source_grad, const Tensor& target_grad, const Tensor& factors,
                     const Tensor& upstream) {
  const Place place(factors);
  cuda::ScaleProblem problem;
  problem.factors = vector(place, factors, 2, "factors");
  place.check(upstream, "upstream");
  STD_TORCH_CHECK(upstream.dim() <= 1, "upstream must have one dimension at most");
  problem.upstream = {upstream.const_data_ptr(), kernel_type(upstream, "upstream"),
                      upstream.dim() == 0 ? 0 : upstream.stride(0)};
  const Tensor* gradients[2] = {&source_grad, &target_grad};
  for (int k = 0; k < 2; ++k) {
    if (gradients[k]->numel() == 0) continue;
    STD_TORCH_CHECK(upstream.dim() == 0 || upstream.size(0) == gradients[k]->size(0),
                    "upstream must have one entry a row");
    problem.gradients[k] = matrix(place, *gradients[k], "gradient");
  }
  cuda::launch_scale(problem, place.device().rules, place.stream());
}

Tensor translate_labels(const Tensor& target, const OptionalTensor& target_b, const OptionalTensor& mix,
                        const Tensor& relationship, int64_t ignore_index) {
  STD_TORCH_CHECK(!is_floating(target), "target must be class indices");
  const Place place(relationship);
  cuda::TranslateProblem problem;
  const int64_t batch = target.dim() == 1 ? target.size(0) : -1;
  read_target(place, target, target_b, mix, batch, &problem);
  problem.relationship = const_matrix(place, relationship, "relationship");
  problem.ignore_index = ignore_index;
  Tensor out = place.empty({batch, relationship.size(1)}, relationship.scalar_type());
  problem.out = matrix(place, out, "out");
  cuda::launch_translate(problem, place.device().rules, place.stream());
  return out;
}

void add_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& logits, const Tensor& target,
                    double inverse_temperature, int64_t ignore_index) {
  const Place place(logits);
  cuda::ClassSumsProblem problem;
  problem.logits = const_matrix(place, logits, "logits");
  problem.labels = labels(place, target, problem.logits.rows, "labels");
  problem.sums = matrix(place, sums, "sums");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float || sums.scalar_type() == ScalarType::Double,
                  "sums must be float32 or float64");
  STD_TORCH_CHECK(problem.sums.columns == problem.logits.columns, "sums must have one column a column of logits");
  place.check(counts, "counts");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 1 &&
                      counts.size(0) == sums.size(0),
                  "counts must be contiguous int64 of shape (", sums.size(0), ",)");
  problem.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  problem.ignore_index = ignore_index;
  problem.inverse_temperature = inverse_temperature;
  cuda::launch_class_sums(problem, place.device().rules, place.stream());
}

Tensor temperature_terms(const Tensor& logits, const Tensor& target, double inverse_temperature, int64_t ignore_index) {
  const Place place(logits);
  cuda::TemperatureProblem problem;
  problem.logits = const_matrix(place, logits, "logits");
  problem.labels = labels(place, target, problem.logits.rows, "labels");
  problem.ignore_index = ignore_index;
  problem.inverse_temperature = inverse_temperature;
  Tensor terms = place.empty({cuda::kTemperatureSums}, ScalarType::Double);
  problem.terms = static_cast<double*>(terms.mutable_data_ptr());
  const cuda::PassPlan plan =
      cuda::plan_pass(problem.logits.rows, problem.logits.columns, problem.logits.type, place.device().rules);
  const SumsMemory memory(place, plan.blocks, cuda::kTemperatureSums);
  problem.sums = memory.sums();
  cuda::launch_temperature(problem, plan, place.stream());
  return terms;
}

COTUNING_LIBRARY_IMPL(library) {
  library.impl("co_tuning_loss", TORCH_BOX(&co_tuning_loss));
  library.impl("co_tuning_loss_", TORCH_BOX(&co_tuning_loss_inplace));
  library.impl("scale_gradients_", TORCH_BOX(&scale_gradients));
  library.impl("translate_labels", TORCH_BOX(&translate_labels));
  library.impl("add_class_sums_", TORCH_BOX(&add_class_sums));
  library.impl("temperature_terms", TORCH_BOX(&temperature_terms));
}

}  // namespace
}  // namespace cotuning::ops

#ifndef COTUNING_EMULATE
// "nvcc 13.0: 8.0 9.0+PTX", for the environment report.
extern "C" __attribute__((visibility("default"))) const char* cotuning_kernels_cuda_build() {
  return COTUNING_CUDA_BUILD;
}
#endif
