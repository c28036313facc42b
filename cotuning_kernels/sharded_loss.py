"""The loss of a batch whose rows are distributed over processes.

A mean is not a mean of means: with ignored labels, class weights or classes without source supervision, shares with the
same number of rows do not count equally. :func:`share_of_mean` divides a share's sums by the counts of all processes.
:func:`loss_of_dtensors` takes DTensors, the output of a tensor-parallel head with ``use_local_output=False``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cotuning_kernels.autograd import normalized_class_weights
from cotuning_kernels.options import LossOptions
from cotuning_kernels.sparse_rows import SparseRows, supervised_classes
from cotuning_kernels.targets import Target

__all__ = ["is_dtensor", "loss_of_dtensors", "share_of_mean"]

Terms = tuple[Tensor, Tensor, Tensor]
"""The loss and its two parts."""


def share_of_mean(
    compute: Callable[[Target, Any, LossOptions], Terms],
    target: Target,
    relationship: Tensor | SparseRows,
    options: LossOptions,
    all_reduce: Callable[[Tensor], Any],
    scale: int = 1,
) -> Terms:
    """This process's share of the mean over the rows of all processes, times ``scale``. The shares add up to the mean.

    Args:
        compute: the loss of this process's rows and its two terms, from a target, a relationship and options.
        target, relationship, options: those of this process's rows.
        all_reduce: adds up a float64 tensor of three numbers over the processes, in place.
        scale: the factor of each share.
    """
    weight = options.weight
    if weight is not None and not (isinstance(target, Tensor) and target.is_floating_point()):
        weight = normalized_class_weights(weight)  # the kernels see a sum, which becomes a mean only here
    counts = _counts(target, relationship, weight, options.ignore_index)
    all_reduce(counts)
    # If a count is 0, the sum and its gradients are 0, so any divisor is right. A mean over nothing has the value NaN,
    # which is added below.
    target_count, source_count, _ = torch.where(counts == 0, 1, counts).unbind()
    without_target, _, without_rows = torch.where(counts == 0, math.nan, 0.0).unbind()
    # One fused call gives target_sum + x * source_sum; the global mean needs the sums divided by different counts.
    trade_off = options.trade_off * target_count / source_count
    options = options._replace(weight=weight, trade_off=trade_off, reduction="sum")
    loss, target_sum, source_sum = compute(target, relationship, options)
    return (
        loss * (scale / target_count).to(loss.dtype) + (without_target + without_rows).to(loss.dtype),
        target_sum * (scale / target_count).to(loss.dtype) + without_target.to(loss.dtype),
        source_sum * (scale / source_count).to(loss.dtype) + without_rows.to(loss.dtype),
    )


@torch.no_grad()
def _counts(target: Target, relationship: Tensor | SparseRows, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The divisors of the two means, and the number of rows that count: float64 ``[target, source, rows]``."""
    supervised = supervised_classes(relationship).double()
    weight = torch.ones_like(supervised) if weight is None else weight.double()
    if isinstance(target, Tensor) and target.is_floating_point():
        rows = supervised.new_full((), len(target))  # filled on the device: a copy from the host would wait for it
        return torch.stack([rows, (target.double() @ supervised).sum(), (target != 0).any(dim=1).sum()])

    def of_labels(labels: Tensor, share: Tensor | float) -> Tensor:
        share = share.to(labels.device, torch.float64) if isinstance(share, Tensor) else share
        counted = (labels != ignore_index).double() * share
        # Clamp: the loss itself reports a label out of range.
        index = torch.where(labels != ignore_index, labels, 0).long().clamp(0, len(weight) - 1)
        return torch.stack([(counted * weight[index]).sum(), (counted * supervised[index]).sum(), counted.sum()])

    if isinstance(target, tuple):
        labels_a, labels_b, share = target
        return of_labels(labels_a, share) + of_labels(labels_b, 1 - share)
    return of_labels(target, 1.0)


# ---------------------------------------------------------------------------------------------------------- DTensors


def is_dtensor(value: object) -> bool:
    """Whether this is a DTensor. If torch's DTensor module was never imported, it is not."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def loss_of_dtensors(
    compute: Callable[..., Terms],
    source_logits: Any,
    target_logits: Any,
    target: Any,
    relationship: Any,
    options: LossOptions,
) -> Terms:
    """The loss of logits that are replicated or sharded by rows, computed on each process's part. Returns DTensors.

    Args:
        compute: gives the loss and its two terms for ordinary tensors: source logits, target logits, target,
            relationship and options.
        source_logits, target_logits: DTensors ``(B, N_s)`` and ``(B, N_t)`` (or ``None``) of one mesh and placement.
        target: a DTensor of the same mesh and placement, or an ordinary tensor with the rows of this process.
        relationship, options: ordinary tensors, or replicated ones.

    Raises:
        TypeError, ValueError: another placement, or only one head's logits are a DTensor; the message says what to do.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = source_logits.device_mesh, source_logits.placements
    rows_or_whole = all(each == Replicate() or each == Shard(0) for each in placements)
    if not rows_or_whole:
        raise ValueError(_PLACEMENT.format("source_logits", placements))
    if source_logits.dim() != 2:
        raise ValueError(
            f"source_logits is a DTensor of shape {tuple(source_logits.shape)}, expected (B, N_s): pass what "
            "to_local() gives"
        )

    def local(name: str, value: Any, of_rows: bool) -> Any:
        if isinstance(value, SparseRows):
            return value
        if isinstance(value, tuple):
            return tuple(local(f"{name}[{i}]", each, of_rows) for i, each in enumerate(value))
        if not isinstance(value, DTensor):
            return value
        wanted = placements if of_rows and value.dim() else (Replicate(),) * mesh.ndim
        if value.device_mesh != mesh or tuple(value.placements) != tuple(wanted):
            raise ValueError(
                f"{name} is a DTensor with placements {tuple(value.placements)}, expected {tuple(wanted)} on the mesh "
                f"of source_logits, which has {tuple(placements)}; redistribute it"
            )
        return value.to_local()

    if target_logits is not None and not isinstance(target_logits, DTensor):
        raise TypeError(
            "source_logits is a DTensor and target_logits is not; pass both as DTensors, or both as to_local() gives "
            "them"
        )
    logits = [local("source_logits", source_logits, True), local("target_logits", target_logits, True)]
    target, relationship = local("target", target, True), local("relationship", relationship, False)
    options = options._replace(
        weight=local("weight", options.weight, False), trade_off=local("trade_off", options.trade_off, False)
    )

    def of_part(target: Target, relationship: Tensor | SparseRows, options: LossOptions) -> Terms:
        return compute(*logits, target, relationship, options)

    sharded = [dim for dim, each in enumerate(placements) if each == Shard(0)]
    if not sharded or options.reduction != "mean":
        terms = of_part(target, relationship, options)
    else:

        def all_reduce(counts: Tensor) -> None:
            for dim in sharded:
                torch.distributed.all_reduce(counts, group=mesh.get_group(dim))

        terms = share_of_mean(of_part, target, relationship, options, all_reduce)
    if options.reduction == "none":
        shape, stride = torch.Size(source_logits.shape[:1]), (1,)
        loss, *both = (
            DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride) for x in terms
        )
    else:
        parts = tuple(Partial() if each == Shard(0) else Replicate() for each in placements)
        whole = (Replicate(),) * mesh.ndim
        loss, *both = (
            DTensor.from_local(x, mesh, parts, run_check=False).redistribute(placements=whole) for x in terms
        )
    return loss, both[0], both[1]


_PLACEMENT = (
    "{} is a DTensor with placements {}, expected replicated logits or logits sharded by rows (Shard(0)): "
    "redistribute them, or leave use_local_output=True and pass what to_local() gives"
)
