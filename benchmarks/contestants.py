"""The contestants, and the check that all compute the same result before any is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import cotuning_kernels as ck
from benchmarks import baselines
from benchmarks.problems import CalibrationProblem, LossProblem, RelationshipProblem
from cotuning_kernels import backends, reference

__all__ = [
    "LOSS_CONTESTANTS",
    "OURS",
    "RELATIONSHIP_CONTESTANTS",
    "TEMPERATURE_CONTESTANTS",
    "TRITON",
    "DisagreementError",
    "ExpectedLoss",
    "LossContestant",
    "check_loss",
    "check_relationship",
    "check_temperature",
    "exact_temperature",
    "forward_and_backward",
    "our_backend",
    "prepare",
    "unavailable",
]

OURS = "cotuning_kernels"

LossFunction = Callable[[], Tensor]


@dataclass(frozen=True)
class LossContestant:
    """One way to compute the loss.

    Attributes:
        name: its name in the tables.
        prepare: does what a training script does once before its loop, and returns the loss of one step.
        source_loss: which loss it computes, ``"cross_entropy"`` or ``"kl"``. The gradients are the same.
        compiles: whether it compiles for each shape (``torch.compile``, Triton).
    """

    name: str
    prepare: Callable[[LossProblem], LossFunction]
    source_loss: str = "cross_entropy"
    compiles: bool = False


def _ours(problem: LossProblem, backend: str = "auto") -> LossFunction:
    criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off, backend=backend)
    device = problem.source_logits.device
    return lambda: criterion(problem.source_logits, problem.target_logits, problem.labels.to(device))


def _tllib(problem: LossProblem) -> LossFunction:
    labels = problem.labels.cpu()  # tllib indexes the relationship on the host
    return lambda: baselines.tllib_loss(
        problem.source_logits, problem.target_logits, labels, problem.relationship_numpy, problem.trade_off
    )


def _torch(loss: baselines.TorchLoss, problem: LossProblem) -> LossFunction:
    return lambda: loss(
        problem.source_logits, problem.target_logits, problem.labels, problem.relationship, problem.trade_off
    )


def _compiled(loss: baselines.TorchLoss, problem: LossProblem) -> LossFunction:
    return _torch(baselines.compiled(loss), problem)


LOSS_CONTESTANTS = (
    LossContestant(OURS, _ours),
    LossContestant("tllib", _tllib),
    LossContestant("F.cross_entropy", partial(_torch, baselines.cross_entropy_loss)),
    LossContestant("F.kl_div", partial(_torch, baselines.kl_div_loss), source_loss="kl"),
    LossContestant("compiled F.cross_entropy", partial(_compiled, baselines.cross_entropy_loss), compiles=True),
    LossContestant("compiled log_softmax", partial(_compiled, baselines.log_softmax_loss), compiles=True),
)
# Timed on a GPU that the CUDA kernels serve.
TRITON = LossContestant("our Triton kernels", partial(_ours, backend="triton"), compiles=True)


def _our_relationship(problem: RelationshipProblem) -> Tensor:
    first = problem.logits[0]
    estimator = ck.RelationshipEstimator(problem.target_classes, first.shape[1], device=first.device)
    for logits, labels in zip(problem.logits, problem.labels, strict=True):
        estimator.update(logits, labels)
    matrix: Tensor = estimator.compute().matrix
    return matrix


def _tllib_relationship(problem: RelationshipProblem) -> Tensor:
    return torch.from_numpy(baselines.tllib_relationship(problem.logits, problem.labels))


# By name; each returns the (N_t, N_s) relationship.
RELATIONSHIP_CONTESTANTS: dict[str, Callable[[RelationshipProblem], Tensor]] = {
    OURS: _our_relationship,
    "tllib": _tllib_relationship,
}


def _our_temperature(problem: CalibrationProblem) -> float:
    return float(ck.fit_temperature(problem.logits, problem.labels).temperature)


def _authors_temperature(problem: CalibrationProblem) -> float:
    return baselines.authors_temperature(problem.logits, problem.labels)


# By name; each returns the temperature.
TEMPERATURE_CONTESTANTS: dict[str, Callable[[CalibrationProblem], float]] = {
    OURS: _our_temperature,
    "authors": _authors_temperature,
}


def our_backend(device: str) -> str:
    """The backend that serves cotuning_kernels on ``device``; tables name it beside the numbers."""
    backend = backends.select(torch.device(device).type)
    return f"cpp {backends.cpu_isa()}" if backend == "cpp" else backend


def unavailable(contestant: LossContestant, device: str) -> str | None:
    """Return why this contestant is not timed on ``device``, or ``None``."""
    if contestant.name == OURS and our_backend(device) == "reference":
        return backends.missing_reason("cpp") or f"no kernel of cotuning_kernels serves {device!r}"
    if contestant is TRITON:
        kind = torch.device(device).type
        if "triton" not in backends.available(kind):
            return backends.missing_reason("triton") or f"the Triton kernels do not serve {device!r}"
        return "cotuning_kernels itself uses them there" if backends.select(kind) == "triton" else None
    return baselines.compiler_missing() if contestant.compiles else None


def prepare(contestants: Iterable[LossContestant], problem: LossProblem) -> dict[str, LossFunction]:
    """Return the loss of one step of each contestant, by name. Losses of earlier problems must not be called again."""
    # Without this the compiler counts earlier problems as recompilations of the same function, and gives up at eight.
    torch.compiler.reset()
    return {contestant.name: contestant.prepare(problem) for contestant in contestants}


def forward_and_backward(step: LossFunction) -> Callable[[], None]:
    """The timed call: the loss of a step and its backward pass, as in a training loop."""

    def call() -> None:
        step().backward()

    return call


class DisagreementError(AssertionError):
    """A contestant's result differs from the reference."""


# Bounds are relative to the rounded quantity: |loss|, and for a gradient factor * (p - q) the larger quantity
# factor * (p + q), since p and q may cancel. `element` bounds each element, `norm` the whole gradient, where rounding
# averages out. Torch's log_softmax on bfloat16 logits returns bfloat16: a log-probability of -30 is off by up to 0.06,
# so the probability that the backward pass computes from it is off by 6 %.
@dataclass(frozen=True)
class _Tolerance:
    loss: float
    element: float
    norm: float


_TOLERANCES = {
    torch.float32: _Tolerance(1e-5, 2e-5, 1e-5),
    torch.bfloat16: _Tolerance(1e-2, 0.1, 1.5e-2),
}


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Split a ``(rows, columns)`` tensor into slices of rows, so that the checks need little memory."""
    size = max(1, 2**22 // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class ExpectedLoss:
    """The reference's loss and gradients of a problem, in float64.

    Attributes:
        losses: the loss by ``source_loss``.
        source_grad, target_grad: the gradients of the logits.
    """

    def __init__(self, problem: LossProblem) -> None:
        self.problem = problem
        batch, columns = problem.source_logits.shape
        self.losses = {"cross_entropy": 0.0, "kl": 0.0}
        self.source_grad = torch.empty(problem.source_logits.shape, dtype=torch.float64)
        self.target_grad = torch.empty(problem.target_logits.shape, dtype=torch.float64)
        relationship, labels = problem.relationship.cpu().double(), problem.labels.cpu()
        for rows in _row_chunks(batch, columns):
            source_logits = problem.source_logits.detach()[rows].cpu().double().requires_grad_()
            target_logits = problem.target_logits.detach()[rows].cpu().double().requires_grad_()
            for source_loss in self.losses:
                loss, _, _ = reference.co_tuning_loss(
                    source_logits, target_logits, labels[rows], relationship, trade_off=problem.trade_off,
                    reduction="sum", source_loss=source_loss,
                )  # fmt: skip
                self.losses[source_loss] += loss.item() / batch
            gradients = torch.autograd.grad(loss / batch, (source_logits, target_logits))
            self.source_grad[rows], self.target_grad[rows] = gradients

    def check(self, contestant: LossContestant, loss: Tensor) -> None:
        """Compare a contestant's loss, and the gradients that its backward pass has stored, with the reference.

        Raises:
            DisagreementError: names the wrong value and its error.
        """
        problem = self.problem
        tolerance = _TOLERANCES[problem.source_logits.dtype]
        expected = self.losses[contestant.source_loss]
        if not abs(loss.item() - expected) <= tolerance.loss * abs(expected):
            raise DisagreementError(f"{contestant.name}: the loss is {loss.item()!r}, expected {expected!r}")
        batch, num_target_classes = problem.target_logits.shape
        one_hot_rows = torch.eye(num_target_classes, dtype=torch.float64)
        labels = problem.labels.cpu()
        for name, logits, expected_grad, distributions, factor in (
            ("source_logits", problem.source_logits, self.source_grad, problem.relationship.cpu(), problem.trade_off),
            ("target_logits", problem.target_logits, self.target_grad, one_hot_rows, 1.0),
        ):
            if logits.grad is None:
                raise DisagreementError(f"{contestant.name}: {name} has no gradient")
            if logits.grad.dtype != logits.dtype or logits.grad.shape != logits.shape:
                raise DisagreementError(f"{contestant.name}: the gradient of {name} has another dtype or shape")
            error_norm = scale_norm = 0.0
            for rows in _row_chunks(batch, logits.shape[1]):
                expected_rows = expected_grad[rows]
                error = (logits.grad[rows].cpu().double() - expected_rows).abs_()
                p_plus_q = expected_rows + (2 * factor / batch) * distributions[labels[rows]]
                if not bool((error <= tolerance.element * p_plus_q).all()):
                    row, column = divmod(int((error / p_plus_q).nan_to_num_(torch.inf).argmax()), error.shape[1])
                    raise DisagreementError(
                        f"{contestant.name}: the gradient of {name}[{rows.start + row}, {column}] is "
                        f"{float(logits.grad[rows][row, column])!r}, expected {float(expected_rows[row, column])!r}"
                    )
                error_norm += float(error.square().sum())
                scale_norm += float(p_plus_q.square().sum())
            if not error_norm <= tolerance.norm**2 * scale_norm:
                relative = (error_norm / scale_norm) ** 0.5
                raise DisagreementError(
                    f"{contestant.name}: the gradient of {name} is off by {relative:.1e} of its norm, "
                    f"expected at most {tolerance.norm:.1e}"
                )


def check_loss(contestant: LossContestant, step: LossFunction, expected: ExpectedLoss) -> None:
    """Run a forward and a backward pass twice and compare both with the reference.

    Raises:
        DisagreementError: the loss or a gradient is wrong, or the logits were changed.
    """
    problem = expected.problem
    versions = problem.source_logits._version, problem.target_logits._version
    for _ in range(2):
        problem.clear_gradients()
        loss = step()
        loss.backward()
        expected.check(contestant, loss.detach())
    problem.clear_gradients()
    if (problem.source_logits._version, problem.target_logits._version) != versions:
        raise DisagreementError(f"{contestant.name}: overwrote the logits")


def check_relationship(problem: RelationshipProblem, *, tolerance: float = 1e-5) -> None:
    """Compare every relationship contestant with the reference in float64, by the relative error of each element.

    Raises:
        DisagreementError: names the contestant and its error.
    """
    sums = torch.zeros(problem.target_classes, problem.logits[0].shape[1], dtype=torch.float64)
    counts = torch.zeros(problem.target_classes, dtype=torch.int64)
    for logits, labels in zip(problem.logits, problem.labels, strict=True):
        for rows in _row_chunks(*logits.shape):
            more_sums, more_counts = reference.softmax_class_sums(
                logits[rows].cpu(), labels[rows], problem.target_classes
            )
            sums += more_sums
            counts += more_counts
    expected = sums / counts[:, None]
    for name, learn in RELATIONSHIP_CONTESTANTS.items():
        error = float(((learn(problem).cpu().double() - expected).abs() / expected).nan_to_num_(torch.inf).max())
        if not error <= tolerance:
            raise DisagreementError(f"{name}: an element of the relationship is off by {error:.1e} of its value")


def exact_temperature(problem: CalibrationProblem) -> float:
    """The temperature with the least negative log-likelihood, in float64, by Newton's method with the reference.

    Raises:
        RuntimeError: the method did not converge.
    """
    inverse = 1.0 / problem.temperature
    for _ in range(50):
        totals = torch.zeros(4, dtype=torch.float64)
        for rows in _row_chunks(*problem.logits.shape):
            totals += reference.temperature_terms(
                problem.logits[rows].cpu(), problem.labels[rows].cpu(), inverse_temperature=inverse
            )
        step = float(totals[1] / totals[2])
        # The minimum is at a positive factor, so a step past 0 is shortened.
        inverse = max(inverse - step, inverse / 4)
        if abs(step) <= 1e-12 * inverse:
            return 1.0 / inverse
    raise RuntimeError("the temperature of least negative log-likelihood was not found")


# The authors' L-BFGS ends when its float32 loss no longer changes, before the temperature has all its digits.
_TEMPERATURE_TOLERANCES = {OURS: 1e-5, "authors": 1e-3}


def check_temperature(problem: CalibrationProblem) -> dict[str, float]:
    """Return ``|T - exact| / exact`` of every temperature contestant.

    Raises:
        DisagreementError: an error is above the tolerance of its method.
    """
    exact = exact_temperature(problem)
    errors = {name: abs(fit(problem) - exact) / exact for name, fit in TEMPERATURE_CONTESTANTS.items()}
    for name, error in errors.items():
        if not error <= _TEMPERATURE_TOLERANCES[name]:
            raise DisagreementError(f"{name}: the temperature is off by {error:.1e} of its value, {exact:.6f}")
    return errors
