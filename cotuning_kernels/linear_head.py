"""One linear head and its loss as an operation of torch; the logits exist only for a chunk of rows at a time.

For each chunk of rows: the logits are a matrix product, the loss writes their gradient over them, and two more products
give the gradients of the features and of the head's weight. The peak of memory is that of the gradients plus one chunk,
not that of all logits and what a loss makes of them. Rows that take no part never reach a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cotuning_kernels.autograd import is_known_to_be_one, refuse_second_derivatives
from cotuning_kernels.backends.dense_rows import translated_rows
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.options import SCHEMA, OperationOptions
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import OperandTarget, SparseOperandTarget, operand_target, without_autocast

__all__ = ["MEMORY_BUDGET", "compute_linear_head", "linear_head_loss", "rows_of_chunk"]

MEMORY_BUDGET = 64 * 2**20
"""Bytes of logits that exist at a time, unless the caller says otherwise."""


_SETTINGS = (
    "ScalarType dtype, int memory_budget, str backend, bool features_gradient, bool weight_gradient, "
    "bool bias_gradient, bool metrics"
)


def rows_of_chunk(row_bytes: int, memory_budget: int) -> int:
    """How many rows of ``row_bytes`` each exist at a time: as many as the budget has room for, at least one."""
    return max(1, memory_budget // max(1, row_bytes))


def compute_linear_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    takes_part: Tensor,
    factor: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    mix: Tensor | None,
    relationship: Tensor | None,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    *others: Any,
) -> tuple[Any, ...]:
    """``loss = factor * total``, where ``total`` sums one head's loss over the rows that take part, and its gradients.

    The other arguments are the options, for a sum with a trade-off of 1, and those of ``_SETTINGS``. With
    ``relationship`` it is the source term, without it the target term; with indices, ``relationship`` has the values of
    a sparse one. Everything is summed over the chunks in
    float32 (float64 for float64 logits; ``total`` always), whatever the dtype of the tensors. What was not asked for is
    empty.
    """
    num_options = len(OperationOptions._fields)
    options = OperationOptions(*others[:num_options])
    dtype, memory_budget, backend, *wanted, metrics = others[num_options:]
    gradients = features_gradient, weight_gradient, bias_gradient = tuple(wanted)
    results = _results(features, weight, bias, dtype, gradients, memory_budget, metrics)
    loss, total, features_grad, weight_grads, bias_grad, logsumexp, correct = results
    for each in (total, features_grad, *weight_grads, bias_grad, correct):
        each.zero_()
    logsumexp.fill_(torch.nan)
    rows = _rows(takes_part)
    num_rows = features.shape[0] if rows is None else rows.shape[0]
    with torch.no_grad(), without_autocast(features.device):
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        size = min(rows_of_chunk(weight.shape[0] * dtype.itemsize, memory_budget), max(num_rows, 1))
        buffer = weight.new_empty((size, weight.shape[0]))
        for start in range(0, num_rows, size):
            here: Any = slice(start, min(start + size, num_rows))
            here = here if rows is None else rows[here]
            x = features[here]
            logits = buffer[: x.shape[0]]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            matrix: Tensor | SparseRows | None = relationship
            if relationship is not None and crow_indices is not None and col_indices is not None:
                matrix = SparseRows(crow_indices, col_indices, relationship, logits.shape[1])
            operand = _operand(target, target_b, mix, matrix, here, logits)
            if metrics:
                wide = logits.to(logsumexp.dtype)
                logsumexp[here] = torch.logsumexp(wide, dim=1)
                correct[here] = wide.argmax(dim=1) == _likeliest(operand, matrix, options, backend)
            chunk_sum, chunk_factor = _chunk(logits, operand, relationship is not None, options, backend, gradients)
            total += chunk_sum
            chunk_factor = chunk_factor * factor
            if features_gradient:
                features_grad[here] = (logits @ weight).to(features_grad.dtype) * chunk_factor
            if weight_gradient:
                _add_product(weight_grads, logits, x, chunk_factor, memory_budget)
            if bias_gradient:
                bias_grad += logits.sum(dim=0).to(bias_grad.dtype) * chunk_factor
    loss.copy_(total * factor)
    return results


linear_head_loss = torch.library.custom_op(
    "cotuning_kernels::linear_head_loss",
    compute_linear_head,
    mutates_args=(),
    schema="(Tensor features, Tensor head_weight, Tensor? bias, Tensor takes_part, Tensor factor, Tensor target, "
    "Tensor? target_b, Tensor? mix, Tensor? relationship, Tensor? crow_indices, Tensor? col_indices, "
    f"{SCHEMA}, {_SETTINGS}) "
    "-> (Tensor loss, Tensor total, Tensor features_grad, Tensor[] weight_grads, Tensor bias_grad, Tensor "
    "logsumexp, Tensor correct)",
)


@linear_head_loss.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Any, ...]:
    *_, dtype, memory_budget, _, of_features, of_weight, of_bias, metrics = others
    return _results(features, weight, bias, dtype, (of_features, of_weight, of_bias), memory_budget, metrics)


def _results(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    gradients: tuple[bool, bool, bool],
    memory_budget: int,
    metrics: bool,
) -> tuple[Any, ...]:
    """New memory for the results.

    A weight whose gradient is rounded in the end has several tensors of sums, each for a block of classes that fits the
    budget. The backward pass rounds and frees one after the other, so that sums and gradient never exist side by side.
    """
    arithmetic = torch.promote_types(dtype, torch.float32)
    rows = features.shape[0] if metrics else 0

    def sums(of: Tensor | None, wanted: bool) -> Tensor:
        return features.new_empty(0 if of is None or not wanted else of.shape, dtype=arithmetic)

    blocks: list[Tensor] = [weight]
    if gradients[1] and weight.dtype != arithmetic:
        blocks = list(weight.split(rows_of_chunk(weight.shape[1] * arithmetic.itemsize, memory_budget)))
    return (
        features.new_empty((), dtype=arithmetic),
        features.new_empty((), dtype=torch.float64),
        sums(features, gradients[0]),
        [sums(block, gradients[1]) for block in blocks],
        sums(bias, gradients[2]),
        features.new_empty(rows, dtype=arithmetic),
        features.new_empty(rows, dtype=torch.bool),
    )


def _rows(takes_part: Tensor) -> Tensor | None:
    """The indices of the rows that take part, None if all do. The host waits for the device here, once a head.

    In the capture of a CUDA graph, where it cannot wait, all rows go through the products: the loss gives those that
    take no part a gradient of 0.
    """
    if takes_part.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = takes_part.nonzero()[:, 0]
    return None if rows.shape[0] == takes_part.shape[0] else rows


def _operand(
    target: Tensor,
    target_b: Tensor | None,
    mix: Tensor | None,
    relationship: Tensor | SparseRows | None,
    here: Any,
    logits: Tensor,
) -> OperandTarget | SparseOperandTarget:
    """The target of a chunk's rows as the operations take it; without a relationship, one of a single source class."""
    of_rows = None if mix is None else mix if mix.shape[0] == 1 else mix[here]
    labels, labels_b = target[here], None if target_b is None else target_b[here]
    probabilities = labels.is_floating_point()
    if relationship is None:
        # The operations have a source head in any case. Here it has one class, without supervision.
        relationship = logits.new_zeros((labels.shape[0] if probabilities else logits.shape[1], 1))
        of_rows = logits.new_zeros(labels.shape[0], dtype=torch.float64) if probabilities else of_rows
    elif probabilities:
        return operand_target(labels, relationship, torch.promote_types(logits.dtype, torch.float32))
    if isinstance(relationship, SparseRows):
        return SparseOperandTarget(labels, labels_b, of_rows, *relationship[:3])
    return OperandTarget(labels, labels_b, of_rows, relationship)


def _chunk(
    logits: Tensor,
    operand: OperandTarget | SparseOperandTarget,
    of_source: bool,
    options: OperationOptions,
    backend: str,
    gradients: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk. Its gradient, but for the factor that is returned, is written over the logits."""
    heads = (logits, None) if of_source else (logits.new_zeros((logits.shape[0], 1)), logits)
    one = torch.ones((), dtype=torch.float64, device=logits.device)
    arguments = *heads, *operand, *options
    name = "sparse_co_tuning_loss" if isinstance(operand, SparseOperandTarget) else "co_tuning_loss"
    if not any(gradients):
        loss, *_ = operation(name, backend)(*arguments, False, False)
        return loss, one
    loss, _, factors = operation(f"{name}_", backend)(*arguments)
    factor = factors[0 if of_source else 1]
    if logits.dtype == torch.float16:
        # The stored gradient is the true one times a power of two, with which its products could overflow.
        logits *= factor
        return loss, one
    return loss, factor


def _likeliest(
    operand: OperandTarget | SparseOperandTarget,
    matrix: Tensor | SparseRows | None,
    options: OperationOptions,
    backend: str,
) -> Tensor:
    """The likeliest class of each row of a chunk's target: a source class if there is a relationship ``matrix``."""
    labels, labels_b, mix, *_ = operand
    if isinstance(matrix, SparseRows) and not labels.is_floating_point():
        return translated_rows(labels, labels_b, mix, matrix, options.ignore_index).argmax(dim=1)
    relationship = operand[3]
    if labels.is_floating_point():
        return (labels if matrix is None else relationship).argmax(dim=1)
    if matrix is not None:
        translate = operation("translate_labels", backend)
        return translate(labels, labels_b, mix, relationship, options.ignore_index).argmax(dim=1)
    if labels_b is None or mix is None:
        return labels
    take_b = ((mix < 0.5) & (labels_b != options.ignore_index)) | (labels == options.ignore_index)
    return torch.where(take_b, labels_b, labels)


def _add_product(
    weight_grads: list[Tensor], logits_grad: Tensor, features: Tensor, factor: Tensor, memory_budget: int
) -> None:
    """Add ``factor * logits_grad.T @ features`` to the blocks of the weight's gradient, in their dtype."""
    grads_of_blocks = logits_grad.split([len(sums) for sums in weight_grads], dim=1)
    # A product of half-precision matrices has their dtype. It is added a few classes at a time, while in a cache.
    size = rows_of_chunk(features.shape[1] * features.dtype.itemsize, memory_budget // 32)
    for sums, grads in zip(weight_grads, grads_of_blocks, strict=True):
        if sums.dtype == grads.dtype:
            sums.addmm_(grads.t(), features * factor)
            continue
        for part, columns in zip(sums.split(size), grads.split(size, dim=1), strict=True):
            part.addcmul_(columns.t() @ features, factor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, total, features_grad, weight_grads, bias_grad, *metrics = output
    ctx.mark_non_differentiable(total, features_grad, *weight_grads, bias_grad, *metrics)
    ctx.save_for_backward(features_grad, bias_grad, *weight_grads)
    ctx.stored = inputs[-4:-1]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives()
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if upstream is None:
        return tuple(found)
    tracing = torch.compiler.is_compiling() or type(upstream) is not Tensor
    # retain_graph=True: another backward pass may read the sums again. In a compiled graph the compiler decides.
    keep = tracing or torch._C._autograd._get_current_graph_task_keep_graph()
    factor = None if not tracing and is_known_to_be_one(upstream) else upstream
    features_grad, bias_grad, *weight_grads = ctx.saved_tensors
    sums = [features_grad], weight_grads, [bias_grad]
    for i, (blocks, stored, dtype) in enumerate(zip(sums, ctx.stored, ctx.dtypes, strict=True)):
        if not ctx.needs_input_grad[i]:
            continue
        if not stored:
            raise RuntimeError(f"linear_head_loss was called without the gradient of its tensor {i}")
        finished = [_finished(block, factor, dtype, keep) for block in blocks]
        found[i] = finished[0] if len(finished) == 1 else torch.cat(finished)
    return tuple(found)


def _finished(sums: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool) -> Tensor:
    """``factor * sums`` in ``dtype``; unless ``keep``, the memory of the sums is used for it, or freed."""
    if keep:
        return sums.to(dtype, copy=True) if factor is None else (sums * factor).to(dtype)
    scaled = sums if factor is None else sums.mul_(factor)
    gradient = scaled.to(dtype)
    if gradient is not scaled:
        sums.untyped_storage().resize_(0)  # the graph still holds the tensor
    return gradient


linear_head_loss.register_autograd(_backward, setup_context=_setup_context)
