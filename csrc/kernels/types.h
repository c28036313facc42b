// The scalar types and options of the CPU and the CUDA kernels. Nothing in csrc/kernels includes torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define COTUNING_HOST_DEVICE __host__ __device__
#else
#define COTUNING_HOST_DEVICE
#endif

namespace cotuning {

enum class ScalarType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
inline constexpr int kScalarTypes = 4;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// All types but double compute in float: loads widen half-precision values.
template <class T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class T>
using ComputeType = typename ComputeTypeOf<T>::type;

COTUNING_HOST_DEVICE constexpr int64_t size_of(ScalarType type) {
  return type == ScalarType::kFloat64 ? 8 : type == ScalarType::kFloat32 ? 4 : 2;
}

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

}  // namespace cotuning
