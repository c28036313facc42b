"""Checks of logits with labels, for relationship learning and calibration.

Both run beside a network's forward pass, not inside a training step. So the checks may read data, unlike those in
:mod:`cotuning_kernels.validation`: the message names the row of a wrong label or a NaN.
"""

from __future__ import annotations

import math
import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from cotuning_kernels.dtypes import FLOATING, INDICES, named
from cotuning_kernels.shapes import class_dimension, logits_as_rows, shape_of_labels

__all__ = [
    "REFERENCE_ROWS",
    "check_labelled_logits",
    "first_row_without_softmax",
    "positive_integer",
    "positive_number",
    "warn_of_probabilities",
]

_ROWS_TO_JUDGE = 64
REFERENCE_ROWS = 4096
"""The reference copies its logits to float64; it gets this many rows at a time."""


def check_labelled_logits(
    logits_name: str,
    logits: Tensor,
    labels: Tensor,
    num_classes: int | None,
    ignore_index: int,
    *,
    kernel_checks_labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits as ``(rows, C)``, detached and with dense columns, and labels as ``(rows,)`` on their device.

    Args:
        logits_name: their name in messages.
        logits: ``(B, C)``, ``(C,)`` or ``(B, C, d1, ...)``.
        labels: ``(B,)``, ``()`` or ``(B, d1, ...)``.
        num_classes: of the labels; ``None`` if the labels are classes of the logits.
        ignore_index: the label that is no class.
        kernel_checks_labels: whether the kernel raises the same IndexError for labels ``(B,)``, so that they need not
            be read here.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape.
        IndexError: a label that is neither a class nor ``ignore_index``; names the row and the value.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{logits_name} is a {type(logits).__name__}, expected a Tensor of shape (B, classes)")
    if logits.dim() == 0 or logits.shape[class_dimension(logits)] == 0:
        raise ValueError(f"{logits_name} has shape {tuple(logits.shape)}, expected (B, classes)")
    if logits.dtype not in FLOATING:
        raise TypeError(f"{logits_name} has dtype {logits.dtype}, expected one of {named(FLOATING)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}, expected a Tensor of class indices (B,)")
    if labels.dtype not in INDICES:
        raise TypeError(f"labels has dtype {labels.dtype}, expected int64 or int32 class indices; use labels.long()")
    shape = shape_of_labels(logits)
    if labels.shape != shape:
        last = (
            f"; where they are the last dimension, flatten the others: {logits_name}.flatten(0, -2), labels.flatten()"
            if logits.dim() > 2
            else ""
        )
        found = f"labels has shape {tuple(labels.shape)}, expected {shape}: one class index a row"
        its = f"{logits_name} has shape {tuple(logits.shape)} and its classes in dimension {class_dimension(logits)}"
        raise ValueError(f"{found}; {its}{last}" if labels.dim() == len(shape) else f"{its}, but {found}{last}")
    flat = labels.detach().reshape(-1)
    num_classes = logits.shape[class_dimension(logits)] if num_classes is None else num_classes
    left_to_kernel = kernel_checks_labels and labels.dim() == 1
    row = None if left_to_kernel else _first_wrong_label(flat, num_classes, ignore_index)
    if row is not None:
        raise IndexError(
            f"{'labels' if labels.dim() == 1 else 'labels.flatten()'}[{row}] is {int(flat[row])}, expected a class "
            f"index in [0, {num_classes}) or ignore_index={ignore_index}"
        )
    logits = logits_as_rows(logits.detach())
    if logits.stride(1) != 1:
        logits = logits.clone(memory_format=torch.contiguous_format)
    return logits, flat.to(logits.device)


def _first_wrong_label(labels: Tensor, num_classes: int, ignore_index: int) -> int | None:
    if labels.numel() == 0:
        return None
    # One sweep is enough without ignored labels. Reading both values together waits for a GPU only once.
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest >= 0 and highest < num_classes:
        return None
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    return int(wrong.nonzero()[0]) if wrong.any() else None


def first_row_without_softmax(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[int, str] | None:
    """The first row without a softmax, and why; ``None`` if every row has one. Rows with an ignored label do not count.

    One read of the logits without a temporary: their sum is finite only if all of them are. If it is not, the cause may
    be a masked class (-inf) or an overflow, so the maximum of each row decides: it is finite exactly if the row has no
    NaN, no +inf, and not only -inf.
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


def warn_of_probabilities(name: str, logits: Tensor, stacklevel: int) -> None:
    """Warn of softmax outputs given as logits: their softmax is nearly uniform, and nothing else would show it.

    Only the first rows are read.

    Args:
        name: the logits' name in the message.
        logits: ``(rows, C)``.
        stacklevel: that of :func:`warnings.warn`, for the caller's caller.
    """
    rows = logits[:_ROWS_TO_JUDGE].double()
    if len(rows) and rows.shape[1] > 1 and bool(((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-3)).all()):
        warnings.warn(
            f"{name}: no value is negative and the rows sum to 1, as those of probabilities do, and logits are "
            "expected; leave out the model's softmax, or pass the logarithm of its outputs",
            stacklevel=stacklevel + 1,
        )


def positive_integer(name: str, value: Any) -> int:
    """``value`` as an int; NumPy's integers are accepted.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r:.80}, expected a positive int")
    return number


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
        except ValueError:  # Python refuses to print an int of thousands of digits
            shown = f"an {type(value).__name__} too long to be shown"
        raise ValueError(f"{name} is {shown}, expected a positive finite number")
    return number
