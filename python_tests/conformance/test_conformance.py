"""Every backend against the conformance table: its rows are in ``support.cases``, its rule in ``support.rule``."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning_kernels import autograd, functional, reference
from cotuning_kernels.targets import OperandTarget, operand_target
from support.backends import TABLE_BACKENDS, Backend
from support.cases import CASES, Case, covering
from support.checks import check_class_sums, check_temperature_terms
from support.layouts import LAYOUTS, Layout, Placed, bits
from support.problems import DTYPES, FORMS, Outcome, Problem
from support.rule import Expectation, assert_same_bits, verify

_CASE = {case.name: case for case in CASES}
_COVERING = {case.name for case in covering(CASES)}


@lru_cache(maxsize=len(FORMS) * len(DTYPES))
def _drawn(name: str, dtype: torch.dtype, form: str, seed: int) -> tuple[Problem, Expectation]:
    """The problem and its truth. Tests run case by case through all backends, which share both."""
    problem = _CASE[name].build(dtype, seed)
    return problem, Expectation(problem, form)


# All dtypes in one test: four tests would pay a test's fixed cost, as large as its work, four times.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(
            case.name,
            backend,
            id=f"{case.name}-{backend.name}",
            marks=[pytest.mark.covering] if case.name in _COVERING else [],
        )
        for case in CASES
        for backend in TABLE_BACKENDS
        if backend.takes(case)
    ],
    indirect=["backend"],
)
def test_table(name: str, backend: Backend, seed: int) -> None:
    for dtype in _CASE[name].dtypes:
        for form in FORMS if dtype in backend.all_forms else FORMS[:1]:
            if form in backend.forms:
                problem, expectation = _drawn(name, dtype, form, seed)
                try:
                    verify(backend, problem, form, expectation=expectation)
                except Exception as error:
                    case = f"case {name!r} ({_CASE[name].why}), {dtype}, {form}, {backend.name}, --seed {seed}"
                    raise AssertionError(case) from error


# Three target forms read the other operands in three ways. Widths: a multiple of every vector, and two others.
_LAYOUT_CASES = (
    Case("labels in a layout", "ignored rows are skipped over", (5, 9, 67), "ignoring", weight="random"),
    Case("pair in a layout", "two rows of R at once", (5, 16, 64), "pair", options={"source_loss": "kl"}),
    Case("probabilities in a layout", "a row of P and a row of P R", (5, 17, 131), "probabilities"),
    Case("rows in a layout", "an upstream gradient a row", (5, 9, 67), "int32", options={"reduction": "none"}),
)


@cache
def _in_any_layout(number: int, dtype: torch.dtype, form: str, seed: int) -> tuple[Problem, Expectation | None]:
    """All backends and layouts share the truth too."""
    problem = _LAYOUT_CASES[number].build(dtype, seed)
    return problem, Expectation(problem, form)


@pytest.mark.parametrize("backend", TABLE_BACKENDS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", _LAYOUT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend: Backend, layout: Layout, case: Case, dtype: torch.dtype, seed: int) -> None:
    problem, expectation = _in_any_layout(_LAYOUT_CASES.index(case), dtype, FORMS[0], seed)
    if layout.expanded:  # repeats one row: a different problem
        expectation = None
    verify(backend, problem, logits_layout=layout, expectation=expectation)
    verify(backend, problem, other_layout=layout, expectation=expectation)
    if layout.in_place and "in place" in backend.forms:
        problem, expectation = _in_any_layout(_LAYOUT_CASES.index(case), dtype, "in place", seed)
        verify(backend, problem, "in place", logits_layout=layout, other_layout=layout, expectation=expectation)


@pytest.mark.parametrize("backend", TABLE_BACKENDS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_the_size_of_class_weights_costs_half_precision_no_digits(backend: Backend, size: float, seed: int) -> None:
    """Only their ratios matter in a mean. The table's rule would allow digits lost when a gradient is stored."""
    problem = Case("weights", "", (12, 48, 70), weight="random", upstream="gradient scaler").build(torch.float16, seed)
    assert problem.weight is not None
    problem.weight = problem.weight * size
    expectation = Expectation(problem, FORMS[0])
    ours = verify(backend, problem, expectation=expectation).tensors()["target gradient"].double()
    exact = expectation.truth.tensors()["target gradient"]
    assert ((ours - exact).abs() / exact.abs()).quantile(0.9) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("backend", TABLE_BACKENDS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("kind", ["labels", "pair"])
def test_a_row_of_R_with_a_nan_is_supervised_and_stays_alone(backend: Backend, kind: str, seed: int) -> None:
    """The reference multiplies matrices, so 0 * NaN reaches every row of the batch; in a kernel it must not."""
    if backend.argument == "reference":
        pytest.skip("reference: a matrix product spreads NaN")
    problem = Case("NaN in R", "", (4, 7, 90), kind).build(torch.float32, seed)
    problem.target = torch.arange(4) if kind == "labels" else (torch.arange(4), torch.arange(4), 0.3)
    for entry in (0.2, math.nan):
        problem.relationship[1] = 0
        problem.relationship[1, 5] = entry
        with backend.using():
            given = problem.map(lambda _, x: x.to(backend.device))
            outcome = backend.run(given, "both heads", backend.argument)
        gradient = outcome.source_grad.cpu()
        if entry == 0.2:
            sound = gradient
    assert outcome.loss.isnan()
    assert gradient[1].isnan().all()
    others = [0, 2, 3]  # divided by the same number of supervised rows
    torch.testing.assert_close(gradient[others], sound[others])


@pytest.mark.parametrize("backend", TABLE_BACKENDS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("form", ["both heads", "in place"])
@pytest.mark.parametrize("kind", ["labels", "pair", "probabilities"])
def test_a_trade_off_of_0_reads_no_relationship(backend: Backend, form: str, kind: str, seed: int) -> None:
    """NaN and inf in R do not reach the loss, as NaN and inf in source logits do not (those are in the table)."""
    if form not in backend.forms:
        pytest.skip(f"{backend.name} does not offer this")
    problem = Case("NaN in R", "", (4, 7, 90), kind, options={"trade_off": 0.0}).build(torch.float32, seed)
    expectation = Expectation(problem, form)
    problem.relationship[:, 1], problem.relationship[:, 2] = math.nan, math.inf
    verify(backend, problem, form, expectation=expectation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ignoring", "pair", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_run_and_every_thread_count_gives_the_same_bits(
    backend: Backend, dtype: torch.dtype, kind: str, reduction: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.argument == "reference":
        pytest.skip("reference: plain PyTorch promises no order of summation")
    if backend.device_code:
        pytest.skip(f"{backend.name}: no threads; test_triton.py changes the order of its programs instead")
    if kind == "probabilities":
        monkeypatch.setattr(autograd, "operand_target", _product_on_one_thread)
    # Below and above the 100000 elements from which rows are shared between threads; 301 rows do not divide evenly.
    for batch in (5, 301):
        case = Case(f"{batch} rows, {kind}", "", (batch, 40, 401), kind, options={"reduction": reduction})
        problem = case.build(dtype, seed).map(lambda _, x: x.to(backend.device))
        outcomes: dict[str, Outcome] = {}
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            outcome = backend.run(problem, "both heads", backend.argument)
            assert_same_bits(outcomes.setdefault("first", outcome), outcome, f"{batch} rows on {threads} threads")


def _product_on_one_thread(*arguments: Any) -> OperandTarget:
    """torch multiplies probabilities by the relationship, and its order of summation may follow the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return operand_target(*arguments)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("relationship_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["labels", "int32", "ignoring", "pair", "pair ignoring", "pair, float share", "probabilities"]
)
def test_translated_labels(backend: Backend, relationship_dtype: torch.dtype, kind: str, seed: int) -> None:
    """A row of R is copied bit for bit; a mixture is rounded to R's dtype once (torch's product may do worse)."""
    for width in (1, 15, 64, 131):
        case = Case(
            f"translate {kind} {width}", "", (7, 5, width), kind, "unsupervised", relationship_dtype=relationship_dtype
        )
        problem = case.build(torch.float32, seed)
        relationship = Placed(problem.relationship, device=backend.device)
        target = problem.map(lambda _, x: x.to(backend.device)).target
        given = functional.translate_labels(
            target, relationship.view, ignore_index=problem.ignore_index, backend=backend.argument
        ).cpu()
        relationship.assert_unchanged("relationship")
        exact = reference.translate_labels(problem.target, problem.relationship.double())
        in_float32 = backend.argument == "reference" or kind == "probabilities"
        assert given.dtype == relationship_dtype
        assert given.shape == (7, width)
        if isinstance(problem.target, Tensor) and not problem.target.is_floating_point():
            assert torch.equal(given.double(), exact)
        # Two rounded products and their sum: an ulp of the larger rows, in float32 where torch multiplies matrices.
        eps = max(torch.finfo(relationship_dtype).eps, torch.finfo(torch.float32).eps if in_float32 else 0.0)
        largest, tiny = problem.relationship.double().amax(0), torch.finfo(relationship_dtype).smallest_normal
        assert ((given.double() - exact).abs() <= eps * (exact.abs() + largest + tiny)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 17, 64, 131, 1000])
@pytest.mark.parametrize("inverse_temperature", [1.0, 0.37, 4.0])
def test_class_sums(backend: Backend, dtype: torch.dtype, width: int, inverse_temperature: float, seed: int) -> None:
    def add(sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, b: float) -> None:
        if backend.argument == "reference":
            more, rows = reference.softmax_class_sums(logits, labels, len(sums), inverse_temperature=b)
            sums += more
            counts += rows
        else:
            torch.ops.cotuning_kernels.add_class_sums_(sums, counts, logits, labels, b, -100)

    check_class_sums(add, dtype, width, inverse_temperature, seed, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 15, 17, 64, 131, 1000])
@pytest.mark.parametrize("inverse_temperature", [1.0, 0.37, 4.0])
def test_temperature_terms(
    backend: Backend, dtype: torch.dtype, width: int, inverse_temperature: float, seed: int
) -> None:
    def terms_of(logits: Tensor, labels: Tensor, b: float) -> Tensor:
        if backend.argument == "reference":
            return reference.temperature_terms(logits, labels, inverse_temperature=b)
        terms: Tensor = torch.ops.cotuning_kernels.temperature_terms(logits, labels, b, -100)
        return terms

    check_temperature_terms(terms_of, dtype, width, inverse_temperature, seed, backend.device)


@pytest.mark.parametrize("name", ["temperature_terms", "class sums"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_give_the_same_bits_on_every_thread_count(
    backend: Backend, name: str, dtype: torch.dtype, draw: torch.Generator
) -> None:
    if backend.argument == "reference":
        pytest.skip("reference: plain PyTorch promises no order of summation")
    if backend.device_code:
        pytest.skip(f"{backend.name}: no threads; test_triton.py changes the order of its programs instead")
    logits = (3 * torch.randn(301, 401, generator=draw)).to(backend.device, dtype)
    labels = torch.randint(9, (301,), generator=draw).to(backend.device)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        if name == "temperature_terms":
            results.append(torch.ops.cotuning_kernels.temperature_terms(logits, labels, 0.7, -100))
        else:
            sums = torch.zeros(9, 401, dtype=torch.float64, device=backend.device)
            counts = torch.zeros(9, dtype=torch.int64, device=backend.device)
            torch.ops.cotuning_kernels.add_class_sums_(sums, counts, logits, labels, 0.7, -100)
            results.append(sums)
    assert all(torch.equal(bits(results[0]), bits(other)) for other in results[1:])
