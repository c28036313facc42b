// The functions that csrc/ops/cuda.cpp calls. Each launches its kernel on the stream and returns; on failure it throws
// std::runtime_error with CUDA's message.
#pragma once

#include <atomic>

#include "plan.h"
#include "problems.h"

namespace cotuning::cuda {

// The properties and counters of a device that launches use.
struct Device {
  PlanRules rules;
  // Every loss kernel is allowed this much dynamic shared memory, by one call before its first launch
  // (co_tuning_loss.cu). It is the most that the device grants beside kStaticSharedBytes, and no plan needs more. The
  // limit never changes afterwards: another thread's launch, or the replay of a captured graph, may rely on it.
  int64_t dynamic_shared_bytes = 0;
  std::atomic<bool> allowed[kScalarTypes] = {};  // whether that call was made, by type of logits
  unsigned* counters = nullptr;
  std::atomic<unsigned> next_counter{0};
};

// The state of the device with this index, which must be the current one. CUDA is queried once per process.
Device& device_at(int index);

// `sums`: memory for shared_sums(plan) doubles.
void launch_co_tuning_loss(LossProblem problem, const LossPlan& plan, Device& device, double* sums, void* stream);
// The source rows of a plan that splits them; called by launch_co_tuning_loss.
void launch_split_rows(const LossProblem& problem, const SplitPlan& plan, void* stream);
void launch_scale_gradients(const ScaleProblem& problem, const PlanRules& rules, void* stream);
void launch_translate_labels(const TranslateProblem& problem, const PlanRules& rules, void* stream);
void launch_class_sums(const ClassSumsProblem& problem, const ClassSumsPlan& plan, void* stream);
void launch_temperature_terms(const TemperatureProblem& problem, const PassPlan& plan, void* stream);

// A counter that is 0 and that no other launch in flight uses; the kernel resets it to 0. During graph capture it is
// `own`, 4 bytes of the launch's memory that a node of the graph clears, since the graph may run at any time.
unsigned* finished_counter(Device& device, unsigned* own, void* stream);
bool is_capturing(void* stream);

}  // namespace cotuning::cuda
