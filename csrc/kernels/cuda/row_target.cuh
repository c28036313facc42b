// A row's target as classes and shares.
#pragma once

#include "device.h"
#include "problems.h"

namespace cotuning::cuda {

// Up to two classes and their shares. An ignored label has share 0.
struct RowTarget {
  int64_t index[2];
  double share[2];

  __device__ bool any() const { return share[0] != 0 || share[1] != 0; }
};

__device__ __forceinline__ RowTarget read_row_target(const TargetInputs& p, int64_t classes, int64_t row) {
  const bool mixed = p.labels_b.data != nullptr;
  const double share = mixed ? p.mix[row * p.mix_stride] : 1.0;
  RowTarget target{{p.labels[row], mixed ? p.labels_b[row] : p.ignore_index}, {share, mixed ? 1.0 - share : 0.0}};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const bool ignored = target.index[k] == p.ignore_index;
    device_assert(ignored || (target.index[k] >= 0 && target.index[k] < classes));
    if (ignored) target.share[k] = 0;
  }
  return target;
}

}  // namespace cotuning::cuda
