// The vocabulary of the kernels: CUDA's, and a few macros. The build decides which <cuda_runtime.h> is found: the
// toolkit's, or one for the CPU that brings its own macros.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef COTUNING_SHARED
#define COTUNING_SHARED(type, name, count) __shared__ type name[count]
#define COTUNING_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define COTUNING_COUNT_READ(bytes)
#define COTUNING_COUNT_WRITTEN(bytes)
#define device_assert(condition) assert(condition)
#endif

namespace cotuning::cuda {

// What to do about an error that comes from the driver or the card that the kernels were not built for, else "".
inline const char* remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return "; the driver is older than the CUDA toolkit that compiled the kernels: update the driver, or reinstall "
             "cotuning_kernels on this machine with a toolkit that the driver supports (nvidia-smi says which)";
    case cudaErrorNoKernelImageForDevice:
      return "; the kernels were not compiled for this card: reinstall cotuning_kernels on this machine, or with "
             "TORCH_CUDA_ARCH_LIST set to its compute capability";
    default: return "";
  }
}

// Clears the thread's last error before throwing, so that the next call of another library does not report it.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("cotuning_kernels: ") + what + ": " + cudaGetErrorString(error) + remedy(error));
}

// cudaLaunchKernel returns its own error. <<<>>> would leave it with the thread, which may also hold an older error of
// another library.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
            Parameters... arguments) {
  void* addresses[] = {&arguments...};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), addresses,
                         static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
        "launching a kernel");
}

}  // namespace cotuning::cuda
