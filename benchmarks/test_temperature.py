"""Fitting the temperature to 20 000 rows of 1000 logits."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contestants import TEMPERATURE_CONTESTANTS, check_temperature
from benchmarks.problems import CalibrationProblem
from benchmarks.timing import synchronizer


@pytest.fixture(scope="module")
def problem(device: str) -> CalibrationProblem:
    return CalibrationProblem.make(20_000, 1000, device=device)


@pytest.fixture(scope="module")
def errors(problem: CalibrationProblem) -> dict[str, float]:
    """How far each contestant is from the exact temperature; none is timed that is too far."""
    return check_temperature(problem)


@pytest.mark.parametrize("contestant", TEMPERATURE_CONTESTANTS)
def test_temperature(
    benchmark: BenchmarkFixture, problem: CalibrationProblem, errors: dict[str, float], contestant: str, device: str
) -> None:
    fit, synchronize = TEMPERATURE_CONTESTANTS[contestant], synchronizer(device)
    benchmark.group = "temperature 20000x1000"
    benchmark.extra_info["relative error"] = errors[contestant]

    def call() -> None:
        fit(problem)
        synchronize()

    benchmark.pedantic(call, rounds=3)
