"""The loss of linear heads against float64: the conformance table through identity features, and real products.

With the identity matrix as features the logits are the weight's transpose exactly, and so is the weight's gradient that
of the logits. The rule of the table then judges both as it judges the loss of logits.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cotuning_kernels import functional, linear_head, reference
from cotuning_kernels.functional import CoTuningMetrics, CoTuningTerms
from support.backends import Backend, sampled_table
from support.cases import Case
from support.problems import DTYPES, Outcome, Problem
from support.rule import Expectation, verify

_ROWS = 2  # of the source head in a chunk: most cases have several chunks, and a last one that is smaller


def run_linear(problem: Problem, form: str, backend: str) -> Outcome:
    """The problem's logits as products of identity features; the gradients of the weights are those of the logits."""
    logits = problem.source_logits, problem.target_logits
    weights = [each.detach().t().requires_grad_() for each in logits]
    features = tuple(torch.eye(len(each), dtype=each.dtype, device=each.device) for each in logits)
    budget = max(1, _ROWS * weights[0].shape[0] * weights[0].itemsize)
    if form == "source head":
        loss = functional.linear_source_label_loss(
            features[0], weights[0], None, problem.target, problem.relationship, memory_budget=budget, backend=backend,
            **problem.source_options,
        )  # fmt: skip
        return Outcome(loss.detach(), torch.autograd.grad(loss, weights[0], problem.upstream)[0].t())
    terms = functional.linear_co_tuning_loss(
        (features[0], features[1]), weights[0], None, weights[1], None, problem.target, problem.relationship,
        return_terms=True, memory_budget=budget, backend=backend, **problem.options,
    )  # fmt: skip
    assert isinstance(terms, CoTuningTerms)
    source_grad, target_grad = torch.autograd.grad(terms.loss, weights, problem.upstream)
    return Outcome(terms.loss.detach(), source_grad.t(), target_grad.t(), terms.target_term, terms.source_term)


_RUNS = [(case, backend) for case, backend in sampled_table(run_linear, 12) if case.options.get("reduction") != "none"]


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(case, backend, id=f"{case.name}-{backend.name}") for case, backend in _RUNS],
    indirect=["backend"],
)
def test_table(case: Case, backend: Backend, seed: int) -> None:
    for dtype in case.dtypes:
        problem = case.build(dtype, seed)
        if not all(each.isfinite().all() for each in (problem.source_logits, problem.target_logits)):
            pytest.skip("0 * inf is NaN in the product, so such logits stand in no row alone")
        for form in ("both heads", "source head"):
            verify(backend, problem, form, expectation=Expectation(problem, form))


# --------------------------------------------------------------------------------------------------- real products


class Heads:
    """Features and two heads in float64, and the loss of a call with them in any dtype."""

    def __init__(self, draw: torch.Generator, rows: int = 37, width: int = 24, classes: tuple[int, int] = (70, 6)):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.names = ("features", "source_weight", "source_bias", "target_weight", "target_bias")
        self.tensors = (
            normal(rows, width),
            normal(classes[0], width) / math.sqrt(width),
            normal(classes[0]),
            normal(classes[1], width) / math.sqrt(width),
            normal(classes[1]),
        )
        self.relationship = torch.softmax(2 * normal(classes[1], classes[0]), dim=1)
        self.relationship[::2] = 0
        labels = torch.randint(classes[1], (rows,), generator=draw)
        labels[::5] = -100
        self.targets: dict[str, Any] = {
            "labels": labels,
            "pair": (labels, labels.flip(0), torch.rand(rows, generator=draw)),
            "probabilities": torch.softmax(normal(rows, classes[1]), dim=1).float(),
        }
        self.weight = 0.5 + torch.rand(classes[1], generator=draw)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype, copy=True).requires_grad_() for x in self.tensors]


def unfused(leaves: list[Tensor], target: Any, relationship: Tensor, **options: Any) -> Tensor:
    """``features @ W.T`` and the reference: what every torch user can write."""
    features, source_weight, source_bias, target_weight, target_bias = leaves
    source_logits = F.linear(features, source_weight, source_bias)
    target_logits = F.linear(features, target_weight, target_bias)
    return reference.co_tuning_loss(source_logits, target_logits, target, relationship, **options)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["labels", "pair", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("source_loss", ["cross_entropy", "kl"])
def test_no_less_exact_than_torch(
    backend: Backend, dtype: torch.dtype, kind: str, reduction: str, source_loss: str, draw: torch.Generator
) -> None:
    """Loss and all five gradients against float64; the bound is torch's own error in the same dtype."""
    if backend.device_code and (reduction == "sum") != (source_loss == "kl"):
        pytest.skip(f"{backend.name}: interpreted, two of the four pairs of options are enough")
    heads = Heads(draw)
    options: dict[str, Any] = {
        "weight": heads.weight, "label_smoothing": 0.1, "reduction": reduction, "source_loss": source_loss,
    }  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)

    def solve(leaves: list[Tensor], compute: Any, relationship: Tensor) -> list[Tensor]:
        loss = compute(leaves, heads.targets[kind], relationship, **options)
        return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]

    def fused(leaves: list[Tensor], target: Any, relationship: Tensor, **options: Any) -> Any:
        return functional.linear_co_tuning_loss(
            *leaves, target, relationship, memory_budget=9 * 70 * dtype.itemsize, backend=backend.argument, **options
        )  # fmt: skip

    given = heads.leaves(dtype)
    exact = solve([x.detach().double().requires_grad_() for x in given], unfused, heads.relationship)
    torchs = solve(given, unfused, heads.relationship.to(wide))
    ours = solve(given, fused, heads.relationship.to(wide))
    for name, x, theirs, truth in zip(("loss", *heads.names), ours, torchs, exact, strict=True):
        scale = truth.abs().max()
        error, allowed = ((each - truth).abs().max() / scale for each in (x, theirs))
        units = 16 if dtype == torch.float64 else 2  # the truth in float64 is rounded as well
        assert error <= 2 * allowed + units * torch.finfo(dtype).eps, (name, float(error), float(allowed))


@pytest.mark.parametrize("kind", ["labels", "pair", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "source_loss": "kl", "label_smoothing": 0.2}])
def test_gradcheck(backend: Backend, kind: str, options: dict[str, Any], draw: torch.Generator) -> None:
    if backend.device_code and kind != "labels":
        pytest.skip(f"{backend.name}: interpreted, one kind is enough")
    heads = Heads(draw, rows=5, width=3, classes=(7, 4))

    def loss(*leaves: Tensor) -> Any:
        return functional.linear_co_tuning_loss(
            *leaves, heads.targets[kind], heads.relationship, memory_budget=2 * 7 * 8, backend=backend.argument,
            **options,
        )  # type: ignore[arg-type]  # fmt: skip

    assert torch.autograd.gradcheck(loss, tuple(heads.leaves(torch.float64)))


@pytest.mark.parametrize("kind", ["labels", "pair", "probabilities"])
@pytest.mark.parametrize("shape", ["rows", "tokens"])
def test_metrics(backend: Backend, kind: str, shape: str, draw: torch.Generator) -> None:
    """Accuracies and log-sum-exps against torch's functions on all logits; the loss is the same bits with them."""
    heads = Heads(draw, rows=36)
    leaves, target = heads.leaves(torch.float32), heads.targets[kind]
    arguments: dict[str, Any] = {"memory_budget": 9 * 70 * 4, "backend": backend.argument}
    relationship = heads.relationship.float()
    if shape == "tokens":
        leaves[0] = leaves[0].detach().view(4, 9, -1).requires_grad_()
        of = lambda x: x.view(4, 9, *x.shape[1:])  # noqa: E731
        target = tuple(map(of, target)) if isinstance(target, tuple) else of(target)
    found = functional.linear_co_tuning_loss(*leaves, target, relationship, return_metrics=True, **arguments)
    assert isinstance(found, CoTuningMetrics)
    terms = functional.linear_co_tuning_loss(*leaves, target, relationship, return_terms=True, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, terms, strict=False))

    features, source_weight, source_bias, target_weight, target_bias = (x.detach().double() for x in heads.tensors)
    p = reference.translate_labels(heads.targets[kind], torch.eye(6, dtype=torch.float64))
    q = p @ heads.relationship
    for logits, distribution, accuracy, logsumexp in (
        (F.linear(features, target_weight, target_bias), p, found.target_accuracy, found.target_logsumexp),
        (F.linear(features, source_weight, source_bias), q, found.source_accuracy, found.source_logsumexp),
    ):
        counts = (distribution != 0).any(1)
        right = logits[counts].argmax(1) == distribution[counts].argmax(1)
        torch.testing.assert_close(accuracy, right.float().mean())
        expected = torch.where(counts, logits.logsumexp(1), math.nan).float()
        torch.testing.assert_close(logsumexp.flatten(), expected, equal_nan=True)
        assert logsumexp.shape == (leaves[0].shape[:-1])
        assert not logsumexp.requires_grad


@pytest.mark.parametrize(
    ("row_bytes", "budget", "rows"), [(100, 1000, 10), (100, 1099, 10), (100, 99, 1), (100, 1, 1), (0, 50, 50)]
)
def test_rows_of_a_chunk(row_bytes: int, budget: int, rows: int) -> None:
    assert linear_head.rows_of_chunk(row_bytes, budget) == rows


def test_small_class_weights_cost_float16_no_digits(backend: Backend, draw: torch.Generator) -> None:
    """Gradients of logits are stored before the weights' sum is known: they must not be as small as the weights."""
    heads = Heads(draw)
    leaves, weight = heads.leaves(torch.float16), 1e-6 * heads.weight
    found, exact = (
        torch.autograd.grad(
            1024 * compute(*each, heads.targets["labels"], heads.relationship.float(), weight=weight), each[3]
        )[0].double()
        for compute, each in (
            (partial(functional.linear_co_tuning_loss, backend=backend.argument), leaves),
            (
                lambda *x, **options: unfused(list(x[:5]), *x[5:], **options),
                [x.detach().double().requires_grad_() for x in leaves],
            ),
        )
    )
    assert float((found - exact).norm() / exact.norm()) < 1e-3
