// The functions that the Python tests call through ctypes.
#include "../../csrc/kernels/cuda/device.h"
#include "../../csrc/kernels/cuda/launch.h"

namespace {

void read_unwritten(float* out) {
  COTUNING_DYNAMIC_SHARED(dynamic);
  COTUNING_SHARED(float, fixed, 4);
  out[0] = fixed[2];
  out[1] = reinterpret_cast<const float*>(dynamic)[3];
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void cotuning_emulator_schedule(int order, uint64_t seed) {
  cotuning::emulator::settings().order = static_cast<cotuning::emulator::Order>(order);
  cotuning::emulator::settings().seed = seed;
}

// Sets the plan rules of later launches. Plans may use `shared_bytes` of shared memory.
__attribute__((visibility("default"))) void cotuning_emulator_plan(int64_t shared_bytes, int64_t warp_vectors,
                                                                   int64_t max_blocks, int64_t multiprocessors,
                                                                   int64_t split_vectors) {
  cotuning::cuda::PlanRules rules;
  rules.shared_bytes = shared_bytes;
  rules.warp_vectors = warp_vectors;
  rules.max_blocks = max_blocks;
  rules.multiprocessors = multiprocessors;
  rules.split_vectors = split_vectors;
  cotuning::cuda::device_at(0).rules = rules;
}

// Counts since the last call: bytes read by vectors of 16 and by less, bytes written by vectors of 16 and by less,
// launches.
__attribute__((visibility("default"))) void cotuning_emulator_take_counts(uint64_t* counts) {
  cotuning::emulator::Statistics& seen = cotuning::emulator::statistics();
  counts[0] = seen.vector_bytes_read;
  counts[1] = seen.other_bytes_read;
  counts[2] = seen.vector_bytes_written;
  counts[3] = seen.other_bytes_written;
  counts[4] = seen.launches;
  seen = {};
}

// Reads shared memory that has not been written: one static number and one dynamic number.
__attribute__((visibility("default"))) void cotuning_emulator_read_unwritten(float* out) {
  cotuning::emulator::launch_kernel(read_unwritten, 1, 1, 16, out);
}

}  // extern "C"
