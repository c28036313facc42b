// The kernels as runtime.cpp sees them. CUDA's and the emulator's headers both define dim3, so no file can include
// both. This header includes neither.
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
  size_t static_shared_bytes;  // a driver subtracts it from the limit of dynamic shared memory
  // Copies the arguments. Returns the function that each thread of the launch runs.
  std::function<std::function<void()>(void** arguments)> bind;
};

// Finds a kernel by its mangled name, which nvcc and g++ share; nullptr for a kernel that is not ours.
const Kernel* find_kernel(const char* name);

// Runs all blocks. Throws std::runtime_error with the emulator's message if a rule of CUDA is broken.
void run_kernel(const Kernel& kernel, Size3 grid, Size3 block, size_t dynamic_bytes, size_t allowed_bytes,
                const std::function<void()>& thread);

}  // namespace cotuning::emulator
