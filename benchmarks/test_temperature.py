"""Fitting the temperature to 20 000 rows of 1000 logits."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contestants import TEMPERATURE_CONTESTANTS, check_temperature
from benchmarks.problems import CALIBRATION_CLASSES, CALIBRATION_ROWS, TEMPERATURES, CalibrationProblem
from benchmarks.timing import finished


@pytest.fixture(scope="module", params=TEMPERATURES, ids=lambda temperature: f"T={temperature}")
def problem(request: pytest.FixtureRequest, device: str) -> CalibrationProblem:
    return CalibrationProblem.make(CALIBRATION_ROWS, CALIBRATION_CLASSES, request.param, device=device)


@pytest.fixture(scope="module")
def errors(problem: CalibrationProblem) -> dict[str, float]:
    """The error of each contestant against the exact temperature. Too large an error fails before timing."""
    return check_temperature(problem)


@pytest.mark.parametrize("contestant", TEMPERATURE_CONTESTANTS)
def test_temperature(
    benchmark: BenchmarkFixture, problem: CalibrationProblem, errors: dict[str, float], contestant: str, device: str
) -> None:
    fit = TEMPERATURE_CONTESTANTS[contestant]
    benchmark.group = f"temperature {CALIBRATION_ROWS}x{CALIBRATION_CLASSES}, T near {problem.temperature}"
    benchmark.extra_info["relative error"] = errors[contestant]
    benchmark.pedantic(finished(lambda: fit(problem), device), rounds=3)
