"""The Co-Tuning loss as functions. :class:`cotuning_kernels.FusedCoTuningLoss` is the same as a module."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cotuning_kernels import autograd, backends, reference, validation
from cotuning_kernels.backends.registry import REGISTRY
from cotuning_kernels.linear_head import MEMORY_BUDGET
from cotuning_kernels.linear_loss import CoTuningMetrics, Head, LinearCall, linear_loss
from cotuning_kernels.options import LossOptions, check_options
from cotuning_kernels.shapes import logits_as_rows, shape_of_labels, target_as_rows
from cotuning_kernels.sharded_loss import is_dtensor, loss_of_dtensors
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import RelationshipLike, Target, as_collated

__all__ = [
    "CoTuningMetrics",
    "CoTuningTerms",
    "co_tuning_loss",
    "linear_co_tuning_loss",
    "linear_source_label_loss",
    "source_label_loss",
    "translate_labels",
]


class CoTuningTerms(NamedTuple):
    """The loss and its two parts.

    ``loss = target_term + trade_off * source_term`` is differentiable; the two terms are detached, for logging. All
    have shape ``()``, or that of the class indices with ``reduction="none"``.
    """

    loss: Tensor
    target_term: Tensor
    source_term: Tensor


def co_tuning_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    target: Target,
    relationship: Tensor | RelationshipLike,
    *,
    trade_off: float | Tensor = 2.3,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
    return_terms: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | CoTuningTerms:
    r"""Co-Tuning's collaborative loss, both heads and both gradients in one pass over the logits.

    .. math:: L = \mathrm{CE}(z^t, y) + \lambda \, \mathrm{CE}(z^s, R_y), \qquad
        \mathrm{CE}(z^s, q) = \sum_j q_j \Bigl(\log \sum_k e^{z^s_k} - z^s_j\Bigr)

    (eq. 1 and 5 of You, Kou, Long, Wang, NeurIPS 2020). Rows of ``relationship`` need not sum to 1: the formula holds
    for any row. A row of zeros says that its target class has no source supervision.

    Args:
        source_logits: ``(B, N_s)``, float32, bfloat16, float16 or float64; any row stride. The arithmetic of a head is
            float64 for float64 logits, else float32. As in :func:`torch.nn.functional.cross_entropy` also ``(N_s,)``
            with a scalar target, and ``(B, N_s, d1, ...)`` with a target ``(B, d1, ...)``; the latter costs a copy of
            the logits and one of the gradient, unless the classes lie last in memory (``channels_last``).
        target_logits: ``(B, N_t)``, the same dtypes, not necessarily the same one; further dimensions as above.
        target: class indices ``(B,)`` (int64 or int32); class probabilities ``(B, N_t)``; or a mixup pair
            ``(labels_a, labels_b, share of labels_a)`` (:class:`cotuning_kernels.MixedTarget`).
        relationship: ``R[t, s] = p(y_source = s | y_target = t)``, ``(N_t, N_s)`` in any floating dtype, or a
            :class:`cotuning_kernels.Relationship`.
        trade_off: the factor lambda of the source term; 2.3 in the paper's code. A floating tensor of shape ``()`` on
            the logits' device changes under ``torch.compile`` without a recompilation; a float does not. With 0 no row
            has source supervision: the source logits may be infinite or NaN, their gradient is exactly 0.
        weight, label_smoothing, ignore_index: for the target term, as in :func:`torch.nn.functional.cross_entropy`. A
            row with label ``ignore_index`` counts in neither term, and its gradient is exactly 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean of the target term is that of ``F.cross_entropy``. The
            mean of the source term is over the rows with source supervision (a mixture counts by its supervised
            share), and 0 if no row has any. If every row is ignored, or there is no row, both means are NaN.
        source_loss: ``"cross_entropy"``, or ``"kl"`` for ``KL(R_y || softmax(source_logits))``: the same gradient,
            and 0 where the source head predicts exactly ``R_y``.
        return_terms: return :class:`CoTuningTerms` instead of the loss.
        inplace: write the gradients over the logits, which saves memory of their size; nothing may read these logits
            afterwards (autograd raises if an operation saved them). They must not be leaves. If no gradient is needed
            (an evaluation under ``torch.no_grad``), nothing is written.
        backend: ``"auto"``, or the name of a backend (:func:`cotuning_kernels.backends.select`).

    Returns:
        The loss, shape ``()``, or that of the class indices with ``reduction="none"``: float64 where any logits are
        float64, else float32 whatever the logits. It can be differentiated once.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        IndexError: a label is out of range (CPU); on an accelerator an assertion of the device, as ``F.cross_entropy``.
        RuntimeError: the requested backend does not serve the logits' device; the message says how to install it.
    """
    require_target_logits(target_logits)
    options = LossOptions(weight, trade_off, label_smoothing, ignore_index, reduction, source_loss)
    return compute_loss(
        source_logits, target_logits, target, matrix_of(relationship), options, inplace, backend, return_terms
    )


def source_label_loss(
    source_logits: Tensor,
    target: Target,
    relationship: Tensor | RelationshipLike,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The source term of :func:`co_tuning_loss` alone, for use with another loss on the target head.

    Args, Returns, Raises: as for :func:`co_tuning_loss`.
    """
    options = LossOptions(trade_off=1.0, ignore_index=ignore_index, reduction=reduction, source_loss=source_loss)
    loss = compute_loss(source_logits, None, target, matrix_of(relationship), options, inplace, backend, False)
    return cast(Tensor, loss)


def linear_co_tuning_loss(
    features: Tensor | tuple[Tensor, Tensor],
    source_weight: Tensor,
    source_bias: Tensor | None,
    target_weight: Tensor,
    target_bias: Tensor | None,
    target: Target,
    relationship: Tensor | RelationshipLike,
    *,
    trade_off: float | Tensor = 2.3,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
    return_terms: bool = False,
    return_metrics: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    backend: str = "auto",
) -> Tensor | CoTuningTerms | CoTuningMetrics:
    r"""The Co-Tuning loss of two linear heads, whose logits exist only for a chunk of rows at a time.

    .. math:: L = \mathrm{CE}(W^t f + b^t, y) + \lambda \, \mathrm{CE}(W^s f + b^s, R_y)

    The result is that of :func:`co_tuning_loss` on ``F.linear(features, source_weight, source_bias)`` and
    ``F.linear(features, target_weight, target_bias)``, up to rounding. The gradients of the features, the weights and
    the biases come from the same pass, so memory holds them and one chunk of logits. Rows without source supervision
    never reach the source head's product, rows with label ``ignore_index`` neither head's; on a GPU, counting them
    waits for the device once a head. A head that does not require grad costs no gradient. Gradients of weights and
    biases are summed in float32 (float64 for float64) and rounded once to the dtype of the parameter.

    Args:
        features: ``(rows, D)``, or ``(..., D)`` as for ``nn.Linear``, float32, bfloat16, float16 or float64; or a pair:
            the features that the source head reads, and those that the target head reads.
        source_weight, source_bias: the source head, ``(N_s, D)`` and ``(N_s,)`` or None, in the dtype of the features.
            Under autocast dtypes may differ: the products have the dtype of autocast, as in ``F.linear``.
        target_weight, target_bias: the target head, ``(N_t, D)`` and ``(N_t,)`` or None.
        target: class indices of the features' shape without ``D``; class probabilities ``(..., N_t)``; or a mixup pair.
        relationship, trade_off, weight, label_smoothing, ignore_index, source_loss: as for :func:`co_tuning_loss`. With
            a ``trade_off`` of 0 the source head is not computed.
        reduction: ``"mean"`` or ``"sum"``. The weights' gradients are sums over rows, so a loss a row, whose upstream
            gradient comes later, has none.
        return_terms: return :class:`CoTuningTerms` instead of the loss.
        return_metrics: return :class:`CoTuningMetrics`: also the accuracy of both heads and the log-sum-exp of each
            row, for logging. They cost a pass over each chunk, and a second chunk of memory.
        memory_budget: bytes of logits that exist at a time.
        backend: as for :func:`co_tuning_loss`. The reference, which serves where no kernel does, computes all logits.

    Returns:
        The loss, shape ``()``: float64 where any features are float64, else float32. It can be differentiated once.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        IndexError: a label is out of range (CPU); on an accelerator an assertion of the device, as ``F.cross_entropy``.
        RuntimeError: the requested backend does not serve the features' device; the message says how to install it.
    """
    options = LossOptions(weight, trade_off, label_smoothing, ignore_index, reduction, source_loss)
    heads = source_weight, source_bias, target_weight, target_bias
    return compute_linear_loss(
        features, heads, target, matrix_of(relationship), options, memory_budget, backend, return_terms, return_metrics
    )


def linear_source_label_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    relationship: Tensor | RelationshipLike,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
    memory_budget: int = MEMORY_BUDGET,
    backend: str = "auto",
) -> Tensor:
    """The source term of :func:`linear_co_tuning_loss` alone, for use with another loss on the target head.

    Args, Returns, Raises: as for :func:`linear_co_tuning_loss`; ``weight`` and ``bias`` are the source head's.
    """
    options = LossOptions(trade_off=1.0, ignore_index=ignore_index, reduction=reduction, source_loss=source_loss)
    head = Head(features, weight, bias)
    call = LinearCall(head, None, target, matrix_of(relationship), options, memory_budget, backend, False)
    return linear_loss(call).loss


def compute_linear_loss(
    features: Tensor | tuple[Tensor, Tensor],
    heads: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    target: Target,
    relationship: Tensor | SparseRows,
    options: LossOptions,
    memory_budget: int,
    backend: str,
    return_terms: bool,
    return_metrics: bool,
) -> Tensor | CoTuningTerms | CoTuningMetrics:
    """The loss of two linear heads in the form that was asked for. The public function and the module end here."""
    for_source, for_target = features if isinstance(features, tuple | list) else (features, features)
    source, target_head = Head(for_source, *heads[:2]), Head(for_target, *heads[2:])
    found = linear_loss(
        LinearCall(source, target_head, target, relationship, options, memory_budget, backend, return_metrics)
    )
    if return_metrics:
        return found
    return CoTuningTerms(*found[:3]) if return_terms else found.loss


def translate_labels(
    target: Target, relationship: Tensor | RelationshipLike, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """Rows of ``p(y_source | target)``: the labels that the source head is trained on, for inspection.

    The loss never builds this tensor.

    Args:
        target, relationship, ignore_index, backend: as for :func:`co_tuning_loss`.

    Returns:
        ``(B, N_s)`` in the relationship's dtype; rows whose label is ignored are zero.

    Raises:
        TypeError, ValueError, IndexError: as for :func:`co_tuning_loss`.
    """
    matrix, target = matrix_of(relationship), as_collated(target)
    check_matrix(matrix)
    labels = target[0] if isinstance(target, tuple) and target else target
    batch = labels.shape[0] if isinstance(labels, Tensor) and labels.dim() else 0
    validation.check_target(target, batch, matrix.shape[0], matrix.device, ignore_index)
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    served_by = backends.select(matrix.device.type, backend, matrix.device.index)
    if probabilities or served_by == "reference":
        return reference.translate_labels(target, _dense(matrix), ignore_index=ignore_index)
    return autograd.translate_labels(target, matrix, ignore_index, served_by)


def check_matrix(matrix: Tensor | SparseRows) -> None:
    """Check a relationship by itself, without reading data.

    Raises:
        TypeError, ValueError: it has a wrong type, dtype or shape.
    """
    if not isinstance(matrix, SparseRows):
        validation.check_is_tensor("relationship", matrix)
    validation.check_relationship(matrix, None, matrix.shape[-1] if len(matrix.shape) else 0, matrix.device)


def _dense(relationship: Tensor | SparseRows) -> Tensor:
    return relationship.to_dense() if isinstance(relationship, SparseRows) else relationship


def require_target_logits(target_logits: Tensor | None) -> None:
    """Reject None: the result would be the source term without trade_off."""
    if target_logits is None:
        raise TypeError("target_logits is None, expected a Tensor; source_label_loss is the source term alone")


def compute_loss(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Target,
    relationship: Tensor | SparseRows,
    options: LossOptions,
    inplace: bool,
    backend: str,
    return_terms: bool,
) -> Tensor | CoTuningTerms:
    """The loss from the backend that serves the call; without ``target_logits`` the source term alone.

    The public functions and the module end here. Errors are those of :func:`co_tuning_loss`.
    """
    tracing = torch.compiler.is_compiling()
    if not (tracing or inplace or REGISTRY.fast_path_loss is None) and backend in ("auto", "cpp"):
        result = REGISTRY.fast_path_loss(source_logits, target_logits, target, relationship, options, return_terms)
        if result is not NotImplemented:  # declined: take the general path, which also explains errors
            return CoTuningTerms(result[0], *result[1].unbind()) if return_terms else result
    if isinstance(target, tuple | list):
        target = as_collated(target)
    validation.check_is_tensor("source_logits", source_logits)
    if is_dtensor(source_logits):

        def of_part(s: Tensor, t: Tensor, y: Target, r: Any, o: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
            found = compute_loss(s, t, y, r, o, inplace, backend, True)
            assert isinstance(found, CoTuningTerms)
            return found

        whole = loss_of_dtensors(of_part, source_logits, target_logits, target, relationship, options)
        return CoTuningTerms(*whole) if return_terms else whole[0]
    if source_logits.dim() not in (0, 2):
        return _compute_loss_of_rows(
            source_logits, target_logits, target, relationship, options, inplace, backend, return_terms
        )
    served_by = backends.select(source_logits.device.type, backend, source_logits.device.index)
    inputs = source_logits, target_logits, target, relationship
    if served_by == "reference":
        _check_call(*inputs, options)
        wants_gradient = source_logits.requires_grad or (target_logits is not None and target_logits.requires_grad)
        if inplace and wants_gradient and torch.is_grad_enabled():
            raise ValueError("inplace=True needs a kernel, but the reference serves this call; leave inplace out")
        loss, target_term, source_term = reference.co_tuning_loss(
            *inputs[:3], _dense(relationship), **options._asdict()
        )
        return CoTuningTerms(loss, target_term.detach(), source_term.detach()) if return_terms else loss
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace cannot record the fused Co-Tuning loss: trace the model without the loss, use "
            'torch.export or torch.compile for both, or backend="reference"'
        )
    # Checking a small batch's arguments in Python takes about as long as its loss. So the kernels reject wrong
    # arguments, and only then do the Python checks explain the error. A trace checks first: its runs do not repeat it.
    if tracing:
        _check_call(*inputs, options)
    try:
        loss, both_terms = autograd.co_tuning_loss(*inputs, options, inplace, return_terms, served_by)
    except Exception:
        if not tracing:
            _check_call(*inputs, options)
        raise
    return CoTuningTerms(loss, *both_terms.unbind()) if return_terms and both_terms is not None else loss


def _compute_loss_of_rows(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Target,
    relationship: Tensor | SparseRows,
    options: LossOptions,
    inplace: bool,
    backend: str,
    return_terms: bool,
) -> Tensor | CoTuningTerms:
    """:func:`compute_loss` for logits ``(C,)`` or ``(B, C, d1, ...)``, reshaped to rows."""
    validation.check_shapes(source_logits, target_logits, target)
    shape = shape_of_labels(source_logits)
    rows = None if target_logits is None else logits_as_rows(target_logits)
    result = compute_loss(
        logits_as_rows(source_logits), rows, target_as_rows(target, shape), relationship, options, inplace, backend,
        return_terms,
    )  # fmt: skip
    if options.reduction != "none":
        return result
    return CoTuningTerms(*(x.reshape(shape) for x in result)) if return_terms else cast(Tensor, result).reshape(shape)


def _check_call(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Target,
    relationship: Tensor | SparseRows,
    options: LossOptions,
) -> None:
    validation.check_inputs(source_logits, target_logits, target, relationship, options.ignore_index)
    check_options(options, relationship.shape[0], source_logits.device)


def matrix_of(relationship: Tensor | RelationshipLike | SparseRows) -> Tensor | SparseRows:
    """The matrix of a Relationship; a sparse one as its tensors. The checks reject anything else."""
    if isinstance(relationship, Tensor) and relationship.layout is torch.strided:
        return relationship
    if isinstance(relationship, SparseRows):
        return relationship
    matrix = cast(Tensor, getattr(relationship, "matrix", relationship))
    return SparseRows.of(matrix) if isinstance(matrix, Tensor) and matrix.layout is not torch.strided else matrix
