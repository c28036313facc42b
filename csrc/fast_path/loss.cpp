// The fast path: autograd.py's _CoTuningLoss as a C++ autograd node.
//
// With 48 rows the kernel takes about as long as everything around it: a Python autograd.Function, its backward in
// Python, and the dispatcher with the stable ABI's boxing of 14 arguments. The usual call in training needs none of
// that: ordinary CPU tensors, class indices, no tracing, no transform. This file serves that call and *declines*
// (returns NotImplemented) all others: the Python path then serves the call or explains its error. So this file raises
// no errors and does not repeat the mathematics: csrc/ops/arguments.h reads the arguments, csrc/kernels computes.
//
// It needs torch's C++ interface, which changes between versions. It is therefore a separate module, loaded only beside
// the torch that it was built with (backends/cpp.py). Without it the same calls take longer.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/headeronly/version.h>

#include <cmath>
#include <mutex>
#include <optional>

#include "../ops/cpu_loss.h"
#include "../ops/kernel_table.h"

namespace cotuning::fast_path {
namespace {

namespace autograd = torch::autograd;
namespace dynamo = torch::dynamo::autograd;
using at::Tensor;

const ops::KernelTable* kernels = nullptr;

// ------------------------------------------------------------------------------------------------- what is served

// True for exactly the dispatch keys of a fresh dense tensor: no subclass, transform wrapper, fake, lazy conjugate, ...
bool is_ordinary(const Tensor& tensor) {
  static const c10::DispatchKeySet ordinary = at::detail::empty_cpu({0}, at::kFloat).key_set();
  return tensor.key_set() == ordinary && !autograd::isFwGradDefined(tensor);
}

// True if no mode is active that would see an operation: torch_function, torch_dispatch, functorch, tracing, inference.
bool is_ordinary_moment() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return c10::default_included_set.isSupersetOf(keys.included_) &&
         c10::default_excluded_set.isSupersetOf(keys.excluded_) && !at::impl::torch_function_mode_enabled();
}

const Tensor* ordinary_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return is_ordinary(tensor) ? &tensor : nullptr;
}

// -------------------------------------------------------------------------------------------------- backward pass

// gradient *= factor * upstream; on a copy if the graph is kept for another backward pass.
Tensor scaled(Tensor gradient, double factor, const std::vector<double>& upstream, int64_t stride, bool keep) {
  if (!gradient.defined()) return gradient;
  if (keep) gradient = gradient.clone();
  if (stride == 0 && factor * upstream[0] == 1.0) return gradient;
  kernels->scale_gradients(ops::matrix(ops::OnTheCpu{}, gradient, "gradient"), factor, upstream.data(), stride,
                           kernels->parallel_for);
  return gradient;
}

// Scales through the dispatcher if the upstream gradient is not an ordinary tensor (under vmap, say).
void scale_through_dispatcher(const Tensor& source, const Tensor& target, const Tensor& factors,
                              const Tensor& upstream) {
  static const auto operation =
      c10::Dispatcher::singleton().findSchemaOrThrow("cotuning_kernels::scale_gradients_", "");
  operation.typed<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>().call(source, target, factors,
                                                                                           upstream);
}

struct SavedGradients {
  Tensor source, target;  // undefined if not wanted
  double source_factor, target_factor;
};

autograd::variable_list scaled_gradients(SavedGradients saved, const Tensor& upstream, bool keep) {
  const at::NoGradGuard no_grad;
  if (is_ordinary(upstream)) {
    const std::vector<double> by_row = ops::read_numbers(upstream, "upstream");
    return {scaled(std::move(saved.source), saved.source_factor, by_row, upstream.dim(), keep),
            scaled(std::move(saved.target), saved.target_factor, by_row, upstream.dim(), keep)};
  }
  const auto copy = [](const Tensor& gradient) { return gradient.defined() ? gradient.clone() : at::empty({0, 0}); };
  const Tensor source = copy(saved.source), target = copy(saved.target);
  scale_through_dispatcher(source, target, at::tensor({saved.source_factor, saved.target_factor}, at::kDouble),
                           upstream);
  return {saved.source.defined() ? source : Tensor(), saved.target.defined() ? target : Tensor()};
}

// The same message as in autograd.py, which has the reasons.
constexpr const char* kOnlyOnce =
    "create_graph=True asks for a gradient that can be differentiated, but the fused Co-Tuning loss can be "
    "differentiated only once; for second derivatives use backend=\"reference\"";

struct CoTuningLossBackward : autograd::Node {
  autograd::SavedVariable source_gradient, target_gradient;
  double source_factor = 1, target_factor = 1;

  std::string name() const override { return "CoTuningLossBackward"; }

  autograd::variable_list apply(autograd::variable_list&& upstreams) override {
    TORCH_CHECK(!at::GradMode::is_enabled(), kOnlyOnce);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return {Tensor(), Tensor()};
    autograd::variable_list gradients =
        scaled_gradients({source_gradient.unpack(), target_gradient.unpack(), source_factor, target_factor}, upstream,
                         autograd::get_current_graph_task_keep_graph());
    for (size_t k = 0; k < gradients.size(); ++k) {
      if (!task_should_compute_output(k)) gradients[k] = Tensor();
    }
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    source_gradient.reset_data();
    target_gradient.reset_data();
  }

  // For compiled autograd: the values that the graph depends on, and the call that it makes at run time. The saved
  // gradients are inputs of the graph, so they are not scaled in place.
  void compiled_args(dynamo::CompiledNodeArgs& args) const override {
    args.collect(source_gradient, false);
    args.collect(target_gradient, false);
    args.collect(source_factor);
    args.collect(target_factor);
  }

  autograd::variable_list apply_with_saved(const autograd::variable_list& upstreams,
                                           dynamo::SwapSavedVariables& saved) override {
    saved.before(source_gradient);
    saved.before(target_gradient);
    dynamo::PackedArgs packed;
    packed.pack(source_gradient.unpack());
    packed.pack(target_gradient.unpack());
    packed.pack(source_factor);
    packed.pack(target_factor);
    const std::vector<at::TypePtr> schema{at::TensorType::get(), at::TensorType::get(), at::FloatType::get(),
                                          at::FloatType::get()};
    const auto& compiler = dynamo::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(saved.get_py_compiler(), name(), &apply_packed, schema, true, false);
    auto gradients =
        compiler->call_function(saved.get_py_compiler(), "apply_functional", function, upstreams, packed.vec(),
                                dynamo::IValuePacker<std::vector<std::optional<autograd::InputMetadata>>>::pack(
                                    dynamo::get_input_metadata(next_edges())));
    saved.after(source_gradient);
    saved.after(target_gradient);
    return gradients;
  }

  static autograd::variable_list apply_packed(const autograd::variable_list& upstreams,
                                              const std::vector<c10::IValue>& arguments) {
    dynamo::PackedArgs packed(arguments);
    SavedGradients saved;
    saved.source = packed.unpack<Tensor>();
    saved.target = packed.unpack<Tensor>();
    saved.source_factor = packed.unpack<double>();
    saved.target_factor = packed.unpack<double>();
    if (!upstreams[0].defined()) return {Tensor(), Tensor()};
    return scaled_gradients(std::move(saved), upstreams[0], /*keep=*/true);
  }
};

// Creates a node as torch does: from 2.13 on the node counts its references; before, it needs a shared_ptr.
auto new_node() {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  return std::shared_ptr<CoTuningLossBackward>(new CoTuningLossBackward(), autograd::deleteNode);
#else
  return c10::make_intrusive<CoTuningLossBackward>();
#endif
}

// --------------------------------------------------------------------------------------------------- forward pass

struct Losses {
  Tensor loss, terms;
};

// The loss of a batch, with its node in the graph if a gradient is wanted; nullopt if a label is bad. The problem has
// the options already.
std::optional<Losses> co_tuning_loss(const ops::LossTensors<Tensor>& tensors, cpu::LossProblem& problem,
                                     bool return_terms) {
  RECORD_FUNCTION("cotuning_kernels::co_tuning_loss", c10::ArrayRef<const c10::IValue>{});
  const bool graph = at::GradMode::is_enabled();
  const auto new_gradient = [graph](const Tensor* logits, Matrix* view) {
    if (!graph || logits == nullptr || !logits->requires_grad()) return Tensor();
    Tensor gradient = at::detail::empty_cpu({logits->size(0), logits->size(1)}, logits->scalar_type());
    *view = ops::matrix(ops::OnTheCpu{}, gradient, "gradient");
    return gradient;
  };
  ops::read_tensors(tensors, &problem);
  const Tensor source_gradient = new_gradient(tensors.source_logits, &problem.source_gradient);
  const Tensor target_gradient = new_gradient(tensors.target_logits, &problem.target_gradient);
  cpu::LossResult result;
  {
    const pybind11::gil_scoped_release no_gil;
    if (kernels->co_tuning_loss(problem, kernels->parallel_for, &result)) return std::nullopt;
  }
  const ops::ScalarType type = ops::loss_type(problem);
  const bool by_row = problem.reduction == Reduction::kNone;
  const int64_t rows = problem.source_logits.rows;
  Losses losses;
  losses.loss = by_row ? at::detail::empty_cpu({rows}, type) : at::detail::empty_cpu({}, type);
  if (return_terms) {
    losses.terms = by_row ? at::detail::empty_cpu({2, rows}, type) : at::detail::empty_cpu({2}, type);
  }
  ops::store_losses(problem, result, losses.loss, return_terms ? &losses.terms : nullptr);
  if (source_gradient.defined() || target_gradient.defined()) {
    const auto node = new_node();
    node->set_next_edges(autograd::collect_next_edges(
        *tensors.source_logits, tensors.target_logits != nullptr ? *tensors.target_logits : Tensor()));
    node->source_gradient = autograd::SavedVariable(source_gradient, false);
    node->target_gradient = autograd::SavedVariable(target_gradient, false);
    node->source_factor = result.source_factor;
    node->target_factor = result.target_factor;
    autograd::set_history(losses.loss, node);
  }
  return losses;
}

// --------------------------------------------------------------------------------------------------------- Python

PyObject* decline() { Py_RETURN_NOTIMPLEMENTED; }

// The trade-off as a finite float or a float64 tensor. As in the operation, a tensor's value is not checked.
std::optional<double> read_trade_off(PyObject* object) {
  if (PyFloat_CheckExact(object)) {
    const double value = PyFloat_AS_DOUBLE(object);
    return std::isfinite(value) ? std::optional<double>(value) : std::nullopt;
  }
  const Tensor* tensor = ordinary_tensor(object);
  if (tensor == nullptr || tensor->requires_grad()) return std::nullopt;
  return *ops::read_trade_off(ops::OnTheCpu{}, *tensor);
}

// Reads the fields of a Python LossOptions; visits LossInputs::visit_options.
struct OptionReader {
  PyObject* options;
  Py_ssize_t next;
  bool is_served = true;  // every option so far has the usual type and a valid value

  PyObject* take() { return next < PyTuple_GET_SIZE(options) ? PyTuple_GET_ITEM(options, next++) : Py_None; }

  void operator()(const char*, double& value, const Range& range) {
    PyObject* option = take();
    if (!PyFloat_CheckExact(option)) return decline();
    value = PyFloat_AS_DOUBLE(option);
    if (!range.holds(value)) decline();
  }
  void operator()(const char*, int64_t& value) {
    PyObject* option = take();
    if (!PyLong_CheckExact(option)) return decline();
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(option, &overflow);
    if (overflow != 0) decline();
  }
  template <class Value>
  void operator()(const char*, Value& value, const Words& words) {
    PyObject* option = take();
    if (!PyUnicode_CheckExact(option)) return decline();
    int index = 0;
    for (const char* word : words) {
      if (PyUnicode_CompareWithASCIIString(option, word) == 0) {
        value = static_cast<Value>(index);
        return;
      }
      ++index;
    }
    decline();
  }

 private:
  void decline() { is_served = false; }
};

// co_tuning_loss(source_logits, target_logits or None, target, relationship, LossOptions, return_terms)
// -> loss, or (loss, terms), or NotImplemented. A LossOptions begins with the weight and the trade-off.
PyObject* python_co_tuning_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 6 || !PyTuple_Check(arguments[4]) || PyTuple_GET_SIZE(arguments[4]) < 2 || !PyBool_Check(arguments[5]) ||
      !is_ordinary_moment()) {
    return decline();
  }
  PyObject* const options = arguments[4];
  const bool return_terms = arguments[5] == Py_True;
  PyObject* const objects[] = {arguments[0], arguments[1], arguments[2], arguments[3], PyTuple_GET_ITEM(options, 0)};
  const Tensor* tensors[5];
  for (int k = 0; k < 5; ++k) {
    const bool is_none = (k == 1 || k == 4) && objects[k] == Py_None;
    tensors[k] = is_none ? nullptr : ordinary_tensor(objects[k]);
    if (tensors[k] == nullptr && !is_none) return decline();
  }
  const auto [source_logits, target_logits, target, relationship, weight] =
      std::tie(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]);
  if (ops::is_floating(*target) || relationship->requires_grad() || (weight != nullptr && weight->requires_grad())) {
    return decline();
  }
  try {
    const std::optional<double> trade_off = read_trade_off(PyTuple_GET_ITEM(options, 1));
    OptionReader reader{options, 2};
    cpu::LossProblem problem;
    problem.visit_options(reader);
    if (!trade_off || !reader.is_served || reader.next != PyTuple_GET_SIZE(options)) return decline();
    problem.trade_off = *trade_off;
    std::optional<Losses> losses = co_tuning_loss(
        {source_logits, target_logits, target, nullptr, nullptr, relationship, weight}, problem, return_terms);
    if (!losses) return decline();
    PyObject* loss = THPVariable_Wrap(std::move(losses->loss));
    if (!return_terms) return loss;
    return Py_BuildValue("(NN)", loss, THPVariable_Wrap(std::move(losses->terms)));
  } catch (python_error& error) {
    // A saved-tensor hook raised, as a checkpoint's does to stop early. Pass the error on: declining would call the
    // hook a second time for the same tensor.
    error.restore();
    return nullptr;
  } catch (const std::exception&) {  // a shape, a dtype, memory: the Python path explains it
    PyErr_Clear();
    return decline();
  }
}

void connect(const pybind11::capsule& capsule) {
  const auto* table = static_cast<const ops::KernelTable*>(PyCapsule_GetPointer(capsule.ptr(), ops::kKernelTableName));
  if (table == nullptr) throw pybind11::error_already_set();
  if (table->problem_size != sizeof(cpu::LossProblem)) {
    throw pybind11::import_error(
        "cotuning_kernels._fast_path and cotuning_kernels._C were built from different sources");
  }
  kernels = table;
}

PyMethodDef methods[] = {
    {"co_tuning_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&python_co_tuning_loss)), METH_FASTCALL,
     "The loss of ordinary CPU tensors, or NotImplemented."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace cotuning::fast_path

PYBIND11_MODULE(_fast_path, m) {
  cotuning::fast_path::connect(pybind11::module_::import("cotuning_kernels._C").attr("kernel_table"));
  PyModule_AddFunctions(m.ptr(), cotuning::fast_path::methods);
}
