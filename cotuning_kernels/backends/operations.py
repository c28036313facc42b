"""The operations: one schema each for all backends, and their shapes without data (for ``torch.compile``).

Python defines the schemas, and not C++, so that a backend which needs no compiler (Triton) serves the same operations
where the C++ extension was not built. A backend only adds an implementation for its dispatch key.

Conventions that all operations share:

* Rows may have any stride, columns are dense (``stride(1) == 1``); gradients and results are fresh and contiguous.
* ``target`` is one of: class indices ``(B,)`` (int64 or int32); with ``target_b`` and ``mix`` a mixup pair, row ``i``
  being ``mix[i] * onehot(target[i]) + (1 - mix[i]) * onehot(target_b[i])`` with ``mix`` float64 ``(B,)`` or ``(1,)``;
  or class probabilities ``(B, N_t)`` (floating).
* With class probabilities the source distribution is a matrix product, which torch computes before the call:
  ``relationship`` is then the ``(B, N_s)`` product ``target @ R``, row ``i`` belonging to row ``i``, and ``mix`` the
  share of each row's target that has source supervision, float64 ``(B,)``.
* A relationship with few entries a row is given by the tensors of a ``torch.sparse_csr`` matrix ``(N_t, N_s)``:
  ``crow_indices`` ``(N_t + 1,)`` and ``col_indices`` ``(entries,)``, both int64 or both int32, and ``values``
  ``(entries,)``, floating; all contiguous. Columns ascend within a row. The CPU kernel checks the rows that it reads.
  The target is class indices or a mixup pair: of class probabilities, the product with R is dense.
* Losses and terms are float64 when any logits are float64, else float32. Gradients have their logits' dtype.
* The options of the loss have the form of :class:`cotuning_kernels.options.OperationOptions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cotuning_kernels import options
from cotuning_kernels.options import REDUCTIONS, OperationOptions
from cotuning_kernels.targets import OperandTarget, SparseOperandTarget

__all__ = [
    "NAMESPACE",
    "OPERATIONS",
    "SCHEMAS",
    "SPARSE_OPERATIONS",
    "add_to_class_sums_",
    "operation",
    "split_loss_arguments",
    "split_sparse_loss_arguments",
]

NAMESPACE = "cotuning_kernels"
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LOSS_ARGUMENTS = f"Tensor target, Tensor? target_b, Tensor? mix, Tensor relationship, {options.SCHEMA}"
_SPARSE_LOSS_ARGUMENTS = (
    "Tensor target, Tensor? target_b, Tensor? mix, Tensor crow_indices, Tensor col_indices, Tensor values, "
    f"{options.SCHEMA}"
)

SCHEMAS = {
    # Loss, terms [target, source] and both gradients in one pass. Without target_logits the loss is the source term,
    # without trade_off. A gradient that is not asked for is an empty tensor. The gradient of the loss is
    # `factors[0] * source_grad` and `factors[1] * target_grad`: a half-precision gradient is stored without the part of
    # its scale that could push it below the smallest half.
    "co_tuning_loss": f"(Tensor source_logits, Tensor? target_logits, {_LOSS_ARGUMENTS}, "
    "bool source_gradient, bool target_gradient) "
    "-> (Tensor loss, Tensor terms, Tensor factors, Tensor source_grad, Tensor target_grad)",
    # The same; the gradients overwrite the logits.
    "co_tuning_loss_": f"(Tensor(a!) source_logits, Tensor(b!)? target_logits, {_LOSS_ARGUMENTS}) "
    "-> (Tensor loss, Tensor terms, Tensor factors)",
    # Both with the relationship in compressed rows. A kernel never reads a row of R: the loss of a row is
    # sum_k q_k (log sum exp(z) - z_k) over its entries, its gradient is Q softmax(z), less q_k in their columns.
    "sparse_co_tuning_loss": f"(Tensor source_logits, Tensor? target_logits, {_SPARSE_LOSS_ARGUMENTS}, "
    "bool source_gradient, bool target_gradient) "
    "-> (Tensor loss, Tensor terms, Tensor factors, Tensor source_grad, Tensor target_grad)",
    "sparse_co_tuning_loss_": f"(Tensor(a!) source_logits, Tensor(b!)? target_logits, {_SPARSE_LOSS_ARGUMENTS}) "
    "-> (Tensor loss, Tensor terms, Tensor factors)",
    # grad *= factor * upstream, where upstream is a scalar or has one entry a row, (B,). The host reads nothing.
    "scale_gradients_": "(Tensor(a!) source_grad, Tensor(b!) target_grad, Tensor factors, Tensor upstream) -> ()",
    # Rows of p(y_source | target), in the relationship's dtype.
    "translate_labels": "(Tensor target, Tensor? target_b, Tensor? mix, Tensor relationship, int ignore_index) "
    "-> Tensor",
    # sums[t] += softmax(logits[i] * inverse_temperature), counts[t] += 1, for every row i of class t.
    "add_class_sums_": "(Tensor(a!) sums, Tensor(b!) counts, Tensor logits, Tensor labels, float inverse_temperature, "
    "int ignore_index) -> ()",
    # float64 [NLL, its first and second derivative in the inverse temperature, rows], summed over rows.
    "temperature_terms": "(Tensor logits, Tensor labels, float inverse_temperature, int ignore_index) -> Tensor",
}

# On the CPU only: sums and counts become those before plus the batch's, without a copy of all sums. A class whose count
# is the same in both must have the same row of sums in both. Returns the first row of logits without a softmax, or -1.
_ADD_TO_CLASS_SUMS = (
    "(Tensor(a!) sums, Tensor(b!) counts, Tensor sums_before, Tensor counts_before, Tensor logits, Tensor labels, "
    "float inverse_temperature, int ignore_index) -> int"
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"add_to_class_sums_{_ADD_TO_CLASS_SUMS}")
add_to_class_sums_ = torch.ops.cotuning_kernels.add_to_class_sums_.default
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.define(f"{_name}.triton{_schema}")

SPARSE_OPERATIONS = ("sparse_co_tuning_loss", "sparse_co_tuning_loss_")
"""A backend may implement these. Where it does not, :mod:`cotuning_kernels.backends.dense_rows` does."""
OPERATIONS = tuple(name for name in SCHEMAS if name not in SPARSE_OPERATIONS)
"""Every backend implements these."""
# By name, and whether Triton serves. The fastest kernels for a device serve an operation's default overload. Triton's
# own overload makes Triton a choice of every single call, which a compiled graph keeps.
_overloads = {
    (name, asked): getattr(getattr(torch.ops.cotuning_kernels, name), overload)
    for name in SCHEMAS
    for asked, overload in ((False, "default"), (True, "triton"))
}


def operation(name: str, backend: str) -> torch._ops.OpOverload:
    """Return the operation that calls the kernels of ``backend``, a name from :func:`backends.select`."""
    return _overloads[name, backend == "triton"]


def split_loss_arguments(arguments: Sequence[Any]) -> tuple[OperandTarget, OperationOptions]:
    """Split the arguments that ``co_tuning_loss`` and ``co_tuning_loss_`` share after the logits."""
    count = len(OperandTarget._fields)
    return OperandTarget(*arguments[:count]), OperationOptions(*arguments[count:])


def split_sparse_loss_arguments(arguments: Sequence[Any]) -> tuple[SparseOperandTarget, OperationOptions]:
    """Split the arguments that ``sparse_co_tuning_loss`` and ``sparse_co_tuning_loss_`` share after the logits."""
    count = len(SparseOperandTarget._fields)
    return SparseOperandTarget(*arguments[:count]), OperationOptions(*arguments[count:])


def _fake(name: str) -> Callable[[_Function], _Function]:
    def register(function: _Function) -> _Function:
        for overload in (name, f"{name}.triton"):
            torch.library.register_fake(f"{NAMESPACE}::{overload}", function, lib=_library)
        return function

    return register


# Shapes, dtypes and devices of the results, without data. A call on tensors of the "meta" device ends here too, so
# tensors on different devices are refused here, as the kernels refuse them.


def _check_one_device(*tensors: Tensor | None) -> None:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"expected tensors on one device, got {', '.join(sorted(map(str, devices)))}")


@_fake("co_tuning_loss_")
def _co_tuning_loss_inplace(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _reduced(source_logits, target_logits, *split_loss_arguments(arguments))


@_fake("sparse_co_tuning_loss_")
def _sparse_co_tuning_loss_inplace(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _reduced(source_logits, target_logits, *split_sparse_loss_arguments(arguments))


def _reduced(
    source_logits: Tensor, target_logits: Tensor | None, operand: Sequence[Any], chosen: OperationOptions
) -> tuple[Tensor, Tensor, Tensor]:
    _check_one_device(source_logits, target_logits, *operand, chosen.weight, chosen.trade_off)
    double = source_logits.dtype == torch.float64
    double |= target_logits is not None and target_logits.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    rows = (source_logits.shape[0],) if chosen.reduction == REDUCTIONS["none"] else ()
    empty = source_logits.new_empty
    return empty(rows, dtype=dtype), empty((2, *rows), dtype=dtype), empty((2,), dtype=dtype)


@_fake("co_tuning_loss")
def _co_tuning_loss(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduced = _co_tuning_loss_inplace(source_logits, target_logits, *arguments[:-2])
    return (*reduced, *_new_gradients(source_logits, target_logits, *arguments[-2:]))


@_fake("sparse_co_tuning_loss")
def _sparse_co_tuning_loss(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduced = _sparse_co_tuning_loss_inplace(source_logits, target_logits, *arguments[:-2])
    return (*reduced, *_new_gradients(source_logits, target_logits, *arguments[-2:]))


def _new_gradients(
    source_logits: Tensor, target_logits: Tensor | None, source_gradient: bool, target_gradient: bool
) -> tuple[Tensor, Tensor]:
    def gradient(logits: Tensor | None, wanted: bool) -> Tensor:
        if logits is None or not wanted:
            return source_logits.new_empty((0, 0), dtype=torch.float32)
        return logits.new_empty(logits.shape)

    return gradient(source_logits, source_gradient), gradient(target_logits, target_gradient)


@_fake("scale_gradients_")
def _scale_gradients(source_grad: Tensor, target_grad: Tensor, factors: Tensor, upstream: Tensor) -> None:
    return None


@_fake("translate_labels")
def _translate_labels(
    target: Tensor, target_b: Tensor | None, mix: Tensor | None, relationship: Tensor, ignore_index: int
) -> Tensor:
    _check_one_device(target, target_b, mix, relationship)
    return relationship.new_empty((target.shape[0], relationship.shape[1]))


@_fake("add_class_sums_")
def _add_class_sums(
    sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, inverse_temperature: float, ignore_index: int
) -> None:
    _check_one_device(sums, counts, logits, labels)


@_fake("temperature_terms")
def _temperature_terms(logits: Tensor, labels: Tensor, inverse_temperature: float, ignore_index: int) -> Tensor:
    _check_one_device(logits, labels)
    return logits.new_empty((4,), dtype=torch.float64)
