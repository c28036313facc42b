"""Temperature scaling (Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017).

Co-Tuning averages the source classifier's probabilities, so a probability of 0.8 should be right 8 times in 10. One
number, the temperature ``T``, brings ``softmax(logits / T)`` as close to that as possible on held-out *source* data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from cotuning_kernels import backends, reference
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.labelled_logits import (
    REFERENCE_ROWS,
    check_labelled_logits,
    first_row_without_softmax,
    positive_integer,
    positive_number,
    warn_of_probabilities,
)
from cotuning_kernels.validation import check_ignore_index

__all__ = [
    "Reliability",
    "TemperatureFit",
    "expected_calibration_error",
    "fit_temperature",
    "reliability",
]

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-4, 1e4
# (NLL, slope, curvature, rows), summed over rows.
_Terms = tuple[float, float, float, float]
# A sample is every 32nd row, but at least 512 rows. It is worth its passes if it is at most an eighth of all rows.
_SAMPLE_STRIDE, _SAMPLE_ROWS, _LEAST_STRIDE = 32, 512, 8
_MOST_SAMPLE_PASSES = 20
# After this many passes that all asked for a lower temperature, try the lowest one of the search.
_ASK_THE_BOUND = 8


@dataclass(frozen=True)
class TemperatureFit:
    """The result of :func:`fit_temperature`.

    Attributes:
        temperature: divide logits by it.
        nll_before, nll_after: mean negative log likelihood in nats at temperature 1 and at ``temperature``.
        iterations: passes over the logits.
        converged: false if there is no finite optimum (``temperature`` is then a bound of the search, and a warning
            says so) or if ``max_iterations`` was too few.
    """

    temperature: float
    nll_before: float
    nll_after: float
    iterations: int
    converged: bool


class _Bracket:
    """The values of ``b = 1 / T`` between which the optimum lies, by the signs of the slopes.

    Attributes:
        least, most: the bounds of the search.
        low, high: the largest ``b`` with a falling NLL and the smallest with a rising one; None where none is known.
        hard: the ``b`` to return if the NLL falls for ever.
    """

    def __init__(self) -> None:
        self.least, self.most = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
        self.low: float | None = None
        self.high: float | None = None
        self.hard = self.most

    def optimum_is_beyond(self, b: float, slope: float) -> bool:
        """Whether ``b`` is a bound of the search and the optimum lies beyond it."""
        return (b == self.most and slope <= 0) or (b == self.least and slope >= 0)

    def widen(self, size: float) -> None:
        """Scale the bounds, which fit ordinary logits, to logits of this size: the softmax there is as hard or flat."""
        self.least, self.most = min(self.least, 1 / (20 * size)), max(self.most, 1 / (LOWEST_TEMPERATURE * size))
        self.hard = max(self.hard, 10 / size)

    def narrow(self, b: float, slope: float) -> None:
        """Note the sign of the slope at ``b``."""
        if slope < 0:
            self.low = b
        else:
            self.high = b

    def inside(self, b: float) -> float:
        """``b``, or the end that it passes: a bound, or instead of a known ``low`` or ``high`` the middle in log b."""
        low = self.least if self.low is None else self.low
        high = self.most if self.high is None else self.high
        middle = math.sqrt(low * high)
        if b <= low:
            return low if self.low is None else middle
        if b >= high:
            return high if self.high is None else middle
        return b


@torch.no_grad()
def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
    max_iterations: int = 50,
    tolerance: float = 1e-7,
) -> TemperatureFit:
    """The temperature that minimises the negative log likelihood of ``labels`` under ``softmax(logits / T)``.

    Newton's method in ``b = 1 / T``, one pass over the logits an iteration, from ``b = 1``. In ``b`` the NLL is convex
    whatever the logits are (its second derivative is ``Var_p[z] >= 0``), so the curvature never points the wrong way,
    and the slope ``E_p[z] - z_y`` usually rises almost linearly before it levels off: steps from below the optimum
    hardly overshoot. In ``log b`` or ``T`` the NLL is not convex, and Newton's method took as many passes or more. The
    signs of the slopes bracket the optimum; a step that leaves the bracket goes to its end the first time, and to its
    middle (in ``log b``) if that end was already evaluated.

    Many rows on the CPU usually take 2 to 4 passes: a sample of the rows shows how the slope bends on the way to the
    optimum, which a Newton step does not use. The result is still that of all rows.

    Use source data that the model was *not* trained on (its validation set), with source labels.

    Args:
        logits: ``(B, N)``, ``(N,)`` or ``(B, N, d1, ...)``; float32, bfloat16, float16 or float64. A masked class may
            be -inf. Probabilities instead of logits cause a warning.
        labels: ``(B,)``, ``()`` or ``(B, d1, ...)``; int64 or int32 class indices, or ``ignore_index``.
        ignore_index: rows with this label do not count.
        backend: see :func:`cotuning_kernels.backends.select`.
        max_iterations: the most passes over the logits; 2 to 8 are usual, up to 15 for a very confident model.
        tolerance: the allowed relative error of ``T``, estimated from the last two passes. The default is about the
            rounding of a float32 exponential.

    Returns:
        :class:`TemperatureFit`. If every label has the highest logit of its row, the NLL keeps falling as ``T``
        goes to 0; if the labels are no likelier than chance, as ``T`` grows. Then ``temperature`` is 1e-4 or 1e4 (for
        logits below 1e-3 or above 500 in size, a tenth or 20 times the largest), ``converged`` is false, and a warning
        says what happened.

    Raises:
        TypeError, ValueError: wrong types or shapes; no labelled row; a row with NaN, +inf or nothing but -inf, or with
            -inf at its label, which no temperature makes possible.
        IndexError: a label out of range; names the row and the value.
    """
    max_iterations = positive_integer("max_iterations", max_iterations)
    check_ignore_index(ignore_index)
    positive_number("tolerance", tolerance)
    logits, labels = check_labelled_logits("logits", logits, labels, None, ignore_index)
    num_classes = logits.shape[1]
    warn_of_probabilities("logits", logits, stacklevel=3)
    backend = backends.select(logits.device.type, backend, logits.device.index)
    terms_at = _terms_of(logits, labels, ignore_index, backend)
    sample_terms_at = None
    stride = min(_SAMPLE_STRIDE, len(labels) // _SAMPLE_ROWS)
    # No sample on a GPU: a pass over all rows takes less time than reading its result.
    if stride >= _LEAST_STRIDE and logits.device.type == "cpu":
        sample_terms_at = _terms_of(logits[::stride], labels[::stride], ignore_index, backend)

    bracket = _Bracket()
    b, nll_before = 1.0, math.nan
    last_b, last_curvature = math.nan, math.nan
    for iteration in range(1, max_iterations + 1):
        nll, slope, curvature, rows = terms_at(b)
        if rows == 0:
            raise ValueError("there is no labelled row: logits is empty, or every label is ignore_index")
        if not (math.isfinite(nll) and math.isfinite(slope) and math.isfinite(curvature)):
            _raise_not_finite(logits, labels, ignore_index)
        if iteration == 1:
            nll_before = nll / rows
        if num_classes == 1:
            return TemperatureFit(1.0, nll_before, nll_before, iteration, converged=True)
        # A row whose label is not its single highest logit has p <= 1/2, so a NLL of at least log 2, at every T.
        if nll < math.log(2):
            _warn("every label has the highest logit of its row, so the NLL falls for ever as the temperature falls")
            nll_after = terms_at(bracket.hard)[0] / rows
            return TemperatureFit(1 / bracket.hard, nll_before, nll_after, iteration + 1, converged=False)
        if bracket.optimum_is_beyond(b, slope):
            bracket.widen(_largest(logits))
        if bracket.optimum_is_beyond(b, slope):
            _warn(
                "the NLL still falls at the lowest temperature of the search; are these logits?"
                if b == bracket.most
                else "the labels are no likelier than chance, at any temperature; do they belong to these logits?"
            )
            return TemperatureFit(1 / b, nll_before, nll / rows, iteration, converged=False)

        step = -slope / curvature if curvature > 0 else 0.0
        if curvature <= 0 and slope != 0:  # saturated: only the side of the optimum is known
            step = math.copysign(math.inf, -slope)
        elif sample_terms_at is not None and step != 0:
            step = _step_with_sample(sample_terms_at, b, slope / rows, curvature / rows, step)
        # Equal curvatures of two passes do not mean that it is constant: they may lie on either side of its maximum.
        moved = abs(b - last_b) or math.inf  # a step below b's last digit has moved nothing
        bend = max(abs(curvature - last_curvature) / moved, curvature / b)
        if _error_left(step, curvature, bend) <= tolerance * b:
            # The NLL at the end of the last step from its parabola: the error is of third order in a tiny step.
            nll_after = (nll + slope * step / 2) / rows
            if not LOWEST_TEMPERATURE <= 1 / (b + step) <= HIGHEST_TEMPERATURE:
                _warn(f"the temperature is {1 / (b + step):.3g}, because the logits have that size; are they logits?")
            return TemperatureFit(1 / (b + step), nll_before, nll_after, iteration, converged=True)
        bracket.narrow(b, slope)
        last_b, last_curvature = b, curvature
        b = bracket.inside(b + step)
        if slope < 0 and bracket.high is None and iteration % _ASK_THE_BOUND == 0:
            b = bracket.most  # the NLL keeps falling, or almost: check whether there is an optimum
    _warn(f"no convergence in {max_iterations} iterations; raise max_iterations, or tolerance from {tolerance}")
    return TemperatureFit(1 / b, nll_before, terms_at(b)[0] / rows, max_iterations + 1, converged=False)


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often predictions of each confidence are right; see :func:`reliability`.

    Attributes:
        confidence: float64 ``(bins,)``, the mean probability of the predicted class in each bin; NaN where it is empty.
        accuracy: float64 ``(bins,)``, the share of right predictions in each bin; NaN where it is empty.
        count: int64 ``(bins,)``, the rows in each bin. Bin ``m`` of ``M`` holds confidences in ``(m/M, (m+1)/M]``.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def expected_calibration_error(self) -> float:
        """``sum over bins of count / rows * |accuracy - confidence|`` (Guo et al. 2017, eq. 3), in [0, 1]."""
        return self._mean((self.accuracy - self.confidence).abs())

    @property
    def mean_confidence(self) -> float:
        """Over all rows, in [0, 1]."""
        return self._mean(self.confidence)

    @property
    def mean_accuracy(self) -> float:
        """Over all rows, in [0, 1]."""
        return self._mean(self.accuracy)

    def _mean(self, per_bin: Tensor) -> float:
        return float((per_bin.nan_to_num(nan=0.0) * self.count).sum() / self.count.sum())


@torch.no_grad()
def reliability(
    logits: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    temperature: float = 1.0,
    probabilities: bool = False,
    ignore_index: int = -100,
) -> Reliability:
    """Confidence against accuracy of the predicted class, in bins of equal width over [0, 1].

    Args:
        logits: ``(B, N)``, ``(N,)`` or ``(B, N, d1, ...)``, floating; with ``probabilities=True`` rows that sum to 1.
        labels: ``(B,)``, ``()`` or ``(B, d1, ...)``; int64 or int32 class indices, or ``ignore_index``.
        bins: how many bins; 15 as in Guo et al. 2017.
        temperature: the logits are divided by it.
        probabilities: the first argument holds probabilities, not logits; ``temperature`` is then 1.
        ignore_index: rows with this label do not count.

    Returns:
        :class:`Reliability`, on the CPU.

    Raises:
        TypeError, ValueError: wrong types, shapes or values; no labelled row; a row with NaN, +inf or nothing but -inf.
        IndexError: a label out of range; names the row and the value.
    """
    bins = positive_integer("bins", bins)
    temperature = positive_number("temperature", temperature)
    if probabilities and temperature != 1:
        raise ValueError(f"temperature is {temperature}, but it divides logits, not probabilities; pass the logits")
    check_ignore_index(ignore_index)
    logits, labels = check_labelled_logits("logits", logits, labels, None, ignore_index)
    if not probabilities:
        warn_of_probabilities("logits", logits, stacklevel=3)
    # Name the device: torch.set_default_device may have set another one.
    count = torch.zeros(bins, dtype=torch.int64, device="cpu")
    confidence = torch.zeros(bins, dtype=torch.float64, device="cpu")
    right = torch.zeros(bins, dtype=torch.float64, device="cpu")
    for row, (some, truth) in enumerate(zip(logits.split(REFERENCE_ROWS), labels.split(REFERENCE_ROWS), strict=True)):
        found = first_row_without_softmax(some, truth, ignore_index)
        if found is not None:
            raise ValueError(f"logits[{row * REFERENCE_ROWS + found[0]}] has no softmax: {found[1]}")
        valid = truth != ignore_index
        some = some[valid].double()
        top, predicted = some.max(dim=1)
        if probabilities:
            _check_probabilities(some)
        else:  # the softmax of the highest logit
            top = ((some - top[:, None]) / temperature).exp_().sum(dim=1).reciprocal_()
        bin_index = ((top * bins).ceil().long() - 1).clamp_(0, bins - 1).cpu()
        count += bin_index.bincount(minlength=bins)
        confidence.index_add_(0, bin_index, top.cpu())
        right.index_add_(0, bin_index, (predicted == truth[valid]).double().cpu())
    if not count.any():
        raise ValueError("there is no labelled row: logits is empty, or every label is ignore_index")
    return Reliability(confidence / count, right / count, count)


def expected_calibration_error(
    logits: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    temperature: float = 1.0,
    probabilities: bool = False,
    ignore_index: int = -100,
) -> float:
    """The expected gap between confidence and accuracy of the predicted class, in [0, 1]; 0 is perfectly calibrated.

    The top-label ECE of Guo et al. 2017 (eq. 3) with ``bins`` bins of equal width. Arguments and errors are those of
    :func:`cotuning_kernels.calibration.reliability`.
    """
    return reliability(
        logits, labels, bins=bins, temperature=temperature, probabilities=probabilities, ignore_index=ignore_index
    ).expected_calibration_error


def _terms_of(logits: Tensor, labels: Tensor, ignore_index: int, backend: str) -> Callable[[float], _Terms]:
    def reference_terms(b: float) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64, device=logits.device)
        for some, truth in zip(logits.split(REFERENCE_ROWS), labels.split(REFERENCE_ROWS), strict=True):
            total += reference.temperature_terms(some, truth, inverse_temperature=b, ignore_index=ignore_index)
        return total

    def kernel_terms(b: float) -> Tensor:
        terms: Tensor = operation("temperature_terms", backend)(logits, labels, b, ignore_index)
        return terms

    def terms_at(b: float) -> _Terms:
        nll, slope, curvature, rows = (reference_terms(b) if backend == "reference" else kernel_terms(b)).tolist()
        return nll, slope, curvature, rows

    return terms_at


def _error_left(step: float, curvature: float, bend: float) -> float:
    """How far ``b`` is from the optimum after this step, about: ``bend step^2 / (2 curvature)``.

    A Newton step leaves that error when the curvature changes by ``bend`` per unit of ``b``; a step that knows how the
    slope bends leaves less. If no bend is known (NaN: the first pass), the error may be as large as the step.
    """
    error = bend * step * step / (2 * curvature) if curvature > 0 else math.nan
    return min(abs(step), error) if math.isfinite(error) else abs(step)


def _step_with_sample(
    sample_terms_at: Callable[[float], _Terms], b: float, slope: float, curvature: float, newton_step: float
) -> float:
    """The step from ``b`` to where the slope of all rows is 0, assuming that it bends like the slope of the sample.

    ``G(x)`` is the mean slope over all rows, ``S(x)`` that over the sample. Newton's method finds the root ``x`` of

        S(x) + (G(b) - S(b)) + (G'(b) - S'(b)) (x - b)

    which has the value and the derivative of ``G`` at ``b``. The error is that of a Newton step times the relative
    error of the sample's third derivative, so the passes over all rows still converge to the optimum of all rows.
    """
    _, sample_slope, sample_curvature, rows = sample_terms_at(b)
    if rows == 0:
        return newton_step
    offset, tilt = slope - sample_slope / rows, curvature - sample_curvature / rows
    step = newton_step
    for _ in range(_MOST_SAMPLE_PASSES):
        if not 1 / HIGHEST_TEMPERATURE < b + step < 1 / LOWEST_TEMPERATURE:
            return newton_step
        _, sample_slope, sample_curvature, _ = sample_terms_at(b + step)
        here, rise = sample_slope / rows + offset + tilt * step, sample_curvature / rows + tilt
        if not rise > 0:
            return newton_step
        step -= here / rise
        if abs(here / rise) <= 1e-4 * abs(step):  # the remaining error is the square of that
            return step
    return newton_step


def _raise_not_finite(logits: Tensor, labels: Tensor, ignore_index: int) -> NoReturn:
    found = first_row_without_softmax(logits, labels, ignore_index)
    if found is not None:
        raise ValueError(f"logits[{found[0]}] has no softmax: {found[1]}")
    valid = labels != ignore_index
    label_logit = logits.gather(1, torch.where(valid, labels, 0).long()[:, None])[:, 0]
    impossible = ((label_logit == float("-inf")) & valid).nonzero()
    if len(impossible):
        row = int(impossible[0])
        raise ValueError(
            f"logits[{row}, {int(labels[row])}] is -inf, but {int(labels[row])} is the label of the row: no "
            "temperature makes it possible; is a class masked that the data has?"
        )
    raise ValueError("the likelihood of finite logits is not finite; are they within the range of float32?")


def _check_probabilities(rows: Tensor) -> None:
    # 1e-2 allows rounding to half precision.
    if not ((rows >= 0).all() and ((rows.sum(dim=1) - 1).abs() <= 1e-2).all()):
        raise ValueError("with probabilities=True every row must be non-negative and sum to 1; are these logits?")


def _largest(logits: Tensor) -> float:
    """The largest finite size of a logit; 1 where all are 0."""
    sizes = logits.abs()
    return float(sizes.masked_fill_(~torch.isfinite(sizes), 0).max()) or 1.0


def _warn(message: str) -> None:
    # stacklevel skips this function, fit_temperature and its no_grad wrapper.
    warnings.warn(f"fit_temperature: {message}", stacklevel=4)
