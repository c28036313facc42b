// What the torch side calls (csrc/ops/cuda.cpp). Every function launches one kernel on the stream and returns; it
// throws std::runtime_error with CUDA's own words when that fails.
#pragma once

#include <atomic>

#include "plan.h"
#include "problems.h"

namespace cotuning::cuda {

// What launches need to know of a device.
struct Device {
  PlanRules rules;
  // Every loss kernel is allowed this much dynamic shared memory, by one call before its first launch
  // (co_tuning_loss.cu). It is the most that the device grants beside kStaticSharedBytes, and no plan asks for more.
  // The limit never changes afterwards: another thread's launch, or the replay of a captured graph, may rely on it.
  int64_t dynamic_shared_bytes = 0;
  std::atomic<bool> allowed[kScalarTypes] = {};  // by the type of logits: whether that call was made
  unsigned* counters = nullptr;
  std::atomic<unsigned> next_counter{0};
};

// The state of the device with this index, which must be the current one. Asked of CUDA once in a process.
Device& device_at(int index);

void launch_co_tuning_loss(const LossProblem& problem, const LossPlan& plan, Device& device, void* stream);
void launch_scale_gradients(const ScaleProblem& problem, const PlanRules& rules, void* stream);
void launch_translate_labels(const TranslateProblem& problem, const PlanRules& rules, void* stream);
void launch_class_sums(const ClassSumsProblem& problem, const PlanRules& rules, void* stream);
void launch_temperature_terms(const TemperatureProblem& problem, const PassPlan& plan, void* stream);

// A number that is 0 and that no other launch in flight uses; the kernel sets it back to 0. While a graph is captured
// it is `own`, 4 bytes of the launch's own memory, cleared by a node of the graph, which may run at any time.
unsigned* finished_counter(Device& device, unsigned* own, void* stream);
bool is_capturing(void* stream);

}  // namespace cotuning::cuda
