// Views of the memory that the CPU kernels work on.
#pragma once

#include "../types.h"

namespace cotuning::cpu {

using cotuning::BFloat16;
using cotuning::ComputeType;
using cotuning::Float16;
using cotuning::kScalarTypes;
using cotuning::Labels;
using cotuning::Reduction;
using cotuning::ScalarType;
using cotuning::size_of;

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
