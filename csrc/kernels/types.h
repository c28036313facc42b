// The scalar types and options of both the CPU and the CUDA kernels. No torch below csrc/kernels.
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

// Arithmetic is float for every type but double: half-precision values are widened as they are loaded.
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
