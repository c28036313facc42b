"""The ``torch.autograd.Function``s over the operations.

The gradient is computed in the forward pass, while the logits are in the cache and their exponentials are known, so
the backward pass only multiplies it by the upstream gradient. There are four ways to a gradient:

=========================  ===========================================================================================
C++ node                   the fast path (csrc/fast_path): the ordinary call on the CPU; this module is not reached
``_CoTuningLoss``          every other call with a gradient: the operation below autograd, its gradients saved
``_InplaceCoTuningLoss``   ``inplace=True``: the gradients lie in the logits' memory
``register_autograd``      the operation by itself, as ``torch.export`` keeps it and ``vmap`` calls it
=========================  ===========================================================================================
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cotuning_kernels import validation
from cotuning_kernels.backends.dense_rows import translated_rows
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.options import LossOptions
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import SparseOperandTarget, Target, dense_columns, operand_target

__all__ = [
    "co_tuning_loss",
    "is_known_to_be_one",
    "normalized_class_weights",
    "refuse_second_derivatives",
    "translate_labels",
]


def co_tuning_loss(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Target,
    relationship: Tensor | SparseRows,
    options: LossOptions,
    inplace: bool,
    return_terms: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """``(loss, [target_term, source_term])``: the loss is differentiable in both logits, the terms are not. Without
    ``return_terms`` the second is None.

    Checks only what the operation would wrongly accept.
    """
    sparse = isinstance(relationship, SparseRows)
    if isinstance(relationship, SparseRows):  # no tensor of the operation says how many columns it has
        num_classes = None if target_logits is None else target_logits.shape[-1]
        validation.check_relationship(relationship, num_classes, source_logits.shape[-1], source_logits.device)
    else:
        relationship = dense_columns(relationship)
    operand: tuple[Any, ...]
    if not sparse and isinstance(target, Tensor) and not target.is_floating_point():
        operand = (target, None, None, relationship)
    else:
        validation.check_target(
            target, source_logits.shape[0], relationship.shape[0], source_logits.device, options.ignore_index
        )
        operand = operand_target(target, relationship, _compute_dtype(source_logits))
    matrix = relationship.values if isinstance(relationship, SparseRows) else relationship
    if matrix.requires_grad:
        raise ValueError("relationship must not require grad")
    if options.weight is not None and options.reduction == "mean" and backend != "cpp":
        half = target_logits is not None and target_logits.dtype is torch.float16
        if half and not operand[0].is_floating_point():
            options = options._replace(weight=normalized_class_weights(options.weight))
    name = "sparse_co_tuning_loss" if isinstance(operand, SparseOperandTarget) else "co_tuning_loss"
    arguments: tuple[Any, ...] = (*operand, *options.in_operations(source_logits.device))
    source_gradient = source_logits.requires_grad
    target_gradient = target_logits is not None and target_logits.requires_grad
    wants_gradient = torch.is_grad_enabled() and (source_gradient or target_gradient)
    _reject_forward_mode(source_logits, target_logits)
    # True only under vmap; other functorch transforms raise. vmap hides requires_grad, so both gradients are requested
    # and chosen when vmap calls the operation.
    is_mapped = torch.is_grad_enabled() and _is_mapped()
    if inplace and wants_gradient and not is_mapped:
        validation.check_inplace("source_logits", source_logits)
        if target_logits is not None:
            validation.check_inplace("target_logits", target_logits)
        if not torch.compiler.is_compiling():  # a trace has no memory yet
            validation.check_inplace_memory(source_logits, target_logits, operand[0], matrix)
        result = _InplaceCoTuningLoss.apply(source_logits, target_logits, name, arguments, return_terms, backend)
        return result if return_terms else (result, None)
    source_logits = dense_columns(source_logits)
    target_logits = None if target_logits is None else dense_columns(target_logits)
    if is_mapped:
        both = (True, target_logits is not None)
        loss, terms, *_ = operation(name, backend)(source_logits, target_logits, *arguments, *both)
        return loss, terms
    if wants_gradient:
        arguments = (*arguments, source_gradient, target_gradient)
        result = _CoTuningLoss.apply(source_logits, target_logits, name, arguments, return_terms, backend)
        return result if return_terms else (result, None)
    loss, terms, *_ = _below_autograd(name, backend, source_logits, target_logits, *arguments, False, False)
    return loss, terms


def translate_labels(target: Target, relationship: Tensor | SparseRows, ignore_index: int, backend: str) -> Tensor:
    """Rows of ``p(y_source | target)`` for class indices or a mixup pair; not differentiable."""
    if isinstance(relationship, SparseRows):
        sparse = operand_target(target, relationship.detach())
        return translated_rows(*sparse[:3], relationship, ignore_index)
    labels, labels_b, mix, relationship = operand_target(target, dense_columns(relationship.detach()))
    translated: Tensor = operation("translate_labels", backend)(labels, labels_b, mix, relationship, ignore_index)
    return translated


def normalized_class_weights(weight: Tensor) -> Tensor:
    """Class weights divided by the largest, so that float16 gradients keep their digits.

    A mean over labels depends only on the weights' ratios. A kernel on an accelerator stores the gradients before it
    knows the sum of the weights that divides them: with weights of 1e-4, float16 gradients would keep hardly a digit.
    (The C++ kernels choose a power of two.)
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight / weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)


def _reject_forward_mode(*tensors: Tensor | None) -> None:
    """Forward-mode differentiation would bypass the operations and leave a derivative of 0."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "the fused Co-Tuning loss has no forward-mode derivative (jvp, jacfwd, dual tensors); use "
            'backend="reference"'
        )


def _is_mapped() -> bool:
    """Whether the call is under torch.func.vmap.

    Raises:
        RuntimeError: it is under another functorch transform; none of them can differentiate the loss.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any(each.key() != torch._C._functorch.TransformType.Vmap for each in transforms):
        raise RuntimeError(
            "the fused Co-Tuning loss cannot be differentiated by torch.func (grad, jacrev, functorch's transforms but "
            'vmap); use loss.backward() or torch.autograd.grad, or backend="reference"'
        )
    return True


def _compute_dtype(source_logits: Tensor) -> torch.dtype:
    return torch.float64 if source_logits.dtype == torch.float64 else torch.float32


def refuse_second_derivatives() -> None:
    """Raise where the gradient shall be differentiated (``create_graph=True``)."""
    # A node on the gradient could not raise this: autograd skips nodes that lead to no wanted tensor, and a penalty on
    # the gradient would silently contribute nothing. (A compiler raises for its own graphs.)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True asks for a gradient that can be differentiated, but the fused Co-Tuning loss can be "
            'differentiated only once; for second derivatives use backend="reference"'
        )


def _backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives()
    return _scaled_gradients(ctx, upstream)


def _scaled_gradients(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return None, None, None, None, None, None
    tracing = torch.compiler.is_compiling()
    saved = ctx.saved_tensors
    source_grad, target_grad, factors = saved if len(saved) == 3 else (*saved, ctx.factors)
    source_grad, target_grad = (upstream.new_empty((0, 0)) if x is None else x for x in (source_grad, target_grad))
    if not tracing and torch._C._autograd._get_current_graph_task_keep_graph():
        # retain_graph=True: another backward pass may read the saved gradients, so scale copies. (In a compiled graph
        # the compiler does that.)
        source_grad, target_grad = source_grad.clone(), target_grad.clone()
    if tracing or not (is_known_to_be_one(upstream) and factors.tolist() == [1.0, 1.0]):
        operation("scale_gradients_", ctx.backend)(source_grad, target_grad, factors, upstream)
    wanted = ctx.needs_input_grad
    return source_grad if wanted[0] else None, target_grad if wanted[1] else None, None, None, None, None


def is_known_to_be_one(upstream: Tensor) -> bool:
    """Whether the upstream gradient is 1, as in ``loss.backward()``. False on an accelerator: reading it would wait."""
    return upstream.is_cpu and upstream.dim() == 0 and upstream.item() == 1.0


def _save(ctx: Any, source_grad: Tensor, target_grad: Tensor, factors: Tensor, backend: str) -> None:
    """Save the requested gradients and no other tensor, as csrc/fast_path does.

    Activation checkpointing raises if the second call saves other tensors than the first, and the fast path may serve
    one call and decline the other. A trace keeps only saved tensors, so the factors are one of them there.
    """
    gradients = (source_grad, target_grad)
    wanted = (x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=False))
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*wanted, factors)
    else:
        ctx.save_for_backward(*wanted)
        ctx.factors = factors
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _below_autograd(name: str, backend: str, *arguments: Any) -> Any:
    """The operation without its own derivative (below), which would only cost time: the caller saves the gradients."""
    if torch.compiler.is_compiling():
        return operation(name, backend)(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operation(name, backend)(*arguments)


# The operation by itself is differentiable: torch.export keeps the operation, not the Function that called it. (The
# in-place operation is not: torch allows no derivative for an operation that overwrites its arguments.)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, source_gradient, target_gradient = inputs
    _, terms, factors, source_grad, target_grad = output
    ctx.mark_non_differentiable(terms, factors, source_grad, target_grad)
    ctx.stored = source_gradient, target_gradient
    ctx.save_for_backward(source_grad, target_grad, factors)


def _operation_backward(backend: str, ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives()
    gradients = tuple(each.clone() for each in ctx.saved_tensors[:2])  # copies: other code may hold the results
    wanted = ctx.needs_input_grad[:2]
    for name, stored, needed in zip(("source_gradient", "target_gradient"), ctx.stored, wanted, strict=True):
        if needed and not stored:
            raise RuntimeError(f"the operation was called with {name}=False, and has no gradient for these logits")
    operation("scale_gradients_", backend)(*gradients, ctx.saved_tensors[2], upstream)
    chosen = (gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True))
    return *chosen, *[None] * (len(ctx.needs_input_grad) - 2)


for _backend in ("auto", "triton"):
    for _name in ("co_tuning_loss", "sparse_co_tuning_loss"):
        torch.library.register_autograd(
            operation(_name, _backend), partial(_operation_backward, _backend), setup_context=_setup_context
        )


class _CoTuningLoss(torch.autograd.Function):
    """Loss and gradients in new memory; the logits stay unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        source_logits: Tensor,
        target_logits: Tensor | None,
        name: str,
        arguments: tuple[Any, ...],
        return_terms: bool,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, terms, factors, source_grad, target_grad = _below_autograd(
            name, backend, source_logits, target_logits, *arguments
        )
        _save(ctx, source_grad, target_grad, factors, backend)
        if not return_terms:
            return loss
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, upstream)


class _InplaceCoTuningLoss(torch.autograd.Function):
    """The gradients are written over the logits: no memory of their size is allocated."""

    @staticmethod
    def forward(
        ctx: Any,
        source_logits: Tensor,
        target_logits: Tensor | None,
        name: str,
        arguments: tuple[Any, ...],
        return_terms: bool,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, terms, factors = operation(f"{name}_", backend)(source_logits, target_logits, *arguments)
        # An operation that saved these logits for its backward pass now raises instead of using overwritten values.
        torch.autograd.graph.increment_version([x for x in (source_logits, target_logits) if x is not None])
        source_grad = source_logits.detach()
        target_grad = source_logits.new_empty((0, 0)) if target_logits is None else target_logits.detach()
        _save(ctx, source_grad, target_grad, factors, backend)
        if not return_terms:
            return loss
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, upstream)
