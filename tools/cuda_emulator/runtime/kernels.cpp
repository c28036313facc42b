#include "kernels.h"

#include <dlfcn.h>

#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "../../../csrc/kernels/cuda/class_sums.cuh"
#include "../../../csrc/kernels/cuda/co_tuning_loss.cuh"
#include "../../../csrc/kernels/cuda/scale_gradients.cuh"
#include "../../../csrc/kernels/cuda/split_rows.cuh"
#include "../../../csrc/kernels/cuda/temperature_terms.cuh"
#include "../../../csrc/kernels/cuda/translate_labels.cuh"

namespace cotuning::emulator {
namespace {

using Kernels = std::unordered_map<std::string, Kernel>;

template <class... Parameters, size_t... k>
std::function<void()> with_arguments(void (*kernel)(Parameters...), void** arguments, std::index_sequence<k...>) {
  return [=, values = std::tuple<Parameters...>(*static_cast<Parameters*>(arguments[k])...)] {
    std::apply(kernel, values);
  };
}

// Runs the kernel once with arguments without rows, to learn how much static shared memory it declares.
template <class... Parameters>
void add(Kernels* kernels, void (*kernel)(Parameters...), const Parameters&... no_rows) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  Dl_info found;
  if (dladdr(function, &found) == 0 || found.dli_saddr != function) throw Error("a kernel's symbol is not exported");
  launch_kernel(kernel, 1, cuda::kSmallestBlock, 0, no_rows...);
  (*kernels)[found.dli_sname] = {function, static_shared_bytes(function), [=](void** arguments) {
                                   return with_arguments(kernel, arguments, std::index_sequence_for<Parameters...>());
                                 }};
}

template <class T>
void add_typed(Kernels* kernels) {
  double parts[8] = {}, results[8] = {};
  unsigned finished = 0;
  cuda::LossProblem loss;
  loss.sums = {parts, &finished};
  loss.first_sums = results;
  cuda::LossPlan plan;
  plan.part = cuda::LossPart::kFirst;
  add(kernels, cuda::loss_kernel<T>, loss, plan);
  add(kernels, cuda::split_sums_kernel<T>, loss, cuda::SplitPlan{});
  add(kernels, cuda::split_gradients_kernel<T>, loss, cuda::SplitPlan{});
  cuda::ClassSumsProblem class_sums;
  class_sums.logits.columns = 1;
  add(kernels, cuda::row_norms_kernel<T>, class_sums, cuda::PassPlan{});
  add(kernels, cuda::class_sums_kernel<T>, class_sums, cuda::ClassSumsPlan{});
  cuda::TemperatureProblem temperature;
  temperature.terms = results;
  temperature.sums = {parts, &finished};
  add(kernels, cuda::temperature_kernel<T>, temperature, cuda::PassPlan{});
}

Kernels all_kernels() {
  Kernels kernels;
  add_typed<float>(&kernels);
  add_typed<double>(&kernels);
  add_typed<cuda::BFloat16>(&kernels);
  add_typed<cuda::Float16>(&kernels);
  add(&kernels, cuda::scale_kernel, {}, cuda::ScalePlan{cuda::kSmallestBlock, {}});
  add(&kernels, cuda::translate_kernel, {}, {});
  return kernels;
}

}  // namespace

const Kernel* find_kernel(const char* name) {
  static const Kernels kernels = all_kernels();
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : &found->second;
}

void run_kernel(const Kernel& kernel, Size3 grid, Size3 block, size_t dynamic_bytes, size_t allowed_bytes,
                const std::function<void()>& thread) {
  allow_dynamic_shared(kernel.function, allowed_bytes);
  launch(kernel.function, Dim3(grid.x, grid.y, grid.z), Dim3(block.x, block.y, block.z), dynamic_bytes, thread);
}

}  // namespace cotuning::emulator
