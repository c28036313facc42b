// Views of the memory that the CPU kernels work on. No torch below csrc/kernels.
#pragma once

#include <cstdint>

namespace cotuning::cpu {

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

constexpr int64_t size_of(ScalarType type) {
  return type == ScalarType::kFloat64 ? 8 : type == ScalarType::kFloat32 ? 4 : 2;
}

// A matrix with dense columns and rows at any distance (0: every row is the same one). No columns: no matrix. (A null
// pointer would not say so: it is also what a matrix without rows has.)
struct ConstMatrix {
  const void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;  // in elements

  explicit operator bool() const { return columns > 0; }
  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_stride * size_of(type); }
};

struct Matrix {
  void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  int64_t row_stride = 0;
  bool stream = false;  // worth writing around the cache

  void* row(int64_t i) const { return static_cast<char*>(data) + i * row_stride * size_of(type); }
};

// Class indices, int64 or int32, at any distance.
struct Labels {
  const void* data = nullptr;
  bool is_int32 = false;
  int64_t stride = 1;

  int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(data)[i * stride] : static_cast<const int64_t*>(data)[i * stride];
  }
};

// The first label that is neither a class nor ignored, if there is one.
struct BadLabel {
  int64_t row = -1;
  int64_t value = 0;
  bool second = false;  // in the second labels of a mixup pair

  explicit operator bool() const { return row >= 0; }
};

// Splits [begin, end) over threads in chunks of at least `grain`, and calls `body` with each; returns when all are
// done.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Elements a thread must have to be worth waking: below about two of these a call runs serially (measured).
inline constexpr int64_t kGrainElements = 64 * 1024;

inline int64_t grain_rows(int64_t columns) {
  return columns >= kGrainElements ? 1 : kGrainElements / (columns + 1) + 1;
}

}  // namespace cotuning::cpu
