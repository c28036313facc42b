// CUDA on the CPU, for tests on machines without a GPU: g++ compiles the kernels of csrc/kernels/cuda with the headers
// in include/ in place of the CUDA toolkit's, and every CUDA thread runs as a fiber.
//
// A kernel may use the following; anything else does not compile:
//   threadIdx, blockIdx, blockDim, gridDim; __syncthreads; __syncwarp, __shfl_sync, __shfl_xor_sync, __ballot_sync with
//   full or partial masks; __ffs, __popc; __ldcs of uint4; __threadfence; atomicAdd on integers; COTUNING_SHARED,
//   COTUNING_DYNAMIC_SHARED; device_assert; the conversions and the maximum of pairs of 16-bit numbers in include/. The
//   host code may use the runtime calls of include/cuda_runtime.h.
// Left out on purpose: atomics on floating-point numbers (their result depends on the order of blocks), textures,
// cooperative groups, clusters, asynchronous copies, dynamic parallelism.
//
// Every build checks: a barrier that only a part of a block reaches, or reaches at two places; a warp operation that a
// lane of its mask misses; a deadlock; sizes of blocks and grids; and shared memory by the driver's rule
// (refused_shared_memory in emulator.cpp). Shared memory starts as NaN. Under ThreadSanitizer only what orders memory
// on a GPU orders it here: barriers within a block, fences with atomics across blocks. docs/cuda.md says what the
// emulator cannot show.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

namespace cotuning::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which warps and blocks run. The first warp that is ready runs until it waits; `kRandom` shuffles the
// warps now and then, so that one warp may be whole phases ahead of another.
enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

struct Settings {
  Order order = Order::kRandom;
  uint64_t seed = 1;
  size_t shared_memory = 227 << 10;  // per block, at most
};
Settings& settings();

struct Statistics {
  uint64_t launches = 0, blocks = 0, barriers = 0, warp_operations = 0, switches = 0;
  // Bytes of rows in global memory that kernels report as accessed: by vectors of 16 bytes, and by less.
  uint64_t vector_bytes_read = 0, other_bytes_read = 0, vector_bytes_written = 0, other_bytes_written = 0;
};
Statistics& statistics();
void count_read(size_t bytes);
void count_written(size_t bytes);

// Called by a running kernel.
const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_size();
const Dim3& grid_size();
void block_barrier(const char* file, int line);
void warp_barrier(unsigned mask);
// Every lane of the mask gives a value and sees the values of all.
struct LaneValues {
  const uint64_t* at;
};
LaneValues exchange(unsigned mask, uint64_t value, const char* operation);
unsigned lane();
void fence();
void before_atomic(const void* address);
void after_atomic(const void* address);
void* static_shared(const void* declaration, size_t bytes);
void* dynamic_shared();
void fail_assertion(const char* condition, const char* file, int line);
void fail(const char* message);

void launch(const void* kernel, Dim3 grid, Dim3 block, size_t dynamic_bytes, const std::function<void()>& body);
// Sets the attribute MaxDynamicSharedMemorySize of a kernel. The last call counts, whichever thread made it.
void allow_dynamic_shared(const void* kernel, size_t bytes);
// Forgets the limits of all kernels, as in a new process.
void forget_limits();
// Static shared memory of a kernel, as observed in its launches.
size_t static_shared_bytes(const void* kernel);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>, "warp operations move numbers of up to 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* operation) {
  const LaneValues values = exchange(mask, to_bits(value), operation);
  if ((mask >> (source & 31) & 1) == 0) fail("a shuffle reads a lane outside its mask");
  return from_bits<T>(values.at[source & 31]);
}

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t dynamic_bytes, Arguments... arguments) {
  launch(reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes, [=] { kernel(arguments...); });
}

}  // namespace cotuning::emulator
