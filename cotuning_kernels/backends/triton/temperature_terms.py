"""One pass over the logits for the calibration: NLL and its first two derivatives in ``b = 1 / T``, summed over rows.

With ``x = z - max(z)``, ``e = exp(b x)``, ``S = sum(e)`` and ``E[.]`` the mean under ``e / S``, a row with label ``y``
has

    NLL = log S - b x_y        dNLL/db = E[x] - x_y        d2NLL/db2 = E[x^2] - E[x]^2

Traffic: each logit is read once and 12 to 28 bytes a row are written; torch adds these up over rows, in float64.
``b`` changes with every step of Newton's method, so it is an argument of the launch, in float64, and no constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotuning_kernels.backends.triton.checks import check_labels, check_matrix
from cotuning_kernels.backends.triton.exponential import exp
from cotuning_kernels.backends.triton.labels import read_label
from cotuning_kernels.backends.triton.launch import Launch, compute_type, plan_rows, threads_for, vector

__all__ = ["plan", "temperature_terms"]


@triton.jit
def _whole_rows(logits, stride, width, b, rows, in_batch, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """``(max, S, sum e x, sum e x^2)`` of rows in registers."""
    columns = tl.arange(0, BLOCK)
    mask = in_batch[:, None] & (columns < width)[None, :]
    z = tl.load(
        logits + rows[:, None] * stride + columns[None, :], mask=mask, other=-float("inf"),
        eviction_policy="evict_first",
    ).to(DTYPE)  # fmt: skip
    top = tl.max(z, 1)
    x = z - top[:, None]
    e = exp(b * x)
    x = tl.where(e > 0, x, 0.0)  # a logit of -inf has no share; the product alone would be NaN
    first = e * x
    return top, tl.sum(e, 1), tl.sum(first, 1), tl.sum(first * x, 1)


@triton.jit
def _long_rows(logits, stride, width, b, rows, in_batch, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The same, a block of columns at a time.

    Where the maximum rises by ``d``, every earlier ``x`` lies ``d`` deeper:
    ``sum e (x - d)^2 = sum e x^2 - 2 d sum e x + d^2 sum e``, whose terms all have one sign as ``x <= 0 <= d``.
    """
    lanes = tl.arange(0, BLOCK)
    top = tl.full([ROWS], -float("inf"), DTYPE)
    sums = tl.zeros([ROWS, BLOCK], DTYPE)
    firsts = tl.zeros([ROWS, BLOCK], DTYPE)
    seconds = tl.zeros([ROWS, BLOCK], DTYPE)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        mask = in_batch[:, None] & (columns < width)[None, :]
        z = tl.load(
            logits + rows[:, None] * stride + columns[None, :], mask=mask, other=-float("inf"),
            eviction_policy="evict_first",
        ).to(DTYPE)  # fmt: skip
        new_top = tl.maximum(top, tl.max(z, 1))
        rise = tl.where(top == -float("inf"), 0.0, new_top - top)[:, None]
        shrink = tl.where((top == -float("inf"))[:, None], 0.0, exp(-b * rise))
        x = z - tl.where(new_top == -float("inf"), 0.0, new_top)[:, None]
        e = exp(b * x)
        x = tl.where(e > 0, x, 0.0)
        seconds = shrink * (seconds - 2 * rise * firsts + rise * rise * sums) + e * x * x
        firsts = shrink * (firsts - rise * sums) + e * x
        sums = shrink * sums + e
        top = new_top
    return top, tl.sum(sums, 1), tl.sum(firsts, 1), tl.sum(seconds, 1)


@triton.jit(
    do_not_specialize=["stride", "labels_stride", "ignore_index", "batch", "width"],
    do_not_specialize_on_alignment=["labels"],
)  # fmt: skip
def temperature_terms_kernel(
    logits, stride: tl.int64, labels, labels_stride: tl.int64, inverse_temperature: tl.float64,
    ignore_index: tl.int64, by_row,
    batch: tl.int64, width: tl.int32,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``by_row`` is ``(4, batch)``: NLL, both derivatives, and 1 for a row that counts; 0 for one that does not."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < batch
    b = inverse_temperature.to(DTYPE)
    label, counts, _ = read_label(labels, labels_stride, rows, in_batch, width * VEC, ignore_index)
    logit = tl.load(logits + rows * (stride * VEC) + label, mask=counts, other=0.0).to(DTYPE)
    if LOOPS:
        top, total, first, second = _long_rows(
            logits, stride * VEC, width * VEC, b, rows, in_batch, ROWS, BLOCK, DTYPE
        )  # fmt: skip
    else:
        top, total, first, second = _whole_rows(logits, stride * VEC, width * VEC, b, rows, in_batch, BLOCK, DTYPE)
    x = logit - top
    mean = first / total
    out = by_row + rows
    tl.store(out, tl.where(counts, tl.log(total) - b * x, 0.0), mask=in_batch)
    tl.store(out + batch, tl.where(counts, mean - x, 0.0), mask=in_batch)
    tl.store(out + 2 * batch, tl.where(counts, second / total - mean * mean, 0.0), mask=in_batch)
    tl.store(out + 3 * batch, tl.where(counts, 1.0, 0.0).to(DTYPE), mask=in_batch)


def temperature_terms(logits: Tensor, labels: Tensor, inverse_temperature: float, ignore_index: int) -> Tensor:
    """``cotuning_kernels::temperature_terms``; see :mod:`cotuning_kernels.backends.operations`."""
    check_matrix("logits", logits, logits.device)
    check_labels("labels", labels, logits.shape[0], logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    by_row = torch.empty((4, logits.shape[0]), dtype=dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        plan(logits, labels, inverse_temperature, ignore_index, by_row).run()
    return by_row.sum(1, dtype=torch.float64)


def plan(logits: Tensor, labels: Tensor, inverse_temperature: float, ignore_index: int, by_row: Tensor) -> Launch:
    """Return the launch of one call."""
    threads = threads_for(logits.shape[1], logits.dtype)
    rows = plan_rows(logits.shape[1], logits.dtype, threads)
    vec = vector(logits)
    return Launch(
        temperature_terms_kernel,
        (rows.programs(logits.shape[0]),),
        {
            "logits": logits,
            "stride": logits.stride(0) // vec,
            "labels": labels,
            "labels_stride": labels.stride(0),
            "inverse_temperature": inverse_temperature,
            "ignore_index": ignore_index,
            "by_row": by_row,
            "batch": logits.shape[0],
            "width": logits.shape[1] // vec,
            "VEC": vec,
            "ROWS": rows.rows,
            "BLOCK": rows.block,
            "LOOPS": rows.loops,
            "DTYPE": compute_type(logits.dtype),
        },
        threads,
    )
