// Fresh memory for a result, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

// Why the last call failed, in torch's words; null before torch 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace cotuning::ops {

// Torch's own message where it is available, since callers look for it in an error (to try a smaller batch, say).
inline std::string allocation_failure(int64_t elements, int32_t device_type) {
  if (torch_exception_get_what_without_backtrace != nullptr) return torch_exception_get_what_without_backtrace();
  const bool cpu = device_type == aoti_torch_device_type_cpu();
  return (cpu ? "DefaultCPUAllocator: can't allocate memory: you tried to allocate "
              : "CUDA out of memory. Tried to allocate ") +
         std::to_string(elements) + " elements";
}

// Contiguous and uninitialised. `device_type` is a value such as aoti_torch_device_type_cpu().
inline torch::stable::Tensor stable_empty(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType type,
                                          int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0;) {
    strides[k] = stride;
    stride *= sizes.begin()[k];
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  const AOTITorchError failed = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), dtype, device_type, device_index, &handle);
  if (failed) throw std::runtime_error(allocation_failure(stride, device_type));
  return torch::stable::Tensor(handle);
}

// The first `size` elements of a vector, as a tensor that keeps the whole vector's memory.
inline torch::stable::Tensor first_elements(const torch::stable::Tensor& vector, int64_t size) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  if (aoti_torch__reinterpret_tensor(vector.get(), 1, &size, &stride, 0, &handle)) {
    throw std::runtime_error("cotuning_kernels: torch makes no view of a vector");
  }
  return torch::stable::Tensor(handle);
}

}  // namespace cotuning::ops
