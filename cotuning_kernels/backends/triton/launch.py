"""How rows are shared out to programs, and what a launch is. One fixed table: no autotuning, so that numbers repeat.

Alignment. Triton takes a number for a multiple of 16 only where it sees that the argument is one, and then for a
multiple of nothing else: 1000 classes would be read element by element. So a kernel gets widths and strides as
multiples of a compile-time ``VEC`` (``1000 = 125 * 8``) and multiplies them itself; what the compiler then knows is
enough for accesses of 128 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "COLUMNS_A_LANE",
    "KEPT_COLUMNS_A_LANE",
    "KEPT_THREADS",
    "LOOP_COLUMNS",
    "MAX_KEPT_ROW_BYTES",
    "MAX_WHOLE_ROW_BYTES",
    "Head",
    "Launch",
    "RowPlan",
    "blocks",
    "compute_type",
    "is_amd",
    "is_kept",
    "plan_kept_row",
    "plan_rows",
    "threads_for",
    "tile_of",
    "vector",
]

# A row and its row of R lie in registers up to here (16384 float32; half of that with two rows of R: they would spill).
MAX_WHOLE_ROW_BYTES = 65536
# Logits alone do up to here (32768 float32): 64 in each of 512 threads, of which a multiprocessor then holds no more.
MAX_KEPT_ROW_BYTES = 131072
KEPT_THREADS = 512
KEPT_COLUMNS_A_LANE = 4  # of a block, or as many as it reads at a time; with 8, those that it reads one by one spill
# Above, columns are looped over.
LOOP_COLUMNS = 2048
COLUMNS_A_LANE = 16  # of those, in the registers of a thread
_LEAST_COLUMNS = 16
_LOOP_THREADS = 128
_TILE = 1024


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: everything but the moment."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int = 128

    def run(self) -> None:
        """On the stream of the current device. An empty grid is no launch."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.options())

    def compile(self) -> Any:
        """Compile what :meth:`run` would run, and return it; nothing is run."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self.options())

    def options(self) -> dict[str, Any]:
        """Of the compiler. ``debug`` turns on the assertions that the kernels make (see ``labels.py``), and would one
        after every addition of integers. A warp is 64 threads on AMD's data-centre GPUs."""
        amd = is_amd()
        return {
            "num_warps": max(1, self.threads // (64 if amd else 32)),
            "debug": not amd,
            "sanitize_overflow": False,
        }


def is_amd() -> bool:
    """Whether this torch is for AMD's GPUs."""
    return torch.version.hip is not None


@dataclass(frozen=True)
class RowPlan:
    """One program takes ``rows`` rows, ``block`` columns at a time: all of them at once, in a loop, or, of a kept row,
    in ``kept`` blocks."""

    rows: int
    block: int
    loops: bool
    kept: int = 0

    def programs(self, batch: int) -> int:
        """How many programs take ``batch`` rows."""
        return blocks(batch, self.rows)

    def access(self, vec: int, dtype: torch.dtype) -> int:
        """Neighbours that a thread reads at a time of a kept or long row, 16 bytes at most; 0 for whole rows."""
        return _access(vec, dtype) if self.loops or self.kept else 0


@dataclass(frozen=True)
class Head:
    """One head as its kernel is compiled for it; a constant of the compiler.

    Attributes:
        is_source: it is the source head, whose target distribution comes from the relationship.
        form: of the target, see ``labels.py``.
        has_weight: the classes have weights (the target head's).
        smooths: the labels are smoothed (the target head's).
        kl: the loss is the Kullback-Leibler divergence (the source head's).
        has_gradient: the gradient is wanted.
        is_scaled: the gradient is stored with the factor of a mean over all rows, see ``co_tuning_loss.py``.
        vec: widths and strides of rows are multiples of it.
        rows, block, kept, access: see :class:`RowPlan`.
        dtype: of the arithmetic.
    """

    is_source: bool
    form: int
    has_weight: bool
    smooths: bool
    kl: bool
    has_gradient: bool
    is_scaled: bool
    vec: int
    rows: int
    block: int
    kept: int
    access: int
    dtype: Any


def threads_for(columns: int, dtype: torch.dtype, *, pair: bool = False) -> int:
    """Threads that a row of ``columns`` logits wants: 64 bytes of arithmetic each, so that what a thread does only once
    weighs little (with 32, half as many instructions again an element). ``pair``: with two rows of R beside it."""
    block = _power_of_two(columns)
    if _loops(block, dtype, pair):
        return _LOOP_THREADS
    size = _compute_size(dtype)
    return min(4096 // size, max(64, block * size // 64))


def plan_rows(columns: int, dtype: torch.dtype, threads: int, *, pair: bool = False) -> RowPlan:
    """Rows of ``columns`` logits for programs of ``threads`` threads: one long row, or several short ones."""
    block = _power_of_two(columns)
    if _loops(block, dtype, pair):
        return RowPlan(1, LOOP_COLUMNS, True)
    return RowPlan(max(1, threads * 32 // (block * _compute_size(dtype))), block, False)


def is_kept(columns: int, dtype: torch.dtype) -> bool:
    """Whether a row is too long for registers with its row of R beside it, but not without. (float64 would spill.)"""
    is_long = _loops(_power_of_two(columns), dtype, False)
    return is_long and dtype != torch.float64 and columns * _compute_size(dtype) <= MAX_KEPT_ROW_BYTES


def plan_kept_row(columns: int, dtype: torch.dtype, vec: int) -> RowPlan:
    """A row for a program of ``KEPT_THREADS`` threads."""
    block = KEPT_THREADS * max(KEPT_COLUMNS_A_LANE, _access(vec, dtype))
    return RowPlan(1, block, False, blocks(columns, block))


def tile_of(columns: int) -> tuple[int, int]:
    """``(rows, columns)`` of a tile for kernels that look at every element alone: a few rows, or a part of one."""
    block = min(_TILE, _power_of_two(columns))
    return _TILE // block, block


def vector(*matrices: Tensor | None) -> int:
    """The largest power of two, 8 at most, that divides the width and the row stride of every matrix."""
    return math.gcd(8, *(n for x in matrices if x is not None for n in (x.shape[1], x.stride(0))))


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count``."""
    return -(-count // size)


def compute_type(dtype: torch.dtype) -> Any:
    """What the arithmetic of a tensor of this dtype is done in, as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _access(vec: int, dtype: torch.dtype) -> int:
    return min(vec, 16 // dtype.itemsize)


def _loops(block: int, dtype: torch.dtype, pair: bool) -> bool:
    return block * _compute_size(dtype) * (2 if pair else 1) > MAX_WHOLE_ROW_BYTES


def _compute_size(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4


def _power_of_two(columns: int) -> int:
    return max(_LEAST_COLUMNS, int(triton.next_power_of_2(columns)))
