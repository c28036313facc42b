// What is asked of the device that is current, and the counters of launches.
#include <atomic>

#include "launch.h"
#include "scalars.cuh"

namespace cotuning::cuda {

#ifdef COTUNING_EMULATE

PlanRules& emulated_plan_rules() {
  static PlanRules rules{static_cast<int64_t>(emulator::settings().shared_memory) - kStaticSharedBytes};
  return rules;
}
PlanRules plan_rules() { return emulated_plan_rules(); }
bool is_capturing(void*) { return false; }
unsigned* finished_counter(unsigned*, void*) {
  static unsigned counter = 0;
  return &counter;
}

#else

namespace {

// A stream holds about a thousand launches that wait. Two launches in flight meet in one counter only when so many lie
// between them.
constexpr unsigned kCounters = 1 << 16;
__device__ unsigned counters[kCounters];

}  // namespace

PlanRules plan_rules() {
  int device = 0, shared = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for shared memory");
  PlanRules rules;
  rules.shared_bytes = shared - kStaticSharedBytes;
  return rules;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "asking whether a graph is captured");
  return status == cudaStreamCaptureStatusActive;
}

unsigned* finished_counter(unsigned* own, void* stream) {
  if (own != nullptr) {
    check(cudaMemsetAsync(own, 0, sizeof *own, static_cast<cudaStream_t>(stream)), "clearing a counter");
    return own;
  }
  static std::atomic<unsigned> next{0};
  void* first = nullptr;
  check(cudaGetSymbolAddress(&first, counters), "asking for the counters");
  return static_cast<unsigned*>(first) + next++ % kCounters;
}

#endif

}  // namespace cotuning::cuda
