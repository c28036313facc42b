"""Checks of the tensors of a call, with messages that explain the error.

These functions read shapes, dtypes and devices, but no data, so they never wait for a device. The kernels check the
values of labels; :mod:`cotuning_kernels.options` checks the options.
"""

from __future__ import annotations

import numbers
import os

import torch
from torch import Tensor

from cotuning_kernels.dtypes import FLOATING, INDICES, named
from cotuning_kernels.shapes import shape_of_labels
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import Target

__all__ = [
    "check_device",
    "check_ignore_index",
    "check_inplace",
    "check_inplace_memory",
    "check_inputs",
    "check_is_tensor",
    "check_labels_of_features",
    "check_linear_head",
    "check_relationship",
    "check_shapes",
    "check_target",
]


def check_inputs(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Target,
    relationship: Tensor | SparseRows,
    ignore_index: int,
) -> None:
    """Check the logits, the target and the relationship of the loss, and that they fit together.

    Raises:
        TypeError, ValueError: one of them has a wrong type, dtype, shape, device or value.
    """
    _check_logits("source_logits", source_logits)
    device, batch = source_logits.device, source_logits.shape[0]
    num_target_classes = None
    if target_logits is not None:
        _check_logits("target_logits", target_logits)
        num_target_classes = target_logits.shape[1]
        if target_logits.shape[0] != batch or target_logits.device != device:
            raise ValueError(
                f"source_logits is {tuple(source_logits.shape)} on {device} and target_logits is "
                f"{tuple(target_logits.shape)} on {target_logits.device}, expected the same rows on the same device"
            )
    check_relationship(relationship, num_target_classes, source_logits.shape[1], device)
    check_target(target, batch, relationship.shape[0], device, ignore_index)


def check_shapes(source_logits: Tensor, target_logits: Tensor | None, target: Target) -> None:
    """Check logits ``(C,)`` or ``(B, C, d1, ...)`` and their target, before they are flattened to rows.

    Raises:
        TypeError, ValueError: ``target_logits`` is no Tensor; shapes that do not fit together.
    """
    shape = shape_of_labels(source_logits)
    classes = "logits are (B, classes), (classes,) or (B, classes, d1, ...), as for F.cross_entropy"
    last = (
        "; where the classes are the last dimension, flatten the others: source_logits.flatten(0, -2), target.flatten()"
        if source_logits.dim() > 2
        else ""
    )
    if target_logits is not None:
        check_is_tensor("target_logits", target_logits)
        if target_logits.dim() != source_logits.dim() or shape_of_labels(target_logits) != shape:
            raise ValueError(
                f"source_logits has shape {tuple(source_logits.shape)} and target_logits "
                f"{tuple(target_logits.shape)}, expected the same shape but for the number of classes ({classes}{last})"
            )
    for labels in target[:2] if isinstance(target, tuple) else (target,):
        if not isinstance(labels, Tensor):
            continue  # the checks of the rows reject it
        if (shape_of_labels(labels) if labels.is_floating_point() and labels.dim() else labels.shape) != shape:
            raise ValueError(
                f"target has shape {tuple(labels.shape)}, expected class indices {shape} (or class probabilities with "
                f"the classes as in the logits) for source_logits of shape {tuple(source_logits.shape)}: "
                f"{classes}{last}"
            )


def check_linear_head(name: str, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check a linear head, "source" or "target", and the features that it reads, as ``F.linear`` takes them.

    Raises:
        TypeError, ValueError: one of them has a wrong type, dtype, shape or device.
    """
    tensors = {"features": features, f"{name}_weight": weight}
    for what, tensor in (tensors if bias is None else tensors | {f"{name}_bias": bias}).items():
        check_is_tensor(what, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{what} has dtype {tensor.dtype}, expected one of {named(FLOATING)}")
        check_device(what, tensor, features.device)
    if features.dim() < 2 or weight.dim() != 2 or features.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"features has shape {tuple(features.shape)} and {name}_weight {tuple(weight.shape)}, expected (rows, D) "
            "and (classes, D), as nn.Linear has them"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) or None")
    dtypes = {tensor.dtype for tensor in (features, weight, bias) if tensor is not None}
    if len(dtypes) > 1 and (features.device.type == "meta" or not torch.is_autocast_enabled(features.device.type)):
        raise TypeError(
            f"features are {features.dtype} and the {name} head is {weight.dtype}"
            f"{'' if bias is None else f' with a bias in {bias.dtype}'}, expected one dtype, or torch.autocast"
        )


def check_labels_of_features(shape: tuple[int, ...], target: Target) -> None:
    """Check a target for features ``(*shape, D)``, before both are flattened to rows.

    Raises:
        ValueError: shapes that do not fit together.
    """
    for labels in target[:2] if isinstance(target, tuple) else (target,):
        if not isinstance(labels, Tensor):
            continue  # the checks of the rows reject it
        if (labels.shape[:-1] if labels.is_floating_point() else labels.shape) != shape:
            raise ValueError(
                f"target has shape {tuple(labels.shape)}, expected class indices {tuple(shape)} or class probabilities "
                f"{(*shape, 'N_t')} for features {(*shape, 'D')}"
            )


def check_is_tensor(name: str, value: Tensor) -> None:
    """Require a Tensor; the message helps with arrays and paths."""
    if not isinstance(value, Tensor):
        mend = "; torch.from_numpy makes one of an array" if hasattr(value, "__array__") else ""
        if name == "relationship" and isinstance(value, (str, os.PathLike)):
            mend = "; Relationship.load reads one from a file"
        if name == "relationship" and hasattr(value, "relationship"):  # tllib's Relationship
            mend = "; pass its array: torch.from_numpy(relationship.relationship)"
        raise TypeError(f"{name} is a {type(value).__name__}, expected a Tensor{mend}")


def check_device(name: str, tensor: Tensor | SparseRows, device: torch.device) -> None:
    """Require that ``tensor`` is on the logits' device."""
    if tensor.device != device:
        move = f"move it with .to({str(device)!r})"
        raise ValueError(f"{name} is on {tensor.device}, but the logits are on {device}; {move}")


def _check_logits(name: str, logits: Tensor) -> None:
    check_is_tensor(name, logits)
    if logits.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}, expected (B, classes) as source_logits has; flatten leading "
            f"dimensions first, for instance {name}.flatten(0, -2) and target.flatten()"
        )
    if logits.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {logits.dtype}, expected one of {named(FLOATING)}")
    if logits.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected at least one class")


def check_target(target: Target, batch: int, num_target_classes: int, device: torch.device, ignore_index: int) -> None:
    """Require class indices, class probabilities or a mixup pair for ``batch`` rows of logits."""
    check_ignore_index(ignore_index)
    if isinstance(target, tuple):
        if len(target) != 3:
            raise ValueError(
                f"target is a tuple of {len(target)}, expected a mixup pair (labels_a, labels_b, share of labels_a)"
            )
        _check_labels("target[0]", target[0], batch, device)
        _check_labels("target[1]", target[1], batch, device)
        if target[0].dtype != target[1].dtype:
            raise TypeError(f"target[0] is {target[0].dtype} and target[1] is {target[1].dtype}, expected one dtype")
        _check_share(target[2], batch)
        return
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target is a {type(target).__name__}, expected class indices (B,), class probabilities (B, N_t), or a "
            "mixup pair (labels_a, labels_b, share of labels_a)"
        )
    if not target.is_floating_point():
        _check_labels("target", target, batch, device)
        return
    if target.dim() != 2 or target.shape[0] != batch or target.shape[1] != num_target_classes:
        raise ValueError(
            f"target holds class probabilities of shape {tuple(target.shape)}, expected "
            f"({batch}, {num_target_classes}) (class indices are int64 or int32 of shape (B,)"
            f"{': target.long() makes them so' if target.dim() == 1 else ''})"
        )
    if target.requires_grad:
        raise ValueError("target requires grad, but the loss is not differentiated in it; pass target.detach()")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index is {ignore_index}, but it has no meaning with class probabilities as target")
    check_device("target", target, device)


def check_relationship(
    relationship: Tensor | SparseRows,
    num_target_classes: int | None,
    num_source_classes: int,
    device: torch.device,
) -> None:
    """Require a floating matrix with one column per source class and, if ``N_t`` is known, one row per target class.

    The indices of a sparse one are not read: :meth:`cotuning_kernels.sparse_rows.SparseRows.check` does that.
    """
    if not isinstance(relationship, Tensor | SparseRows):
        raise TypeError(
            f"relationship is a {type(relationship).__name__}, expected a Tensor of shape (N_t, N_s) or a Relationship"
        )
    if len(relationship.shape) != 2 or not relationship.dtype.is_floating_point:
        raise ValueError(
            f"relationship is {relationship.dtype} of shape {tuple(relationship.shape)}, expected a floating tensor "
            "(N_t, N_s): one row of source-class probabilities a target class"
        )
    if relationship.dtype not in FLOATING:
        raise TypeError(f"relationship has dtype {relationship.dtype}, expected {named(FLOATING)}")
    if relationship.shape[0] == 0:
        raise ValueError(
            f"relationship has shape {tuple(relationship.shape)}, expected at least one row: one a target class"
        )
    if relationship.shape[1] != num_source_classes:
        raise ValueError(
            f"relationship has {relationship.shape[1]} columns, but source_logits has {num_source_classes} classes; "
            + (
                "it has as many rows: is it transposed, or are source_logits and target_logits swapped?"
                if relationship.shape[0] == num_source_classes
                else "was the relationship learnt with another source head?"
            )
        )
    if num_target_classes is not None and relationship.shape[0] != num_target_classes:
        raise ValueError(
            f"relationship has {relationship.shape[0]} rows, but target_logits has {num_target_classes} classes; "
            "a target class without source supervision needs a row too (of zeros)"
        )
    if (relationship.values if isinstance(relationship, SparseRows) else relationship).requires_grad:
        raise ValueError("relationship requires grad, but the loss is not differentiated in it; pass .detach()")
    check_device("relationship", relationship, device)
    if isinstance(relationship, SparseRows):
        indices = relationship.crow_indices, relationship.col_indices
        if any(each.device != device or each.dtype not in INDICES for each in indices):
            raise ValueError("relationship has indices that are neither int64 nor int32, or not beside its values")


def check_inplace(name: str, logits: Tensor) -> None:
    """Require logits that a gradient may overwrite: no leaf, and dense rows that do not overlap."""
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(f"{name} is a leaf that requires grad; inplace=True would destroy it. Leave inplace out")
    if not logits.requires_grad:
        raise ValueError(f"{name} does not require grad; inplace=True writes a gradient over it. Leave inplace out")
    if (logits.stride(1) != 1 and logits.shape[1] > 1) or (logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]):
        raise ValueError(
            f"{name} has strides {logits.stride()} for shape {tuple(logits.shape)}; inplace=True needs rows that are "
            "dense and do not overlap"
        )


def check_ignore_index(ignore_index: int) -> None:
    """Require a 64-bit integer."""
    if not isinstance(ignore_index, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"ignore_index is {ignore_index!r:.80}, expected an integer")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}, expected an integer of 64 bits")


def check_inplace_memory(source_logits: Tensor, target_logits: Tensor | None, *others: Tensor) -> None:
    """Require that gradients may overwrite the logits: no other data that is read may share their memory."""
    logits = [source_logits] if target_logits is None else [source_logits, target_logits]
    if any(_share_storage(x, other) for x in logits for other in others):
        raise ValueError("inplace=True, but the target or the relationship shares memory with the logits; clone it")
    if len(logits) == 2 and _share_storage(*logits) and not _are_disjoint_columns(*logits):
        raise ValueError(
            "inplace=True, but source_logits and target_logits overlap in memory; only disjoint columns of one tensor "
            "may share it. Leave inplace out"
        )


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0 and b.numel() > 0


def _are_disjoint_columns(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices in one storage are different columns of one matrix, as from a model with two heads."""
    if a.dtype != b.dtype:
        return False
    if a.shape[0] == 1:  # the stride of a single row says nothing
        (start, width), (next_start, _) = sorted((x.storage_offset(), x.shape[1]) for x in (a, b))
        return start + width <= next_start
    stride = a.stride(0)
    if stride != b.stride(0):
        return False
    (start, width), (next_start, next_width) = sorted((x.storage_offset() % stride, x.shape[1]) for x in (a, b))
    return start + width <= next_start and next_start + next_width <= stride


def _check_labels(name: str, labels: Tensor, batch: int, device: torch.device) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is a {type(labels).__name__}, expected a Tensor of class indices")
    if labels.dtype not in INDICES:
        raise TypeError(
            f"{name} has dtype {labels.dtype}, expected class indices as int64 or int32; convert with {name}.long()"
        )
    if labels.dim() != 1 or labels.shape[0] != batch:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}, expected ({batch},): one class index a row of logits"
        )
    check_device(name, labels, device)


def _check_share(share: Tensor | float, batch: int) -> None:
    if isinstance(share, Tensor):
        if share.dim() > 1 or (share.dim() == 1 and share.shape[0] not in (1, batch)):
            raise ValueError(f"target[2], the share, has shape {tuple(share.shape)}, expected () or ({batch},)")
        if not share.is_floating_point():
            raise TypeError(f"target[2], the share, has dtype {share.dtype}, expected a floating dtype")
        if share.requires_grad:
            raise ValueError("target[2], the share, requires grad, but the loss is not differentiated in it")
    elif not isinstance(share, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"target[2], the share of labels_a, is {share!r:.80}, expected a number in [0, 1] or a tensor")
    elif not isinstance(share, torch.SymFloat) and not 0.0 <= share <= 1.0:
        raise ValueError(f"target[2], the share of labels_a, is {share}, expected a number in [0, 1]")
