"""The reverse method: learn ``p(y_target | y_source)``, then turn it round with Bayes' rule.

You, Kou, Long and Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020, section 3.2, and the authors' script:

1. A softmax regression without intercept predicts the target label from the source classifier's calibrated
   probabilities ``x``: ``p(y_target = t | x) = softmax(W x)[t]``. Of a list of L2 penalties, the one with the highest
   accuracy on validation data is taken.
2. The regression's temperature ``T`` is fitted on the same validation data.
3. A source class is the probability vector with a single 1, so ``p(t | s) = softmax(W[:, s] / T)[t]``.
4. Bayes: ``R[t, s] = p(t | s) p(s) / sum over s' of p(t | s') p(s')``, where ``p(s)`` is the mean probability over all
   the data. Rows sum to 1.

:func:`learn_reverse_relationship` runs all four steps; :func:`regression_path` is step 1 alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cotuning_kernels import functional
from cotuning_kernels.calibration import fit_temperature
from cotuning_kernels.labelled_logits import (
    check_labelled_logits,
    first_row_without_softmax,
    positive_integer,
    positive_number,
    warn_of_probabilities,
)
from cotuning_kernels.relationship.matrix import Relationship, check_empty_policy, class_names, fill_empty_classes
from cotuning_kernels.targets import without_autocast
from cotuning_kernels.validation import check_ignore_index

__all__ = ["INVERSE_PENALTIES", "RegressionFit", "learn_reverse_relationship", "regression_path"]

INVERSE_PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4)
"""The list of the authors' script: scikit-learn's ``C``, from the strongest penalty to the weakest."""


@dataclass(frozen=True, eq=False)
class RegressionFit:
    """A softmax regression at one penalty; see :func:`regression_path`.

    Attributes:
        inverse_penalty: ``C`` in the objective ``sum of cross entropies + |W|^2 / (2 C)``.
        coefficients: ``W``, ``(N_t, N_s)``, in the probabilities' dtype.
        objective: its value, in float64.
        gap: a bound on the objective's distance from its minimum, relative to the smaller of the objective and the
            gain over ``W = 0``; see :func:`regression_path`.
        iterations, evaluations: of L-BFGS, and of the objective with its gradient.
        converged: whether ``gap`` is below the tolerance, or the objective no longer falls by more than rounding (in
            float32, under a weak penalty, the rounding of the gradient alone keeps the bound above the tolerance).
    """

    inverse_penalty: float
    coefficients: Tensor
    objective: float
    gap: float
    iterations: int
    evaluations: int
    converged: bool


@torch.inference_mode(False)  # the regression needs gradients
def learn_reverse_relationship(
    train_logits: Tensor,
    train_labels: Tensor,
    validation_logits: Tensor,
    validation_labels: Tensor,
    num_target_classes: int,
    *,
    temperature: float = 1.0,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    tolerance: float = 1e-4,
    empty: str = "unsupervised",
    target_classes: Sequence[str] | None = None,
    source_classes: Sequence[str] | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Relationship:
    """The reverse relationship from the source classifier's logits on training and validation data.

    All data are in memory on the logits' device: ``4 (2 n + m) N_s`` bytes for ``n`` training and ``m`` validation
    rows.

    Args:
        train_logits, validation_logits: ``(n, N_s)`` and ``(m, N_s)``, or ``(n, N_s, d1, ...)``; float32, bfloat16,
            float16 or float64. The arithmetic is float64 for float64 logits, else float32.
        train_labels, validation_labels: target classes, int64 or int32, ``(n,)`` and ``(m,)``; rows with
            ``ignore_index`` do not count.
        num_target_classes: ``N_t``.
        temperature: of the source classifier, see :func:`cotuning_kernels.fit_temperature`.
        inverse_penalties: the values of ``C`` to choose from. If several have the same validation accuracy, the weakest
            penalty (the largest ``C``) is taken, as the authors do.
        tolerance: see :func:`cotuning_kernels.relationship.reverse.regression_path`. It bounds the regression's
            objective; the weaker the penalty, the flatter its minimum. Another order of the rows, which changes the
            rounding, moved elements of the relationship of 100 rows by 1e-4 at ``C = 100`` and by 4e-3 at
            ``C = 1e4``; with float64 logits and 1e-8, by 1e-5 and 4e-4. The number of threads also changes how torch's
            matrix products round: float32 logits repeat the same bits only with the same ``torch.get_num_threads()``.
        empty: the row of a target class without training rows; see
            :meth:`cotuning_kernels.RelationshipEstimator.compute`.
        target_classes, source_classes: names to keep with the relationship.
        backend: for the regression's loss; see :func:`cotuning_kernels.backends.select`.

    Returns:
        A :class:`cotuning_kernels.Relationship` with ``method="reverse"``. Its ``counts`` are those of the training
        rows; its ``metadata`` has the regression's penalty, temperature and accuracy on the validation data.

    Raises:
        TypeError, ValueError: wrong types, shapes or values; no labelled row in one of the two sets.
        IndexError: a label out of range; names the row and the value.
    """
    num_target_classes = positive_integer("num_target_classes", num_target_classes)
    temperature = positive_number("temperature", temperature)
    positive_number("tolerance", tolerance)
    check_ignore_index(ignore_index)
    check_empty_policy(empty)
    checked_penalties(inverse_penalties)
    target_classes = class_names("target_classes", target_classes, num_target_classes)
    train, train_labels = _probabilities(
        "train", train_logits, train_labels, num_target_classes, temperature, ignore_index
    )
    validation, validation_labels = _probabilities(
        "validation", validation_logits, validation_labels, num_target_classes, temperature, ignore_index
    )
    if train.shape[1] != validation.shape[1]:
        raise ValueError(
            f"train_logits has {train.shape[1]} source classes, but validation_logits has {validation.shape[1]}"
        )
    if train.device != validation.device:
        raise ValueError(
            f"train_logits is on {train.device}, but validation_logits on {validation.device}; bring them together"
        )
    dtype = torch.promote_types(train.dtype, validation.dtype)
    train, validation = train.to(dtype), validation.to(dtype)
    best, best_accuracy, best_logits = None, -1.0, validation
    for fit in regression_path(
        train, train_labels, num_target_classes, inverse_penalties, tolerance=tolerance, backend=backend
    ):
        with without_autocast(validation.device):
            logits = validation @ fit.coefficients.T
        accuracy = float((logits.argmax(dim=1) == validation_labels).double().mean())
        if accuracy >= best_accuracy:
            best, best_accuracy, best_logits = fit, accuracy, logits
    assert best is not None  # checked_penalties rejects an empty list
    regression_temperature = _regression_temperature(best_logits, validation_labels)
    marginal = (train.double().sum(dim=0) + validation.double().sum(dim=0)) / (len(train) + len(validation))
    matrix = bayes(best.coefficients, regression_temperature, marginal)
    counts = torch.bincount(train_labels, minlength=num_target_classes)
    return Relationship(
        fill_empty_classes(matrix.to(train.dtype), counts, empty, target_classes),
        target_classes=target_classes,
        source_classes=None if source_classes is None else tuple(source_classes),
        method="reverse",
        temperature=temperature,
        counts=counts,
        metadata={
            "inverse_penalty": f"{best.inverse_penalty:g}",
            "regression_temperature": f"{regression_temperature:.6g}",
            "regression_validation_accuracy": f"{best_accuracy:.6g}",
        },
    )


def bayes(coefficients: Tensor, temperature: float, source_marginal: Tensor) -> Tensor:
    """Steps 3 and 4: ``R[t, s]`` in float64 from ``W``, the regression's temperature and ``p(y_source)``.

    Computed in logarithms: ``p(t | s)`` may underflow for every ``s``, which would make a row 0 / 0.
    """
    log_target_given_source = F.log_softmax(coefficients.double() / temperature, dim=0)
    return torch.softmax(log_target_given_source + source_marginal.double().log(), dim=1)


def regression_path(
    probabilities: Tensor,
    labels: Tensor,
    num_target_classes: int,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    backend: str = "auto",
) -> Iterator[RegressionFit]:
    r"""Softmax regressions without intercept, from the strongest L2 penalty to the weakest.

    .. math:: f(W) = \sum_i \mathrm{CE}(W x_i, y_i) + \frac{1}{2 C} \lVert W \rVert^2

    L-BFGS (``torch.optim.LBFGS``) for each ``C``. An evaluation is two matrix products of ``n N_s N_t`` and the fused
    cross entropy with its gradient in between. Two measures keep the number of evaluations small:

    * Each coefficient is scaled by the root of the Hessian's diagonal, ``sum_i p_it (1 - p_it) x_is^2 + 1 / C``, at the
      start. Source classes differ in it by many orders of magnitude. In these coordinates the gradient itself is about
      the Newton step, so it is the first step.
    * The start extrapolates the last two solutions linearly in ``log C``. Their logits are extrapolated too, so the
      first evaluation and the scales cost one product each.

    The objective without ``|W|^2 / (2 C)`` is convex, so the objective is at most ``C |gradient|^2 / 2`` above its
    minimum. A fit ends when this bound is below ``tolerance`` times the objective, and below ``tolerance`` times the
    gain over ``W = 0``, which is small under a strong penalty; or when an iteration changes the objective by no more
    than the rounding of the dtype.

    Args:
        probabilities: ``x``, ``(n, N_s)``, float32 or float64.
        labels: ``(n,)`` int64.
        num_target_classes: ``N_t``.
        inverse_penalties: the values of ``C``, in any order.
        tolerance: see above.
        max_iterations: for each ``C``; if they are too few, a warning names the ``C``.
        backend: see :func:`cotuning_kernels.backends.select`.

    Yields:
        :class:`RegressionFit`, in ascending order of ``C``.

    Raises:
        ValueError: no penalty, or one that is not a number between 1e-30 and 1e30.
    """
    values = checked_penalties(inverse_penalties)
    positive_number("tolerance", tolerance)
    num_target_classes = positive_integer("num_target_classes", num_target_classes)
    max_iterations = positive_integer("max_iterations", max_iterations)
    with torch.inference_mode(False):
        regression = _Regression(probabilities, labels, num_target_classes, backend)
        older, last, solved = None, None, regression.zeros()
    older_solved = solved
    for value in values:
        with torch.inference_mode(False), without_autocast(probabilities.device):  # not across the yield
            start = solved if older is None or last is None else _carried_on(older, older_solved, last, solved, value)
            older, older_solved = last, solved
            last, solved = regression.fit(value, start, tolerance, max_iterations)
        if not last.converged:
            warnings.warn(
                f"the regression with C = {value:g} has not converged in {last.iterations} iterations: the gap "
                f"to the minimum is up to {last.gap:.1e}, the tolerance is {tolerance:g}",
                stacklevel=2,
            )
        yield last


def checked_penalties(inverse_penalties: Sequence[float]) -> list[float]:
    """The values of ``C`` without repetition, in ascending order.

    Raises:
        TypeError, ValueError: no values, or one that is not a number between 1e-30 and 1e30.
    """
    if not isinstance(inverse_penalties, Iterable):
        raise TypeError(f"inverse_penalties is {inverse_penalties!r:.80}, expected a sequence of positive numbers")
    values = sorted({positive_number("inverse_penalties", value) for value in inverse_penalties})
    if not values:
        raise ValueError("inverse_penalties is empty, expected at least one positive number")
    if not 1e-30 <= values[0] <= values[-1] <= 1e30:
        raise ValueError(f"inverse_penalties goes from {values[0]} to {values[-1]}, expected within 1e-30 and 1e30")
    return values


class _Point(NamedTuple):
    """Coefficients and their logits on the data, kept because they cost a matrix product. Both are linear."""

    coefficients: Tensor
    logits: Tensor


def _carried_on(
    older: RegressionFit, older_solved: _Point, last: RegressionFit, solved: _Point, inverse_penalty: float
) -> _Point:
    step = math.log(inverse_penalty / last.inverse_penalty) / math.log(last.inverse_penalty / older.inverse_penalty)
    # Do not extrapolate much further than the last step.
    step = min(step, 2.0)
    return _Point(*(torch.lerp(before, now, 1 + step) for before, now in zip(older_solved, solved, strict=True)))


class _Regression:
    """The data of a regression, and its objective."""

    def __init__(self, probabilities: Tensor, labels: Tensor, num_target_classes: int, backend: str) -> None:
        self.probabilities = probabilities
        self.squares = probabilities.square()
        self.labels = labels
        # Cross entropy with hard labels is Co-Tuning's source term with the identity as relationship.
        self.identity = torch.eye(num_target_classes, dtype=probabilities.dtype, device=probabilities.device)
        self.backend = backend

    def zeros(self) -> _Point:
        rows, source_classes = self.probabilities.shape
        zeros = self.probabilities.new_zeros
        return _Point(zeros(len(self.identity), source_classes), zeros(rows, len(self.identity)))

    def logits(self, coefficients: Tensor) -> Tensor:
        return F.linear(self.probabilities, coefficients)

    def objective(self, point: _Point, inverse_penalty: float) -> tuple[Tensor, Tensor]:
        """``f`` in float64, and its gradient. The line search compares sums over many rows, so they are in float64."""
        logits = point.logits.detach().requires_grad_()
        with torch.enable_grad():
            losses = functional.source_label_loss(
                logits, self.labels, self.identity, reduction="none", backend=self.backend
            )
            (slopes,) = torch.autograd.grad(losses, logits, torch.ones_like(losses))
        squared_norm = torch.linalg.vector_norm(point.coefficients, dtype=torch.float64).square()
        value = losses.detach().sum(dtype=torch.float64) + squared_norm / (2 * inverse_penalty)
        return value, torch.addmm(point.coefficients, slopes.T, self.probabilities, beta=1 / inverse_penalty)

    def scales(self, point: _Point, inverse_penalty: float) -> Tensor:
        """``1 / sqrt`` of the Hessian's diagonal."""
        predicted = torch.softmax(point.logits, dim=1)
        variance = predicted.mul_(1 - predicted)
        return (variance.T @ self.squares).add_(1 / inverse_penalty).rsqrt_()

    def fit(
        self, inverse_penalty: float, start: _Point, tolerance: float, max_iterations: int
    ) -> tuple[RegressionFit, _Point]:
        scales = self.scales(start, inverse_penalty)
        closure = _Closure(self, inverse_penalty, start, scales)
        # One iteration per call, so that our own criterion can end the fit. max_eval also bounds torch's line search.
        optimizer = torch.optim.LBFGS(
            [closure.step], max_iter=1, max_eval=25, tolerance_grad=0, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
        rounding = 10 * torch.finfo(scales.dtype).eps / math.sqrt(len(self.labels))
        objective_of_zeros = len(self.labels) * math.log(len(self.identity))
        objective, gap = math.inf, math.inf
        for iteration in range(max_iterations + 1):
            before, objective = objective, float(closure())
            slope = float(torch.linalg.vector_norm(closure.scaled_gradient / scales, dtype=torch.float64))
            gap = inverse_penalty * slope**2 / 2 / max(min(objective, objective_of_zeros - objective), 1e-300)
            stalled = before - objective <= rounding * objective
            if gap <= tolerance or stalled or iteration == max_iterations:
                break
            # torch's L-BFGS first steps by lr * min(1, 1 / |g|_1): this rate makes it the whole scaled gradient.
            first_rate = max(1.0, float(closure.scaled_gradient.abs().sum()))
            optimizer.param_groups[0]["lr"] = first_rate if iteration == 0 else 1.0
            optimizer.step(closure)
        fit = RegressionFit(
            inverse_penalty=inverse_penalty,
            coefficients=closure.point.coefficients,
            objective=objective,
            gap=gap,
            iterations=iteration,
            evaluations=closure.evaluations,
            converged=gap <= tolerance or stalled,
        )
        return fit, closure.point


class _Closure:
    """The objective for L-BFGS, as a function of ``step``, the scaled distance of the coefficients from the start.

    It caches the last value, because each call of ``optimizer.step`` evaluates its starting point again.

    Attributes:
        step: the parameter of the optimizer.
        point, scaled_gradient: those of the last call.
        evaluations: their number so far.
    """

    def __init__(self, regression: _Regression, inverse_penalty: float, start: _Point, scales: Tensor) -> None:
        self._regression, self._inverse_penalty = regression, inverse_penalty
        self._start, self._scales = start, scales
        self.step = torch.zeros_like(scales, requires_grad=True)
        self._evaluated = self.step.detach().clone()
        self.evaluations = 0
        self._evaluate(start)

    def __call__(self) -> Tensor:
        if not torch.equal(self._evaluated, self.step):
            self._evaluated.copy_(self.step.detach())
            coefficients = torch.addcmul(self._start.coefficients, self._evaluated, self._scales)
            self._evaluate(_Point(coefficients, self._regression.logits(coefficients)))
        self.step.grad = self.scaled_gradient
        return self._value

    def _evaluate(self, point: _Point) -> None:
        self.evaluations += 1
        self.point = point
        self._value, gradient = self._regression.objective(point, self._inverse_penalty)
        self.scaled_gradient = gradient.mul_(self._scales)


def _probabilities(
    name: str, logits: Tensor, labels: Tensor, num_target_classes: int, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The calibrated probabilities of the rows that have a label, and the labels as int64."""
    logits, labels = check_labelled_logits(f"{name}_logits", logits, labels, num_target_classes, ignore_index)
    warn_of_probabilities(f"{name}_logits", logits, stacklevel=4)
    found = first_row_without_softmax(logits, labels, ignore_index)
    if found is not None:
        raise ValueError(f"{name}_logits[{found[0]}] has no softmax: {found[1]}")
    labelled = labels != ignore_index
    if not labelled.any():
        raise ValueError(f"{name}_labels has no label: the set is empty, or every label is ignore_index")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.softmax(logits[labelled].to(dtype) * (1 / temperature), dim=1), labels[labelled].long()


def _regression_temperature(validation_logits: Tensor, validation_labels: Tensor) -> float:
    # Under a strong penalty the logits are tiny, and their temperature is outside the range of fit_temperature.
    size = float(validation_logits.abs().max()) or 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fit_temperature", category=UserWarning)
        fit = fit_temperature(validation_logits / size, validation_labels)
    if fit.converged:
        return fit.temperature * size
    warnings.warn(
        f"the regression has no best temperature on {len(validation_labels)} validation rows (all of them right, or no "
        "better than chance); it is left uncalibrated. Use more validation data",
        stacklevel=3,
    )
    return 1.0
