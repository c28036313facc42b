// From torch's tensors to the views that the kernels take: for the stable ABI's tensors (cpu.cpp) and for the ordinary
// ones (csrc/fast_path), which have these members in common.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "../kernels/cpu/types.h"
#include "dtypes.h"

namespace cotuning::ops {

template <class Tensor>
void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(1) > 0, name, " must have columns");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name, " must have dense columns (stride(1) == 1)");
}

template <class Tensor>
cpu::ConstMatrix const_matrix(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  return {tensor.const_data_ptr(), kernel_type(tensor, name), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

template <class Tensor>
cpu::Matrix matrix(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  return {tensor.mutable_data_ptr(), kernel_type(tensor, name), tensor.stride(0)};
}

template <class Tensor>
cpu::Labels labels(const Tensor& tensor, int64_t rows, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, name, " must have shape (", rows, ",)");
  const bool is_int32 = tensor.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(is_int32 || tensor.scalar_type() == ScalarType::Long, name, " must be int64 or int32");
  return {tensor.const_data_ptr(), is_int32, tensor.stride(0)};
}

}  // namespace cotuning::ops
