// From torch's stable tensors to the views that the kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../kernels/cpu/types.h"

namespace cotuning::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cpu::ScalarType kernel_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::ScalarType::kFloat32;
    case ScalarType::BFloat16: return cpu::ScalarType::kBFloat16;
    case ScalarType::Half: return cpu::ScalarType::kFloat16;
    case ScalarType::Double: return cpu::ScalarType::kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(1) > 0, name, " must have columns");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name, " must have dense columns (stride(1) == 1)");
}

inline cpu::ConstMatrix const_matrix(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  return {tensor.const_data_ptr(), kernel_type(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

inline cpu::Matrix matrix(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  return {tensor.mutable_data_ptr(), kernel_type(tensor, name), tensor.stride(0)};
}

inline cpu::Labels labels(const Tensor& tensor, int64_t rows, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, name, " must have shape (", rows, ",)");
  const bool is_int32 = tensor.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(is_int32 || tensor.scalar_type() == ScalarType::Long, name, " must be int64 or int32");
  return {tensor.const_data_ptr(), is_int32, tensor.stride(0)};
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type != ScalarType::Long && type != ScalarType::Int;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0;) {
    strides[k] = stride;
    stride *= sizes.begin()[k];
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// torch's own threads: torch.set_num_threads holds here too.
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  if (end - begin <= grain) {
    if (begin < end) body(begin, end, context);
    return;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

}  // namespace cotuning::ops
