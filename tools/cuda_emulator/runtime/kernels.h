// What the runtime (runtime.cpp) knows of the kernels. Two headers cannot meet in one file, CUDA's and the emulator's,
// which both say what dim3 is: this one has neither.
#pragma once

#include <cstddef>
#include <functional>

namespace cotuning::emulator {

struct Size3 {
  unsigned x, y, z;
};

// A kernel of csrc/kernels/cuda, compiled for the CPU.
struct Kernel {
  const void* function;
  size_t static_shared_bytes;  // which a driver takes off its limits for dynamic shared memory
  // The kernel with its arguments, which are copied: what a thread of the launch runs.
  std::function<std::function<void()>(void** arguments)> bind;
};

// By the name that nvcc and g++ both give it, the mangled one; nullptr for any that is not ours.
const Kernel* find_kernel(const char* name);

// Runs all blocks. Throws std::runtime_error in the emulator's words where a rule of CUDA is broken.
void run_kernel(const Kernel& kernel, Size3 grid, Size3 block, size_t dynamic_bytes, size_t allowed_bytes,
                const std::function<void()>& thread);

}  // namespace cotuning::emulator
