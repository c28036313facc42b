"""The checkers can fail: each is given a kernel with one planted fault, and must object.

The kernel is a textbook one, written here in a page of torch: like a real kernel it computes loss and gradients at
once from what it reads from memory, stores half-precision gradients before the upstream gradient arrives, and scales
them then. Without a fault it passes the whole table; that shows that the objections below are to the faults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import test_loss_properties as laws
import torch
from conformance import (
    ABSURD_CLASS,
    CASES,
    DTYPES,
    FORMS,
    LAYOUTS,
    Backend,
    Case,
    Expectation,
    Outcome,
    Problem,
    assert_same_bits,
    compute_dtype,
    verify,
)
from test_conformance import check_class_sums, check_temperature_terms
from test_gradcheck import check_backward_twice
from torch import Tensor

import cotuning_kernels as ck
from cotuning_kernels import reference

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
"""Faults that the table alone must find, by what they are, and how one comes by them."""

_LAYOUT_FAULTS = {
    "a row stride taken for the width": "right for contiguous logits only",
    "R's row stride taken for the width": "right for a contiguous relationship only",
    "the labels' stride taken for 1": "right for contiguous labels only",
}
"""Faults that show only where tensors are not contiguous."""


def _read(x: Tensor, contiguous_anyway: bool) -> Tensor:
    """A copy of what a kernel reads; with the fault, as if rows followed each other."""
    if contiguous_anyway:
        strides = (x.shape[1], 1) if x.dim() == 2 else (1,)
        return torch.as_strided(x, x.shape, strides, x.storage_offset()).clone()
    return x.clone()


def _labels(x: Tensor, fault: str) -> Tensor:
    labels = _read(x, fault == "the labels' stride taken for 1")
    # The poison around labels would end in an IndexError: a way to be caught too, but not the one meant here.
    return torch.where(labels == ABSURD_CLASS, torch.zeros_like(labels), labels)


def _distribution(problem: Problem, classes: int, dtype: torch.dtype, fault: str) -> Tensor:
    """``P``, dense."""

    def one_hot(labels: Tensor) -> Tensor:
        rows = torch.zeros(len(labels), classes, dtype=dtype)
        for i, label in enumerate(labels.tolist()):
            if label != problem.ignore_index:
                rows[i, label] = 1
            elif fault == "ignored rows take part":
                rows[i, label % classes] = 1
        return rows

    if isinstance(problem.target, tuple):
        a, b = (one_hot(_labels(labels, fault)) for labels in problem.target[:2])
        share = torch.as_tensor(problem.target[2], dtype=dtype).reshape(-1, 1)
        if fault == "the pair's share swapped":
            share = 1 - share
        return a if fault == "the pair's second label ignored" else share * a + (1 - share) * b
    if problem.target.is_floating_point():
        return problem.target.to(dtype)
    return one_hot(_labels(problem.target, fault))


def _head(z: Tensor, part: Tensor, kl: bool, fault: str) -> tuple[Tensor, Tensor]:
    """Losses and gradients of the rows of one head, with target mass ``part``."""
    takes_part = (part != 0).any(1, keepdim=True)
    vectors = z.shape[1] // 16 * 16 if "tail" in fault else z.shape[1]
    if fault == "NaN swallowed":
        z = z.nan_to_num(-math.inf, math.inf, -math.inf)
    if fault == "-inf taken for a large number":
        z = z.clamp(min=-1e30)
    top = z[:, :64].amax(1, keepdim=True) if "first 64" in fault else z.amax(1, keepdim=True)
    if fault == "no maximum subtracted":
        top = torch.zeros_like(top)
    e = torch.exp(z - top)
    if fault == "exp that flushes below -20":
        e = torch.where(z - top < -20, 0.0, e)
    total = (e[:, :vectors] if fault == "a tail of the sum dropped" else e).sum(1, keepdim=True)
    whole = part.sum(1, keepdim=True)
    origin = torch.zeros_like(top) if fault == "q . z summed as it stands" else top
    product = part * (z - origin)
    if fault != "0 times -inf":
        product = torch.where(part == 0, 0.0, product)
    if fault == "a tail of the dot product dropped":
        product = product[:, :vectors]
    lse = torch.log(total) + (top - origin)
    losses = (lse if fault == "a loss that takes Q for 1" else whole * lse) - product.sum(1, keepdim=True)
    gradients = (1.0 if fault == "a gradient that takes Q for 1" else whole) * e / total - part
    if kl and fault != "the entropy missing in KL":
        losses = losses + (part * torch.log(part) if fault == "KL's 0 log 0" else torch.xlogy(part, part)).sum(1, True)
    nothing = 1e-38 if fault == "ignored rows almost 0" else 0.0
    return torch.where(takes_part, losses, 0.0)[:, 0], torch.where(takes_part, gradients, nothing)


def _textbook_kernel(problem: Problem, form: str, _: str, fault: str = "none") -> Outcome:
    alone = form == "source head"
    logits = [problem.source_logits] if alone else [problem.source_logits, problem.target_logits]
    dtype = compute_dtype(*logits)
    strided = fault == "a row stride taken for the width"
    z = [_read(x, strided).to(dtype) for x in logits]
    if fault == "a row read past its end":
        for k, x in enumerate(logits):
            z[k] = torch.as_strided(x, (len(x), x.shape[1] + 1), x.stride(), x.storage_offset()).to(dtype)
    relationship = _read(problem.relationship, fault == "R's row stride taken for the width").to(dtype)
    classes = relationship.shape[0]
    p = _distribution(problem, classes, dtype, fault)
    probabilities = isinstance(problem.target, Tensor) and problem.target.is_floating_point()

    q = p @ relationship
    supervised = (
        torch.ones(classes, dtype=dtype)
        if fault == "unsupervised rows counted"
        else (relationship != 0).any(1).to(dtype)
    )
    smoothed = p.sum(1, keepdim=True)
    if probabilities or fault == "label smoothing of zero rows":
        smoothed = torch.ones(len(p), 1, dtype=dtype)
    smoothing = 0.0 if fault == "label smoothing missing" else problem.label_smoothing
    weight = (
        torch.ones(classes, dtype=dtype)
        if problem.weight is None or fault == "weight missing"
        else problem.weight.to(dtype)
    )
    part = weight * ((1 - smoothing) * p + smoothing / classes * smoothed)
    counted = p if fault == "weight missing in the divisor" else weight * p
    counts = [(p @ supervised).sum(), torch.tensor(float(len(p)), dtype=dtype) if probabilities else counted.sum()]
    if fault == "ignored rows counted":
        counts = [torch.tensor(float(len(p)), dtype=dtype)] * 2
    wants_mean = (problem.reduction == "mean" and fault != "a sum instead of the mean") or (
        problem.reduction == "sum" and fault == "a mean instead of the sum"
    )

    factors = [1.0 if alone else problem.trade_off, 1.0]
    terms, gradients = [], []
    for k, x in enumerate(logits):
        mass = q if k == 0 else part
        if mass.shape[1] < z[k].shape[1]:  # read past its end
            mass = torch.cat([mass, torch.zeros(len(mass), 1, dtype=dtype)], 1)
        rows, gradient = _head(z[k], mass, k == 0 and problem.source_loss == "kl", fault)
        gradient = gradient[:, : x.shape[1]]
        if fault == "a NaN that spreads to other rows":
            gradient = gradient + 0 * rows.sum()
        stored = gradient.to(x.dtype)
        if fault == "a half-precision gradient rounded toward zero" and x.element_size() == 2:
            away = stored.to(dtype).abs() > gradient.abs()
            stored = torch.where(away, torch.nextafter(stored, torch.zeros_like(stored)), stored)
        if wants_mean:
            count = counts[k]
            nothing = k == 0 and count == 0 and bool((p != 0).any()) and fault != "an empty source mean"
            terms.append(rows.sum() if nothing else rows.sum() / count)
            divisor = torch.where(count == 0, 1.0, count)
        else:
            terms.append(rows if problem.reduction == "none" else rows.sum())
            divisor = torch.ones((), dtype=dtype)
        upstream = problem.upstream.reshape(-1, 1)
        if fault == "upstream gradient ignored":
            upstream = torch.ones_like(upstream)
        elif fault == "one upstream gradient for all rows":
            upstream = upstream[:1]
        factor = (1.0 if fault == "trade_off missing in the gradient" else factors[k]) / divisor * upstream
        scaled = (stored.to(dtype) * factor).to(x.dtype)
        if fault == "a gradient off by 1 %":
            scaled = scaled * 1.01
        elif fault == "a gradient of bfloat16 precision":
            scaled = scaled.bfloat16().to(x.dtype)
        elif fault == "the last row's gradient missing":
            scaled[-1:] = 0
        elif fault == "the last column's gradient missing":
            scaled[:, -1:] = 0
        gradients.append(scaled)
        if fault == "logits modified" and x.numel():
            x[0, 0] += 1
        if fault == "a row written past its end":
            torch.as_strided(x, (len(x), x.shape[1] + 1), x.stride(), x.storage_offset())[:, -1] = 0

    if alone:
        return Outcome(terms[0], gradients[0])
    loss = terms[1] + problem.trade_off * terms[0]
    if fault == "terms swapped":
        terms.reverse()
    if fault == "a loss in the logits' dtype":
        loss = loss.to(problem.source_logits.dtype).to(dtype)
    if form == "in place":
        for x, gradient in zip(logits, gradients, strict=True):
            x.copy_(gradient)
    return Outcome(loss, gradients[0], gradients[1], terms[1], terms[0])


def _backend(fault: str) -> Backend:
    return Backend(f"textbook, {fault}", "", run=partial(_textbook_kernel, fault=fault))


# The shapes of real heads add nothing here but time, and this kernel has one arithmetic for both heads.
_CASES = [case for case in CASES if math.prod(case.shape) <= 300_000 and case.target_logits_dtype is None]


@cache
def _drawn(name: str, dtype: torch.dtype, seed: int) -> tuple[Problem, Expectation]:
    """All faults are held against the same problems."""
    (case,) = (case for case in _CASES if case.name == name)
    problem = case.build(dtype, seed)
    return problem, Expectation(problem, "both heads")


def _objections(fault: str, dtype: torch.dtype, seed: int) -> Iterator[str]:
    """Names of the cases of the table that object."""
    for case in _CASES:
        problem, expectation = _drawn(case.name, dtype, seed)
        try:
            verify(_backend(fault), problem, expectation=expectation)
        except AssertionError:
            yield case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_without_a_fault_passes_the_table(dtype: torch.dtype, seed: int) -> None:
    assert list(_objections("none", dtype, seed)) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_without_a_fault_passes_in_every_form(form: str, dtype: torch.dtype, seed: int) -> None:
    for kind in ("ignoring", "pair", "probabilities"):
        verify(_backend("none"), Case(kind, "", target=kind, weight="random").build(dtype, seed), form)


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
            continue  # its memory is one row, reading on would leave the process's memory
        problem = case.build(torch.float32, seed)
        verify(_backend("none"), problem, logits_layout=layout, other_layout=layout)
        try:
            verify(_backend(fault), problem, logits_layout=layout, other_layout=layout)
        except AssertionError:
            caught_by.append(layout.name)
    assert caught_by, f"no layout objects to {fault} ({_LAYOUT_FAULTS[fault]})"
    assert "contiguous" not in caught_by


def test_the_margins_find_a_row_written_past_its_end_in_place(seed: int) -> None:
    """In place the logits do change, so that only the margins can tell."""
    problem = Case("margins", "", (3, 9, 67)).build(torch.float32, seed)
    with pytest.raises(AssertionError, match="memory around source_logits was written"):
        verify(_backend("a row written past its end"), problem, "in place", logits_layout=LAYOUTS[1])


def test_bits_that_depend_on_the_threads_are_found(seed: int) -> None:
    """One ulp in one element, as another order of summation gives."""
    problem = Case("bits", "", (3, 9, 67)).build(torch.float32, seed)
    first, second = (_textbook_kernel(problem, "both heads", "") for _ in range(2))
    assert_same_bits(first, second, "two runs")
    second.source_grad[2, 66] = torch.nextafter(second.source_grad[2, 66], torch.tensor(2.0))
    with pytest.raises(AssertionError, match="source gradient differs"):
        assert_same_bits(first, second, "two runs")


# ----------------------------------------------------------------------------------------------------- laws of the loss


class _StuckModule(ck.FusedCoTuningLoss):
    """Does not see that its trade_off was set."""

    trade_off = property(ck.FusedCoTuningLoss.trade_off.fget, lambda self, value: None)  # type: ignore[attr-defined]


def _saturating(problem: Problem, form: str, _: str) -> Outcome:
    """Logits above 30 are taken for 30, so that exp cannot overflow."""
    return _textbook_kernel(problem.map(lambda name, x: x.clamp(max=30) if name.endswith("logits") else x), form, "")


_LAW_FAULTS: dict[str, str | Backend] = {
    "every_target_form_equals_its_dense_probabilities": "the pair's share swapped",
    "a_pair_with_one_share_or_one_label_is_plain": "the pair's second label ignored",
    "a_pair_may_be_turned_around": "the pair's second label ignored",
    "rows_may_be_permuted": "the last row's gradient missing",
    "classes_may_be_permuted": "the last column's gradient missing",
    "a_shift_of_all_logits_changes_nothing": Backend("saturating", "reference", run=_saturating),
    "gradients_of_a_row_sum_to_zero": "a gradient that takes Q for 1",
    "linear_in_the_trade_off": "trade_off missing in the gradient",
    "linear_in_the_upstream_gradient": "upstream gradient ignored",
    "sum_and_mean_follow_from_none": "ignored rows counted",
    "kl_is_cross_entropy_less_a_constant": "the entropy missing in KL",
    "the_source_head_alone_is_the_source_term": "terms swapped",
    "translated_labels_are_the_source_targets": "the pair's share swapped",
    "sums_of_two_batches_add_up": "a mean instead of the sum",
    "the_module_is_the_function": Backend(
        "stuck", "reference", lambda: mock.patch.object(ck, "FusedCoTuningLoss", _StuckModule)
    ),
}
"""By law of ``test_loss_properties.py``: a fault of the textbook kernel, or a backend with one, that it must find."""


def test_every_law_has_a_fault_to_find() -> None:
    assert {name.removeprefix("test_") for name in vars(laws) if name.startswith("test_")} == _LAW_FAULTS.keys()


@pytest.mark.parametrize("law", _LAW_FAULTS)
def test_the_law_finds(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the examples that hypothesis draws for it: one where the kernel with the fault objects and that without one
    does not."""
    test, fault = getattr(laws, f"test_{law}"), _LAW_FAULTS[law]
    sound = Backend("textbook", "reference", run=_textbook_kernel)
    faulty = fault if isinstance(fault, Backend) else replace(sound, run=partial(_textbook_kernel, fault=fault))
    holds, found = test.hypothesis.inner_test, []

    def both(backend: Backend, **example: Any) -> None:
        if found:
            return
        holds(sound, **example)
        with backend.using():
            try:
                holds(backend, **example)
            except AssertionError:
                found.append(example)

    monkeypatch.setattr(test.hypothesis, "inner_test", both)
    test(backend=faulty)
    assert found, f"the law that {law.replace('_', ' ')} does not object to {fault}"


# -------------------------------------------------------------------------------------- gradients, sums and temperature


class _ScalesWhatItSaved(torch.autograd.Function):
    """Multiplies the saved gradient where it lies, on every backward pass; as a kernel does, unseen by autograd."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(2 * x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved.data.mul_(upstream).clone()  # type: ignore[no-any-return]


class _HandsOutWhatItSaved(torch.autograd.Function):
    """Right, until somebody changes the gradient that they were given."""

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
