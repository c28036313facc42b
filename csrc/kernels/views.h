// Views of memory, as the CPU and the CUDA kernels take them.
#pragma once

#include "types.h"

namespace cotuning {

// Class indices, int64 or int32, at any distance.
struct Labels {
  const void* data = nullptr;
  bool is_int32 = false;
  int64_t stride = 1;

  COTUNING_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(data)[i * stride] : static_cast<const int64_t*>(data)[i * stride];
  }
};

// A matrix with dense columns and rows at any distance (0: every row is the same one). No columns: no matrix. (A null
// pointer would not tell: a matrix without rows has one too.)
struct ConstMatrix {
  const void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;  // in elements

  COTUNING_HOST_DEVICE explicit operator bool() const { return columns > 0; }
  COTUNING_HOST_DEVICE const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * row_stride * size_of(type);
  }
};

// The same for writing. No data: not wanted.
struct Matrix {
  void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;

  COTUNING_HOST_DEVICE void* row(int64_t i) const { return static_cast<char*>(data) + i * row_stride * size_of(type); }
};

// A vector at any distance (0: one number for all).
struct ConstVector {
  const void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t stride = 0;
};

}  // namespace cotuning
