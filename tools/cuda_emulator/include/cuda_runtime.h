// Replaces CUDA's header of this name for the kernels of csrc/kernels/cuda and their host code. Has the vocabulary of a
// kernel, and the few runtime calls that the host code makes. They call emulator.h, which says what is checked and what
// is left out on purpose.
#pragma once

#include <tuple>
#include <utility>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

using dim3 = ::cotuning::emulator::Dim3;

#define threadIdx (::cotuning::emulator::thread_index())
#define blockIdx (::cotuning::emulator::block_index())
#define blockDim (::cotuning::emulator::block_size())
#define gridDim (::cotuning::emulator::grid_size())
#define __syncthreads() ::cotuning::emulator::block_barrier(__FILE__, __LINE__)

// device.h defines these macros unless they are defined here.
#define COTUNING_SHARED(type, name, count)   \
  static const char name##_declaration_ = 0; \
  type* const name =                         \
      static_cast<type*>(::cotuning::emulator::static_shared(&name##_declaration_, sizeof(type) * (count)))
#define COTUNING_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(::cotuning::emulator::dynamic_shared())
#define COTUNING_COUNT_READ(bytes) ::cotuning::emulator::count_read(bytes)
#define COTUNING_COUNT_WRITTEN(bytes) ::cotuning::emulator::count_written(bytes)
#define device_assert(condition) \
  ((condition) ? void() : ::cotuning::emulator::fail_assertion(#condition, __FILE__, __LINE__))

// ------------------------------------------------------------------------------------------------------ device code

inline void __syncwarp(unsigned mask = 0xffffffffu) { ::cotuning::emulator::warp_barrier(mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return ::cotuning::emulator::shuffle(mask, value, static_cast<unsigned>(source), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  const unsigned source = ::cotuning::emulator::lane() ^ static_cast<unsigned>(other);
  return ::cotuning::emulator::shuffle(mask, value, source, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto values = ::cotuning::emulator::exchange(mask, predicate != 0, "__ballot_sync");
  unsigned ballot = 0;
  for (unsigned k = 0; k < 32; ++k) {
    if (mask >> k & 1) ballot |= static_cast<unsigned>(values.at[k]) << k;
  }
  return ballot;
}
inline void __threadfence() { ::cotuning::emulator::fence(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "an atomic sum of floating-point numbers depends on the order of blocks");
  ::cotuning::emulator::before_atomic(address);
  const T before = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  ::cotuning::emulator::after_atomic(address);
  return before;
}
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 __ldcs(const uint4* from) { return *from; }
inline float __uint_as_float(unsigned bits) { return ::cotuning::emulator::from_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(::cotuning::emulator::to_bits(x)); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// -------------------------------------------------------------------------------------------------------- host code

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? 132
               : static_cast<int>(::cotuning::emulator::settings().shared_memory);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  ::cotuning::emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

// There is one device and one stream. Every call has finished its work when it returns. Nothing is captured.
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

namespace cotuning::emulator {

template <class... Parameters, size_t... k>
void launch_with(void (*kernel)(Parameters...), Dim3 grid, Dim3 block, void** arguments, size_t dynamic_bytes,
                 std::index_sequence<k...>) {
  launch_kernel(kernel, grid, block, dynamic_bytes, *static_cast<Parameters*>(arguments[k])...);
}

}  // namespace cotuning::emulator

// Throws the emulator's Error, which explains what is wrong, where CUDA returns an error code.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t dynamic_bytes, cudaStream_t) {
  ::cotuning::emulator::launch_with(kernel, grid, block, arguments, dynamic_bytes,
                                    std::index_sequence_for<Parameters...>());
  return cudaSuccess;
}
