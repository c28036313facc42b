"""Optional, and independent of Triton's interpreter: the kernels' intermediate code, run on the CPU by ttsem.

In the compiler's output it finds accesses outside a tensor, two programs that touch one number, and arithmetic in the
wrong precision. ``pip install ttsem`` enables these tests; ttsem requires Python 3.12, but 0.1.0 runs on 3.11 with
``pip install --no-deps --ignore-requires-python ttsem``. They take a minute or two and need a separate run: together
with other tests they are skipped (conftest.py says why).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from cotuning_kernels import backends
from support.backends import Backend
from support.cases import Case
from support.checks import check_class_sums, check_temperature_terms
from support.layouts import LAYOUTS
from support.problems import DTYPES
from support.rule import Record, error_lines, verify

sanitize = pytest.importorskip("ttsem.sanitize", reason="ttsem is not installed: see the top of this file")
_MISSING = backends.missing_reason("triton")
if _MISSING is not None:
    pytest.skip(f"triton: {_MISSING}", allow_module_level=True)

import triton  # noqa: E402
from ttsem import pidraces  # noqa: E402

from cotuning_kernels.backends.triton import IMPLEMENTATIONS, counters, rows  # noqa: E402
from cotuning_kernels.backends.triton import co_tuning_loss as loss  # noqa: E402
from support.planted import plant  # noqa: E402
from support.stand_in import cpu_served_by  # noqa: E402


@contextlib.contextmanager
def _torch_cuda_put_back() -> Iterator[None]:
    """ttsem makes torch.cuda report a GPU and leaves it so: later tests would believe that there is one."""
    before = dict(vars(torch.cuda))
    try:
        yield
    finally:
        for name, value in before.items():
            if vars(torch.cuda)[name] is not value:
                setattr(torch.cuda, name, value)


def _without_what_is_counted(log: list[Any] | None) -> list[Any]:
    """The accesses of a launch, in their order, without those that a counter orders: accesses of a program after its
    count to addresses that other programs touch only before their own, earlier counts. ttsem does not know this order
    and would report a race. (test_triton_static.py checks in intermediate and machine code that a count orders memory.)
    """
    counts: dict[int, dict[Any, int]] = {}  # when each program was counted, by the address of the counter
    for when, (program, kind, _, addresses, *_) in enumerate(log or ()):
        if kind == "a":
            counts.setdefault(int(addresses[0]), {})[program] = when
    kept = []
    for when, entry in enumerate(log or ()):
        program, kind, operation, addresses, size, values = entry
        seen: dict[Any, int] = {}  # by program: accesses until this one are visible here
        for counted in counts.values():
            if counted.get(program, when) < when:
                for other, at in counted.items():
                    if at < counted[program]:
                        seen[other] = max(at, seen.get(other, at))
        if seen and kind != "a":
            unordered = np.zeros(addresses.size, bool)
            for at, (other, _, _, touched, *_) in enumerate(log or ()):
                if other != program and at > seen.get(other, -1):
                    unordered |= np.isin(addresses, touched)
            values = None if values is None else values[unordered]
            entry = program, kind, operation, addresses[unordered], size, values
        if entry[3].size:
            kept.append(entry)
    return kept


_find_race = pidraces.find_race


@contextlib.contextmanager
def _run_by_ttsem(planted: ModuleType | None = None) -> Iterator[None]:
    """CPU tensors are served by the compiled kernels, which ttsem runs."""
    functions = dict(IMPLEMENTATIONS)
    if planted is not None:
        functions |= {name: getattr(planted, name) for name in ("co_tuning_loss", "co_tuning_loss_")}
    both_overloads = {f"{name}{overload}": f for name, f in functions.items() for overload in ("", ".triton")}
    driver = triton.runtime.driver
    with (
        _torch_cuda_put_back(),
        mock.patch.object(driver, "_active", driver._active),
        mock.patch.object(pidraces, "find_race", lambda log: _find_race(_without_what_is_counted(log))),
        mock.patch.dict(counters.of_streams, clear=True),
        cpu_served_by("triton", both_overloads),
        sanitize.session(cuda_is_cpu=False),
    ):
        yield


_TTSEM = Backend("triton-ttsem", "triton", _run_by_ttsem)

_CASES = (
    Case("ttsem groups", "", (9, 70, 90), "ignoring"),
    Case("ttsem labels", "", (5, 9, 67), "ignoring", weight="random"),
    Case("ttsem pair", "", (5, 9, 67), "pair ignoring", "unsupervised", options={"source_loss": "kl"}),
    Case("ttsem probabilities", "", (5, 9, 67), "probabilities", options={"label_smoothing": 0.1}),
    Case("ttsem rows", "", (5, 9, 67), "int32", options={"reduction": "none"}),
    Case("ttsem heads", "", (3, 200, 1000), "labels"),
    Case("ttsem kept", "", (3, 9, 21841), "ignoring", "unnormalised"),
    Case("ttsem packed", "", (3, 9, 21841), "ignoring", relationship_dtype=torch.bfloat16),
    Case("ttsem long", "", (2, 9, 21841), "pair"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_conformance(case: Case, dtype: torch.dtype, seed: int) -> None:
    rows = 4 if case.name == "ttsem groups" else loss.GROUP_ROWS
    with mock.patch.object(loss, "GROUP_ROWS", rows):
        verify(_TTSEM, case.build(dtype, seed))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.in_place], ids=lambda layout: layout.name)
def test_layouts_in_place(layout: object, seed: int) -> None:
    case = Case("ttsem layout", "", (5, 9, 67), "ignoring", weight="random")
    verify(_TTSEM, case.build(torch.bfloat16, seed), "in place", logits_layout=layout, other_layout=layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [17, 1000])
def test_statistics(dtype: torch.dtype, width: int, seed: int) -> None:
    ops = torch.ops.cotuning_kernels
    with _run_by_ttsem():
        check_class_sums(lambda *args: ops.add_class_sums_(*args, -100), dtype, width, 0.37, seed)
        check_temperature_terms(lambda *args: ops.temperature_terms(*args, -100), dtype, width, 0.37, seed)


@pytest.mark.parametrize(
    ("module", "bug", "says"),
    [
        (rows, {"(columns < columns_count)": "(columns <= columns_count)"}, "past the end|different values"),
        (loss, {"out = by_row + rows\n": "out = by_row + 0 * rows\n"}, "instances|race|different values"),
        (loss, {"== count - 1": "== count - 2"}, "program instances .* both touch element"),
        (
            loss,
            {"tl.debug_barrier()": "tl.store(counter, tl.load(counter))"},
            "program instances .* both touch element",
        ),
    ],
    ids=[
        "a mask off by one",
        "programs that write one number",
        "a program that does not wait for the last",
        "a counter that is also written",
    ],
)
def test_a_planted_bug_is_found(module: ModuleType, bug: dict[str, str], says: str, tmp_path: Path, seed: int) -> None:
    planted, _ = plant(tmp_path, module, bug)
    problem = Case("ttsem planted", "", (3, 9, 1000)).build(torch.float32, seed)
    with pytest.raises(sanitize.KernelFault, match=says):
        verify(Backend("planted", "triton", lambda: _run_by_ttsem(planted)), problem)


def test_the_summary_shows_its_errors() -> None:
    records = {(_TTSEM.name, "float32"): Record(1e-8, 2e-8, 3e-8, 4e-8, 5), ("planted", "float32"): Record(checks=1)}
    _, line = error_lines(records)
    assert line.split() == ["triton-ttsem", "float32", "5", "1.0e-08", "2.0e-08", "3.0e-08", "4.0e-08"]


def test_no_gpu_is_left_behind() -> None:
    before = torch.cuda.is_available()
    with _run_by_ttsem():
        torch.cuda.is_available = lambda: not before  # as ttsem does at its first launch
    assert torch.cuda.is_available() is before
