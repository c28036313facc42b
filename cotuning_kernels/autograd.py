"""The ``torch.autograd.Function``s over the operations.

The gradient is computed in the forward pass, while the logits are in cache and their exponentials at hand, so that the
backward pass only multiplies by the upstream gradient. Nothing in here knows which backend serves the operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cotuning_kernels.backends import schema as schema
from cotuning_kernels.targets import OperandTarget

__all__ = ["co_tuning_loss"]

_ops = torch.ops.cotuning_kernels


def co_tuning_loss(
    source_logits: Tensor,
    target_logits: Tensor | None,
    operand: OperandTarget,
    weight: Tensor | None,
    trade_off: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    kl_divergence: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """``(loss, terms)``, the loss differentiable in both logits, ``terms = [target_term, source_term]`` not."""
    options = (weight, trade_off, label_smoothing, ignore_index, schema.REDUCTIONS[reduction], kl_divergence)
    source_gradient = source_logits.requires_grad
    target_gradient = target_logits is not None and target_logits.requires_grad
    if not (torch.is_grad_enabled() and (source_gradient or target_gradient)):
        loss, terms, *_ = _ops.co_tuning_loss.default(source_logits, target_logits, *operand, *options, False, False)
        return loss, terms
    function = _InplaceCoTuningLoss if inplace else _CoTuningLoss
    return function.apply(source_logits, target_logits, source_gradient, target_gradient, operand, options)


def _backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 6
    source_grad, target_grad, factors = ctx.saved_tensors
    if _graph_is_kept():
        # Another backward pass may come: what is saved must stay as it is.
        source_grad, target_grad = source_grad.clone(), target_grad.clone()
    _ops.scale_gradients_.default(source_grad, target_grad, factors, upstream)
    return source_grad if ctx.source_gradient else None, target_grad if ctx.target_gradient else None, *(None,) * 4


def _graph_is_kept() -> bool:
    """Whether the running backward pass has ``retain_graph=True``; in a compiled graph the compiler sees to it."""
    return not torch.compiler.is_compiling() and torch._C._autograd._get_current_graph_task_keep_graph()


class _CoTuningLoss(torch.autograd.Function):
    """Loss and gradients in fresh memory; the logits are left alone."""

    @staticmethod
    def forward(
        ctx: Any,
        source_logits: Tensor,
        target_logits: Tensor | None,
        source_gradient: bool,
        target_gradient: bool,
        operand: OperandTarget,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        loss, terms, factors, source_grad, target_grad = _ops.co_tuning_loss.default(
            source_logits, target_logits, *operand, *options, source_gradient, target_gradient
        )
        ctx.save_for_backward(source_grad, target_grad, factors)
        ctx.source_gradient, ctx.target_gradient = source_gradient, target_gradient
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, upstream)


class _InplaceCoTuningLoss(torch.autograd.Function):
    """The gradients are written over the logits: no memory of their size is allocated."""

    @staticmethod
    def forward(
        ctx: Any,
        source_logits: Tensor,
        target_logits: Tensor | None,
        source_gradient: bool,
        target_gradient: bool,
        operand: OperandTarget,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        loss, terms, factors = _ops.co_tuning_loss_.default(source_logits, target_logits, *operand, *options)
        # An operation that saved these logits for its own backward pass now gets autograd's error, not a wrong gradient.
        torch.autograd.graph.increment_version([x for x in (source_logits, target_logits) if x is not None])
        source_grad = source_logits.detach()
        target_grad = source_logits.new_empty((0, 0)) if target_logits is None else target_logits.detach()
        ctx.save_for_backward(source_grad, target_grad, factors)
        ctx.source_gradient, ctx.target_gradient = source_gradient, target_gradient
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, upstream)
