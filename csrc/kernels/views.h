// Views of memory for the CPU and the CUDA kernels.
#pragma once

#include "types.h"

namespace cotuning {

// Class indices, int64 or int32, with any stride.
struct Labels {
  const void* data = nullptr;
  bool is_int32 = false;
  int64_t stride = 1;

  COTUNING_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(data)[i * stride] : static_cast<const int64_t*>(data)[i * stride];
  }
};

// A matrix whose rows are contiguous, with any stride between rows (0: all rows are the same memory). No columns means
// no matrix. A null pointer cannot mean that: a matrix without rows has one too.
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

// A writable matrix. Null data: the caller does not want it.
struct Matrix {
  void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;

  COTUNING_HOST_DEVICE void* row(int64_t i) const { return static_cast<char*>(data) + i * row_stride * size_of(type); }
};

// A matrix in compressed rows: row i has the entries k from starts[i] to starts[i + 1], each values[k] in columns[k].
// Columns ascend within a row. No rows means no matrix.
struct SparseMatrix {
  Labels starts, columns;
  const void* values = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t entries = 0;

  COTUNING_HOST_DEVICE explicit operator bool() const { return rows > 0; }
};

// A vector with any stride (0: one number for all rows).
struct ConstVector {
  const void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t stride = 0;
};

}  // namespace cotuning
