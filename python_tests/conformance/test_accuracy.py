"""Inputs whose rounding errors add up or cancel: the kernels' float32 against torch's, both against float64.

The conformance table draws rows in which errors mostly cancel. Here they do not: thousands of equal terms, each of
which a sum rounds in the same direction, and rows whose largest logits come last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cotuning_kernels import backends, functional
from support.backends import TABLE_BACKENDS, Backend
from support.problems import Target

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


def _smoothed(draw: torch.Generator, classes: int, smoothing: float) -> Arguments:
    one = torch.zeros(4, 1), torch.ones(classes, 1)
    return one[0], _normal(draw, 4, classes), torch.arange(4), one[1], {"label_smoothing": smoothing}


def _uniform(draw: torch.Generator, classes: int) -> Arguments:
    relationship = torch.full((3, classes), 1 / classes)
    return 2 * _normal(draw, 5, classes), _normal(draw, 5, 3), torch.arange(5) % 3, relationship, {}


def _late(draw: torch.Generator) -> Arguments:
    """Rows whose last three logits lie far above all others: by a factor of exp(58)."""
    logits = torch.full((40, 200), -58.0)
    logits[:, -3:] = _normal(draw, 40, 3)
    return logits, logits.clone(), torch.arange(40) + 100, torch.softmax(_normal(draw, 200, 200), 1), {}


def _ascending(draw: torch.Generator) -> Arguments:
    source, target = (10 * _normal(draw, 16, n) for n in (1000, 300))
    relationship = torch.softmax(_normal(draw, 300, 1000), 1)
    return source.sort(1).values, target.sort(1).values, torch.arange(16), relationship, {}


CASES: dict[str, Callable[[torch.Generator], Arguments]] = {
    "smoothed labels of 9001 classes": lambda draw: _smoothed(draw, 9001, 0.1),
    "nothing but smoothing, 40000 classes": lambda draw: _smoothed(draw, 40_000, 1.0),
    "a class that looks like all of 21841": lambda draw: _uniform(draw, 21_841),
    "a class that looks like all of 1000": lambda draw: _uniform(draw, 1000),
    "maxima at the end": _late,
    "ascending logits": _ascending,
}


def _solve(arguments: Arguments, backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Losses by row, and the gradients, in float64."""
    source, target, labels, relationship, options = arguments
    heads = [x.to(dtype, copy=True).requires_grad_() for x in (source, target)]
    loss = functional.co_tuning_loss(
        *heads, labels, relationship.to(dtype), reduction="none", backend=backend, **options
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss.sum(), heads))]


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("case", list(CASES))
def test_no_less_exact_than_torch(case: str, isa: str, draw: torch.Generator) -> None:
    if isa not in backends.cpu_isas():
        pytest.skip(f"this processor or this build has no {isa}")
    arguments = CASES[case](draw)
    exact = _solve(arguments, "reference", torch.float64)
    with backends.use_cpu_isa(isa):
        ours = _solve(arguments, "cpp")
    for name, given, torchs, expected in zip(
        ("loss", "source gradient", "target gradient"), ours, _solve(arguments, "reference"), exact, strict=True
    ):
        scale = expected.abs().max().clamp(min=1e-30)
        error, theirs = ((x - expected).abs().max() / scale for x in (given, torchs))
        # Two ulps beyond twice torch's error. Without partial sums and a second sweep of far rows it is up to 500 ulps.
        assert error <= 2 * theirs + 2.5e-7, (name, float(error), float(theirs))


@pytest.mark.parametrize("share", [1e-3, 1e-6])
def test_float16_keeps_the_digits_of_rows_with_little_mass(share: float, draw: torch.Generator) -> None:
    """The first class of each pair has a small share, and the second one has no supervision."""
    relationship = torch.cat([torch.softmax(_normal(draw, 1, 90), 1), torch.zeros(1, 90)])
    target = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long), share
    logits = _normal(draw, 4, 90)

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = logits.to(dtype).requires_grad_()
        loss = functional.source_label_loss(leaf, target, relationship.to(dtype), reduction="sum", backend=backend)
        return torch.autograd.grad(loss, leaf, torch.tensor(1 / share))[0].double()

    if backends.missing_reason("cpp"):
        pytest.skip("needs the C++ kernels")
    exact = gradient(torch.float64, "reference")
    error = (gradient(torch.float16, "cpp") - exact).abs().max() / exact.abs().max()
    assert error < 4e-3


@pytest.mark.parametrize("backend", TABLE_BACKENDS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide_r", [True, False], ids=["R in float32", "R as logits"])
def test_a_probability_of_nearly_1_keeps_its_distance_from_1(
    backend: Backend, dtype: torch.dtype, wide_r: bool, draw: torch.Generator
) -> None:
    """The gradient at the label is p - 1. A p that is rounded to 16 bits before the subtraction leaves 0."""
    if "source head" not in backend.forms:
        pytest.skip(f"{backend.name} has no source term of its own")
    rows, classes = 12, 1000
    logits, labels = _normal(draw, rows, classes), torch.arange(rows)
    logits[labels, 7 * labels] = torch.linspace(11, 21, rows)
    relationship = torch.zeros(rows, classes)
    relationship[labels, 7 * labels] = 1.0
    logits = logits.to(dtype)
    exact = torch.softmax(logits.double(), 1) - relationship
    relationship = relationship if wide_r else relationship.to(dtype)
    with backend.using():
        leaf = logits.to(backend.device, copy=True).requires_grad_()
        loss = functional.source_label_loss(
            leaf, labels.to(backend.device), relationship.to(backend.device), reduction="sum", backend=backend.argument
        )
        gradient = torch.autograd.grad(loss, leaf)[0].cpu().double()
    at_label, expected = (x[labels, 7 * labels] for x in (gradient, exact))
    assert 1e-7 < -expected.max() < 1e-3
    # One rounding to 16 bits (subnormal numbers of float16 have a fixed distance), and float32's errors of p. Torch's
    # log_softmax, the reference's way, rounds the difference of logits of 20.
    units = 16 if backend.argument == "reference" else 8
    allowed = torch.finfo(dtype).eps * expected.abs() / 2 + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((at_label - expected).abs() <= allowed + units * torch.finfo(torch.float32).eps).all(), (at_label, expected)


# ------------------------------------------------------------------------------------------------- KL near its minimum


def _divergences(logits: Tensor, target: Target, relationship: Tensor, dtype: torch.dtype) -> Tensor:
    """KL of the rows as ``F.kl_div`` computes it in ``dtype``, in float64."""
    translated = functional.translate_labels(target, relationship.to(dtype), backend="reference")
    return F.kl_div(F.log_softmax(logits.to(dtype), 1), translated, reduction="none").sum(1).double()


def _map(target: Target, change: Callable[[Tensor], Tensor]) -> Target:
    return tuple(change(x) for x in target) if isinstance(target, tuple) else change(target)  # type: ignore[return-value]


def _kl_target(kind: str, rows: int, draw: torch.Generator) -> Target:
    if kind == "pair":
        return torch.arange(rows), torch.arange(rows).flip(0), torch.rand(rows, generator=draw)
    return torch.softmax(_normal(draw, rows, rows), 1) if kind == "probabilities" else torch.arange(rows)


@pytest.mark.parametrize("backend", TABLE_BACKENDS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(
    ("classes", "kind"),
    [(1000, "labels"), (1000, "pair"), (1000, "probabilities"), (9001, "labels"), (32_000, "labels")],
)
def test_kl_is_no_less_exact_than_torch(
    backend: Backend, classes: int, kind: str, scale: float, draw: torch.Generator
) -> None:
    """From logits that say nothing of R to those whose softmax is R itself, where KL is 0.

    The reference takes torch's own steps, and like torch goes as far below 0 as a logarithm's rounding.
    """
    rows = 12
    relationship = torch.softmax(scale * _normal(draw, rows, classes), 1)
    target = _kl_target(kind, rows, draw)
    translated = functional.translate_labels(target, relationship, backend="reference")
    epsilon = torch.finfo(torch.float32).eps
    for noise in (None, 1.0, 0.01, 0.0):
        logits = scale * _normal(draw, rows, classes)
        if noise is not None:
            logits = translated.log() + 2.0 + noise * logits
        exact = _divergences(
            logits.double(),
            _map(target, lambda x: x.double() if x.is_floating_point() else x),
            relationship,
            torch.float64,
        )
        theirs = (_divergences(logits, target, relationship, torch.float32) - exact).abs().max()
        with backend.using():
            operands = (_map(x, lambda each: each.to(backend.device)) for x in (logits, target, relationship))
            ours = functional.source_label_loss(
                *operands, source_loss="kl", reduction="none", backend=backend.argument
            ).cpu().double()  # fmt: skip
        error = (ours - exact).abs()
        # An epsilon beyond torch's error: the rounding of the result, and torch's luck on few rows.
        assert (error <= theirs + epsilon * (1 + exact.abs())).all(), (noise, float(error.max()), float(theirs))
        if backend.argument != "reference":
            assert (ours >= exact.clamp(max=0) - 2 * epsilon).all(), (noise, float(ours.min()), float(exact.min()))
