// The kernels of `_C` that the fast path (csrc/fast_path) calls, passed in a Python capsule: the process has one copy
// of the kernels, and one choice of instruction set.
#pragma once

#include <cstddef>

#include "../kernels/cpu/co_tuning_loss.h"
#include "../kernels/cpu/scale_gradients.h"

namespace cotuning::ops {

struct KernelTable {
  size_t problem_size;  // of cpu::LossProblem: both sides must have been compiled from the same headers
  decltype(&cpu::co_tuning_loss) co_tuning_loss;
  decltype(&cpu::scale_gradients) scale_gradients;
  cpu::ParallelFor parallel_for;
};

inline constexpr const char* kKernelTableName = "cotuning_kernels._C.kernel_table";

const KernelTable& kernel_table();  // in cpu.cpp

}  // namespace cotuning::ops
