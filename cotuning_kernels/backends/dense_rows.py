"""The operations with a sparse relationship, for backends that have no kernel for them.

The rows of R that the batch's labels choose become dense, ``(B, N_s)`` or ``(2 B, N_s)`` for a mixup pair, and the
operations with a dense relationship do the rest, one head after the other. That costs memory of the size of the logits
and waits for the device. A backend with a kernel registers it for its dispatch key, which then comes first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cotuning_kernels.backends.operations import NAMESPACE, operation, split_sparse_loss_arguments
from cotuning_kernels.options import OperationOptions
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import OperandTarget

__all__ = ["sparse_co_tuning_loss", "sparse_co_tuning_loss_", "translated_rows"]

_IGNORED = -100


def sparse_co_tuning_loss(
    backend: str,
    source_logits: Tensor,
    target_logits: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """The operation of this name from the dense operations of ``backend``."""
    *shared, source_gradient, target_gradient = arguments
    of_source, of_target = _arguments_of_heads(source_logits, target_logits, shared)
    loss = operation("co_tuning_loss", backend)
    source = loss(source_logits, None, *of_source, source_gradient, False)
    if target_logits is None:
        return tuple(source)
    target = loss(_no_source(target_logits), target_logits, *of_target, False, target_gradient)
    return *_joined(source, target, of_target), source[3], target[4]


def sparse_co_tuning_loss_(
    backend: str, source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    """The same; the gradients overwrite the logits."""
    of_source, of_target = _arguments_of_heads(source_logits, target_logits, arguments)
    loss = operation("co_tuning_loss_", backend)
    source = loss(source_logits, None, *of_source)
    if target_logits is None:
        return tuple(source)
    return _joined(source, loss(_no_source(target_logits), target_logits, *of_target), of_target)


def translated_rows(
    target: Tensor, target_b: Tensor | None, mix: Tensor | None, relationship: SparseRows, ignore_index: int
) -> Tensor:
    """Rows of ``p(y_source | target)``, ``(B, N_s)`` in the relationship's dtype, for class indices or a pair."""
    name = "target" if target_b is None else "target[0]"
    rows = relationship.take(_checked(name, target, relationship, ignore_index)).to_dense()
    if target_b is None or mix is None:
        return rows
    dtype = torch.promote_types(rows.dtype, torch.float32)
    share = mix.to(dtype)[:, None]
    others = relationship.take(_checked("target[1]", target_b, relationship, ignore_index)).to_dense().to(dtype)
    return (share * rows.to(dtype) + (1 - share) * others).to(rows.dtype)


def _checked(name: str, labels: Tensor, relationship: SparseRows, ignore_index: int) -> Tensor:
    """The labels as int64, -1 where ignored.

    Raises:
        IndexError: a label is out of range (on an accelerator the device asserts).
    """
    labels = labels.long()
    classes = relationship.shape[0]
    ignored = labels == ignore_index
    if labels.is_cpu and not torch.compiler.is_compiling():
        bad = ~ignored & ((labels < 0) | (labels >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"{name}[{row}] is {int(labels[row])}, expected a class index in [0, {classes}) or "
                f"ignore_index={ignore_index}"
            )
    return torch.where(ignored, -1, labels)


def _arguments_of_heads(
    source_logits: Tensor, target_logits: Tensor | None, arguments: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The dense operation's arguments after the logits: for the source term alone, and for the target term alone."""
    operand, options = split_sparse_loss_arguments(arguments)
    target, target_b, mix, crow, col, values = operand
    if target_logits is not None:  # a trade-off of 0 takes the source supervision from every row
        values = torch.where(options.trade_off == 0, torch.zeros_like(values), values)
    relationship = SparseRows(crow, col, values, source_logits.shape[1])
    batch = target.shape[0]
    chosen = _checked("target" if target_b is None else "target[0]", target, relationship, options.ignore_index)
    positions = torch.arange(batch, device=target.device)
    labels = torch.where(chosen < 0, _IGNORED, positions)
    labels_b = None
    if target_b is not None:
        chosen_b = _checked("target[1]", target_b, relationship, options.ignore_index)
        labels_b = torch.where(chosen_b < 0, _IGNORED, positions + batch)
        chosen = torch.cat([chosen, chosen_b])
    # One row at least: an empty batch has a relationship, too.
    rows = relationship.take(chosen if batch else chosen.new_full((1,), -1)).to_dense()
    of_source = OperandTarget(labels, labels_b, mix, rows)
    source_options = options._replace(weight=None, ignore_index=_IGNORED)
    classes = values.new_zeros((relationship.shape[0], 1))
    of_target = OperandTarget(target, target_b, mix, classes)
    return (*of_source, *source_options), (*of_target, *options)


def _no_source(target_logits: Tensor) -> Tensor:
    """Logits of a source head of one class, which has no supervision."""
    return target_logits.new_zeros((target_logits.shape[0], 1))


def _joined(source: Any, target: Any, of_target: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms and factors of both heads."""
    trade_off = OperationOptions(*of_target[len(OperandTarget._fields) :]).trade_off
    dtype = torch.promote_types(source[0].dtype, target[0].dtype)
    source_term, target_term = source[0].to(dtype), target[0].to(dtype)
    loss = (target_term.double() + trade_off * source_term.double()).to(dtype)
    factors = torch.stack([trade_off * source[2][0], target[2][1]]).to(dtype)
    return loss, torch.stack([target_term, source_term]), factors


_library = torch.library.Library(NAMESPACE, "IMPL")
for _overload, _backend in (("", "auto"), (".triton", "triton")):
    for _function in (sparse_co_tuning_loss, sparse_co_tuning_loss_):
        _library.impl(f"{_function.__name__}{_overload}", partial(_function, _backend), "CompositeExplicitAutograd")
