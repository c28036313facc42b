"""The Triton backend beyond the conformance table, mostly without a GPU: in the interpreter, the compiler and torch.

``test_conformance.py`` runs the table itself; ``test_triton_static.py`` checks the compiled kernels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.timing import capture
from cotuning_kernels import backends, environment, functional
from cotuning_kernels.backends import operations, triton_version
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.backends.registry import REGISTRY
from cotuning_kernels.options import KL_DIVERGENCE, REDUCTIONS, OperationOptions
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import OperandTarget, operand_target
from support.backends import BACKENDS, run_public
from support.cases import Case
from support.checks import check_class_sums, check_temperature_terms
from support.layouts import Placed
from support.problems import DTYPES, Problem
from support.rule import assert_same_bits, verify

_MISSING = backends.missing_reason("triton")
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"triton: {_MISSING}")

if _MISSING is None:
    import triton
    import triton.language as tl
    import triton.runtime.interpreter as ti

    from cotuning_kernels.backends.triton import IMPLEMENTATIONS, checks, counters, scale_gradients, warmup
    from cotuning_kernels.backends.triton import co_tuning_loss as loss
    from cotuning_kernels.backends.triton import launch as launches
    from support.triton_interpreter import AnyOrder, interpreted, traffic
    from support.triton_stand_in import MODULES, triton_interpreted
    from tools.machine_code.triton import TARGETS, compiled_for

(_ROWS,) = (backend for backend in BACKENDS if backend.name == "triton-rows")


def _op_arguments(problem: Problem) -> tuple[Any, ...]:
    operand = operand_target(problem.target, problem.relationship)
    return (
        problem.source_logits, problem.target_logits, *operand, problem.weight, torch.tensor(2.3, dtype=torch.float64),
        problem.label_smoothing, problem.ignore_index, REDUCTIONS[problem.reduction],
        KL_DIVERGENCE[problem.source_loss], True, True,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- no trace is left


def _state() -> dict[str, Any]:
    """Everything that an interpreted run replaces, by name."""
    watched = (tl, tl.core, tl.core.tensor, tl.math, tl.standard, tl.random, tl.core.dtype, tl.block_type, *MODULES)
    state = {f"{module.__name__}.{name}": value for module in watched for name, value in vars(module).items()}
    state |= {f"builder.{name}": value for name, value in vars(ti.interpreter_builder).items() if "grid" not in name}
    state |= {f"semantic.{name}": value for name, value in vars(ti.interpreter_semantic).items()}
    state["interpret"] = triton.knobs.runtime.interpret
    state["environment"] = dict(os.environ)
    return state


def _compile(problem: Problem) -> list[str]:
    with compiled_for(TARGETS["sm_90"], afresh=True) as launches:
        IMPLEMENTATIONS["co_tuning_loss"](*_op_arguments(problem))
    return [launch.kernel.asm["ptx"] for launch in launches]


def test_interpret_compile_interpret_compile(seed: int) -> None:
    """In one process; afterwards Triton and our modules hold the same objects as before."""
    problem = Case("traces", "", (5, 9, 67), "pair").build(torch.float32, seed)
    before = _state()
    first = verify(_ROWS, problem)
    code = _compile(problem)
    assert_same_bits(first, verify(_ROWS, problem), "before and after compiling")
    assert _compile(problem) == code
    after = _state()
    assert before.keys() == after.keys()
    assert [name for name in before if after[name] is not before[name] and after[name] != before[name]] == []


def test_nothing_is_left_after_an_error() -> None:
    before = _state()
    with pytest.raises(ZeroDivisionError), triton_interpreted(loops=True):
        raise ZeroDivisionError
    assert {name: value for name, value in _state().items() if value is not before[name]}.keys() <= {"environment"}


# ------------------------------------------------------------------------------------------------ order, traffic, size


class _Last:
    """Programs in the order of their numbers, except that one comes last."""

    def __init__(self, last: int) -> None:
        self._last, self.programs = last, 0

    def __call__(self, *size: int) -> Iterator[tuple[int, ...]]:
        programs = list(np.ndindex(*size))
        self.programs = max(self.programs, len(programs))
        first = (self._last + 1) % len(programs)
        return iter(programs[first:] + programs[:first])


def _in_orders(run: Callable[[], Any], loops: bool, *orders: Any) -> list[Any]:
    """Results of ``run`` with the programs in order and in other orders. A GPU promises no order."""
    results = []
    with triton_interpreted(loops=loops):
        for order in (np.ndindex, *orders):
            with mock.patch("support.triton_interpreter.program_order", order):
                results.append(run())
    return results


def _in_some_orders(run: Callable[[], Any], loops: bool, seed: int) -> list[Any]:
    return _in_orders(run, loops, *(AnyOrder(np.random.default_rng(seed + k)) for k in range(2)))


@pytest.mark.parametrize("kind", ["ignoring", "pair", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loops", [False, True])
def test_every_order_of_the_programs_gives_the_same_bits(kind: str, reduction: str, loops: bool, seed: int) -> None:
    """(The static table shows that programs share no number except the counters: there are no other atomics.)"""
    problem = Case("order", "", (19, 70, 150), kind, options={"reduction": reduction}).build(torch.bfloat16, seed)
    first, *others = _in_some_orders(lambda: run_public(problem, "both heads", "triton"), loops, seed)
    for other in others:
        assert_same_bits(first, other, "another order of the programs")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loops", [False, True])
def test_every_program_may_be_the_last(reduction: str, loops: bool, seed: int) -> None:
    """The last program adds up what all have stored, whichever head's rows it has."""
    problem = Case("last", "", (3, 70, 150), options={"reduction": reduction}).build(torch.bfloat16, seed)
    orders = [_Last(last) for last in range(6)]
    first, *others = _in_orders(lambda: run_public(problem, "both heads", "triton"), loops, *orders)
    assert orders[0].programs == (6 if loops else 3)  # one row each, or two source rows and all three target rows
    for other in others:
        assert_same_bits(first, other, "another program was the last")


@pytest.mark.parametrize("loops", [False, True])
def test_every_order_of_the_programs_gives_the_same_statistics(loops: bool, seed: int, draw: torch.Generator) -> None:
    logits, labels = torch.randn(19, 150, generator=draw).bfloat16(), torch.arange(19) % 5

    def run() -> tuple[Tensor, Tensor, Tensor]:
        sums, counts = torch.zeros(5, 150, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
        torch.ops.cotuning_kernels.add_class_sums_(sums, counts, logits, labels, 0.7, -100)
        return sums, counts, torch.ops.cotuning_kernels.temperature_terms(logits, labels, 0.7, -100)

    first, *others = _in_some_orders(run, loops, seed)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("way", "relationship", "reads_z", "reads_q", "writes"),
    [
        ("whole", "unnormalised", 1, 1, 1),
        ("kept", "normalised", 1, 1, 1),
        ("kept", "unnormalised", 1, 2, 2),
        ("kept", "all unsupervised", 0, 1, 1),
        ("kept, 16 bits", "unnormalised", 1, 2, 1),
        ("kept, 16 bits", "all unsupervised", 0, 1, 1),
        ("ordinary", "unnormalised", 1, 1, 1),
        ("ordinary", "all unsupervised", 1, 2, 1),
        ("long", "unnormalised", 2, 2, 1),
        ("long", "all unsupervised", 1, 1, 1),
    ],
)
def test_bytes_moved(
    dtype: torch.dtype, way: str, relationship: str, reads_z: int, reads_q: int, writes: int, seed: int
) -> None:
    """How often each logit of the source head and entry of R is read, each gradient written."""
    # Triton before 3.7 keeps only rows that are read four columns at a time.
    batch, n_t, n_s = 6, 40 if "kept" in way else 70, {"long": 210, "ordinary": 300, "whole": 130}.get(way, 132)
    q_dtype = torch.bfloat16 if "16" in way else torch.float32
    glance = 128 if way == "kept" else 0
    case = Case("traffic", "", (batch, n_t, n_s), relationship=relationship, relationship_dtype=q_dtype)
    problem = case.build(dtype, seed)
    with triton_interpreted(loops=way not in ("whole", "ordinary")), traffic() as moved:
        IMPLEMENTATIONS["co_tuning_loss"](*_op_arguments(problem))
    size = problem.source_logits.element_size()
    by_row = 5 * 4  # two losses, three counts
    source_programs = 3 if way == "whole" else batch
    target_programs = {"whole": 2, "ordinary": 2, "long": batch}.get(way, 1)
    trade_off = 8 * (1 + source_programs)  # for the loss, and by each program of the source head
    # Labels and the numbers per row; scalars and a counter.
    once = {"load": batch * (2 * 8 + by_row) + trade_off, "store": batch * by_row + 5 * 4 + 4}
    expected = {
        "load": batch * (reads_z * n_s + (2 if way == "long" else 1) * n_t) * size
        + batch * (reads_q * n_s + glance) * q_dtype.itemsize
        + once["load"],
        "store": batch * (writes * n_s + n_t) * size + once["store"],
        "atomic": 4 * (source_programs + target_programs),
    }
    if way == "long":  # a row is a group, with its own sums and counter
        expected["load"] += batch * by_row
        expected["store"] += batch * (by_row + 4)
        expected["atomic"] += batch * 4
    assert moved == Counter(expected)


@pytest.mark.parametrize(
    ("n_s", "n_t", "dtype", "options", "kept", "threads"),
    [
        (1000, 9, torch.float32, {}, 0, 32),  # ordinary rows
        (16384, 9, torch.float32, {}, 0, 256),
        (22528, 9, torch.float32, {}, 0, 256),
        (22530, 9, torch.float32, {}, 23, 256),  # 1024 columns a block
        (22532, 9, torch.float32, {"triton": "3.5.1"}, 23, 256),
        (22530, 9, torch.float32, {"triton": "3.6.0"}, 0, 128),  # its compiler would spill
        (22529, 9, torch.float32, {"triton": "3.6.0"}, 0, 128),
        (22529, 9, torch.float32, {"triton": "3.10.1+rocm"}, 23, 256),
        (32768, 8192, torch.float32, {}, 32, 256),
        (32768, 9, torch.bfloat16, {}, 16, 256),  # 16 bytes, 8 columns at a time: 2048 a block
        (32769, 9, torch.float32, {}, 0, 128),  # a loop from here on
        (32000, 9, torch.float32, {"kl_divergence": True}, 0, 128),
        (32000, 9, torch.float64, {}, 0, 128),
        (32000, 8193, torch.float32, {}, 0, 512),  # the target head wants more threads
        (32000, 16385, torch.float32, {}, 0, 128),  # and here fewer
    ],
)
def test_what_rows_are_kept(
    n_s: int, n_t: int, dtype: torch.dtype, options: dict[str, Any], kept: int, threads: int
) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits = new(2, n_s), new(2, n_t)
    labels, kl_divergence = new(2, dtype=torch.int64), options.get("kl_divergence", False)
    version = mock.patch.object(launches.triton, "__version__", options.get("triton", "3.7.0"))
    with mock.patch.object(loss, "counters"), version:
        launch, _ = loss.plan(
            *logits, *logits, OperandTarget(labels, None, None, new(n_t, n_s)),
            OperationOptions(None, new(), 0.0, -100, 0, kl_divergence),
        )  # fmt: skip
    assert (launch.arguments["SOURCE"].kept, launch.threads) == (kept, threads)


@pytest.mark.parametrize(("version", "amd", "least"), [
    ("3.5.1", False, 4), ("3.5.1", True, 16), ("3.6.0", True, 4), ("3.7.0", True, 1), ("3.10.1+rocm", False, 1),
])  # fmt: skip
def test_rows_are_kept_where_the_compiler_does_not_spill(version: str, amd: bool, least: int) -> None:
    assert launches.least_kept_vector(version, amd=amd) == least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["labels", "ignoring"])
def test_the_backward_pass_moves_gradients_only_where_it_changes_them(kind: str, dtype: torch.dtype, seed: int) -> None:
    """Where every row takes part the gradients are final when stored, except in float16, which would lose digits."""
    problem = Case("traffic", "", (6, 7, 130), kind).build(dtype, seed)
    with triton_interpreted():
        _, _, factors, *gradients = IMPLEMENTATIONS["co_tuning_loss"](*_op_arguments(problem))
        with traffic() as moved:
            IMPLEMENTATIONS["scale_gradients_"](*gradients, factors, torch.ones(()))
    whole = sum(x.numel() * x.element_size() for x in gradients)
    if kind == "labels" and dtype != torch.float16:
        assert factors.tolist() == [1.0, 1.0]
        assert moved["store"] == 0
        assert moved["load"] <= 6 * 8  # factors and upstream gradient, for each program
    else:
        assert moved["store"] == whole
        assert moved["load"] >= whole


@pytest.mark.parametrize("programs", [1, 2, 3, 10, 11, 28, 29, 30])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_bounded_number_of_programs_scales_every_tile(programs: int, by_row: bool, draw: torch.Generator) -> None:
    """10 tiles of the source gradient and 19 of the target's, shared by fewer programs than tiles, as many, or more."""
    source, target = torch.randn(37, 130, generator=draw), torch.randn(37, 300, generator=draw)
    factors, upstream = torch.tensor([3.0, 0.5]), torch.randn((37,) if by_row else (), generator=draw)
    column = upstream[:, None] if by_row else upstream
    expected = source * (3.0 * column), target * (0.5 * column)
    with mock.patch.object(scale_gradients, "most_programs", return_value=programs), triton_interpreted():
        launch = scale_gradients.plan(source, target, factors, upstream)
        assert launch.grid == (min(programs, 29),)
        launch.run()
    for ours, theirs in zip((source, target), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_labels_that_start_anywhere_take_no_kernel_of_their_own() -> None:
    """Neither does a trade-off sliced from a schedule, nor the backward pass of one loss among many."""
    logits, relationship = torch.empty(48, 1000), torch.empty(9, 1000)
    labels, schedule = torch.zeros(50, dtype=torch.int64), torch.ones(9, dtype=torch.float64)
    with compiled_for(TARGETS["sm_90"]) as launches:
        for first in (0, 1):
            IMPLEMENTATIONS["co_tuning_loss"](
                logits, torch.empty(48, 9), labels[first : first + 48], None, None, relationship, None, schedule[first],
                0.0, -100, 1, False, True, True,
            )  # fmt: skip
            IMPLEMENTATIONS["scale_gradients_"](logits, torch.empty(48, 9), torch.ones(2), torch.ones(4)[first])
            IMPLEMENTATIONS["translate_labels"](labels[first : first + 48], None, None, relationship, -100)
            IMPLEMENTATIONS["temperature_terms"](logits, labels[first : first + 48], 1.0, -100)
    assert len(launches) == 8
    assert len({id(launch.kernel) for launch in launches}) == 4


def test_bfloat16_on_a_card_without_it_is_refused_in_words() -> None:
    """Triton compiles bfloat16 for compute capability 8.0 and later."""
    device, logits = torch.device("meta"), torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    for capability, refused in (((7, 5), True), ((8, 0), False), ((12, 1), False)):
        checks.computes_bfloat16.cache_clear()
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
            pytest.raises(RuntimeError, match=r"^source_logits is bfloat16, which Triton compiles for")
            if refused
            else nullcontext(),
        ):
            checks.check_matrix("source_logits", logits, device)
        checks.check_matrix("source_logits", logits.half(), device)
    checks.computes_bfloat16.cache_clear()


def test_rows_that_lie_further_apart_than_int32_counts(seed: int) -> None:
    """A row times its stride exceeds 2**31: 4 GiB of addresses, of which only two rows are touched."""
    width, stride = 67, 2**31
    problem = Case("far", "", (2, 2, width)).build(torch.bfloat16, seed)
    try:
        memory = torch.empty(stride + width, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of addresses to be had: {error}")
    far = memory.as_strided((2, width), (stride, 1)).copy_(problem.source_logits)
    with triton_interpreted():
        expected = run_public(problem, "both heads", "triton")
        problem.source_logits = far
        assert_same_bits(expected, run_public(problem, "both heads", "triton"), "rows far apart")


# ----------------------------------------------------------------------------------------------------------- counters


@pytest.mark.parametrize("loops", [False, True])
def test_every_launch_leaves_the_counters_at_0(loops: bool, seed: int) -> None:
    """For every size and reduction, so that the next launch is right, from any thread."""
    problems = [
        Case("counters", "", (batch, 70, 90), options={"reduction": reduction}).build(torch.float32, seed)
        for batch, reduction in ((19, "mean"), (0, "sum"), (1, "none"), (7, "sum"))
    ]
    one_at_a_time = threading.Lock()  # the process has one interpreter

    def run(problem: Problem) -> Any:
        with one_at_a_time, np.errstate(all="ignore"):
            result = run_public(problem, "both heads", "triton")
            assert not counters.counters(torch.device("cpu")).any()
        return result

    with triton_interpreted(loops=loops), mock.patch.object(loss, "MOST_GROUPS", 4):
        first = [run(problem) for problem in problems]
        with ThreadPoolExecutor(4) as threads:
            for once, again in zip(first, threads.map(run, problems), strict=True):
                assert_same_bits(once, again, "the second call")
        assert len(counters.of_streams) == 1


@contextmanager
def _a_gpu(stream: Callable[[], int], *, captures: bool = False) -> Iterator[torch.device]:
    """A device whose tensors have no memory, with mocked streams and capture."""
    with (
        mock.patch.object(triton.runtime.driver, "_active", mock.Mock(get_current_stream=lambda _: stream())),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=captures),
        mock.patch.object(torch.cuda, "Stream") as side,
        mock.patch.object(torch.cuda, "stream"),
        mock.patch.dict(counters.of_streams, clear=True),
    ):
        yield torch.device("meta")
        assert side.return_value.synchronize.call_count == side.call_count  # zeroed before they are handed out


def test_every_stream_has_counters_of_its_own() -> None:
    """All threads of a stream get the same counters, also when they ask at the same time."""
    together, stream = threading.Barrier(4), threading.local()

    def ask(number: int) -> list[Tensor]:
        found = []
        for stream.number in (number % 2, 7):
            together.wait(60)
            found.append(counters.counters(device))
        return found

    with _a_gpu(lambda: stream.number) as device, ThreadPoolExecutor(4) as threads:
        a, b, c, d = threads.map(ask, range(4))
        assert a[0] is c[0] is not b[0] is d[0]
        assert a[1] is b[1] is c[1] is d[1]
        assert len({id(x) for x in (a[0], b[0], a[1])}) == len(counters.of_streams) == 3


def test_a_graph_has_counters_of_its_own() -> None:
    """A node of the graph clears its counters, which are made within the capture and belong only to it."""
    with _a_gpu(lambda: 0, captures=True) as device:
        first, second = counters.counters(device), counters.counters(device)
        assert first is not second
        assert counters.of_streams == {}
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False):
            assert counters.counters(device) is counters.counters(device) is not first


# ----------------------------------------------------------------------------------------------- labels out of range


@pytest.mark.parametrize("bad", [3, -1, -99, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("where", ["labels", "first of a pair", "second of a pair"])
@pytest.mark.parametrize("loops", [False, True])
def test_a_label_out_of_range_is_an_assertion_of_the_device(bad: int, where: str, loops: bool) -> None:
    labels, good = torch.tensor([0, -100, bad, bad]), torch.zeros(4, dtype=torch.int64)
    target: Any = {"labels": labels, "first of a pair": (labels, good, 0.5), "second of a pair": (good, labels, 0.5)}
    placed = [Placed(torch.randn(4, 80)), Placed(torch.randn(4, 3)), Placed(torch.rand(3, 80))]
    with triton_interpreted(loops=loops):
        with pytest.raises(AssertionError, match="a label is out of range"):
            functional.co_tuning_loss(placed[0].view, placed[1].view, target[where], placed[2].view, backend="triton")
        with pytest.raises(AssertionError, match="a label is out of range"):
            functional.translate_labels(target[where], placed[2].view, backend="triton")
    for x in placed:
        x.assert_unchanged("an argument")


@pytest.mark.parametrize("bad", [3, -1])
@pytest.mark.parametrize("pair", [False, True])
def test_without_assertions_a_label_out_of_range_is_nan(bad: int, pair: bool) -> None:
    """On AMD (see labels.py): the loss of its row is NaN, other rows do not change, and no operand is read there."""
    labels, good = torch.tensor([0, -100, bad, 2]), torch.zeros(4, dtype=torch.int64)
    target: Any = (good, labels, 0.5) if pair else labels
    logits, head, relationship = Placed(torch.randn(4, 40)), Placed(torch.randn(4, 3)), Placed(torch.rand(3, 40))
    with triton_interpreted(), mock.patch.object(ti.interpreter_builder, "options", ti.InterpreterOptions()):
        terms = functional.co_tuning_loss(
            logits.view, head.view, target, relationship.view, reduction="none", return_terms=True, backend="triton"
        )
        translated = functional.translate_labels(target, relationship.view, backend="triton")
    assert isinstance(terms, functional.CoTuningTerms)
    for x in terms:
        assert x.isnan().tolist() == [False, False, True, False]
    assert translated.isnan().all(1).tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------ which kernels serve a call


def test_the_overload_chooses_triton_where_another_backend_serves_too(seed: int) -> None:
    """As on a GPU with both: "auto" and the other backend keep their kernels. ``backend="triton"`` chooses for a single
    call, in a compiled graph as well."""
    if (reason := backends.missing_reason("cpp")) is not None:
        pytest.skip(f"cpp: {reason}")
    problem = Case("both", "", (5, 6, 37), "ignoring").build(torch.float32, seed)
    called: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return IMPLEMENTATIONS[name](*args, **kwargs)

        return call

    def step(backend: str) -> Tensor:
        def loss_of(source: Tensor, target: Tensor) -> Tensor:
            loss = functional.co_tuning_loss(
                source, target, problem.target, problem.relationship, backend=backend, return_terms=False
            )
            assert isinstance(loss, Tensor)
            return loss

        source = problem.source_logits.clone().requires_grad_()
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        compiled(source, problem.target_logits).backward()  # type: ignore[no-untyped-call]
        assert source.grad is not None
        return source.grad

    library = torch.library.Library(operations.NAMESPACE, "IMPL")
    try:
        for name in IMPLEMENTATIONS:
            library.impl(f"{name}.triton", counted(name), "CPU")
        serving = {"cpu": [*backends.available("cpu")[:-1], "triton"]}
        with REGISTRY.override(serving=serving), interpreted(*MODULES):
            theirs = step("auto")
            assert called == []
            ours = step("triton")
            assert called == ["co_tuning_loss", "scale_gradients_"]
    finally:
        library._destroy()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_pairs_make_rows_of_a_sparse_relationship_dense(in_place: bool, seed: int) -> None:
    relationship = torch.eye(6, 37).to_sparse_csr()
    problem = Case("sparse", "", (5, 6, 37), "ignoring").build(torch.float32, seed)
    source, target, labels = problem.source_logits, problem.target_logits, problem.target
    with (
        triton_interpreted(),
        mock.patch.object(SparseRows, "to_dense", side_effect=AssertionError("dense rows")),
    ):

        def step(target_: Any) -> None:
            logits = [x.detach().clone().requires_grad_() * 1 for x in (source, target)]
            found = functional.co_tuning_loss(*logits, target_, relationship, backend="triton", inplace=in_place)
            found.backward()  # type: ignore[union-attr]

        step(labels)
        with pytest.raises(AssertionError, match="dense rows"):
            step((labels, labels, 0.5))


def test_names_of_operations() -> None:
    for name in operations.OPERATIONS:
        assert operation(name, "triton") is getattr(torch.ops.cotuning_kernels, name).triton
        assert operation(name, "cpp") is getattr(torch.ops.cotuning_kernels, name).default


def test_triton_is_there_for_gpus_and_not_for_this_processor() -> None:
    assert "triton" in backends.available("cuda")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: it does not serve tensors on 'cpu'"):
        backends.select("cpu", "triton")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "triton is not installed; pip install 'triton>=3.5'"),
        ("__version__ = '3.4.1'\n", "triton 3.4.1 is too old, 3.5 or newer is needed; pip install 'triton>=3.5'"),
        ("", "does not say its version; pip install 'triton>=3.5'"),
        ("__version__ = '3.10.0+rocm'\n", None),
    ],
)
def test_a_missing_or_old_triton_is_one_sentence(source: str | None, reason: str | None, tmp_path: Path) -> None:
    file = tmp_path / "__init__.py"
    file.write_text(source or "")
    spec = None if source is None else mock.Mock(origin=str(file))
    with mock.patch("importlib.util.find_spec", return_value=spec):
        said = triton_version.missing_reason()
    assert said is None if reason is None else (said is not None and reason in said and "\n" not in said)


def test_importing_the_kernels_of_a_missing_triton_is_that_sentence() -> None:
    """An import of ``warmup`` gives that sentence, not the name of a module that Triton lacks."""
    package = "cotuning_kernels.backends.triton"
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
            del sys.modules[name]
        with (
            REGISTRY.override(missing={"triton": "triton 3.6.1 is too old; install it"}),
            pytest.raises(ImportError, match=r"^the Triton kernels cannot be used: triton 3\.6\.1 is too old; install"),
        ):
            importlib.import_module(package)


def test_the_environment_report_says_why_triton_is_missing() -> None:
    with REGISTRY.override(missing={"triton": "triton 3.6.1 is too old"}):
        assert "missing: triton 3.6.1 is too old" in environment.report()


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, cotuning_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("target", ["labels", "pair", "probabilities"])
def test_warmup_compiles_what_a_step_launches(target: str, seed: int) -> None:
    kinds = {"labels": "labels", "pair": "pair", "probabilities": "probabilities"}
    problem = Case("warm", "", (48, 9, 1000), kinds[target]).build(torch.bfloat16, seed)
    with compiled_for(TARGETS["sm_90"]) as launches:
        assert warmup(1000, 9, dtype=torch.bfloat16, target=target, device="cpu") == 3
        ahead = {id(launch.kernel) for launch in launches}
        arguments = _op_arguments(problem)
        _, _, factors, *gradients = IMPLEMENTATIONS["co_tuning_loss"](*arguments)
        IMPLEMENTATIONS["co_tuning_loss"](*arguments[:-2], False, False)
        IMPLEMENTATIONS["scale_gradients_"](*gradients, factors, torch.ones(()))
        assert {id(launch.kernel) for launch in launches} == ahead


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"target": "x"}, "target is 'x', expected one of 'labels', 'pair', 'probabilities'"),
        ({"reduction": "avg"}, "reduction is 'avg', expected 'mean', 'sum' or 'none'"),
        ({"source_loss": ["kl"]}, r"source_loss is \['kl'\], expected 'cross_entropy' or 'kl'"),
    ],
)
def test_warmup_says_what_is_wrong(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}$"):
        warmup(1000, 9, device="cpu", **wrong)


def test_loss_backward_scales_what_was_stored(seed: int) -> None:
    """``loss.backward()`` passes 1, but the stored gradients still lack the factor of the mean."""
    problem = Case("backward", "", (5, 6, 37)).build(torch.float32, seed)
    problem.upstream = torch.ones(())
    verify(_ROWS, problem)


# ------------------------------------------------------------------------------------------------------------ on a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use")


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [17, 1000, 21841])
def test_statistics_on_a_gpu(dtype: torch.dtype, width: int, seed: int) -> None:
    def add(sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, b: float) -> None:
        there = [x.cuda() for x in (sums, counts)]
        operation("add_class_sums_", "triton")(*there, logits.cuda(), labels.cuda(), b, -100)
        sums.copy_(there[0])
        counts.copy_(there[1])

    def terms_of(logits: Tensor, labels: Tensor, b: float) -> Tensor:
        terms: Tensor = operation("temperature_terms", "triton")(logits.cuda(), labels.cuda(), b, -100)
        return terms.cpu()

    check_class_sums(add, dtype, width, 0.37, seed)
    check_temperature_terms(terms_of, dtype, width, 0.37, seed)


@on_a_gpu
def test_a_step_is_captured_in_a_graph_on_a_gpu(seed: int) -> None:
    """No host read, no launch that depends on data: a replay on other numbers gives what a fresh call gives."""
    problem = Case("graph", "", (48, 200, 1000), "ignoring").build(torch.float32, seed).map(lambda _, x: x.cuda())
    source, target = (x.clone().requires_grad_() for x in (problem.source_logits, problem.target_logits))

    def step() -> tuple[Tensor, ...]:
        loss = functional.co_tuning_loss(source, target, problem.target, problem.relationship, backend="triton")
        assert isinstance(loss, Tensor)
        return (loss, *torch.autograd.grad(loss, (source, target)))

    captured, graph = capture(step)
    with torch.no_grad():
        source.neg_()
        target.mul_(0.5)
    graph.replay()
    for replayed, fresh in zip(captured, step(), strict=True):
        assert torch.equal(replayed, fresh)


@on_a_gpu
def test_a_label_out_of_range_stops_the_gpu() -> None:
    code = (
        "import torch; from cotuning_kernels import functional\n"
        "labels = torch.tensor([0, 3], device='cuda')\n"
        "functional.source_label_loss(torch.randn(2, 40).cuda(), labels, torch.rand(3, 40).cuda(), backend='triton')\n"
        "torch.cuda.synchronize()"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "a label is out of range" in finished.stderr + finished.stdout
