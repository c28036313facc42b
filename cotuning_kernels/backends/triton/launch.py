"""How programs share the rows, and what a launch is. One fixed table without autotuning, so that numbers repeat.

Alignment. Triton knows that an argument is a multiple of 16 or it knows nothing: with 1000 classes it would read
element by element. So a kernel gets widths and strides in units of a constant ``vec`` (``1000 = 125 * 8``) and
multiplies them itself, which is enough for the compiler to make accesses of 128 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "COLUMNS_A_LANE",
    "KEPT_COLUMNS_A_LANE",
    "KEPT_THREADS",
    "LEAST_ORDINARY_THREADS",
    "LOOP_COLUMNS",
    "MAX_KEPT_ROW_BYTES",
    "MAX_ORDINARY_ROW_BYTES",
    "MAX_WHOLE_ROW_BYTES",
    "Head",
    "Launch",
    "RowPlan",
    "blocks",
    "compute_type",
    "is_amd",
    "is_kept",
    "is_ordinary",
    "least_kept_vector",
    "most_programs",
    "ordinary_threads",
    "plan_kept_row",
    "plan_ordinary_row",
    "plan_rows",
    "plan_sparse_row",
    "threads_for",
    "threads_for_sparse",
    "tile_of",
    "vector",
]

# The longest row that lies in registers with its row of R: 16384 in float32, or 8192 with two rows of R or for KL
# (more would spill). An ordinary row (see rows.py) may have 22528 columns, 88 in each of 256 threads.
MAX_WHOLE_ROW_BYTES = 65536
MAX_ORDINARY_ROW_BYTES = 90112
LEAST_ORDINARY_THREADS = 32
_MOST_ORDINARY_THREADS = 256
# The longest row whose logits alone lie in registers: 32768 columns in float32, 128 in each of 256 threads.
MAX_KEPT_ROW_BYTES = 131072


def least_kept_vector(triton_version: str, *, amd: bool) -> int:
    """Return what the widths and strides of kept rows must be multiples of.

    The compilers before Triton 3.7 would spill registers where an access has one or two columns, and that of Triton 3.5
    in every kept row on AMD (16 is more than any :func:`vector`). Those rows are looped over.
    """
    major, minor = triton_version.split(".")[:2]
    version = int(major), int(minor)
    if version >= (3, 7):
        return 1
    return 16 if amd and version < (3, 6) else 4


KEPT_THREADS = 256
# A lane's columns of a kept row's block, or as many as it reads at a time.
KEPT_COLUMNS_A_LANE = 4
# A longer row is looped over, so many columns at a time, of which a thread has COLUMNS_A_LANE in its registers.
LOOP_COLUMNS = 2048
COLUMNS_A_LANE = 16
_LEAST_COLUMNS = 16
_LOOP_THREADS = 128
_TILE = 1024


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, ready to run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int = 128

    def run(self) -> None:
        """Launch on the current stream of the current device, unless the grid is empty."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.options())

    def compile(self) -> Any:
        """Compile what :meth:`run` would run, and return it; nothing is run."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self.options())

    def options(self) -> dict[str, Any]:
        """Return the compiler's options.

        A multiplication and an addition are one instruction, which ``rows.py`` relies on; a later Triton has another
        default. ``debug`` turns on the kernels' assertions (see ``labels.py``). It would also turn on one after every
        addition of integers, which ``sanitize_overflow`` turns off. A warp has 64 threads on AMD's data-centre GPUs.
        """
        amd = is_amd()
        return {
            "num_warps": max(1, self.threads // (64 if amd else 32)),
            "debug": not amd,
            "sanitize_overflow": False,
            "enable_fp_fusion": True,
        }


def is_amd() -> bool:
    """Return whether torch's GPUs are AMD's."""
    return torch.version.hip is not None


@dataclass(frozen=True)
class RowPlan:
    """How a program takes ``rows`` rows, ``block`` columns at a time.

    One block holds whole rows, or ``whole`` blocks hold one; a long row is looped over (``loops``); a kept row has
    ``kept`` blocks.
    """

    rows: int
    block: int
    loops: bool
    kept: int = 0
    whole: int = 0

    def programs(self, batch: int) -> int:
        """Return how many programs take ``batch`` rows."""
        return blocks(batch, self.rows)

    def access(self, vec: int, dtype: torch.dtype) -> int:
        """Return how many neighbours a thread reads at a time: 16 bytes at most, or 0 for whole rows."""
        return _access(vec, dtype) if self.loops or self.kept or self.whole else 0


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
        rows, block, kept, whole, access: see :class:`RowPlan`.
        dtype: of the arithmetic.
        sparse: the relationship is sparse (the source head's).
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
    whole: int
    access: int
    dtype: Any
    sparse: bool = False


def threads_for(columns: int, dtype: torch.dtype, *, wide: bool = False, ordinary: bool = False) -> int:
    """Return how many threads a row of ``columns`` logits wants: one for each 64 bytes of arithmetic.

    With 32 bytes, the instructions that each thread executes once would add half as many again to every element.
    ``wide``: two rows of R lie beside the row, or KL needs ``x`` and ``e`` of ``rows.py`` at a time. ``ordinary``: the
    kernel has ordinary rows, whose threads have registers for 128 bytes.
    """
    block = _power_of_two(columns)
    if _loops(block, dtype, wide):
        return _LOOP_THREADS
    size = _compute_size(dtype)
    if ordinary:
        return max(_least_ordinary_threads(), block * size // 128)
    return min(4096 // size, max(64, block * size // 64))


def plan_rows(columns: int, dtype: torch.dtype, threads: int, *, wide: bool = False) -> RowPlan:
    """Return how programs of ``threads`` threads take rows of ``columns`` logits: one long row or several short."""
    block = _power_of_two(columns)
    if _loops(block, dtype, wide):
        return RowPlan(1, LOOP_COLUMNS, True)
    return RowPlan(max(1, threads * (64 if threads <= 32 else 32) // (block * _compute_size(dtype))), block, False)


def is_ordinary(columns: int, dtype: torch.dtype) -> bool:
    """Return whether the registers hold a row with its row of R."""
    return columns * _compute_size(dtype) <= MAX_ORDINARY_ROW_BYTES


def is_kept(columns: int, dtype: torch.dtype, vec: int) -> bool:
    """Return whether the registers hold a row, but not its row of R beside it."""
    fits = not is_ordinary(columns, dtype) and columns * _compute_size(dtype) <= MAX_KEPT_ROW_BYTES
    return fits and vec >= least_kept_vector(triton.__version__, amd=is_amd())


def plan_kept_row(columns: int, dtype: torch.dtype, vec: int) -> RowPlan:
    """Return how a program of ``KEPT_THREADS`` threads takes a kept row."""
    block = KEPT_THREADS * max(KEPT_COLUMNS_A_LANE, _access(vec, dtype))
    return RowPlan(1, block, False, blocks(columns, block))


def ordinary_threads(columns: int) -> int:
    """Return how many threads an ordinary row wants: 32 columns each, and up to 88 in the longest rows."""
    return max(_least_ordinary_threads(), min(_MOST_ORDINARY_THREADS, _power_of_two(columns) // 32))


def _least_ordinary_threads() -> int:
    """Return the threads of a warp: 32, or 64 on AMD's data-centre GPUs."""
    return LEAST_ORDINARY_THREADS * (2 if is_amd() else 1)


def plan_ordinary_row(columns: int, dtype: torch.dtype, threads: int, vec: int) -> RowPlan:
    """Return how a program of ``threads`` threads takes one row that lies in its registers with its row of R."""
    block = threads * _access(vec, dtype)
    return RowPlan(1, block, False, whole=blocks(columns, block))


def plan_sparse_row(columns: int) -> RowPlan:
    """Return how a program takes one row with a sparse row of R: it is looped over, however short it is."""
    return RowPlan(1, min(LOOP_COLUMNS, _power_of_two(columns)), True)


def threads_for_sparse(columns: int) -> int:
    """Return how many threads a row with a sparse row of R wants: one for the columns of a lane."""
    return max(_least_ordinary_threads(), plan_sparse_row(columns).block // COLUMNS_A_LANE)


def tile_of(columns: int) -> tuple[int, int]:
    """Return ``(rows, columns)`` of a tile, for kernels that treat each element alone: a few rows, or a part of one."""
    block = min(_TILE, _power_of_two(columns))
    return _TILE // block, block


@cache
def most_programs(device: torch.device) -> int:
    """Return how many programs of 128 threads run at a time, about: 8 on each multiprocessor."""
    on_cpu = device.type == "cpu"  # interpreted, or only compiled
    return 8 * (132 if on_cpu else torch.cuda.get_device_properties(device).multi_processor_count)


def vector(*matrices: Tensor | None) -> int:
    """Return the largest power of two, 8 at most, that divides the width and the row stride of every matrix."""
    return math.gcd(8, *(n for x in matrices if x is not None for n in (x.shape[1], x.stride(0))))


def blocks(count: int, size: int) -> int:
    """Return how many blocks of ``size`` hold ``count``."""
    return -(-count // size)


def compute_type(dtype: torch.dtype) -> Any:
    """Return Triton's dtype for the arithmetic on tensors of this dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _access(vec: int, dtype: torch.dtype) -> int:
    return min(vec, 16 // dtype.itemsize)


def _loops(block: int, dtype: torch.dtype, wide: bool) -> bool:
    return block * _compute_size(dtype) * (2 if wide else 1) > MAX_WHOLE_ROW_BYTES


def _compute_size(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4


def _power_of_two(columns: int) -> int:
    return max(_LEAST_COLUMNS, int(triton.next_power_of_2(columns)))
