"""What a row's target is: up to two classes and the share of each. Shared by the loss and by the translation.

Reads the labels (4 or 8 bytes a row) and, for mixup pairs, the shares (8 bytes a row).

A label out of range stops the device with an assertion, as in ``F.cross_entropy``. On AMD an assertion is a
conversation with the host, several times the code of the loss itself; it is left out there, and the label's share is
NaN, which makes the loss NaN. Nothing is read at such a label anywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["read_label", "read_target"]


@triton.jit
def read_label(labels, stride, rows, in_batch, classes, ignore_index):
    """``(label as int64, whether it takes part, whether it is no class)``; where it takes no part it is 0."""
    label = tl.load(labels + rows * stride, mask=in_batch, other=0).to(tl.int64)
    counts = in_batch & (label != ignore_index)
    in_range = (label >= 0) & (label < classes)
    tl.device_assert(in_range | (counts == 0), "a label is out of range")
    is_bad = counts & (in_range == 0)
    counts = counts & in_range
    return tl.where(counts, label, 0), counts, is_bad


@triton.jit
def read_target(
    labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, rows, in_batch, classes, ignore_index,
    PAIR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(label, its share, second label, its share)`` a row. An ignored label has no share, whatever ``mix`` is."""
    label, counts, is_bad = read_label(labels, labels_stride, rows, in_batch, classes, ignore_index)
    if PAIR:
        label_b, counts_b, is_bad_b = read_label(labels_b, labels_b_stride, rows, in_batch, classes, ignore_index)
        share = tl.load(mix + rows * mix_stride, mask=in_batch, other=0.0)
        share_a = tl.where(is_bad, float("nan"), tl.where(counts, share, 0.0)).to(DTYPE)
        share_b = tl.where(is_bad_b, float("nan"), tl.where(counts_b, 1.0 - share, 0.0)).to(DTYPE)
    else:
        label_b = label
        share_a = tl.where(is_bad, float("nan"), tl.where(counts, 1.0, 0.0)).to(DTYPE)
        share_b = share_a
    return label, share_a, label_b, share_b
