// The vocabulary of the kernels: CUDA's own when nvcc compiles them, the emulator's (tools/cuda_emulator) when g++ does.
#pragma once

#ifdef COTUNING_EMULATE

#include "../../../tools/cuda_emulator/emulator.h"

namespace cotuning::cuda {

using Stream = void*;

template <class... Parameters>
void allow_dynamic_shared(void (*kernel)(Parameters...), int64_t bytes) {
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
}
inline void check_launch() {}

}  // namespace cotuning::cuda

#else

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>

#define COTUNING_SHARED(type, name, count) __shared__ type name[count]
#define COTUNING_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define COTUNING_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  kernel<<<grid, block, dynamic_bytes, stream>>>(__VA_ARGS__)
#define COTUNING_COUNT_READ(bytes)
#define COTUNING_COUNT_WRITTEN(bytes)
#define device_assert(condition) assert(condition)

namespace cotuning::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("cotuning_kernels: ") + what + ": " + cudaGetErrorString(error));
  }
}

// A kernel may use 48 KB until it asks for more. Asked at every launch: it costs little beside one, and holds for
// whichever device is current.
template <class... Parameters>
void allow_dynamic_shared(void (*kernel)(Parameters...), int64_t bytes) {
  if (bytes <= 48 << 10) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "asking for shared memory");
}
inline void check_launch() { check(cudaGetLastError(), "launching a kernel"); }

}  // namespace cotuning::cuda

#endif
