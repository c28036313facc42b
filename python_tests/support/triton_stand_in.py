"""Interpreted Triton kernels in place of the CPU's, so that they run the conformance table without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from unittest import mock

from cotuning_kernels.backends.triton import (
    IMPLEMENTATIONS,
    class_sums,
    counters,
    exponential,
    labels,
    launch,
    rows,
    scale_gradients,
    temperature_terms,
    translate_labels,
)
from cotuning_kernels.backends.triton import co_tuning_loss as loss
from support.stand_in import cpu_served_by
from support.triton_interpreter import interpreted

__all__ = ["MODULES", "long_rows", "ordinary_rows", "triton_interpreted"]

MODULES: tuple[ModuleType, ...] = (
    class_sums, exponential, labels, loss, rows, scale_gradients, temperature_terms, translate_labels,
)  # fmt: skip
"""The modules of the kernels and of the functions that they call."""

_active: list[str] = []


@contextmanager
def long_rows(kernels: ModuleType = loss) -> Iterator[None]:
    """Lower the kernels' limits. Rows are long above 64 columns (normally 16384) and are taken 128 columns at a time.
    They may be kept up to 200 columns (32768), in blocks of 64 or 128 (2048 or 4096). A group of rows whose numbers are
    added up is as small as possible (256). ``kernels`` is the loss's module."""
    with (
        mock.patch.object(launch, "MAX_WHOLE_ROW_BYTES", 256),
        mock.patch.object(launch, "MAX_ORDINARY_ROW_BYTES", 256),
        mock.patch.object(launch, "MAX_KEPT_ROW_BYTES", 4 * 200),
        mock.patch.object(launch, "KEPT_THREADS", 16),
        mock.patch.object(launch, "LOOP_COLUMNS", 128),
        mock.patch.object(kernels, "GROUP_ROWS", 1),
    ):
        yield


@contextmanager
def ordinary_rows() -> Iterator[None]:
    """Lower the least width of the kernels' ordinary rows from 257 to 33 columns, in blocks of 16 or 32."""
    with mock.patch.object(launch, "LEAST_ORDINARY_THREADS", 4):
        yield


@contextmanager
def triton_interpreted(*, loops: bool = False, ordinary: bool = False) -> Iterator[None]:
    """``backend="triton"`` and ``"auto"`` mean the interpreted kernels, for tensors on the CPU.

    ``loops``: with :func:`long_rows`; ``ordinary``: with :func:`ordinary_rows`. Every ``with`` block has new counters,
    because a launch that stops at an error does not reset its own.
    """
    way = "loops" if loops else "ordinary" if ordinary else ""
    if _active[-1:] == [way]:  # nested: a test within a fixture
        yield
        return
    both_overloads = {f"{name}{overload}": f for name, f in IMPLEMENTATIONS.items() for overload in ("", ".triton")}
    with (
        cpu_served_by("triton", both_overloads),
        interpreted(*MODULES),
        long_rows() if loops else ordinary_rows() if ordinary else nullcontext(),
        mock.patch.dict(counters.of_streams, clear=True),
    ):
        _active.append(way)
        try:
            yield
        finally:
            _active.pop()
