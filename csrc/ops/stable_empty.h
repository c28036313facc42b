// Fresh memory for a result, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <vector>

namespace cotuning::ops {

// Contiguous and not initialised; `device_type` as aoti_torch_device_type_cpu() and its like give it.
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), dtype, device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace cotuning::ops
