"""The three forms of a target, and the one form that the operations take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from cotuning_kernels.sparse_rows import SparseRows, supervised_classes

__all__ = [
    "MixedTarget",
    "OperandTarget",
    "RelationshipLike",
    "SparseOperandTarget",
    "Target",
    "as_collated",
    "dense_columns",
    "operand_target",
    "without_autocast",
]


class MixedTarget(NamedTuple):
    """A mixup or CutMix target: row ``i`` is ``share[i]`` of class ``labels_a[i]`` and the rest of ``labels_b[i]``.

    Args:
        labels_a, labels_b: class indices, int64 or int32, shape ``(B,)``.
        share: the share of ``labels_a``, in [0, 1]: a float, or a tensor of shape ``()``, ``(B,)`` or ``(B, 1)``. A
            tensor's values are not checked, because that would wait for its device.
    """

    labels_a: Tensor
    labels_b: Tensor
    share: Tensor | float


Target = Tensor | MixedTarget | tuple[Tensor, Tensor, Tensor | float]
"""Class indices ``(B,)``, class probabilities ``(B, N_t)``, or a mixup pair."""


class RelationshipLike(Protocol):
    """Anything with a relationship's matrix, such as :class:`cotuning_kernels.Relationship`."""

    @property
    def matrix(self) -> Tensor:
        """``R[t, s] = p(y_source = s | y_target = t)``, ``(N_t, N_s)``, dense or ``torch.sparse_csr``."""


class OperandTarget(NamedTuple):
    """A target and its relationship as the operations take them (see :mod:`cotuning_kernels.backends.operations`)."""

    target: Tensor
    target_b: Tensor | None
    mix: Tensor | None
    relationship: Tensor


class SparseOperandTarget(NamedTuple):
    """The same with the relationship in compressed rows; see :class:`cotuning_kernels.sparse_rows.SparseRows`."""

    target: Tensor
    target_b: Tensor | None
    mix: Tensor | None
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor


def as_collated(target: Target) -> Target:
    """The target as a tuple and its shares as ``(B,)``.

    ``default_collate`` makes a list of a dataset's triples, and mixing images by broadcasting gives shares ``(B, 1)``.
    """
    if isinstance(target, list) and len(target) == 3 and isinstance(target[0], Tensor):
        target = tuple(target)
    if isinstance(target, tuple) and len(target) == 3:
        share = target[2]
        if isinstance(share, Tensor) and share.dim() == 2 and share.shape[1] == 1:
            return target[0], target[1], share[:, 0]
    return target


@overload
def operand_target(target: Target, relationship: Tensor, dtype: torch.dtype = ...) -> OperandTarget: ...
@overload
def operand_target(
    target: Target, relationship: Tensor | SparseRows, dtype: torch.dtype = ...
) -> OperandTarget | SparseOperandTarget: ...
def operand_target(
    target: Target, relationship: Tensor | SparseRows, dtype: torch.dtype = torch.float32
) -> OperandTarget | SparseOperandTarget:
    """Split a mixup pair; translate class probabilities by a matrix product in ``dtype``, whose result is dense."""
    if isinstance(target, tuple):
        labels_a, labels_b, share = target
        if isinstance(share, Tensor):
            mix = share.to(labels_a.device, torch.float64).reshape(-1)
        else:
            mix = torch.full((1,), share, dtype=torch.float64, device=labels_a.device)
        return _with_relationship(labels_a, labels_b, mix, relationship)
    if not target.is_floating_point():
        return _with_relationship(target, None, None, relationship)
    with torch.no_grad(), without_autocast(target.device):
        if isinstance(relationship, SparseRows):
            translated = relationship.multiplied_by(target.to(dtype))
        else:
            translated = target.to(dtype) @ relationship.to(dtype)
        supervised = supervised_classes(relationship).to(torch.float64)
        return OperandTarget(dense_columns(target), None, target.to(torch.float64) @ supervised, translated)


def _with_relationship(
    labels: Tensor, labels_b: Tensor | None, mix: Tensor | None, relationship: Tensor | SparseRows
) -> OperandTarget | SparseOperandTarget:
    if isinstance(relationship, SparseRows):
        return SparseOperandTarget(labels, labels_b, mix, *relationship[:3])
    return OperandTarget(labels, labels_b, mix, relationship)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches off autocast, which would round a matrix product to half precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def dense_columns(matrix: Tensor) -> Tensor:
    """The matrix with dense columns, which the kernels need; they take any row stride."""
    if matrix.stride(1) == 1 or matrix.shape[1] == 1:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)  # contiguous() does not change an empty matrix
