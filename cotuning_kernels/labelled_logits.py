"""Checks of logits with labels, for relationship learning and calibration.

Both run next to a network's forward pass and not inside a training step. Unlike :mod:`cotuning_kernels.validation`, the
checks may therefore read data: the message names the row of a wrong label or a NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cotuning_kernels.dtypes import FLOATING, INDICES, named

__all__ = ["REFERENCE_ROWS", "check_labelled_logits", "first_row_without_softmax", "positive_number"]

REFERENCE_ROWS = 4096
"""The reference copies its logits to float64; it gets this many rows at a time."""


def check_labelled_logits(
    logits_name: str, logits: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``logits`` detached and with dense columns, ``labels`` on their device.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape.
        IndexError: a label that is neither a class nor ``ignore_index``; names the row and the value.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{logits_name} is a {type(logits).__name__}, expected a Tensor of shape (B, classes)")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"{logits_name} has shape {tuple(logits.shape)}, expected (B, classes); flatten leading dimensions first, "
            f"for instance {logits_name}.flatten(0, -2) and labels.flatten()"
        )
    if logits.dtype not in FLOATING:
        raise TypeError(f"{logits_name} has dtype {logits.dtype}, expected one of {named(FLOATING)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}, expected a Tensor of class indices (B,)")
    if labels.dtype not in INDICES:
        raise TypeError(f"labels has dtype {labels.dtype}, expected int64 or int32 class indices; use labels.long()")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected ({logits.shape[0]},): one class index a row of "
            f"{logits_name}, which has shape {tuple(logits.shape)}"
        )
    row = _first_wrong_label(labels, num_classes, ignore_index)
    if row is not None:
        raise IndexError(
            f"labels[{row}] is {int(labels[row])}, expected a class index in [0, {num_classes}) or "
            f"ignore_index={ignore_index}"
        )
    logits = logits.detach()
    if logits.stride(1) != 1:
        logits = logits.clone(memory_format=torch.contiguous_format)
    return logits, labels.detach().to(logits.device)


def _first_wrong_label(labels: Tensor, num_classes: int, ignore_index: int) -> int | None:
    if labels.numel() == 0:
        return None
    # One sweep, which settles it for labels without ignore_index; read together, so that a GPU is waited for once.
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest >= 0 and highest < num_classes:
        return None
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    return int(wrong.nonzero()[0]) if wrong.any() else None


def first_row_without_softmax(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[int, str] | None:
    """The first row that has no softmax, and why; ``None`` when there is none. Rows with an ignored label do not count.

    One read of the logits and no temporary: their sum is finite only if all of them are. Where it is not, a masked
    class (-inf) or an overflow may be innocent, and the maximum of each row decides: it is finite exactly if the row
    has no NaN, no +inf, and not only -inf.
    """
    if math.isfinite(logits.sum().item()):
        return None
    maximum = logits.amax(1)
    bad = ~torch.isfinite(maximum) & (labels != ignore_index)
    if not bad.any():
        return None
    row = int(bad.nonzero()[0])
    value = float(maximum[row])
    if value == float("-inf"):
        return row, "every logit is -inf, so there is no class to predict; mask only some classes"
    found = "NaN" if value != value else "+inf"
    return row, f"a logit is {found}; find the input or the layer that makes it (half-precision overflow, bad image)"


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is not a positive finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an int beyond float64 overflows
        number = float("nan")
    if not 0 < number < float("inf"):
        try:
            shown = f"{value!r:.80}"
        except ValueError:  # Python does not write out an int of thousands of digits
            shown = f"an {type(value).__name__} too long to be shown"
        raise ValueError(f"{name} is {shown}, expected a positive finite number")
    return number
