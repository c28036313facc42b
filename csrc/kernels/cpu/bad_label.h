// Finds labels out of range. The caller writes the error message.
#pragma once

#include "../views.h"

namespace cotuning::cpu {

// The first label that is neither a class nor ignored, if any.
struct BadLabel {
  int64_t row = -1;
  int64_t value = 0;
  bool second = false;  // in the second labels of a mixup pair

  explicit operator bool() const { return row >= 0; }
};

inline BadLabel find_bad_label(Labels labels, int64_t rows, int64_t num_classes, int64_t ignore_index) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = labels[i];
    if (label != ignore_index && (label < 0 || label >= num_classes)) return {i, label, false};
  }
  return {};
}

}  // namespace cotuning::cpu
