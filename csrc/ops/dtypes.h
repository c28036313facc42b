// Translates torch's dtypes to the kernels' types, for tensors of the stable ABI and ordinary ones.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../kernels/types.h"

namespace cotuning::ops {

using torch::headeronly::ScalarType;

template <class Tensor>
cotuning::ScalarType kernel_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cotuning::ScalarType::kFloat32;
    case ScalarType::BFloat16: return cotuning::ScalarType::kBFloat16;
    case ScalarType::Half: return cotuning::ScalarType::kFloat16;
    case ScalarType::Double: return cotuning::ScalarType::kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

template <class Tensor>
bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type != ScalarType::Long && type != ScalarType::Int;
}

}  // namespace cotuning::ops
