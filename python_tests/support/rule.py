"""The one rule by which every backend is judged.

The truth is the reference in float64 on *the same* inputs (a bfloat16 logit is upcast exactly). Torch's own
error is that of the formulation people write today (``torch_formulation``), as autocast computes it: in float32 for
half precision, the gradient rounded to the logits' dtype once, at the end. A backend may be as wrong as torch is plus
``SLACK`` units; a unit is what one rounding of the parts of a number costs (those of a gradient are ``Q softmax(z)``
and ``q``, those of a loss its terms; see ``Expectation``).

NaN and infinity must stand exactly where the truth has them, a row that takes no part has a gradient of exactly 0, and
logits, labels, relationship and weight must come out bit for bit as they went in. Every tensor lies inside a larger
buffer full of NaN (of an absurd class for labels): reading past its end shows in the result, writing past it shows in
the buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning_kernels import reference
from support.backends import TABLE_BACKENDS, Backend
from support.layouts import CONTIGUOUS, Layout, Placed, bits
from support.problems import Outcome, Problem, compute_dtype, reference_outcome, torch_formulation

# Units beyond torch's own error, or beyond half a unit where torch's error on few numbers is small by luck. Half
# precision: we round a gradient when it is stored and again when the upstream gradient arrives, each time by half a
# unit; torch under autocast rounds once. Float64: the truth itself is rounded.
SLACK = {torch.float32: 4.0, torch.bfloat16: 0.6, torch.float16: 0.6, torch.float64: 16.0}


class Expectation:
    """The truth of one problem, and one unit of error for each of its numbers.

    A loss is a sum of terms ``q (logsumexp(z) - z)``, each with an error of an ulp of it, and of ``q`` where it is near
    0: its unit is ``eps * (sum of terms + Q)``. A gradient is ``c (Q softmax(z) - q)`` with a constant ``c`` a row: an
    ulp of either part where they nearly cancel, an ulp of the argument of ``exp``, and one rounding to the logits'
    dtype. So its unit is ``eps(compute) * parts * (1 + max(z) - z) + eps(logits) * |x|``, where
    ``parts = c (Q softmax(z) + q)``; among subnormal numbers it is their spacing. Where entries of R cancel, their
    errors do not: sizes are those of ``|R|``.
    """

    def __init__(self, problem: Problem, form: str) -> None:
        exact = problem.double()
        self.truth = reference_outcome(exact, form)
        self.torch_outcome = torch_formulation(problem.map(lambda _, x: x.detach().cpu()), form)
        alone = form == "source head"
        heads = (problem.source_logits,) if alone else (problem.source_logits, problem.target_logits)
        # Each head computes in the precision of its own logits; their sum is as exact as the less exact head.
        source_dtype, target_dtype = compute_dtype(problem.source_logits), compute_dtype(problem.target_logits)
        worse = torch.float32 if torch.float32 in map(compute_dtype, heads) else torch.float64
        self._arithmetic = {
            "loss": worse,
            "source_term": source_dtype,
            "target_term": target_dtype,
            "source gradient": source_dtype,
            "target gradient": target_dtype,
        }
        self.dtypes = dict.fromkeys(self.truth.losses(), compute_dtype(*heads))
        self.dtypes |= {"source gradient": problem.source_logits.dtype, "target gradient": problem.target_logits.dtype}

        p = exact.distribution()
        q = p @ exact.relationship
        q_size = p @ exact.relationship.abs()
        probabilities = isinstance(exact.target, Tensor) and exact.target.is_floating_point()
        smooth = exact.label_smoothing / p.shape[1] * (1.0 if probabilities else p.sum(1, keepdim=True))
        weight = torch.ones(p.shape[1], dtype=torch.float64) if exact.weight is None else exact.weight
        target_part = ((1 - exact.label_smoothing) * p + smooth) * weight
        source_count = target_count = torch.ones((), dtype=torch.float64)
        if exact.reduction == "mean":
            source_count = (p @ (exact.relationship != 0).any(1).double()).sum()
            target_count = target_count * len(p) if probabilities else (p * weight).sum()
        # Where no row takes part, there is nothing to measure.
        source_factor = (1.0 if alone else exact.trade_off) / torch.where(source_count > 0, source_count, 1.0)
        target_factor = 1.0 / torch.where(target_count > 0, target_count, 1.0)

        by_row = exact.options | {"reduction": "none", "source_loss": "cross_entropy"}
        if alone:
            by_row["trade_off"] = 1.0
        _, target_rows, source_rows = reference.co_tuning_loss(
            exact.source_logits, exact.target_logits, exact.target, exact.relationship.abs(), **by_row
        )

        def loss_size(rows: Tensor, part: Tensor, factor: Tensor) -> Tensor:
            rows = (rows.abs() + part.sum(1)) * factor.abs()
            return rows if exact.reduction == "none" else rows.sum()

        def gradient_size(logits: Tensor, part: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
            constant = (factor * exact.upstream).reshape(-1, 1)
            # A row without a softmax has no finite truth or takes no part.
            parts = constant.abs() * (part.sum(1, keepdim=True) * torch.softmax(logits, 1).nan_to_num(0.0) + part)
            tiny = torch.finfo(dtype).smallest_normal / torch.finfo(dtype).eps
            return parts + tiny * constant.abs().clamp(min=1)

        def argument(logits: Tensor, dtype: torch.dtype) -> Tensor:
            finite = torch.where(logits.isfinite(), logits, -math.inf)
            # The truth is exp(log_softmax), which rounds the logarithm of the sum into the argument as well.
            top = torch.logsumexp(finite, 1, keepdim=True) if dtype == torch.float64 else finite.amax(1, keepdim=True)
            below = top - finite
            return torch.where(below.isfinite(), below, 0.0)

        self._argument = {
            "source gradient": argument(exact.source_logits, source_dtype),
            "target gradient": argument(exact.target_logits, target_dtype),
        }
        # The exponentials are summed in a few partial sums, each of which rounds once per element.
        self._sum_units = max(x.shape[1] for x in heads) / 2048
        source_size = gradient_size(exact.source_logits, q_size, source_factor, source_dtype)
        if alone:
            self.size = Outcome(loss_size(source_rows, q_size, source_factor), source_size)
        else:
            target_term_size = loss_size(target_rows, target_part, target_factor)
            loss = target_term_size + loss_size(source_rows, q_size, source_factor)
            self.size = Outcome(
                loss,
                source_size,
                gradient_size(exact.target_logits, target_part, target_factor, target_dtype),
                target_term_size,
                loss_size(source_rows, q_size, 1.0 / torch.where(source_count > 0, source_count, 1.0)),
            )
        factor = torch.maximum(source_factor.abs(), target_factor) * exact.upstream.abs()
        # A half-precision gradient is stored before it is multiplied by this.
        self._stored_factor = factor.clamp(min=1).reshape(-1, 1)
        nothing_above = exact.upstream.reshape(-1, 1) == 0
        self._takes_no_part = {
            "source gradient": (q == 0).all(1, keepdim=True) | nothing_above | (exact.trade_off == 0 and not alone),
            "target gradient": (target_part == 0).all(1, keepdim=True) | nothing_above,
        }
        self._units = {name: self._unit(name) for name in self.truth.tensors()}
        self.torch_errors = self.errors(self.torch_outcome)

    def _unit(self, name: str) -> Tensor:
        compute, stored = torch.finfo(self._arithmetic[name]), torch.finfo(self.dtypes[name])
        unit = compute.eps * self.size.tensors()[name]
        if name in self.truth.gradients():
            unit = unit * (1 + self._argument[name])
            if stored.eps != compute.eps:
                subnormal = stored.smallest_normal * stored.eps
                unit = unit + stored.eps * self.truth.tensors()[name].abs() + subnormal * self._stored_factor
        return unit

    def errors(self, outcome: Outcome) -> dict[str, tuple[float, float]]:
        """By tensor, over finite numbers: the largest error in units, and relative to the largest magnitude."""
        found = {}
        for name, ours in outcome.tensors().items():
            exact, unit, size = self.truth.tensors()[name], self._units[name], self.size.tensors()[name]
            finite = ours.isfinite() & exact.isfinite() & unit.isfinite()
            error = (ours.double() - exact).abs()[finite]
            if error.numel():
                units = torch.where(error == 0, 0.0, error / unit[finite])
                found[name] = (float(units.max()), float(error.max() / size[finite].max()))
        return found

    def check(self, outcome: Outcome) -> dict[str, tuple[float, float]]:
        """Return the errors. Raises AssertionError where ``outcome`` breaks the rule of this module."""
        assert outcome.tensors().keys() == self.truth.tensors().keys(), f"got {outcome.tensors().keys()}"
        for name, ours in outcome.tensors().items():
            exact = self.truth.tensors()[name]
            assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
            assert ours.dtype == self.dtypes[name], f"{name} is {ours.dtype}, expected {self.dtypes[name]}"
            rounded = exact.to(ours.dtype)
            for what, pattern in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
                wrong = pattern(ours) != pattern(rounded)
                assert not wrong.any(), f"{name}{_first(wrong)}: {what} misplaced in\n{ours}\nexpected\n{exact}"
            if name in self.truth.gradients():
                wrong = self._takes_no_part[name] & (exact == 0) & (ours != 0)
                assert not wrong.any(), f"{name}{_first(wrong)} is not 0 in\n{ours}\nbut its row takes no part"
        errors = self.errors(outcome)
        for name, (units, relative) in errors.items():
            slack = SLACK[self.dtypes[name] if name in self.truth.gradients() else self._arithmetic[name]]
            allowed = max(0.5, self.torch_errors.get(name, (0.0, 0.0))[0]) + slack + self._sum_units
            assert units <= allowed, (
                f"{name} is {units:.3g} units off ({relative:.3g} of its largest number), allowed are {allowed:.3g}; "
                f"got\n{outcome.tensors()[name]}\nexpected\n{self.truth.tensors()[name]}"
            )
        return errors


def _first(mask: Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero()[0]] if mask.dim() else []


@dataclass
class Record:
    """Largest errors seen, relative to a tensor's largest magnitude, beside torch's own."""

    loss: float = 0.0
    torch_loss: float = 0.0
    gradient: float = 0.0
    torch_gradient: float = 0.0
    checks: int = 0

    def add(self, ours: dict[str, tuple[float, float]], torchs: dict[str, tuple[float, float]]) -> None:
        for name in ours.keys() & torchs.keys():  # torch's formulation may be NaN: nothing to compare with
            kind = "gradient" if "gradient" in name else "loss"
            setattr(self, kind, max(getattr(self, kind), ours[name][1]))
            setattr(self, f"torch_{kind}", max(getattr(self, f"torch_{kind}"), torchs[name][1]))
        self.checks += 1

    def merge(self, other: Record) -> None:
        for kind in ("loss", "torch_loss", "gradient", "torch_gradient"):
            setattr(self, kind, max(getattr(self, kind), getattr(other, kind)))
        self.checks += other.checks


RECORDS: dict[tuple[str, str], Record] = {}
"""By backend name and logits dtype; the summary of a test session prints them."""


def verify(
    backend: Backend, problem: Problem, form: str = "both heads", *,
    logits_layout: Layout = CONTIGUOUS, other_layout: Layout = CONTIGUOUS, expectation: Expectation | None = None,
) -> Outcome:  # fmt: skip
    """Run ``problem`` on ``backend`` among poisoned memory and judge every result. Raises AssertionError.

    Pass ``expectation`` to compute it once where several backends run one problem.
    """
    placed: dict[str, Placed] = {}

    def place(name: str, x: Tensor) -> Tensor:
        if x.dim() == 1 and x.stride(0) == 0:
            return x.to(backend.device)  # an expanded vector stays expanded
        placed[name] = Placed(x, logits_layout if name.endswith("logits") else other_layout, backend.device)
        return placed[name].view

    given = problem.map(place)
    # Taken from the placed tensors, since an expanded layout repeats one row, and before a kernel may overwrite them.
    expectation = expectation or Expectation(given, form)
    with backend.using():
        outcome = backend.run(given, form, backend.argument)
    for name, x in vars(outcome).items():
        setattr(outcome, name, None if x is None else x.detach().cpu())
    for name, tensor in placed.items():
        if form == "in place" and name.endswith("logits"):
            tensor.assert_margins_unchanged(name)
        else:
            tensor.assert_unchanged(name)
    errors = expectation.check(outcome)
    if problem.source_logits.dtype == problem.target_logits.dtype:
        dtype = str(problem.source_logits.dtype).removeprefix("torch.")
        record = RECORDS.setdefault((backend.name, dtype), Record())
        record.add(errors, expectation.torch_errors)
    return outcome


def assert_same_bits(first: Outcome, second: Outcome, what: str) -> None:
    for name, x in first.tensors().items():
        assert torch.equal(bits(x), bits(second.tensors()[name])), f"{name} differs: {what}"


def error_lines(records: dict[tuple[str, str], Record]) -> list[str]:
    """The table of errors: of the backends that the conformance table judges, not of kernels with planted faults."""
    names = [*(backend.name for backend in TABLE_BACKENDS), "triton-ttsem"]
    lines = [f"{'backend':20}{'logits':16}{'checks':>8}{'loss':>12}{'torch':>12}{'gradient':>12}{'torch':>12}"]
    for (name, dtype), record in sorted(records.items(), key=lambda item: item[0]):
        if name in names:
            errors = (record.loss, record.torch_loss, record.gradient, record.torch_gradient)
            lines.append(f"{name:20}{dtype:16}{record.checks:8}" + "".join(f"{error:12.1e}" for error in errors))
    return lines if len(lines) > 1 else []
