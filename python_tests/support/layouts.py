"""How a tensor may lie in memory, inside a larger buffer full of poison."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in memory. A vector uses only the column step."""

    name: str
    why: str
    row_padding: int = 0
    column_offset: int = 0
    row_step: int = 1
    column_step: int = 1
    expanded: bool = False
    transposed: bool = False

    @property
    def in_place(self) -> bool:
        """Whether gradients can be written over logits that lie like this."""
        return not (self.expanded or self.transposed or self.column_step > 1)


CONTIGUOUS = Layout("contiguous", "the ordinary case: a Linear's output")
LAYOUTS = (
    CONTIGUOUS,
    Layout("padded rows", "stride(0) > N; nothing between the rows may be read or written", row_padding=24),
    Layout("odd columns", "a slice x[:, 3:3+N] of an odd width: no row is aligned to any vector", 5, 3),
    Layout("every second row", "x[::2]: other people's rows lie in between", row_step=2),
    Layout("expanded row", "stride(0) == 0: all rows share one memory", expanded=True),
    Layout("transposed", "stride(1) != 1: columns are not dense, a copy has to be made", transposed=True),
    Layout("every second column", "x[:, ::2], and labels[::2]: not dense either", column_step=2),
)

ABSURD_CLASS = 2**30
_MARGIN = 64


class Placed:
    """A tensor inside a larger, poisoned buffer. ``view`` is what a backend gets."""

    def __init__(self, values: Tensor, layout: Layout = CONTIGUOUS, device: str = "cpu") -> None:
        rows, columns = values.shape if values.dim() == 2 else (1, values.numel())
        column_stride = layout.column_step
        row_stride = (columns * column_stride + layout.row_padding) * layout.row_step
        if layout.expanded:
            row_stride = 0
        if layout.transposed:
            row_stride, column_stride = 1, rows
        # The start is a multiple of 64 elements, hence aligned like the allocator's memory, before column_offset.
        start = _MARGIN + layout.column_offset
        extent = max(rows - 1, 0) * row_stride + columns * column_stride
        poison = math.nan if values.is_floating_point() else ABSURD_CLASS
        self.buffer = torch.full((start + extent + _MARGIN,), poison, dtype=values.dtype, device=device)
        strides = (row_stride, column_stride) if values.dim() == 2 else (column_stride,) * values.dim()
        self.view = self.buffer.as_strided(values.shape, strides, start)
        if layout.expanded and values.dim() == 2:
            self.view[:1].copy_(values[:1])
        else:
            self.view.copy_(values)
        self._before = bits(self.buffer).clone()

    def assert_unchanged(self, name: str) -> None:
        assert torch.equal(bits(self.buffer), self._before), f"{name}, or the memory around it, was modified"

    def assert_margins_unchanged(self, name: str) -> None:
        inside = torch.zeros(self.buffer.shape, dtype=torch.bool, device=self.buffer.device)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        changed = (bits(self.buffer) != self._before) & ~inside
        assert not changed.any(), f"memory around {name} was written, first at element {int(changed.nonzero()[0])}"


def bits(x: Tensor) -> Tensor:
    """The bit pattern as integers: NaN equals NaN, and -0.0 differs from 0.0."""
    if not x.is_floating_point():
        return x
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
