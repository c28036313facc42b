"""The loss of linear heads, of which :mod:`cotuning_kernels.linear_head` computes one at a time.

A head's rows are those that count in its term. The others never reach a product: rows with label ``ignore_index``, and
for the source head rows without source supervision, which are most in a language model's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cotuning_kernels import backends, reference, validation
from cotuning_kernels.autograd import normalized_class_weights
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.linear_head import linear_head_loss
from cotuning_kernels.options import LossOptions, check_options
from cotuning_kernels.shapes import target_as_rows
from cotuning_kernels.sharded_loss import is_dtensor
from cotuning_kernels.sparse_rows import SparseRows, supervised_classes
from cotuning_kernels.targets import Target, as_collated, dense_columns, operand_target

__all__ = ["CoTuningMetrics", "Head", "LinearCall", "check_linear_options", "features_as_rows", "linear_loss"]


class Head(NamedTuple):
    """A linear head and its input: the logits are ``features @ weight.T + bias``.

    ``features`` is ``(rows, D)``, ``weight`` ``(classes, D)`` and ``bias`` ``(classes,)`` or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the logits: that of the features, or the one that autocast asks for, as in ``F.linear``."""
        device = self.features.device.type
        if self.features.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return self.features.dtype
        return torch.get_autocast_dtype(device)


class LinearCall(NamedTuple):
    """What :func:`linear_loss` computes; without ``target_head`` the source term alone, without the trade-off.

    With ``metrics=False`` the last four members of the result are empty.
    """

    source: Head
    target_head: Head | None
    target: Target
    relationship: Tensor | SparseRows
    options: LossOptions
    memory_budget: int
    backend: str
    metrics: bool


class CoTuningMetrics(NamedTuple):
    """The loss, its two parts, and numbers for logging from the same pass over the logits.

    ``loss`` is differentiable, all others are detached. Where rows do not count in a term, their log-sum-exp is NaN,
    because their logits were never computed, and no accuracy counts them. If no row counts, an accuracy is NaN.
    """

    loss: Tensor
    target_term: Tensor
    source_term: Tensor
    target_accuracy: Tensor
    """The share of rows whose largest target logit is at the label (at the likeliest class of a mixture)."""
    source_accuracy: Tensor
    """The share of rows whose largest source logit is at the likeliest source class of ``R[y]``."""
    target_logsumexp: Tensor
    """``log sum exp`` of the target logits, one number a row."""
    source_logsumexp: Tensor
    """``log sum exp`` of the source logits, one number a row."""


def check_linear_options(options: LossOptions, memory_budget: int) -> None:
    """Check what is special to linear heads, after :func:`cotuning_kernels.options.check_options`.

    Raises:
        TypeError, ValueError: ``reduction="none"``; a budget that is no positive integer.
    """
    if options.reduction == "none":
        raise ValueError(
            "reduction is 'none', expected 'mean' or 'sum': the gradients of the weights are sums over rows, which are "
            "computed before each row's upstream gradient is known"
        )
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget is {memory_budget!r:.80}, expected a number of bytes")
    if memory_budget < 1:
        raise ValueError(f"memory_budget is {memory_budget}, expected at least 1 byte")


_MENDS = (
    "FSDP2 gathers weights only in the forward of the module that it shards, so call the criterion there, or shard "
    "that module with reshard_after_forward=False",
    "pass what to_local() gives",
)


def linear_loss(call: LinearCall) -> CoTuningMetrics:
    """The Co-Tuning loss of linear heads.

    The public functions and the module end here. Errors are those of
    :func:`cotuning_kernels.functional.linear_co_tuning_loss`.
    """
    source, target_head, target, relationship, options, memory_budget, backend, metrics = call
    heads = {"source": source} if target_head is None else {"source": source, "target": target_head}
    for name, head in heads.items():
        for part, value in head._asdict().items():
            if is_dtensor(value):
                raise ValueError(
                    f"the {name} head's {part} is a DTensor, expected an ordinary tensor: {_MENDS[part == 'features']}"
                )
        validation.check_linear_head(name, *head)
    target = as_collated(target)
    shape = source.features.shape[:-1]
    if target_head is not None and target_head.features.shape[:-1] != shape:
        raise ValueError(
            f"the source head's features have shape {tuple(source.features.shape)} and the target head's "
            f"{tuple(target_head.features.shape)}, expected the same rows"
        )
    features, target = features_as_rows([head.features for head in heads.values()], target)
    source = source._replace(features=features[0])
    if target_head is not None:
        target_head = target_head._replace(features=features[1])
    device = source.features.device
    num_target_classes = None if target_head is None else target_head.weight.shape[0]
    validation.check_relationship(relationship, num_target_classes, source.weight.shape[0], device)
    validation.check_target(target, source.features.shape[0], relationship.shape[0], device, options.ignore_index)
    check_options(options, relationship.shape[0], device)
    check_linear_options(options, memory_budget)
    served_by = backends.select(device.type, backend, device.index)
    compute = _by_reference if served_by == "reference" else _by_chunks
    found = compute(call._replace(source=source, target_head=target_head, target=target, backend=served_by))
    if metrics and len(shape) > 1:
        found = found._replace(
            target_logsumexp=found.target_logsumexp.reshape(shape if target_head is not None else (0,)),
            source_logsumexp=found.source_logsumexp.reshape(shape),
        )
    return found


def features_as_rows(features: Sequence[Tensor], target: Target) -> tuple[Sequence[Tensor], Target]:
    """Features ``(..., D)`` of each head and their target, as rows.

    Raises:
        ValueError: the target has another shape.
    """
    if not isinstance(features[0], Tensor) or features[0].dim() <= 2:
        return features, target
    shape = features[0].shape[:-1]
    validation.check_labels_of_features(shape, target)
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target.flatten(0, -2)
    else:
        target = target_as_rows(target, shape)
    return [each.flatten(0, -2) for each in features], target


def _by_reference(call: LinearCall) -> CoTuningMetrics:
    """The definition of correct: all logits by ``F.linear``, then the reference's loss."""
    source, target_head, target, relationship, options, _, _, metrics = call
    source_logits = F.linear(*source)
    target_logits = None if target_head is None else F.linear(*target_head)
    if isinstance(relationship, SparseRows):
        relationship = relationship.to_dense()
    terms = reference.co_tuning_loss(source_logits, target_logits, target, relationship, **options._asdict())
    empty = source_logits.new_empty(0)
    found = CoTuningMetrics(terms[0], terms[1].detach(), terms[2].detach(), empty, empty, empty, empty)
    if not metrics:
        return found
    with torch.no_grad():
        classes = torch.eye(relationship.shape[0], dtype=torch.float64, device=source_logits.device)
        of_target = reference.translate_labels(target, classes, ignore_index=options.ignore_index)
        of_source = reference.translate_labels(target, relationship.double(), ignore_index=options.ignore_index)
        if target_head is not None and options.trade_off == 0:
            of_source = torch.zeros_like(of_source)
        source_accuracy, source_logsumexp = _logged(source_logits, of_source)
        if target_logits is None:
            return found._replace(source_accuracy=source_accuracy, source_logsumexp=source_logsumexp)
        target_accuracy, target_logsumexp = _logged(target_logits, of_target)
        return CoTuningMetrics(
            *found[:3], target_accuracy, source_accuracy, target_logsumexp, source_logsumexp
        )  # fmt: skip


def _logged(logits: Tensor, distribution: Tensor) -> tuple[Tensor, Tensor]:
    """The accuracy over the rows with a distribution, and their log-sum-exp; NaN elsewhere."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = (distribution != 0).any(dim=1)
    correct = (logits.argmax(dim=1) == distribution.argmax(dim=1)) & counts
    accuracy = correct.sum() / counts.sum()
    return accuracy, torch.where(counts, torch.logsumexp(logits, dim=1), torch.nan)


def _by_chunks(call: LinearCall) -> CoTuningMetrics:
    source, target_head, target, relationship, options, memory_budget, backend, metrics = call
    matrix: tuple[Tensor | None, ...]
    if isinstance(relationship, SparseRows):
        matrix = relationship.values, relationship.crow_indices, relationship.col_indices
    else:
        matrix = dense_columns(relationship), None, None
    weight = options.weight
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    if weight is not None and options.reduction == "mean" and not probabilities:
        assert target_head is not None
        if target_head.compute_dtype == torch.float16:
            weight = normalized_class_weights(weight)
    with torch.no_grad():
        counted = _Counted.of(target, relationship, weight, options, backend, alone=target_head is None)

    of_sum = options._replace(trade_off=1.0, reduction="sum")

    def term(head: Head, in_source: bool) -> tuple[Tensor, ...]:
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head]
        result: tuple[Tensor, ...] = linear_head_loss(
            *head,
            counted.in_source if in_source else counted.in_target,
            counted.source_factor if in_source else counted.target_factor,
            *counted.labels,
            *(matrix if in_source else (None, None, None)),
            *of_sum._replace(weight=None if in_source else weight).in_operations(relationship.device),
            head.compute_dtype,
            memory_budget,
            backend,
            *wanted,
            metrics,
        )
        loss, total, _, _, _, logsumexp, correct = result
        return loss, total, correct.sum() / (counted.in_source if in_source else counted.in_target).sum(), logsumexp

    source_loss, source_sum, source_accuracy, source_logsumexp = term(source, True)
    if target_head is None:
        loss = source_loss + counted.without_source.to(source_loss.dtype)
        empty = source_loss.new_empty(0)
        return CoTuningMetrics(
            loss, torch.zeros_like(loss).detach(), loss.detach(), empty, source_accuracy, empty, source_logsumexp
        )
    target_loss, target_sum, target_accuracy, target_logsumexp = term(target_head, False)
    loss = target_loss + source_loss
    loss = loss + (counted.without_target + counted.without_source).to(loss.dtype)
    return CoTuningMetrics(
        loss,
        (target_sum * counted.target_factor + counted.without_target).to(loss.dtype),
        (source_sum * counted.source_share + counted.without_source).to(loss.dtype),
        target_accuracy,
        source_accuracy,
        target_logsumexp,
        source_logsumexp,
    )


class _Counted(NamedTuple):
    """Which rows count in each term, and by what its sum over them is multiplied.

    ``without_target`` and ``without_source`` are added to the terms: NaN for a mean over nothing, else 0.
    """

    labels: tuple[Tensor, Tensor | None, Tensor | None]
    in_target: Tensor
    in_source: Tensor
    target_factor: Tensor
    source_share: Tensor
    source_factor: Tensor
    without_target: Tensor
    without_source: Tensor

    @classmethod
    def of(
        cls,
        target: Target,
        relationship: Tensor | SparseRows,
        weight: Tensor | None,
        options: LossOptions,
        backend: str,
        alone: bool,
    ) -> _Counted:
        """Count the rows of a target. ``source_factor`` has the trade-off unless the source term is ``alone``."""
        supervised = supervised_classes(relationship).to(torch.float64)
        ones = torch.ones_like(supervised)
        # By target class: what a row of it counts in the target term's mean, in the source term's, and at all.
        columns = torch.stack([ones if weight is None else weight.to(torch.float64), supervised, ones], dim=1)
        labels, labels_b, mix, shares = operand_target(target, columns, torch.float64)
        if labels.is_floating_point():
            mix = None
            in_target = torch.ones_like(shares[:, 2], dtype=torch.bool)  # a row of zeros counts, too
            target_count = shares.new_full((), shares.shape[0])
            any_row = (labels != 0).any()
        else:
            # One row a row of the batch. On the CPU this also checks the labels, before anything else is computed.
            shares = operation("translate_labels", backend)(labels, labels_b, mix, columns, options.ignore_index)
            in_target = shares[:, 2] != 0
            target_count = shares[:, 0].sum()
            any_row = in_target.any()
        in_source = shares[:, 1] != 0
        source_count = shares[:, 1].sum()
        trade_off = ones.new_ones(())
        if not alone:
            given = options.trade_off
            trade_off = given.to(torch.float64) if isinstance(given, Tensor) else ones.new_full((), given)
            in_source = in_source & (trade_off != 0)
        if options.reduction == "sum":
            one, zero = ones.new_ones(()), ones.new_zeros(())
            return cls((labels, labels_b, mix), in_target, in_source, one, one, trade_off, zero, zero)
        # Where no row counts, the sum and its gradients are 0, and any divisor is right.
        source_share = 1 / torch.where(source_count == 0, 1, source_count)
        return cls(
            (labels, labels_b, mix),
            in_target,
            in_source,
            1 / torch.where(target_count == 0, 1, target_count),
            source_share,
            trade_off * source_share,
            torch.where(target_count == 0, torch.nan, 0.0),
            torch.where(any_row, 0.0, torch.nan),
        )
