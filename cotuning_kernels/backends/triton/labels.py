"""The target of a row: up to two classes and the share of each. The loss and the translation share it.

Traffic: 4 or 8 bytes a row for the label and, for mixup pairs, 8 bytes for the share.

A label out of range stops the device with an assertion, as in ``F.cross_entropy``. On AMD an assertion is a
conversation with the host, several times the code of the loss itself. There it is left out: the label's share is NaN,
which makes the loss NaN. No GPU reads anything at such a label.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LABELS", "PAIR", "PROBABILITIES", "form_of", "read_label", "read_target"]

# The forms of a target (see backends/operations.py).
LABELS = tl.constexpr(0)
PAIR = tl.constexpr(1)
PROBABILITIES = tl.constexpr(2)


def form_of(target: Tensor, target_b: Tensor | None) -> int:
    """Return the form of a target, as the operations take it."""
    form = PROBABILITIES if target.is_floating_point() else LABELS if target_b is None else PAIR
    return int(form.value)


@triton.jit
def read_label(labels, stride, rows, in_batch, classes, ignore_index):
    """``(label as int64, whether it takes part, whether it is no class)``; the label is 0 where it takes no part."""
    label = tl.load(labels + rows * stride, mask=in_batch, other=0).to(tl.int64)
    counts = in_batch & (label != ignore_index)
    in_range = label.to(tl.uint64) < classes.to(tl.uint64)
    tl.device_assert(in_range | (counts == 0), "a label is out of range")
    is_bad = counts & (in_range == 0)
    counts = counts & in_range
    return tl.where(counts, label, 0), counts, is_bad


@triton.jit
def read_target(labels, rows, in_batch, HAS_PAIR: tl.constexpr, DTYPE: tl.constexpr):
    """``(label, its share, second label, its share)`` of each row. An ignored label has no share, whatever ``mix`` is.

    ``labels`` is ``(labels, stride, labels_b, stride, mix, stride, classes, ignore_index)``. Without a pair the second
    label is the first one.
    """
    labels_a, labels_a_stride, labels_b, labels_b_stride, mix, mix_stride, classes, ignore_index = labels
    label, counts, is_bad = read_label(labels_a, labels_a_stride, rows, in_batch, classes, ignore_index)
    if HAS_PAIR:
        label_b, counts_b, is_bad_b = read_label(labels_b, labels_b_stride, rows, in_batch, classes, ignore_index)
        share = tl.load(mix + rows * mix_stride, mask=in_batch, other=0.0)
        share_a = tl.where(is_bad, float("nan"), tl.where(counts, share, 0.0)).to(DTYPE)
        share_b = tl.where(is_bad_b, float("nan"), tl.where(counts_b, 1.0 - share, 0.0)).to(DTYPE)
    else:
        label_b = label
        share_a = tl.where(is_bad, float("nan"), tl.where(counts, 1.0, 0.0)).to(DTYPE)
        share_b = share_a
    return label, share_a, label_b, share_b
