"""Rows of p(y_source | target): row i is row ``target[i]`` of R, or a pair's mixture of two rows.

Traffic: each row is read once (from L2 where rows repeat) and written once. A single row is copied bit for bit; a
mixture is computed in float32 (float64 for a float64 R) and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotuning_kernels.backends.triton.checks import check_matrix, check_target, require
from cotuning_kernels.backends.triton.labels import read_target
from cotuning_kernels.backends.triton.launch import Launch, blocks, compute_type, tile_of, vector

__all__ = ["plan", "translate_labels"]


@triton.jit(
    do_not_specialize=[
        "labels_stride", "labels_b_stride", "mix_stride", "relationship_stride", "out_stride", "batch", "classes",
        "width", "ignore_index",
    ],
    do_not_specialize_on_alignment=["labels", "labels_b", "mix"],
)  # fmt: skip
def translate_labels_kernel(
    labels, labels_stride: tl.int64, labels_b, labels_b_stride: tl.int64, mix, mix_stride: tl.int64, relationship,
    relationship_stride: tl.int64, out, out_stride: tl.int64, batch: tl.int64, classes: tl.int32, width: tl.int32,
    ignore_index: tl.int64,
    HAS_PAIR: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of rows and columns a program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_batch = rows < batch
    mask = in_batch[:, None] & (columns < width * VEC)[None, :]
    label, share, label_b, share_b = read_target(
        (labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, classes, ignore_index), rows, in_batch,
        HAS_PAIR, DTYPE,
    )  # fmt: skip
    stride = relationship_stride * VEC
    q = tl.load(
        relationship + label[:, None] * stride + columns[None, :], mask=mask & (share != 0)[:, None], other=0.0
    ).to(DTYPE)  # fmt: skip
    if HAS_PAIR:
        q_b = tl.load(
            relationship + label_b[:, None] * stride + columns[None, :], mask=mask & (share_b != 0)[:, None], other=0.0
        ).to(DTYPE)  # fmt: skip
        q = q * share[:, None] + q_b * share_b[:, None]
    q = tl.where((share + share_b != share + share_b)[:, None], float("nan"), q)  # see labels.py
    tl.store(out + rows[:, None] * (out_stride * VEC) + columns[None, :], q.to(out.dtype.element_ty), mask=mask)


def translate_labels(
    target: Tensor, target_b: Tensor | None, mix: Tensor | None, relationship: Tensor, ignore_index: int
) -> Tensor:
    """``cotuning_kernels::translate_labels``, for class indices and mixup pairs."""
    require(not target.is_floating_point() and target.dim() == 1, "target must be class indices of shape (B,)")
    check_matrix("relationship", relationship, target.device)
    check_target(target, target_b, mix, target.shape[0], target.device)
    out = relationship.new_empty((target.shape[0], relationship.shape[1]))
    with torch.cuda.device_of(relationship):
        plan(target, target_b, mix, relationship, ignore_index, out).run()
    return out


def plan(
    target: Tensor, target_b: Tensor | None, mix: Tensor | None, relationship: Tensor, ignore_index: int, out: Tensor
) -> Launch:
    """Return the launch of one call."""
    batch, columns = out.shape
    vec = vector(relationship, out)
    rows, block = tile_of(columns)
    return Launch(
        translate_labels_kernel,
        (blocks(batch, rows), blocks(columns, block)),
        {
            "labels": target,
            "labels_stride": target.stride(0),
            "labels_b": target_b,
            "labels_b_stride": 0 if target_b is None else target_b.stride(0),
            "mix": mix,
            "mix_stride": 0 if mix is None or mix.shape[0] == 1 else mix.stride(0),
            "relationship": relationship,
            "relationship_stride": relationship.stride(0) // vec,
            "out": out,
            "out_stride": out.stride(0) // vec,
            "batch": batch,
            "classes": relationship.shape[0],
            "width": columns // vec,
            "ignore_index": ignore_index,
            "HAS_PAIR": target_b is not None,
            "VEC": vec,
            "ROWS": rows,
            "BLOCK": block,
            "DTYPE": compute_type(relationship.dtype),
        },
    )
