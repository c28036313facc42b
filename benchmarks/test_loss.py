"""Forward and backward pass of the Co-Tuning loss: every contestant at every shape, grouped by shape and dtype."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contestants import (
    LOSS_CONTESTANTS,
    ExpectedLoss,
    LossContestant,
    check_loss,
    forward_and_backward,
    our_backend,
    prepare,
    unavailable,
)
from benchmarks.problems import DTYPES, SHAPES, LossProblem, Shape
from benchmarks.timing import finished, interleave

_CASES = [pytest.param((shape, dtype), id=f"{shape}-{dtype}") for shape in SHAPES for dtype in DTYPES]


@pytest.fixture(scope="module")
def expected(request: pytest.FixtureRequest, device: str) -> ExpectedLoss:
    """A problem and the reference's result, made once for all contestants."""
    shape, dtype = request.param
    return ExpectedLoss(LossProblem.make(shape, DTYPES[dtype], device=device))


@pytest.mark.parametrize("expected", _CASES, indirect=True)
@pytest.mark.parametrize("contestant", LOSS_CONTESTANTS, ids=lambda contestant: contestant.name.replace(" ", "_"))
def test_forward_and_backward(
    benchmark: BenchmarkFixture, expected: ExpectedLoss, contestant: LossContestant, device: str
) -> None:
    reason = unavailable(contestant, device)
    if reason:
        pytest.skip(reason)
    problem = expected.problem
    step = prepare([contestant], problem)[contestant.name]
    check_loss(contestant, step, expected)
    (batch, target_classes), source_classes = problem.target_logits.shape, problem.source_logits.shape[1]
    shape = Shape(batch, target_classes, source_classes)
    benchmark.group = f"loss {shape} {str(problem.source_logits.dtype).removeprefix('torch.')}"
    benchmark.extra_info["backend"] = our_backend(device)
    call = finished(forward_and_backward(step), device)
    one = interleave({"one": call}, seconds=0.05, before_each=problem.clear_gradients, min_rounds=1)["one"].median
    rounds = max(5, min(2000, round(0.5 / one)))
    benchmark.pedantic(call, setup=problem.clear_gradients, rounds=rounds, warmup_rounds=3)
    problem.clear_gradients()
