"""Laws that the loss obeys for all numbers: hypothesis looks for sizes, options and values that break one.

Problems are in float64, so that errors are only rounding; ``backend`` runs every law on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

import cotuning_kernels as ck
from cotuning_kernels import functional
from support.backends import Backend
from support.cases import Case
from support.problems import Outcome, Problem
from support.textbook_kernel import textbook_kernel

# The fixture only selects the backend; it may stay selected from one example to the next.
_examples = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def _fewer_examples_where_interpreted(
    request: pytest.FixtureRequest, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call in an interpreter takes as long as twenty others: it gets the first 10 examples, and after a failure as
    many as hypothesis needs to shrink it."""
    if not backend.device_code:
        return
    law, tried = request.function.hypothesis.inner_test, 0.0

    def first_ones(**example: Any) -> None:
        nonlocal tried
        tried += 1
        if tried > 10:
            return
        try:
            law(**example)
        except UnsatisfiedAssumption:
            raise
        except Exception:
            tried = -math.inf
            raise

    monkeypatch.setattr(request.function.hypothesis, "inner_test", first_ones)


def _law(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that hypothesis runs with every backend."""
    return pytest.mark.usefixtures("_fewer_examples_where_interpreted")(_examples(test))


_KINDS = ("labels", "int32", "ignoring", "pair", "pair ignoring", "pair, float share", "pair, shares 0 and 1",
          "probabilities", "unnormalised probabilities", "probabilities, zero rows")  # fmt: skip


@st.composite
def problems(
    draw: st.DrawFn, kinds: tuple[str, ...] = _KINDS, reductions: tuple[str, ...] = ("mean", "sum", "none")
) -> Problem:
    """A problem in float64 with any options."""
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 70)))
    options = {
        "reduction": draw(st.sampled_from(reductions)),
        "source_loss": draw(st.sampled_from(["cross_entropy", "kl"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "trade_off": draw(st.floats(-3, 3).filter(bool)),  # 0 leaves the source term out: test_linear_in_the_trade_off
        "ignore_index": draw(st.sampled_from([-100, -1, -7])),
    }
    case = Case(
        "property", "", shape, draw(st.sampled_from(kinds)),
        draw(st.sampled_from(["normalised", "dense", "unnormalised", "unsupervised", "one-hot"])),
        draw(st.sampled_from(["none", "random", "zeros"])), options=options,
    )  # fmt: skip
    return case.build(torch.float64, draw(st.integers(0, 2**31)))


def _run(backend: Backend, problem: Problem) -> Outcome:
    return backend.run(problem, "both heads", backend.argument)


def _assert_close(ours: Outcome, expected: Outcome) -> None:
    for name, x in ours.tensors().items():
        assert torch.allclose(x, expected.tensors()[name], rtol=1e-9, atol=1e-11, equal_nan=True), name


@_law
@given(problem=problems(("labels", "int32", "pair", "pair, float share"), ("sum", "none")))
def test_every_target_form_equals_its_dense_probabilities(backend: Backend, problem: Problem) -> None:
    """Indices and pairs are shorthands. No mean here: its divisor depends on the form, as in F.cross_entropy."""
    dense = replace(problem, target=problem.distribution())
    _assert_close(_run(backend, problem), _run(backend, dense))


@_law
@given(problem=problems(("labels", "ignoring")), other=st.integers(0, 8))
def test_a_pair_with_one_share_or_one_label_is_plain(backend: Backend, problem: Problem, other: int) -> None:
    assert isinstance(problem.target, Tensor)
    plain = _run(backend, problem)
    another = torch.full_like(problem.target, other % problem.target_logits.shape[1])
    for pair in (
        (problem.target, another, 1.0),
        (another, problem.target, torch.zeros(len(another))),
        ck.MixedTarget(problem.target, problem.target, 0.37),
    ):
        _assert_close(_run(backend, replace(problem, target=pair)), plain)


@_law
@given(problem=problems(("pair", "pair ignoring")))
def test_a_pair_may_be_turned_around(backend: Backend, problem: Problem) -> None:
    assert isinstance(problem.target, tuple)
    a, b, share = problem.target
    assert isinstance(share, Tensor)
    turned = replace(problem, target=(b, a, 1 - share.double()))
    _assert_close(_run(backend, turned), _run(backend, problem))


@_law
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_rows_may_be_permuted(backend: Backend, problem: Problem, seed: int) -> None:
    order = torch.randperm(len(problem.source_logits), generator=torch.Generator().manual_seed(seed))
    by_row = {"source_logits", "target_logits", "target", "labels_a", "labels_b", "share"}
    if problem.reduction == "none":
        by_row.add("upstream")
    permuted = _run(backend, problem.map(lambda name, x: x[order] if name in by_row and x.dim() else x))
    expected = _run(backend, problem)
    assert expected.target_grad is not None
    expected.source_grad, expected.target_grad = expected.source_grad[order], expected.target_grad[order]
    if problem.reduction == "none":
        assert expected.target_term is not None
        assert expected.source_term is not None
        expected.loss, expected.target_term = expected.loss[order], expected.target_term[order]
        expected.source_term = expected.source_term[order]
    _assert_close(permuted, expected)


@_law
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_classes_may_be_permuted(backend: Backend, problem: Problem, seed: int) -> None:
    """Source classes in another order, in the logits and in the columns of R: the same loss, the gradient permuted."""
    order = torch.randperm(problem.source_logits.shape[1], generator=torch.Generator().manual_seed(seed))
    columns = {"source_logits", "relationship"}
    permuted = _run(backend, problem.map(lambda name, x: x[:, order] if name in columns else x))
    expected = _run(backend, problem)
    expected.source_grad = expected.source_grad[:, order]
    _assert_close(permuted, expected)


@_law
@given(problem=problems(), shift=st.floats(-500, 500))
def test_a_shift_of_all_logits_changes_nothing(backend: Backend, problem: Problem, shift: float) -> None:
    shifted = problem.map(lambda name, x: x + shift if name.endswith("logits") else x)
    _assert_close(_run(backend, shifted), _run(backend, problem))


@_law
@given(problem=problems())
def test_gradients_of_a_row_sum_to_zero(backend: Backend, problem: Problem) -> None:
    """``sum_j Q softmax_j - q_j = Q - Q``, also where Q is not 1. This follows from the invariance to shifts."""
    outcome = _run(backend, problem)
    assume(outcome.loss.isfinite().all())  # the mean over rows without weight: test_sum_and_mean_follow_from_none
    for gradient in outcome.gradients().values():
        assert gradient is not None
        total = gradient.sum(1).abs()
        assert (total <= 1e-13 * (1 + gradient.abs().sum(1))).all()


@_law
@given(problem=problems(), factor=st.floats(-4, 4))
def test_linear_in_the_trade_off(backend: Backend, problem: Problem, factor: float) -> None:
    """The loss is target_term + trade_off * source_term; the terms and the target's gradient ignore trade_off.

    Except for a trade-off of 0, which leaves the source term out: its term is 0.
    """
    one, scaled = (_run(backend, replace(problem, trade_off=x)) for x in (1.0, factor))
    assert one.target_term is not None
    assert one.source_term is not None
    _assert_close(
        scaled,
        replace(
            one,
            loss=one.target_term + factor * one.source_term,
            source_term=one.source_term if factor else 0 * one.source_term,
            source_grad=factor * one.source_grad,
        ),
    )


@_law
@given(problem=problems(), factor=st.floats(-4, 4))
def test_linear_in_the_upstream_gradient(backend: Backend, problem: Problem, factor: float) -> None:
    scaled, expected = _run(backend, replace(problem, upstream=factor * problem.upstream)), _run(backend, problem)
    assert expected.target_grad is not None
    expected.source_grad, expected.target_grad = factor * expected.source_grad, factor * expected.target_grad
    _assert_close(scaled, expected)


@_law
@given(problem=problems(reductions=("none",)))
def test_sum_and_mean_follow_from_none(backend: Backend, problem: Problem) -> None:
    """Sum the rows; divide by what F.cross_entropy divides by, and the source term by its supervised rows."""
    rows = _run(backend, problem)
    assert rows.target_term is not None
    assert rows.source_term is not None
    scalar = torch.tensor(0.7, dtype=torch.float64)
    total, mean = (
        _run(backend, replace(problem, reduction=reduction, upstream=scalar)) for reduction in ("sum", "mean")
    )
    assert total.target_term is not None
    assert total.source_term is not None
    assert torch.allclose(total.target_term, rows.target_term.sum(), rtol=1e-12)
    assert torch.allclose(total.source_term, rows.source_term.sum(), rtol=1e-12)
    p = problem.distribution()
    probabilities = isinstance(problem.target, Tensor) and problem.target.is_floating_point()
    weight = torch.ones(p.shape[1], dtype=torch.float64) if problem.weight is None else problem.weight.double()
    target_count = torch.tensor(float(len(p))) if probabilities else (p * weight).sum()
    source_count = (p @ (problem.relationship != 0).any(1).double()).sum()
    assert mean.target_term is not None
    assert mean.source_term is not None
    assert torch.allclose(mean.target_term, total.target_term / target_count, rtol=1e-10, equal_nan=True)
    supervised = source_count > 0 or not p.any()
    expected = total.source_term / source_count if supervised else torch.zeros((), dtype=torch.float64)
    assert torch.allclose(mean.source_term, expected, rtol=1e-10, equal_nan=True)


@_law
@given(problem=problems(reductions=("none",)))
def test_kl_is_cross_entropy_less_a_constant(backend: Backend, problem: Problem) -> None:
    """KL = CE - H(q): the same gradient, and at least Q log Q where q sums to Q (the log sum inequality)."""
    kl = _run(backend, replace(problem, source_loss="kl"))
    cross_entropy = _run(backend, replace(problem, source_loss="cross_entropy"))
    assert kl.source_term is not None
    assert cross_entropy.source_term is not None
    q = problem.distribution() @ problem.relationship
    entropy = -torch.xlogy(q, q).sum(1)
    assert torch.allclose(kl.source_term, cross_entropy.source_term - entropy, rtol=1e-9, atol=1e-11)
    assert torch.allclose(kl.source_grad, cross_entropy.source_grad, rtol=1e-9, atol=1e-12)
    total = q.sum(1)
    assert (kl.source_term >= torch.xlogy(total, total) - 1e-12).all()


@_law
@given(problem=problems())
def test_the_source_head_alone_is_the_source_term(backend: Backend, problem: Problem) -> None:
    alone = backend.run(problem, "source head", backend.argument)
    both = _run(backend, replace(problem, trade_off=1.0))
    assert both.source_term is not None
    assert torch.allclose(alone.loss, both.source_term, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert torch.allclose(alone.source_grad, both.source_grad, rtol=1e-12, atol=1e-14, equal_nan=True)


@_law
@given(problem=problems())
def test_translated_labels_are_the_source_targets(backend: Backend, problem: Problem) -> None:
    """F.cross_entropy against the translated labels gives the rows of the source term."""
    translated = functional.translate_labels(
        problem.target, problem.relationship, ignore_index=problem.ignore_index, backend=backend.argument
    )
    rows = torch.nn.functional.cross_entropy(problem.source_logits, translated, reduction="none")
    ours = _run(
        backend, replace(problem, reduction="none", source_loss="cross_entropy", upstream=torch.ones(len(rows)))
    )
    assert ours.source_term is not None
    assert torch.allclose(ours.source_term, rows, rtol=1e-9, atol=1e-11)


@_law
@given(problem=problems(reductions=("sum",)), split=st.integers(0, 6))
def test_sums_of_two_batches_add_up(backend: Backend, problem: Problem, split: int) -> None:
    """What gradient accumulation relies on."""
    by_row = {"source_logits", "target_logits", "target", "labels_a", "labels_b", "share"}

    def part(rows: slice) -> Outcome:
        return _run(backend, problem.map(lambda name, x: x[rows] if name in by_row and x.dim() else x))

    whole, first, second = part(slice(None)), part(slice(0, split)), part(slice(split, None))
    assert torch.allclose(whole.loss, first.loss + second.loss, rtol=1e-10, atol=1e-11)
    assert torch.allclose(whole.source_grad, torch.cat([first.source_grad, second.source_grad]), rtol=1e-10, atol=1e-12)


@_law
@given(problem=problems(), trade_off=st.floats(-3, 3))
def test_the_module_is_the_function(backend: Backend, problem: Problem, trade_off: float) -> None:
    """With the same arguments, also after its trade_off is set to another value, as a warm-up does."""
    options = problem.options
    criterion = ck.FusedCoTuningLoss(problem.relationship, backend=backend.argument, **options)
    for value in (problem.trade_off, trade_off):
        criterion.trade_off = value
        ours = criterion(problem.source_logits, problem.target_logits, problem.target)
        expected = functional.co_tuning_loss(
            problem.source_logits, problem.target_logits, problem.target, problem.relationship,
            backend=backend.argument, **options | {"trade_off": value},
        )  # fmt: skip
        assert isinstance(expected, Tensor)
        assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))


# --------------------------------------------------------------------------------------------------- every law can fail


class _StuckModule(ck.FusedCoTuningLoss):
    """Ignores a new trade_off."""

    trade_off = property(ck.FusedCoTuningLoss.trade_off.fget, lambda self, value: None)  # type: ignore[attr-defined]


def _saturating(problem: Problem, form: str, _: str) -> Outcome:
    """Clamps logits to 30, so that exp cannot overflow."""
    return textbook_kernel(problem.map(lambda name, x: x.clamp(max=30) if name.endswith("logits") else x), form, "")


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
"""By law: a fault of the textbook kernel, or a faulty backend, that the law must find."""


def test_every_law_has_a_fault_to_find() -> None:
    laws = {name.removeprefix("test_") for name, x in globals().items() if hasattr(x, "hypothesis")}
    assert laws == _LAW_FAULTS.keys()


@pytest.mark.parametrize("law", _LAW_FAULTS)
def test_the_law_finds(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis draws an example on which the kernel with the fault breaks the law and the kernel without it does
    not."""
    test, fault = globals()[f"test_{law}"], _LAW_FAULTS[law]
    sound = Backend("textbook", "reference", run=textbook_kernel)
    faulty = fault if isinstance(fault, Backend) else replace(sound, run=partial(textbook_kernel, fault=fault))
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
