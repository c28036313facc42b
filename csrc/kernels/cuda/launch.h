// What the torch side calls (csrc/ops/cuda.cpp). Every function launches one kernel on the stream and returns; it
// throws std::runtime_error with CUDA's own words when that fails.
#pragma once

#include "plan.h"
#include "types.h"

namespace cotuning::cuda {

void launch_loss(const LossProblem& problem, const LossPlan& plan, void* stream);
void launch_scale(const ScaleProblem& problem, const PlanRules& rules, void* stream);
void launch_translate(const TranslateProblem& problem, const PlanRules& rules, void* stream);
void launch_class_sums(const ClassSumsProblem& problem, const PlanRules& rules, void* stream);
void launch_temperature(const TemperatureProblem& problem, const PassPlan& plan, void* stream);

// Those of the device that is current.
PlanRules plan_rules();

// A number that is 0 and that no other launch in flight uses, on the device that is current. The kernel puts it back to
// 0. While a graph is captured it is `own`, 4 bytes of the launch's own memory, set to 0 within the graph, which may
// run at any time.
unsigned* finished_counter(unsigned* own, void* stream);
bool is_capturing(void* stream);

}  // namespace cotuning::cuda
