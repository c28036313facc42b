"""Temperature scaling, calibration error, reliability diagrams."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from cotuning_kernels import calibration, reference
from cotuning_kernels.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    Reliability,
    TemperatureFit,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from cotuning_kernels.labelled_logits import REFERENCE_ROWS
from cotuning_kernels.plots import plot_reliability
from support.backends import Backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Largest allowed |dT| / T. The kernel's exponentials are float32 unless the logits are float64.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def calibrated(draw: torch.Generator, rows: int, classes: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float64 logits, and labels drawn from their softmax at ``temperature``."""
    logits = 2 * torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=draw)[:, 0]
    return logits * temperature, labels


def slope(logits: Tensor, labels: Tensor, b: float) -> float:
    """d NLL / db by autograd through torch's own cross entropy in float64."""
    inverse = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    nll = F.cross_entropy(logits.double() * inverse, labels, reduction="sum")
    return float(torch.autograd.grad(nll, inverse)[0])


def exact_temperature(logits: Tensor, labels: Tensor) -> float:
    """The root of the slope by bisection, which needs only the slope's sign."""
    low, high = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    while high / low - 1 > 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(logits, labels, middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def check_fit(fit: TemperatureFit, logits: Tensor, labels: Tensor, tolerance: float) -> None:
    """The temperature is the exact one, and both likelihoods are torch's own."""
    exact = exact_temperature(logits, labels)
    assert fit.converged
    assert fit.temperature == pytest.approx(exact, rel=tolerance)
    for nll, temperature in ((fit.nll_before, 1.0), (fit.nll_after, exact)):
        assert nll == pytest.approx(float(F.cross_entropy(logits.double() / temperature, labels)), rel=tolerance)
    assert fit.nll_after <= fit.nll_before * (1 + tolerance)


# ---------------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.3])
def test_the_fit_is_the_exact_optimum(
    backend: Backend, dtype: torch.dtype, temperature: float, draw: torch.Generator
) -> None:
    logits, labels = calibrated(draw, 400, 12, temperature)
    logits = logits.to(dtype)
    check_fit(fit_temperature(logits, labels, backend=backend.argument), logits, labels, TOLERANCES[dtype])


def test_calibrated_logits_give_back_their_temperature(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 20_000, 10, temperature=1.7)
    assert fit_temperature(logits, labels).temperature == pytest.approx(1.7, rel=0.05)


@pytest.mark.parametrize(
    "wrong_terms",
    [
        lambda nll, slope, curvature, rows: (nll, slope + 1e-4 * rows, curvature, rows),
        lambda nll, slope, curvature, rows: (nll, slope, -curvature, rows),
        lambda nll, slope, curvature, rows: (nll + 0.01 * rows, slope, curvature, rows),
        lambda nll, slope, curvature, rows: (nll, slope, curvature, rows + 1),
    ],
    ids=["slope", "curvature", "NLL", "rows"],
)
@pytest.mark.filterwarnings("ignore:fit_temperature")
def test_the_check_of_a_fit_catches_wrong_derivatives(
    wrong_terms: Callable[..., tuple[float, ...]], draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = calibrated(draw, 400, 12, 1.5)
    right = reference.temperature_terms

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        return torch.tensor(wrong_terms(*right(*arguments, **options).tolist()), dtype=torch.float64)

    check_fit(fit_temperature(logits, labels, backend="reference"), logits, labels, 1e-6)
    monkeypatch.setattr(reference, "temperature_terms", wrong)
    fit = fit_temperature(logits, labels, backend="reference")
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        check_fit(fit, logits, labels, 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(20, 300), classes=st.integers(2, 40), truth=st.floats(0.2, 4),
    power=st.floats(-3, 2.5), heavy=st.booleans(),
)  # fmt: skip
def test_the_fit_is_exact_on_every_scale(
    seed: int, rows: int, classes: int, truth: float, power: float, heavy: bool
) -> None:
    """Logits are scaled by a thousandth to hundreds, where plain Newton steps diverge.

    Repeated with a sample that is far too small and often misleading.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    logits = logits**3 if heavy else 2 * logits
    labels = torch.multinomial(torch.softmax(truth * logits, 1), 1, generator=draw)[:, 0]
    logits = logits * 10**power
    assume((logits.argmax(1) != labels).any())  # else there is no finite optimum
    exact = exact_temperature(logits, labels)
    assume(1e-3 < exact < 1e3)
    for sample_rows in (calibration._SAMPLE_ROWS, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "_SAMPLE_ROWS", sample_rows)
            fit = fit_temperature(logits, labels)
        assert fit.converged
        assert fit.temperature == pytest.approx(exact, rel=1e-6)
        assert fit.iterations <= 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.4, 2.3])
def test_a_sample_saves_passes(dtype: torch.dtype, temperature: float, draw: torch.Generator) -> None:
    """It usually saves two passes; in 11 of 600 draws one, as the sample is small. So the median of seven counts."""
    saved = []
    for number in range(7):
        logits, labels = calibrated(draw, 16384, 12, temperature)
        logits = logits.to(dtype)
        fit = fit_temperature(logits, labels)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "_LEAST_STRIDE", len(labels))  # disables the sample
            plain = fit_temperature(logits, labels)
        saved.append(plain.iterations - fit.iterations)
        if number == 0:  # the check takes longer than the fits
            check_fit(fit, logits, labels, TOLERANCES[dtype])
            check_fit(plain, logits, labels, TOLERANCES[dtype])
    assert statistics.median(saved) >= 2, saved
    assert min(saved) >= 1, saved


def test_a_wrong_step_with_the_sample_costs_passes_only(draw: torch.Generator) -> None:
    """Plants a sum over the sample instead of a mean: the fit stays exact but takes more passes."""
    logits, labels = calibrated(draw, 16384, 12, 2.3)
    right = calibration._step_with_sample

    def wrong(terms_at: Callable[[float], Any], *arguments: float) -> float:
        return right(lambda b: (*(32 * term for term in terms_at(b)[:3]), terms_at(b)[3]), *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_step_with_sample", wrong)
        fit = fit_temperature(logits, labels)
    check_fit(fit, logits, labels, 1e-6)
    assert fit.iterations > fit_temperature(logits, labels).iterations


@pytest.mark.parametrize("sample", ["other temperature", "ignored", "separable", "worse than chance"])
def test_a_misleading_sample_does_not_mislead(sample: str, draw: torch.Generator) -> None:
    """Every stride-th row differs from the other rows; the optimum is still that of all rows."""
    logits, labels = calibrated(draw, 16384, 12, 1.4)
    stride = calibration._SAMPLE_STRIDE
    if sample == "other temperature":
        logits[::stride] *= 8
    elif sample == "ignored":
        labels[::stride] = -100
    elif sample == "separable":
        labels[::stride] = logits[::stride].argmax(1)
    else:
        labels[::stride] = logits[::stride].argmin(1)
    fit = fit_temperature(logits, labels)
    check_fit(fit, logits, labels, 1e-6)
    assert fit.iterations <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confident_rows_whose_label_comes_late(dtype: torch.dtype, backend: Backend, draw: torch.Generator) -> None:
    """Nearly all rows are confident and correct: rounding them must not hide the few rows that decide."""
    rows, classes = 100 if backend.device_code else 3000, 200  # interpreted, a row takes milliseconds
    logits = 3 * torch.randn(rows, classes, generator=draw)
    labels = torch.randint(100, classes, (rows,), generator=draw)
    top, wrong = labels.clone(), torch.arange(rows) < 6
    top[wrong] = 64 + torch.arange(6)
    logits[torch.arange(rows), top] += 45
    logits[torch.arange(rows), labels] += torch.where(wrong, 45 - 6 * torch.rand(rows, generator=draw), 0)
    logits = logits.to(dtype)
    fit = fit_temperature(logits, labels, backend=backend.argument)
    assert fit.temperature == pytest.approx(exact_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize("bias", [0.1075, 0.1085, 0.1086, 0.1087, 0.1095, 0.15])
def test_equal_curvatures_on_both_sides_of_the_largest_are_no_convergence(bias: float, backend: Backend) -> None:
    logits = torch.zeros(1000, 4, dtype=torch.float64)
    logits[:, 0] = bias
    labels = torch.ones(1000, dtype=torch.int64)
    labels[:662] = 0
    # The optimum has p(0) = 0.662.
    exact = bias / (math.log(0.662 / 0.338) + math.log(3))
    fit = fit_temperature(logits, labels, backend=backend.argument)
    assert fit.converged
    assert fit.temperature == pytest.approx(exact, rel=1e-6)


def test_separable_data_with_a_tie_have_no_finite_optimum(backend: Backend) -> None:
    """The tied row keeps the NLL above log 2: half precision has such rows."""
    logits = torch.tensor([[0.0, 0.0], [10.0, 0.0], [8.0, 0.0]])
    with pytest.warns(UserWarning, match="still falls"):
        fit = fit_temperature(logits, torch.zeros(3).long(), backend=backend.argument)
    assert (fit.temperature, fit.converged) == (LOWEST_TEMPERATURE, False)
    assert fit.nll_after == pytest.approx(math.log(2) / 3)
    assert fit.iterations < 15


def test_the_likelihood_is_as_good_as_scipys(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 500, 20, 3.1)

    def nll(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    best = minimize_scalar(nll, bracket=(-1.0, 1.0), tol=1e-12)
    fit = fit_temperature(logits, labels)
    assert fit.nll_after <= best.fun + 1e-13
    assert fit.temperature == pytest.approx(math.exp(best.x), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), factor=st.floats(0.1, 10), shift=st.floats(-50, 50))
def test_symmetries(seed: int, factor: float, shift: float) -> None:
    """Scaled logits scale the temperature; a constant added to a row and the order of rows change nothing."""
    draw = torch.Generator().manual_seed(seed)
    logits, labels = calibrated(draw, 200, 7, 1.4)
    expected = fit_temperature(logits, labels).temperature
    order = torch.randperm(200, generator=draw)
    offsets = shift * torch.rand(200, 1, generator=draw, dtype=torch.float64)
    assert fit_temperature(logits * factor, labels).temperature == pytest.approx(factor * expected, rel=1e-6)
    assert fit_temperature(logits + offsets, labels).temperature == pytest.approx(expected, rel=1e-6)
    assert fit_temperature(logits[order], labels[order]).temperature == pytest.approx(expected, rel=1e-6)


def test_ignored_rows_and_masked_classes(backend: Backend, draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 300, 8, 0.6)
    expected = fit_temperature(logits, labels).temperature
    padded = torch.cat([logits, torch.full((300, 2), -math.inf, dtype=torch.float64)], 1)
    rubbish = torch.full((5, 10), math.nan, dtype=torch.float64)
    labels = torch.cat([labels, torch.full((5,), -100)])
    fit = fit_temperature(torch.cat([padded, rubbish]), labels, backend=backend.argument)
    assert fit.temperature == pytest.approx(expected, rel=1e-6)
    fit = fit_temperature(torch.cat([padded, rubbish]), labels.int().masked_fill(labels == -100, 99), ignore_index=99)
    assert fit.temperature == pytest.approx(expected, rel=1e-6)


def test_any_layout(backend: Backend, draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 100, 9, 2.0)
    expected = fit_temperature(logits, labels).temperature
    wide = torch.zeros(100, 27, dtype=torch.float64)
    wide[:, 9:18] = logits
    for view in (logits.t().contiguous().t(), wide[:, 9:18]):
        fit = fit_temperature(view, labels, backend=backend.argument)
        assert fit.temperature == pytest.approx(expected, rel=1e-9)


def test_logits_that_require_grad(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 100, 9, 2.0)
    assert fit_temperature(logits.clone().requires_grad_(), labels) == fit_temperature(logits, labels)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_separable_data_has_no_finite_optimum(
    backend: Backend, scale: float, dtype: torch.dtype, draw: torch.Generator
) -> None:
    logits = torch.randn(200, 10, generator=draw, dtype=dtype)
    labels = logits.argmax(1)
    logits[torch.arange(200), labels] += 0.1
    with pytest.warns(UserWarning, match="falls for ever|still falls"):
        fit = fit_temperature(scale * logits, labels, backend=backend.argument)
    assert (fit.temperature, fit.converged) == (LOWEST_TEMPERATURE, False)
    assert fit.nll_after <= fit.nll_before
    assert fit.iterations < 40


def test_one_wrong_row_makes_the_optimum_finite(backend: Backend, draw: torch.Generator) -> None:
    """Nearly separable data: the curvature is tiny on the way to the optimum."""
    rows = 200 if backend.device_code else 2000  # interpreted, a row takes milliseconds
    logits = torch.randn(rows, 10, generator=draw, dtype=torch.float64)
    labels = logits.argmax(1)
    labels[7] = (labels[7] + 1) % 10
    check_fit(fit_temperature(logits, labels, backend=backend.argument), logits, labels, 1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_labels_that_are_worse_than_chance(backend: Backend, scale: float, draw: torch.Generator) -> None:
    logits = scale * torch.randn(200, 10, generator=draw)
    with pytest.warns(UserWarning, match="no likelier than chance"):
        fit = fit_temperature(logits, logits.argmin(1), backend=backend.argument)
    assert (fit.temperature, fit.converged) == (HIGHEST_TEMPERATURE, False)
    expected = F.cross_entropy(logits.double() / HIGHEST_TEMPERATURE, logits.argmin(1))
    assert fit.nll_after == pytest.approx(float(expected), rel=1e-6)


def test_one_class_and_constant_logits(backend: Backend) -> None:
    """Every temperature is as good as any other: 1 changes nothing."""
    one = fit_temperature(torch.randn(5, 1), torch.zeros(5).long(), backend=backend.argument)
    assert (one.temperature, one.nll_after, one.converged) == (1.0, 0.0, True)
    flat = fit_temperature(torch.zeros(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), backend=backend.argument)
    assert (flat.temperature, flat.converged) == (1.0, True)
    assert flat.nll_after == pytest.approx(math.log(4), rel=1e-6)


def test_too_few_iterations(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 300, 10, 5.0)
    with pytest.warns(UserWarning, match="no convergence in 2 iterations") as record:
        fit = fit_temperature(logits, labels, max_iterations=2)
    assert record[0].filename == __file__  # the warning points at the caller
    assert not fit.converged
    assert fit.nll_after == pytest.approx(float(F.cross_entropy(logits / fit.temperature, labels)), rel=1e-9)
    loose = fit_temperature(logits, labels, tolerance=0.1)
    assert loose.iterations < fit_temperature(logits, labels).iterations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "label"])
def test_bad_rows_are_named(backend: Backend, fault: str, dtype: torch.dtype, draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 30, 6)
    row = int(torch.randint(0, 30, (), generator=draw))
    if fault == "-inf":
        logits[row] = -math.inf
    elif fault == "label":
        logits[row, labels[row]] = -math.inf
    else:
        logits[row, 2] = float(fault)
    logits[(row + 1) % 30] = math.nan
    labels[(row + 1) % 30] = -100  # an ignored row
    found = rf", {labels[row]}\] is -inf, but" if fault == "label" else r"\] has no softmax"
    with pytest.raises(ValueError, match=rf"logits\[{row}{found}"):
        fit_temperature(logits.to(dtype), labels, backend=backend.argument)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "message"),
    [
        (torch.ones(0, 4), torch.ones(0).long(), {}, ValueError, "no labelled row"),
        (torch.ones(3, 4), torch.full((3,), -100), {}, ValueError, "no labelled row"),
        (torch.ones(3, 4), torch.tensor([0, 4, 0]), {}, IndexError, r"labels\[1\] is 4"),
        (torch.ones(3), torch.tensor([0, 1, 0]), {}, ValueError, r"logits has shape \(3,\)"),
        (torch.tensor(1.0), torch.tensor([0]), {}, ValueError, r"logits has shape \(\)"),
        ([[1.0]], torch.tensor([0]), {}, TypeError, "logits is a list"),
        (torch.ones(3, 4).long(), torch.tensor([0, 1, 0]), {}, TypeError, "logits has dtype torch.int64"),
        (torch.ones(3, 4), torch.ones(3), {}, TypeError, "labels has dtype torch.float32"),
        (torch.ones(3, 4), torch.ones(3).long(), {"max_iterations": 0}, ValueError, "max_iterations is 0"),
        (torch.ones(3, 4), torch.ones(3).long(), {"max_iterations": 1.5}, ValueError, "max_iterations is 1.5"),
        (torch.ones(3, 4), torch.ones(3).long(), {"ignore_index": None}, TypeError, "ignore_index is None"),
        (torch.ones(3, 4), torch.ones(3).long(), {"tolerance": 0}, ValueError, "tolerance is 0"),
        (torch.ones(3, 4), torch.ones(3).long(), {"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_bad_input(logits: Any, labels: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_temperature(logits, labels, **options)


def test_a_tolerance_that_no_number_has(draw: torch.Generator) -> None:
    """Steps shrink below the last digit of the temperature; the fit keeps its value."""
    logits, labels = 2 * torch.randn(500, 7, generator=draw), torch.randint(7, (500,), generator=draw)
    logits += 2 * F.one_hot(labels, 7)
    fit = fit_temperature(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fine = fit_temperature(logits, labels, tolerance=1e-17)
    assert fine.temperature == pytest.approx(fit.temperature, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- calibration error


def plain_reliability(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[float, list[int]]:
    """ECE and the rows of each bin, one row at a time, as the definition reads."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for p, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        if label == -100:
            continue
        confidence = max(p)
        for m in range(bins):
            if m / bins < confidence <= (m + 1) / bins or (m == bins - 1 and confidence > 1):
                members[m].append((confidence, p.index(confidence) == label))
    rows = sum(map(len, members))
    error = 0.0
    for member in filter(None, members):
        confidence = sum(c for c, _ in member) / len(member)
        accuracy = sum(right for _, right in member) / len(member)
        error += len(member) / rows * abs(accuracy - confidence)
    return error, [len(member) for member in members]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 80), classes=st.integers(1, 8), bins=st.integers(1, 30),
    temperature=st.floats(0.1, 10),
)  # fmt: skip
def test_calibration_error_is_the_definition(seed: int, rows: int, classes: int, bins: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, labels = calibrated(draw, rows, classes)
    labels[1:][torch.rand(rows - 1, generator=draw) < 0.2] = -100
    probabilities = torch.softmax(logits / temperature, 1)
    error, counts = plain_reliability(probabilities, labels, bins)
    found = reliability(logits, labels, bins=bins, temperature=temperature)
    assert found.count.tolist() == counts
    assert found.expected_calibration_error == pytest.approx(error, abs=1e-12)
    given_probabilities = expected_calibration_error(probabilities, labels, bins=bins, probabilities=True)
    assert given_probabilities == pytest.approx(error, abs=1e-12)


def test_the_comparison_with_the_definition_can_fail(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 500, 5, temperature=2.0)
    error, counts = plain_reliability(torch.softmax(logits, 1), labels, 15)
    for wrong in (
        reliability(logits, labels, temperature=2.0),
        reliability(logits, labels.roll(1)),
        reliability(-logits, labels),
        reliability(logits, labels, bins=1),
    ):
        assert wrong.expected_calibration_error != pytest.approx(error, abs=1e-6) or wrong.count.tolist() != counts


def test_a_hand_made_example() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]], dtype=torch.float64)
    found = reliability(probabilities, torch.tensor([0, 1, 1, 1]), bins=10, probabilities=True)
    # 0.9 lies in (0.8, 0.9], 0.6 in (0.5, 0.6], 1.0 in (0.9, 1.0]: the upper end belongs to a bin.
    assert found.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 2, 1]
    assert found.accuracy[[5, 8, 9]].tolist() == [1.0, 0.5, 1.0]
    assert found.confidence[[5, 8, 9]].tolist() == pytest.approx([0.6, 0.9, 1.0])
    assert bool(found.accuracy[:5].isnan().all())
    assert found.expected_calibration_error == pytest.approx((0.4 + 2 * 0.4 + 0) / 4)
    assert found.mean_accuracy == pytest.approx(0.75)
    assert found.mean_confidence == pytest.approx((0.6 + 2 * 0.9 + 1) / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calibration_makes_the_error_small(dtype: torch.dtype, draw: torch.Generator) -> None:
    """More rows than one piece holds; overconfident by a factor of three."""
    logits, labels = calibrated(draw, 2 * REFERENCE_ROWS + 17, 10, temperature=3.0)
    logits = logits.to(dtype)
    fit = fit_temperature(logits, labels)
    before = expected_calibration_error(logits, labels)
    after = expected_calibration_error(logits, labels, temperature=fit.temperature)
    assert before > 0.15
    assert after < 0.03
    assert int(reliability(logits, labels).count.sum()) == len(labels)


def test_masked_classes_do_not_change_the_error(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 100, 5)
    padded = torch.cat([logits, torch.full((100, 3), -math.inf)], 1)
    assert expected_calibration_error(padded, labels) == pytest.approx(expected_calibration_error(logits, labels))


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "message"),
    [
        (torch.ones(0, 4), torch.ones(0).long(), {}, ValueError, "no labelled row"),
        (torch.ones(2, 4), torch.full((2,), -100), {}, ValueError, "no labelled row"),
        (torch.ones(2, 4), torch.tensor([0, -1]), {}, IndexError, r"labels\[1\] is -1"),
        (torch.tensor([[1.0, 2], [math.nan, 1]]), torch.tensor([0, 1]), {}, ValueError, r"logits\[1\] has no softmax"),
        (torch.ones(2, 4), torch.tensor([0, 1]), {"bins": 0}, ValueError, "bins is 0"),
        (torch.ones(2, 4), torch.tensor([0, 1]), {"bins": 2.5}, ValueError, "bins is 2.5"),
        (torch.ones(2, 4), torch.tensor([0, 1]), {"temperature": 0.0}, ValueError, "temperature is 0.0"),
        (torch.ones(2, 4), torch.tensor([0, 1]), {"probabilities": True}, ValueError, "are these logits"),
        (-torch.eye(2), torch.tensor([0, 1]), {"probabilities": True}, ValueError, "must be non-negative"),
        (
            torch.full((2, 4), 0.25), torch.tensor([0, 1]), {"probabilities": True, "temperature": 2.0}, ValueError,
            "divides logits, not probabilities",
        ),
    ],
)  # fmt: skip
def test_bad_input_to_reliability(
    logits: Tensor, labels: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reliability(logits, labels, **options)


def test_a_bad_row_is_named_by_its_place_in_the_whole(draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, REFERENCE_ROWS + 10, 3)
    logits[REFERENCE_ROWS + 4, 1] = math.inf
    with pytest.raises(ValueError, match=rf"logits\[{REFERENCE_ROWS + 4}\] has no softmax: a logit is \+inf"):
        reliability(logits, labels)


# ---------------------------------------------------------------------------------------------------------- the picture


def bar_heights(found: Reliability) -> list[float]:
    figure = plot_reliability(found)
    return sorted(patch.get_height() for patch in figure.axes[0].containers[0])


def test_the_diagram_shows_accuracy_and_gap(tmp_path: Path, draw: torch.Generator) -> None:
    logits, labels = calibrated(draw, 400, 5, temperature=3.0)
    before, after = reliability(logits, labels), reliability(logits, labels, temperature=3.0)
    figure = plot_reliability(before, after, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["before calibration", "after calibration"]
    for axes, found in zip(figure.axes[:2], (before, after), strict=True):
        accuracy, gap = axes.containers
        used = found.count > 0
        expected = found.accuracy[used].tolist()
        assert [bar.get_height() for bar in accuracy] == pytest.approx(expected)
        gaps = (found.accuracy - found.confidence)[used].abs().tolist()
        assert [bar.get_height() for bar in gap] == pytest.approx(gaps)
        assert f"ECE {found.expected_calibration_error:.1%}" in axes.texts[0].get_text()
    assert bar_heights(before) != pytest.approx(bar_heights(after))
    with pytest.raises(ValueError, match=r"titles is \['one'\], expected 2"):
        plot_reliability(before, after, titles=["one"])


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_search_goes_as_far_as_the_logits_size(size: float, dtype: torch.dtype, draw: torch.Generator) -> None:
    logits = 3 * torch.randn(3000, 20, generator=draw, dtype=dtype)
    labels = torch.multinomial(torch.softmax(logits / 2, 1), 1, generator=draw)[:, 0]
    right = fit_temperature(logits, labels).temperature
    with pytest.warns(UserWarning, match="because the logits have that size; are they logits"):
        fit = fit_temperature(logits * size, labels)
    assert fit.converged
    assert fit.temperature / size == pytest.approx(right, rel=1e-5)
    with pytest.warns(UserWarning, match="no likelier than chance"):
        fit = fit_temperature(logits * size, logits.argmin(1))
    assert (fit.temperature, fit.converged) == (pytest.approx(max(1e4, 20 * float(logits.abs().max()) * size)), False)
