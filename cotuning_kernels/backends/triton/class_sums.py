"""The relationship's sums: ``sums[t] += sum over rows of class t of softmax(b z)``, without atomics.

A stable sort of the labels puts the rows of a class side by side. One launch finds each row's ``max(z)`` and
``sum exp``. A second launch has one program for each class and block of columns; it adds the softmax of the class's
rows in the order of rows, so that every run gives the same bits.

Traffic: each logit is read twice, 8 bytes a row are written and read, and the sums are read and written once. Rows of a
tile are added in the arithmetic of the logits, tiles in the dtype of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotuning_kernels.backends.triton.checks import check_labels, check_matrix, check_writable, require
from cotuning_kernels.backends.triton.exponential import exp
from cotuning_kernels.backends.triton.labels import read_label
from cotuning_kernels.backends.triton.launch import Launch, blocks, compute_type, plan_rows, threads_for, vector

__all__ = ["add_class_sums_", "plan"]

_TILE_ROWS, _TILE_COLUMNS = 16, 128


@triton.jit(
    do_not_specialize=["stride", "labels_stride", "ignore_index", "batch", "classes", "width"],
    do_not_specialize_on_alignment=["labels"],
)  # fmt: skip
def row_sums_kernel(
    logits, stride: tl.int64, labels, labels_stride: tl.int64, inverse_temperature: tl.float64,
    ignore_index: tl.int64, by_row,
    batch: tl.int64, classes: tl.int32, width: tl.int32,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``by_row`` is ``(2, batch)``: the largest logit, and ``1 / sum exp(b (z - largest))``. Checks the labels."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < batch
    b = inverse_temperature.to(DTYPE)
    _, counts, _ = read_label(labels, labels_stride, rows, in_batch, classes, ignore_index)
    lanes = tl.arange(0, BLOCK)
    row = logits + rows[:, None] * (stride * VEC)
    end = width * VEC
    if LOOPS:
        top = tl.full([ROWS], -float("inf"), DTYPE)
        sums = tl.zeros([ROWS, BLOCK], DTYPE)
        for start in range(0, end, BLOCK):
            columns = start + lanes
            mask = counts[:, None] & (columns < end)[None, :]
            z = tl.load(row + columns[None, :], mask=mask, other=-float("inf")).to(DTYPE)
            new_top = tl.maximum(top, tl.max(z, 1))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            shrink = tl.where(top == -float("inf"), 0.0, exp(b * (top - base)))
            sums = sums * shrink[:, None] + exp(b * (z - base[:, None]))
            top = new_top
    else:
        mask = counts[:, None] & (lanes < end)[None, :]
        z = tl.load(row + lanes[None, :], mask=mask, other=-float("inf")).to(DTYPE)
        top = tl.max(z, 1)
        sums = exp(b * (z - top[:, None]))
    tl.store(by_row + rows, top, mask=in_batch)
    tl.store(by_row + batch + rows, 1.0 / tl.sum(sums, 1), mask=in_batch)


@triton.jit(do_not_specialize=["stride", "sums_stride", "batch", "width"])
def class_sums_kernel(
    logits, stride: tl.int64, by_row, order, ends, sums, sums_stride: tl.int64, inverse_temperature: tl.float64,
    batch: tl.int64, width: tl.int32,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows ``order[ends[t]] ... order[ends[t + 1] - 1]`` are those of class t."""
    target = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width * VEC
    b = inverse_temperature.to(DTYPE)
    address = sums + target * (sums_stride * VEC) + columns
    total = tl.load(address, mask=inside, other=0.0)
    first = tl.load(ends + target)
    last = tl.load(ends + target + 1)
    for start in range(first, last, ROWS):
        places = start + tl.arange(0, ROWS)
        taken = places < last
        rows = tl.load(order + places, mask=taken, other=0)
        top = tl.load(by_row + rows, mask=taken, other=0.0)
        share = tl.load(by_row + batch + rows, mask=taken, other=0.0)
        z = tl.load(
            logits + rows[:, None] * (stride * VEC) + columns[None, :], mask=taken[:, None] & inside[None, :],
            other=-float("inf"), eviction_policy="evict_first",
        ).to(DTYPE)  # fmt: skip
        p = exp(b * (z - top[:, None])) * share[:, None]
        total += tl.sum(p, 0).to(sums.dtype.element_ty)
    tl.store(address, total, mask=inside)


def add_class_sums_(
    sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, inverse_temperature: float, ignore_index: int
) -> None:
    """``cotuning_kernels::add_class_sums_``; see :mod:`cotuning_kernels.backends.operations`."""
    device, batch, classes = logits.device, logits.shape[0], sums.shape[0]
    check_matrix("logits", logits, device)
    check_matrix("sums", sums, device)
    check_writable("sums", sums)
    check_labels("labels", labels, batch, device)
    require(sums.dtype in (torch.float32, torch.float64), "sums must be float32 or float64")
    require(sums.shape[1] == logits.shape[1], "sums must have one column a column of logits")
    require(
        counts.dtype == torch.int64 and counts.shape == (classes,) and counts.device == device,
        f"counts must be int64 of shape ({classes},) on {device}",
    )
    if batch == 0:
        return
    # Ignored labels must lie outside all classes' runs: they take the number behind the last class.
    key = torch.where(labels == ignore_index, classes, labels) if 0 <= ignore_index < classes else labels
    in_order, order = torch.sort(key.long(), stable=True)
    ends = torch.searchsorted(in_order, torch.arange(classes + 1, device=device))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    by_row = torch.empty((2, batch), dtype=dtype, device=device)
    with torch.cuda.device_of(logits):
        for launch in plan(sums, logits, labels, inverse_temperature, ignore_index, by_row, order, ends):
            launch.run()
    counts += ends.diff()


def plan(
    sums: Tensor,
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: float,
    ignore_index: int,
    by_row: Tensor,
    order: Tensor,
    ends: Tensor,
) -> list[Launch]:
    """Return both launches of one call."""
    batch, columns = logits.shape
    threads = threads_for(columns, logits.dtype)
    rows = plan_rows(columns, logits.dtype, threads)
    vec = vector(logits, sums)
    shared = {
        "logits": logits,
        "stride": logits.stride(0) // vec,
        "inverse_temperature": inverse_temperature,
        "by_row": by_row,
        "batch": batch,
        "width": columns // vec,
        "VEC": vec,
        "DTYPE": compute_type(logits.dtype),
    }
    row_sums = Launch(
        row_sums_kernel,
        (rows.programs(batch),),
        {
            **shared,
            "labels": labels,
            "labels_stride": labels.stride(0),
            "ignore_index": ignore_index,
            "classes": sums.shape[0],
            "ROWS": rows.rows,
            "BLOCK": rows.block,
            "LOOPS": rows.loops,
        },
        threads,
    )
    class_sums = Launch(
        class_sums_kernel,
        (sums.shape[0], blocks(columns, _TILE_COLUMNS)),
        {
            **shared,
            "order": order,
            "ends": ends,
            "sums": sums,
            "sums_stride": sums.stride(0) // vec,
            "ROWS": _TILE_ROWS,
            "BLOCK": _TILE_COLUMNS,
        },
    )
    return [row_sums, class_sums]
