"""The checkers can fail: each gets a kernel with one planted fault, and must object.

The kernel is ``support.textbook_kernel``. Without a fault it passes the whole table, which shows that the objections
below are to the faults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from cotuning_kernels import reference
from support.cases import CASES, Case
from support.checks import check_backward_twice, check_class_sums, check_temperature_terms
from support.layouts import LAYOUTS
from support.problems import DTYPES, FORMS, Problem
from support.rule import Expectation, assert_same_bits, verify
from support.textbook_kernel import textbook_backend, textbook_kernel

_TABLE_FAULTS = {
    "a gradient off by 1 %": "whatever is wrong by a little everywhere",
    "a gradient of bfloat16 precision": "a float32 gradient that went through half precision",
    "a half-precision gradient rounded toward zero": "truncation instead of rounding: half a unit too many",
    "the last row's gradient missing": "a loop that ends a row early",
    "the last column's gradient missing": "a loop that ends a column early",
    "a tail of the sum dropped": "the vector loop runs, its tail does not",
    "a tail of the dot product dropped": "the vector loop runs, its tail does not",
    "a gradient that takes Q for 1": "right for normalised rows of R only",
    "a loss that takes Q for 1": "right for normalised rows of R only",
    "no maximum subtracted": "exp overflows",
    "q . z summed as it stands": "cancels catastrophically where all logits are large",
    "the rows' maximum from their first 64 elements": "exp overflows where the maximum comes late",
    "exp that flushes below -20": "a cheap approximation",
    "0 times -inf": "NaN for a masked class without mass",
    "-inf taken for a large number": "a finite loss where it is infinite",
    "NaN swallowed": "a maximum that ignores NaN, as x86's does",
    "a NaN that spreads to other rows": "a mean's gradient divided by the loss, or shared state",
    "ignored rows take part": "ignore_index not looked at: the label wraps around",
    "ignored rows counted": "a mean over all rows of the batch",
    "ignored rows almost 0": "gradient 1e-38 where it must be 0",
    "unsupervised rows counted": "a source mean over all valid rows",
    "an empty source mean": "0 / 0 where no row is supervised",
    "a sum instead of the mean": "no division",
    "a mean instead of the sum": "a division too many",
    "weight missing in the divisor": "the mean of F.cross_entropy divides by the weights of the labels",
    "weight missing": "class weights not looked at",
    "label smoothing missing": "label_smoothing not looked at",
    "label smoothing of zero rows": "an ignored row is smoothed",
    "the entropy missing in KL": "cross entropy instead of KL",
    "KL's 0 log 0": "NaN where R has a zero",
    "trade_off missing in the gradient": "only the loss is weighted",
    "a source term with factor 0 computed": "0 times an infinite or NaN loss is NaN",
    "upstream gradient ignored": "right for loss.backward() only",
    "one upstream gradient for all rows": "right for a scalar loss only",
    "terms swapped": "a log that shows the wrong head",
    "the pair's second label ignored": "mixup as if it were plain",
    "the pair's share swapped": "1 - share for share",
    "logits modified": "scratch space in the caller's memory",
    "a row read past its end": "the mask of the tail is one too long",
    "a row written past its end": "the mask of the tail is one too long",
    "a loss in the logits' dtype": "bfloat16 losses are good to two digits",
}
"""Faults that the table alone must find, and how each arises in practice."""

_LAYOUT_FAULTS = {
    "a row stride taken for the width": "right for contiguous logits only",
    "R's row stride taken for the width": "right for a contiguous relationship only",
    "the labels' stride taken for 1": "right for contiguous labels only",
}
"""Faults that show only where tensors are not contiguous."""


# The shapes of real heads add nothing here but time, and this kernel has one arithmetic for both heads.
_CASES = [case for case in CASES if math.prod(case.shape) <= 300_000 and case.target_logits_dtype is None]


@cache
def _drawn(name: str, dtype: torch.dtype, seed: int) -> tuple[Problem, Expectation]:
    """All faults run the same problems."""
    (case,) = (case for case in _CASES if case.name == name)
    problem = case.build(dtype, seed)
    return problem, Expectation(problem, "both heads")


def _objections(fault: str, dtype: torch.dtype, seed: int) -> Iterator[str]:
    """Names of the cases of the table that object."""
    for case in _CASES:
        problem, expectation = _drawn(case.name, dtype, seed)
        try:
            verify(textbook_backend(fault), problem, expectation=expectation)
        except AssertionError:
            yield case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_without_a_fault_passes_the_table(dtype: torch.dtype, seed: int) -> None:
    assert list(_objections("none", dtype, seed)) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_without_a_fault_passes_in_every_form(form: str, dtype: torch.dtype, seed: int) -> None:
    for kind in ("ignoring", "pair", "probabilities"):
        verify(textbook_backend("none"), Case(kind, "", target=kind, weight="random").build(dtype, seed), form)


@pytest.mark.parametrize("fault", _TABLE_FAULTS)
def test_the_table_finds(fault: str, seed: int) -> None:
    found = any(True for dtype in (torch.float32, torch.bfloat16) for _ in _objections(fault, dtype, seed))
    assert found, f"no case of the table objects to {fault} ({_TABLE_FAULTS[fault]})"


@pytest.mark.parametrize("fault", _LAYOUT_FAULTS)
def test_the_layouts_find(fault: str, seed: int) -> None:
    case = Case("layouts", "", (5, 9, 67), "ignoring", weight="random")
    caught_by = []
    for layout in LAYOUTS:
        if layout.expanded:
            continue  # its memory is one row: reading on would leave the process's memory
        problem = case.build(torch.float32, seed)
        verify(textbook_backend("none"), problem, logits_layout=layout, other_layout=layout)
        try:
            verify(textbook_backend(fault), problem, logits_layout=layout, other_layout=layout)
        except AssertionError:
            caught_by.append(layout.name)
    assert caught_by, f"no layout objects to {fault} ({_LAYOUT_FAULTS[fault]})"
    assert "contiguous" not in caught_by


def test_the_margins_find_a_row_written_past_its_end_in_place(seed: int) -> None:
    """In place the logits change anyway, so only the margins can show it."""
    problem = Case("margins", "", (3, 9, 67)).build(torch.float32, seed)
    with pytest.raises(AssertionError, match="memory around source_logits was written"):
        verify(textbook_backend("a row written past its end"), problem, "in place", logits_layout=LAYOUTS[1])


def test_bits_that_depend_on_the_threads_are_found(seed: int) -> None:
    """One ulp in one element, as from another order of summation."""
    problem = Case("bits", "", (3, 9, 67)).build(torch.float32, seed)
    first, second = (textbook_kernel(problem, "both heads", "") for _ in range(2))
    assert_same_bits(first, second, "two runs")
    second.source_grad[2, 66] = torch.nextafter(second.source_grad[2, 66], torch.tensor(2.0))
    with pytest.raises(AssertionError, match="source gradient differs"):
        assert_same_bits(first, second, "two runs")


# -------------------------------------------------------------------------------------- gradients, sums and temperature


class _ScalesWhatItSaved(torch.autograd.Function):
    """Multiplies the saved gradient in place on every backward pass, unseen by autograd, as a kernel would."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(2 * x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved.data.mul_(upstream).clone()  # type: ignore[no-any-return]


class _HandsOutWhatItSaved(torch.autograd.Function):
    """Correct until the caller changes the gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(2 * x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved.data  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", [_ScalesWhatItSaved, _HandsOutWhatItSaved])
def test_saved_gradients_that_change_are_found(function: type[torch.autograd.Function], draw: torch.Generator) -> None:
    x = torch.randn(5, generator=draw, requires_grad=True)
    upstream = torch.ones(()) if function is _HandsOutWhatItSaved else torch.randn((), generator=draw)
    check_backward_twice((x * x).sum(), (x,), upstream)
    with pytest.raises(AssertionError, match="second backward"):
        check_backward_twice(function.apply(x), (x,), upstream)  # type: ignore[no-untyped-call]


def _sums(logits: Tensor, labels: Tensor, b: float, fault: str) -> tuple[Tensor, Tensor]:
    if fault == "labels shifted":
        labels = torch.where(labels >= 0, (labels + 1) % 4, labels)
    if fault == "ignored rows counted":
        labels = labels.clamp(min=0)
    if fault == "temperature ignored":
        b = 1.0
    if fault == "temperature divided":
        b = 1 / b
    sums, counts = reference.softmax_class_sums(logits, labels, 6, inverse_temperature=b)
    if fault == "half precision":
        sums = sums.bfloat16().double()
    if fault == "last column missing":
        sums[:, -1] = 0
    return sums, counts


def _add(fault: str, sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, b: float) -> None:
    more, rows = _sums(logits, labels, b, fault)
    sums.copy_(more if fault == "overwritten" else sums + more)
    counts += rows
    if fault == "logits modified":
        logits[0, 0] += 1


@pytest.mark.parametrize(
    "fault",
    ["labels shifted", "ignored rows counted", "temperature ignored", "temperature divided", "half precision",
     "last column missing", "overwritten", "logits modified"],
)  # fmt: skip
def test_the_check_of_class_sums_finds(fault: str, seed: int) -> None:
    check_class_sums(partial(_add, "none"), torch.float32, 17, 0.37, seed)
    with pytest.raises(AssertionError):
        check_class_sums(partial(_add, fault), torch.float32, 17, 0.37, seed)


def _terms(fault: str, logits: Tensor, labels: Tensor, b: float) -> Tensor:
    terms = reference.temperature_terms(
        logits, labels, inverse_temperature=1 / b if fault == "temperature divided" else b
    )
    if fault == "variance without the mean":
        terms[2] += (terms[1] / terms[3]) ** 2 * terms[3]
    if fault == "first derivative's sign":
        terms[1] *= -1
    if fault == "mean instead of the sum":
        terms[:3] /= terms[3]
    if fault == "all rows counted":
        terms[3] = len(labels)
    if fault == "off by 0.01 %":
        terms[2] *= 1.0001
    return terms


@pytest.mark.parametrize(
    "fault",
    ["temperature divided", "variance without the mean", "first derivative's sign", "mean instead of the sum",
     "all rows counted", "off by 0.01 %"],
)  # fmt: skip
def test_the_check_of_temperature_terms_finds(fault: str, seed: int) -> None:
    check_temperature_terms(partial(_terms, "none"), torch.float32, 17, 0.37, seed)
    with pytest.raises(AssertionError):
        check_temperature_terms(partial(_terms, fault), torch.float32, 17, 0.37, seed)
