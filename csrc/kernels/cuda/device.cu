// The state of each device, queried from CUDA once, and the counters of its launches.
#include <map>
#include <mutex>

#include "device.h"
#include "launch.h"

namespace cotuning::cuda {
namespace {

// A stream queues about a thousand launches. Two launches in flight share a counter only if this many lie between them.
constexpr unsigned kCounters = 1 << 16;
__device__ unsigned counters[kCounters];

void ask(int index, Device* device) {
  int shared = 0;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "asking for shared memory");
  device->dynamic_shared_bytes = device->rules.shared_bytes = shared - kStaticSharedBytes;
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "asking for multiprocessors");
  device->rules.multiprocessors = multiprocessors;
  void* first = nullptr;
  check(cudaGetSymbolAddress(&first, counters), "asking for the counters");
  device->counters = static_cast<unsigned*>(first);
}

}  // namespace

Device& device_at(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices[index];
  if (device.counters == nullptr) ask(index, &device);
  return device;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "asking whether a graph is captured");
  return status == cudaStreamCaptureStatusActive;
}

unsigned* finished_counter(Device& device, unsigned* own, void* stream) {
  if (own == nullptr) return device.counters + device.next_counter++ % kCounters;
  check(cudaMemsetAsync(own, 0, sizeof *own, static_cast<cudaStream_t>(stream)), "clearing a counter");
  return own;
}

}  // namespace cotuning::cuda
