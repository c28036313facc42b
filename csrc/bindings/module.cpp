// The Python module cotuning_kernels._C: how it was built, and which instruction set it uses. It passes no tensors:
// loading the module registers the operations with torch (csrc/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/cpu/rows.h"
#include "../kernels/cuda/plan.h"
#include "../ops/kernel_table.h"

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cotuning::cpu::row_kernels_count(); ++i)
    names.emplace_back(cotuning::cpu::row_kernels_at(i).name);
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

void set_cpu_isa(const std::string& name) {
  if (!cotuning::cpu::use_row_kernels(name.c_str())) {
    throw std::runtime_error("instruction set " + name + " is not available, expected one of: " + joined(cpu_isas()));
  }
}

pybind11::dict describe(const cotuning::cuda::RowPlan& plan, int64_t columns, cotuning::ScalarType type) {
  pybind11::dict head;
  head["threads_per_row"] = plan.threads_per_row;
  head["vectors"] = cotuning::cuda::row_vectors(columns, type);
  head["staged_logits"] = plan.staged_logits;
  head["staged_target"] = plan.staged_target;
  head["kept_target"] = plan.kept_target;
  return head;
}

pybind11::dict cuda_loss_plan(int64_t rows, int64_t source_columns, int64_t target_columns, int source_type,
                              int target_type, int64_t shared_memory, int64_t multiprocessors) {
  using cotuning::ScalarType;
  cotuning::cuda::PlanRules rules;
  rules.shared_bytes = shared_memory - cotuning::cuda::kStaticSharedBytes;
  rules.multiprocessors = multiprocessors;
  const auto source = static_cast<ScalarType>(source_type), target = static_cast<ScalarType>(target_type);
  const auto plan = cotuning::cuda::plan_loss(rows, source_columns, source, target_columns, target, rules);
  pybind11::dict described;
  described["blocks"] = plan.blocks;
  described["threads"] = plan.threads;
  described["shared_bytes"] = plan.shared_bytes;
  described["parts"] = plan.split.parts;
  described["source"] = describe(plan.source, source_columns, source);
  if (target_columns > 0) described["target"] = describe(plan.target, target_columns, target);
  return described;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isas", &cpu_isas, "Instruction sets built and available on this processor, fastest first.");
  m.def("cpu_isa", [] { return cotuning::cpu::row_kernels().name; }, "The instruction set in use.");
  m.def("unmet_isa_request", &cotuning::cpu::unmet_isa_request,
        "What COTUNING_KERNELS_CPU_ISA asks for, where there is no such instruction set; else None.");
  m.def("set_cpu_isa", &set_cpu_isa, "Use another one, in the whole process.");
  m.attr("kernel_table") = pybind11::capsule(&cotuning::ops::kernel_table(), cotuning::ops::kKernelTableName);
  m.def("cuda_loss_plan", &cuda_loss_plan, "What the CUDA backend launches for a batch of these shapes.");
  m.attr("compiler") = COTUNING_COMPILER;
  m.attr("built_with_torch") = TORCH_VERSION;
}
