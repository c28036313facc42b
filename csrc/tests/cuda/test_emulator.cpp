// The emulator itself: what it covers, and what it refuses.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>

#include "../check.h"

namespace cotuning::test {
namespace {

using emulator::Error;
using emulator::Order;

constexpr unsigned kAll = 0xffffffffu;

// Calls `body` under schedules of every kind.
template <class Body>
void under_every_schedule(Body body) {
  for (int k = 0; k < 6; ++k) {
    emulator::settings().order = k == 0 ? Order::kForward : k == 1 ? Order::kReverse : Order::kRandom;
    emulator::settings().seed = static_cast<uint64_t>(random_integer(0, 1 << 30));
    body();
  }
  emulator::settings() = {};
}

template <class Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing";
}

#define CHECK_ERROR(text, body)                                                      \
  do {                                                                               \
    const std::string error = error_of(body);                                        \
    CHECK(error.find(text) != std::string::npos, "the error is: %s", error.c_str()); \
  } while (false)

void shuffles(int* out) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  out[4 * thread] = __shfl_xor_sync(kAll, thread, 5);
  out[4 * thread + 1] = static_cast<int>(__shfl_sync(kAll, 2.5 * thread, 7));
  out[4 * thread + 2] = static_cast<int>(__ballot_sync(kAll, thread % 3 == 0));
  // Only a part of the warp.
  out[4 * thread + 3] = lane < 8 ? static_cast<int>(__ballot_sync(0xffu, lane % 2)) : 0;
}

TEST(warp_operations) {
  under_every_schedule([] {
    int out[4 * 64];
    emulator::launch_kernel(shuffles, 1, 64, 0, out);
    for (int thread = 0; thread < 64; ++thread) {
      const int first = thread / 32 * 32;
      unsigned ballot = 0;
      for (int k = 0; k < 32; ++k) ballot |= ((first + k) % 3 == 0 ? 1u : 0u) << k;
      CHECK(out[4 * thread] == (thread ^ 5), "lane %d got %d", thread, out[4 * thread]);
      CHECK(out[4 * thread + 1] == static_cast<int>(2.5 * (first + 7)), "lane %d got %d", thread, out[4 * thread + 1]);
      CHECK(out[4 * thread + 2] == static_cast<int>(ballot), "lane %d got %x", thread, out[4 * thread + 2]);
      CHECK(out[4 * thread + 3] == (thread % 32 < 8 ? 0xaa : 0), "lane %d got %x", thread, out[4 * thread + 3]);
    }
  });
}

void indices(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 24 + thread] = block * 24 + thread;
}

TEST(indices_of_blocks_and_threads) {
  under_every_schedule([] {
    unsigned out[12 * 24] = {};
    emulator::launch_kernel(indices, dim3(3, 2, 2), dim3(4, 3, 2), 0, out);
    for (unsigned i = 0; i < 12 * 24; ++i) CHECK(out[i] == i, "[%u] is %u", i, out[i]);
  });
}

void rotate(int* out, int rounds) {
  COTUNING_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<int*>(memory);
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
  int value = thread;
  for (int r = 0; r < rounds; ++r) {
    shared[thread] = value;
    __syncthreads();
    value = shared[(thread + 33) % count];
    __syncthreads();
  }
  out[thread] = value;
}

TEST(barriers_order_shared_memory) {
  under_every_schedule([] {
    int out[96];
    emulator::launch_kernel(rotate, 1, 96, sizeof out, out, 10);
    for (int i = 0; i < 96; ++i) CHECK(out[i] == (i + 330) % 96, "[%d] is %d", i, out[i]);
  });
}

void read_unwritten(float* out) {
  COTUNING_DYNAMIC_SHARED(dynamic);
  COTUNING_SHARED(float, fixed, 4);
  out[0] = reinterpret_cast<const float*>(dynamic)[3];
  out[1] = fixed[2];
}

TEST(shared_memory_starts_as_nan) {
  float out[2] = {};
  emulator::launch_kernel(read_unwritten, 1, 1, 16, out);
  CHECK(std::isnan(out[0]) && std::isnan(out[1]), "%g and %g", out[0], out[1]);
}

void nothing(int) {}
void other(int) {}
void much_static() {
  COTUNING_SHARED(double, memory, 6145);
  memory[0] = 0;
}
void static_and_dynamic() {
  COTUNING_SHARED(double, memory, 128);
  memory[0] = 0;
}
void static_and_limit() {
  COTUNING_SHARED(double, memory, 128);
  memory[0] = 0;
}

TEST(limits) {
  CHECK_ERROR("a block of 1025 threads", [] { emulator::launch_kernel(nothing, 1, 1025, 0, 0); });
  CHECK_ERROR("a block of 0 threads", [] { emulator::launch_kernel(nothing, 1, 0, 0, 0); });
  CHECK_ERROR("a grid of", [] { emulator::launch_kernel(nothing, 0, 1, 0, 0); });
  CHECK_ERROR("a grid of", [] { emulator::launch_kernel(nothing, dim3(1, 65536), 1, 0, 0); });
  CHECK_ERROR("nothing", [] { emulator::launch_kernel(nothing, dim3(1, 7000), 1, 0, 0); });
  CHECK_ERROR("nothing", [] { emulator::launch_kernel(nothing, 1, 1024, 48 << 10, 0); });
  CHECK_ERROR("49152 were allowed (48 KB less", [] { emulator::launch_kernel(nothing, 1, 32, (48 << 10) + 1, 0); });
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(&other), 100 << 10);
  CHECK_ERROR("nothing", [] { emulator::launch_kernel(other, 1, 32, 100 << 10, 0); });
  CHECK_ERROR("but 102400 were allowed", [] { emulator::launch_kernel(other, 1, 32, (100 << 10) + 1, 0); });
  emulator::settings().shared_memory = 64 << 10;
  CHECK_ERROR("the device has 65536",
              [] { emulator::allow_dynamic_shared(reinterpret_cast<const void*>(&nothing), 65 << 10); });
  CHECK_ERROR("than the device has, 65536", [] { emulator::launch_kernel(other, 1, 32, 100 << 10, 0); });
  emulator::settings() = {};
  CHECK_ERROR("48 KB of static", [] { emulator::launch_kernel(much_static, 1, 1, 0); });
  // The first launch learns how much static memory there is; later launches know it before they begin.
  for (int repetition = 0; repetition < 2; ++repetition) {
    CHECK_ERROR("beside 1024 static ones, but 48128 were allowed",
                [] { emulator::launch_kernel(static_and_dynamic, 1, 1, 48128 + 1); });
  }
  CHECK_ERROR("nothing", [] { emulator::launch_kernel(static_and_dynamic, 1, 1, 48128); });
  CHECK_ERROR("beside 1024 static ones, the device has 232448",
              [] { emulator::allow_dynamic_shared(reinterpret_cast<const void*>(&static_and_dynamic), 231425); });
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(&static_and_dynamic), 231424);
  CHECK_ERROR("nothing", [] { emulator::launch_kernel(static_and_dynamic, 1, 1, 231424); });
  // A limit below the default applies as well, and the last call counts.
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(&static_and_dynamic), 1000);
  CHECK_ERROR("but 1000 were allowed", [] { emulator::launch_kernel(static_and_dynamic, 1, 1, 1001); });
  // A limit that was set before the first launch.
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(&static_and_limit), 232448);
  CHECK_ERROR("together are more than the device has", [] { emulator::launch_kernel(static_and_limit, 1, 1, 0); });
  emulator::forget_limits();
}

void ballot_of_a_full_mask() { __ballot_sync(kAll, 1); }
void ballot_of_two_masks() { __ballot_sync(threadIdx.x < 16 ? 0xffffu : kAll, 1); }
void outside_the_mask() { __ballot_sync(0x7fffffffu, 1); }
void reads_outside() {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
void two_operations() {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __ballot_sync(kAll, 1);
  }
}
void half_at_a_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __ballot_sync(kAll, 1);
    if (threadIdx.x == 40) __syncwarp();
  }
}

TEST(misuse_is_an_error) {
  // A warp of 20 threads has no lane 20.
  CHECK_ERROR("a lane of the mask has returned", [] { emulator::launch_kernel(ballot_of_a_full_mask, 1, 20, 0); });
  CHECK_ERROR("lanes of one warp meet in different operations",
              [] { emulator::launch_kernel(ballot_of_two_masks, 1, 32, 0); });
  CHECK_ERROR("the calling lane is not in the mask", [] { emulator::launch_kernel(outside_the_mask, 1, 32, 0); });
  CHECK_ERROR("reads a lane outside its mask", [] { emulator::launch_kernel(reads_outside, 1, 32, 0); });
  CHECK_ERROR("different operations: __", [] { emulator::launch_kernel(two_operations, 1, 32, 0); });
  under_every_schedule([] {
    const std::string error = error_of([] { emulator::launch_kernel(half_at_a_barrier, 1, 64, 0); });
    CHECK(error != "nothing", "half of a block at a barrier went unnoticed");
  });
  // A failed launch does not affect the next one.
  int out[96];
  emulator::launch_kernel(rotate, 1, 96, sizeof out, out, 1);
  CHECK(out[0] == 33, "%d", out[0]);
}

void note_order(int* order, unsigned* next) {
  if (threadIdx.x % 32 == 0) order[atomicAdd(next, 1u)] = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32);
}

TEST(schedules_differ) {
  const auto order_under = [](Order order, uint64_t seed) {
    emulator::settings().order = order;
    emulator::settings().seed = seed;
    std::vector<int> noted(12);
    unsigned next = 0;
    emulator::launch_kernel(note_order, 3, 128, 0, noted.data(), &next);
    emulator::settings() = {};
    return noted;
  };
  const std::vector<int> forward = order_under(Order::kForward, 1), reverse = order_under(Order::kReverse, 1);
  for (int i = 0; i < 12; ++i) {
    CHECK(forward[i] == i, "forward: %d at %d", forward[i], i);
    CHECK(reverse[i] == 11 - i, "reverse: %d at %d", reverse[i], i);
  }
  CHECK(order_under(Order::kRandom, 3) == order_under(Order::kRandom, 3), "one seed gives two orders");
  CHECK(order_under(Order::kRandom, 3) != order_under(Order::kRandom, 4), "two seeds give one order");
}

}  // namespace
}  // namespace cotuning::test
