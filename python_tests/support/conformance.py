"""The conformance table: what every backend must compute, as data, and the one rule it is judged by.

Adding a backend is one row in ``BACKENDS``; adding an edge case is one row in ``CASES``. Nothing else changes.

The rule. The truth is the reference in float64 on *the same* inputs (a bfloat16 logit is upcast exactly). Torch's own
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

import itertools
import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotuning_kernels import backends, functional, reference
from support import emulated_cuda

Target = Tensor | tuple[Tensor, Tensor, Tensor | float]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Units beyond torch's own error, or beyond half a unit where few numbers make that small by luck. Half precision: we
# round a gradient when it is stored and again when the upstream gradient arrives, each time by half a unit; torch under
# autocast does it once. Float64: the truth is rounded there itself.
SLACK = {torch.float32: 4.0, torch.bfloat16: 0.6, torch.float16: 0.6, torch.float64: 16.0}

# ---------------------------------------------------------------------------------------------------------- problems


@dataclass
class Problem:
    """The arguments of one call and the upstream gradient: a scalar, or one a row with ``reduction="none"``."""

    source_logits: Tensor
    target_logits: Tensor
    target: Target
    relationship: Tensor
    upstream: Tensor
    weight: Tensor | None = None
    trade_off: float = 2.3
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    source_loss: str = "cross_entropy"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``co_tuning_loss``."""
        names = ("trade_off", "weight", "label_smoothing", "ignore_index", "reduction", "source_loss")
        return {name: getattr(self, name) for name in names}

    @property
    def source_options(self) -> dict[str, Any]:
        """Keyword arguments of ``source_label_loss``."""
        return {name: getattr(self, name) for name in ("ignore_index", "reduction", "source_loss")}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Problem:
        """The same problem with every tensor ``x`` called ``name`` replaced by ``change(name, x)``."""
        target: Target
        if isinstance(self.target, tuple):
            a, b, share = self.target
            share = change("share", share) if isinstance(share, Tensor) else share
            target = (change("labels_a", a), change("labels_b", b), share)
        else:
            target = change("target", self.target)
        return replace(
            self,
            source_logits=change("source_logits", self.source_logits),
            target_logits=change("target_logits", self.target_logits),
            target=target,
            relationship=change("relationship", self.relationship),
            upstream=change("upstream", self.upstream),
            weight=None if self.weight is None else change("weight", self.weight),
        )

    def double(self) -> Problem:
        """Every floating tensor in float64 on the CPU, dense: what the truth is computed from."""
        return self.map(lambda _, x: (x.double() if x.is_floating_point() else x).detach().cpu().clone())

    def distribution(self) -> Tensor:
        """``P``, the dense ``(B, N_t)`` target distribution."""
        classes = torch.eye(self.relationship.shape[0], dtype=torch.float64)
        return reference.translate_labels(self.target, classes, ignore_index=self.ignore_index)


@dataclass
class Outcome:
    """What one call gave, or arrays of the same shapes that belong to it. None: not part of this form of the call."""

    loss: Tensor
    source_grad: Tensor
    target_grad: Tensor | None = None
    target_term: Tensor | None = None
    source_term: Tensor | None = None

    def losses(self) -> dict[str, Tensor | None]:
        return {"loss": self.loss, "target_term": self.target_term, "source_term": self.source_term}

    def gradients(self) -> dict[str, Tensor | None]:
        return {"source gradient": self.source_grad, "target gradient": self.target_grad}

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in (self.losses() | self.gradients()).items() if x is not None}


FORMS = ("both heads", "source head", "in place")
"""The ways to call the loss: both heads, ``source_label_loss``, and with the gradients written over the logits."""


def reference_outcome(problem: Problem, form: str) -> Outcome:
    """The reference, differentiated by autograd, in whatever dtype the problem has."""
    source = problem.source_logits.detach().requires_grad_()
    target = problem.target_logits.detach().requires_grad_()
    if form == "source head":
        loss = reference.source_label_loss(source, problem.target, problem.relationship, **problem.source_options)
        return Outcome(loss.detach(), torch.autograd.grad(loss, source, problem.upstream)[0])
    loss, target_term, source_term = reference.co_tuning_loss(
        source, target, problem.target, problem.relationship, **problem.options
    )
    source_grad, target_grad = torch.autograd.grad(loss, (source, target), problem.upstream)
    return Outcome(loss.detach(), source_grad, target_grad, target_term.detach(), source_term.detach())


def torch_formulation(problem: Problem, form: str) -> Outcome:
    """What people write today with ``F.cross_entropy``, as autocast computes it; independent of the reference.

    It is NaN where a logit of -inf meets ``q = 0``, and is no measure there.
    """
    source = problem.source_logits.detach().requires_grad_()
    target = problem.target_logits.detach().requires_grad_()
    dtype = compute_dtype(source, source if form == "source head" else target)
    z_source, z_target = source.to(dtype), target.to(dtype)
    relationship = problem.relationship.to(dtype)
    num_classes = relationship.shape[0]
    weight = None if problem.weight is None else problem.weight.to(dtype)

    def one_hot(labels: Tensor) -> Tensor:
        valid = labels != problem.ignore_index
        return F.one_hot(torch.where(valid, labels, 0).long(), num_classes).to(dtype) * valid[:, None]

    def cross_entropy(labels: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(
            z_target, labels.long(), weight, reduction=reduction, ignore_index=problem.ignore_index,
            label_smoothing=problem.label_smoothing,
        )  # fmt: skip

    if isinstance(problem.target, tuple):
        a, b, share = problem.target
        share = torch.as_tensor(share, dtype=dtype).reshape(-1)
        distribution = share[:, None] * one_hot(a) + (1 - share)[:, None] * one_hot(b)
        rows = share * cross_entropy(a, "none") + (1 - share) * cross_entropy(b, "none")
        count = (distribution if weight is None else distribution * weight).sum()
        target_term = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count}[problem.reduction]
    elif problem.target.is_floating_point():
        distribution = problem.target.to(dtype)
        target_term = F.cross_entropy(
            z_target, distribution, weight, reduction=problem.reduction, label_smoothing=problem.label_smoothing
        )
    else:
        distribution = one_hot(problem.target)
        target_term = cross_entropy(problem.target, problem.reduction)

    translated = distribution @ relationship
    if problem.source_loss == "kl":
        rows = F.kl_div(F.log_softmax(z_source, dim=1), translated, reduction="none").sum(1)
    else:
        rows = F.cross_entropy(z_source, translated, reduction="none")
    rows = torch.where((translated != 0).any(1), rows, torch.zeros_like(rows))
    supervised = (distribution @ (relationship != 0).any(1).to(dtype)).sum()
    mean = rows.sum() / supervised if supervised > 0 or not distribution.any() else rows.sum()
    source_term = {"none": rows, "sum": rows.sum(), "mean": mean}[problem.reduction]
    if form == "source head":
        return Outcome(source_term.detach(), torch.autograd.grad(source_term, source, problem.upstream)[0])
    loss = target_term + problem.trade_off * source_term
    source_grad, target_grad = torch.autograd.grad(loss, (source, target), problem.upstream)
    return Outcome(loss.detach(), source_grad, target_grad, target_term.detach(), source_term.detach())


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """What losses are computed in and returned as."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


# ----------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in memory. A vector takes the column step alone."""

    name: str
    why: str
    row_padding: int = 0
    column_offset: int = 0
    row_step: int = 1
    column_step: int = 1
    expanded: bool = False
    transposed: bool = False

    @property
    def in_place(self) -> bool:
        """Whether gradients can be written over logits that lie like this."""
        return not (self.expanded or self.transposed or self.column_step > 1)


CONTIGUOUS = Layout("contiguous", "the ordinary case: a Linear's output")
LAYOUTS = (
    CONTIGUOUS,
    Layout("padded rows", "stride(0) > N; nothing between the rows may be read or written", row_padding=24),
    Layout("odd columns", "a slice x[:, 3:3+N] of an odd width: no row is aligned to any vector", 5, 3),
    Layout("every second row", "x[::2]: other people's rows lie in between", row_step=2),
    Layout("expanded row", "stride(0) == 0: all rows share one memory", expanded=True),
    Layout("transposed", "stride(1) != 1: columns are not dense, a copy has to be made", transposed=True),
    Layout("every second column", "x[:, ::2], and labels[::2]: not dense either", column_step=2),
)

ABSURD_CLASS = 2**30
_MARGIN = 64


class Placed:
    """A tensor inside a larger, poisoned buffer. ``view`` is what a backend gets."""

    def __init__(self, values: Tensor, layout: Layout = CONTIGUOUS, device: str = "cpu") -> None:
        rows, columns = values.shape if values.dim() == 2 else (1, values.numel())
        column_stride = layout.column_step
        row_stride = (columns * column_stride + layout.row_padding) * layout.row_step
        if layout.expanded:
            row_stride = 0
        if layout.transposed:
            row_stride, column_stride = 1, rows
        # The start is a multiple of 64 elements, hence aligned like the allocator's memory, before column_offset.
        start = _MARGIN + layout.column_offset
        extent = max(rows - 1, 0) * row_stride + columns * column_stride
        poison = math.nan if values.is_floating_point() else ABSURD_CLASS
        self.buffer = torch.full((start + extent + _MARGIN,), poison, dtype=values.dtype, device=device)
        strides = (row_stride, column_stride) if values.dim() == 2 else (column_stride,) * values.dim()
        self.view = self.buffer.as_strided(values.shape, strides, start)
        if layout.expanded and values.dim() == 2:
            self.view[:1].copy_(values[:1])
        else:
            self.view.copy_(values)
        self._before = bits(self.buffer).clone()

    def assert_unchanged(self, name: str) -> None:
        assert torch.equal(bits(self.buffer), self._before), f"{name}, or the memory around it, was modified"

    def assert_margins_unchanged(self, name: str) -> None:
        inside = torch.zeros(self.buffer.shape, dtype=torch.bool, device=self.buffer.device)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        changed = (bits(self.buffer) != self._before) & ~inside
        assert not changed.any(), f"memory around {name} was written, first at element {int(changed.nonzero()[0])}"


def bits(x: Tensor) -> Tensor:
    """The bit pattern as integers: NaN equals NaN, and -0.0 differs from 0.0."""
    if not x.is_floating_point():
        return x
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# ---------------------------------------------------------------------------------------------------------- backends


def run_public(problem: Problem, form: str, backend: str) -> Outcome:
    """Through the public functions, as a user would."""
    source = source_leaf = problem.source_logits.detach().requires_grad_()
    target = target_leaf = problem.target_logits.detach().requires_grad_()
    if form == "source head":
        loss = functional.source_label_loss(
            source, problem.target, problem.relationship, backend=backend, **problem.source_options
        )
        return Outcome(loss.detach(), torch.autograd.grad(loss, source, problem.upstream)[0])
    if form == "in place":
        source, target = _produced(source), _produced(target)
    terms = functional.co_tuning_loss(
        source, target, problem.target, problem.relationship, backend=backend, return_terms=True,
        inplace=form == "in place", **problem.options,
    )  # fmt: skip
    assert isinstance(terms, functional.CoTuningTerms)
    source_grad, target_grad = torch.autograd.grad(terms.loss, (source_leaf, target_leaf), problem.upstream)
    return Outcome(terms.loss.detach(), source_grad, target_grad, terms.target_term, terms.source_term)


class _Produced(torch.autograd.Function):
    """A tensor in its input's memory that is not a leaf: like a Linear's output, but lying where the test wants it."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        alias = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return alias.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _produced(leaf: Tensor) -> Tensor:
    return _Produced.apply(leaf)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class Backend:
    """One row of the table of backends.

    ``argument`` is what users pass as ``backend=``, ``using`` selects a variant of it, ``missing`` says why it cannot
    run here (None where it can), and ``run(problem, form, argument)`` calls it. A slow backend runs some of the table,
    by a rule: ``takes(case)``, and ``all_forms`` only in these dtypes, elsewhere the first. ``device_code`` is made for
    a GPU: a label out of range is an assertion, and where it is interpreted one thread at a time may call it.
    """

    name: str
    argument: str
    using: Callable[[], AbstractContextManager[None]] = nullcontext
    missing: Callable[[], str | None] = lambda: None
    device: str = "cpu"
    forms: tuple[str, ...] = FORMS
    run: Callable[[Problem, str, str], Outcome] = run_public
    takes: Callable[[Case], bool] = lambda case: True
    # How an element is loaded does not depend on where its gradient goes, nor on whether there is another head: these
    # forms run in one wide and one narrow dtype.
    all_forms: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    device_code: bool = False


def _cpp(isa: str) -> Backend:
    def missing() -> str | None:
        reason = backends.missing_reason("cpp")
        if reason is None and isa not in backends.cpu_isas():
            reason = f"this processor or this build has no {isa}, only {', '.join(backends.cpu_isas())}"
        return reason

    return Backend(f"cpp-{isa}", "cpp", lambda: backends.use_cpu_isa(isa), missing)


def _triton(name: str, *, loops: bool) -> Backend:
    """The Triton kernels in Triton's interpreter, on CPU tensors.

    It takes some 20 ms a call. So it runs every case in every dtype of the case, but the other forms in float32 alone;
    and the kernels for long rows, as if those began above 64 columns, run the cases that have such rows. The case of
    hundreds of rows is for threads, of which there are none here.
    """

    def using() -> AbstractContextManager[None]:
        from support.triton_stand_in import triton_interpreted  # and triton with it

        return triton_interpreted(loops=loops)

    def takes(case: Case) -> bool:
        if case.shape[0] > 100:
            return False
        return not loops or (max(case.shape[1:]) > 64 and math.prod(case.shape) < 200_000)

    return Backend(
        name, "triton", using, lambda: backends.missing_reason("triton"), takes=takes, all_forms=(torch.float32,),
        device_code=True,
    )  # fmt: skip


# The kernels themselves, on a GPU.
TRITON_ON_GPU = Backend(
    "triton", "triton",
    missing=lambda: backends.missing_reason("triton")
    or (None if torch.cuda.is_available() else "no GPU that this torch can use"),
    device="cuda", device_code=True,
)  # fmt: skip


# inplace=True is refused by the reference: there is no kernel that could write in place.
REFERENCE = Backend("reference", "reference", forms=("both heads", "source head"))
# Plain labels take the fast path where it is there; the last row is what everybody else gets.
_OPERATIONS = Backend("cpp-operations", "cpp", backends.without_fast_path, lambda: backends.missing_reason("cpp"))


def _emulated_cuda(name: str, plan: emulated_cuda.Plan, least_columns: int = 0) -> Backend:
    """The CUDA kernels on the CPU, by a plan of their own; every call runs warps and blocks in another order."""
    calls = itertools.count()

    def run(problem: Problem, form: str, argument: str) -> Outcome:
        call = next(calls)
        emulated_cuda.schedule(emulated_cuda.ORDERS[call % len(emulated_cuda.ORDERS)], seed=call)
        return run_public(problem, form, argument)

    return Backend(
        f"emulated-{name}", "cuda", emulated_cuda.using(plan), emulated_cuda.missing, run=run,
        takes=lambda case: max(case.shape[1:]) >= least_columns,
    )  # fmt: skip


def _missing_cuda() -> str | None:
    if reason := backends.missing_reason("cuda"):
        return reason
    return None if torch.cuda.is_available() else "no CUDA device that this torch can use"


# Of the two kinds of AVX-512, which differ in how they round to bfloat16, this processor is served by one. The other
# runs the table alone.
_SERVING, _OTHER = ("avx512_bf16", "avx512") if "avx512_bf16" in backends.cpu_isas() else ("avx512", "avx512_bf16")

BACKENDS = (
    REFERENCE,
    _cpp(_SERVING),
    _cpp("avx2"),
    _cpp("portable"),
    _OPERATIONS,
    _triton("triton-rows", loops=False),
)
TABLE_BACKENDS = (
    *BACKENDS,
    _cpp(_OTHER),
    # A warp a row where that is enough, and few blocks, so that each goes on to further rows.
    _emulated_cuda("warps", emulated_cuda.Plan(max_blocks=2)),
    _emulated_cuda("blocks", emulated_cuda.Plan(warp_vectors=0, max_blocks=3)),
    _emulated_cuda("unstaged", emulated_cuda.Plan(shared_bytes=0, warp_vectors=16)),
    # Room for the logits of 128 columns or so, but not for as many of the target, of which registers keep the rest; of
    # shorter rows they keep none.
    _emulated_cuda("registers", emulated_cuda.Plan(shared_bytes=4 * 16 * 35, max_blocks=2), least_columns=65),
    _triton("triton-loops", loops=True),
    Backend("cuda", "cuda", missing=_missing_cuda, device="cuda"),
    TRITON_ON_GPU,
)
"""The table runs on these; everything else that is asked of a backend, on ``BACKENDS``."""


# ---------------------------------------------------------------------------------------------------------- the rule


class Expectation:
    """The truth of one problem, and for every number of it the size of one unit of error.

    A loss is a sum of terms ``q (logsumexp(z) - z)``, each with an error of an ulp of it, and of ``q`` where it is near
    0: its unit is ``eps * (sum of terms + Q)``. A gradient is ``c (Q softmax(z) - q)`` with a constant ``c`` a row: an
    ulp of either part where they nearly cancel, an ulp of the argument of ``exp``, and one rounding to the logits'
    dtype. So its unit is ``eps(compute) * parts * (1 + max(z) - z) + eps(logits) * |x|``, where
    ``parts = c (Q softmax(z) + q)``; among subnormal numbers, the distance of two. Where entries of R cancel, their
    errors do not: sizes are those of ``|R|``.
    """

    def __init__(self, problem: Problem, form: str) -> None:
        exact = problem.double()
        self.truth = reference_outcome(exact, form)
        self.torch_outcome = torch_formulation(problem.map(lambda _, x: x.detach().cpu()), form)
        alone = form == "source head"
        heads = (problem.source_logits,) if alone else (problem.source_logits, problem.target_logits)
        # A head's arithmetic is that of its own logits, and their sum is as good as the worse of the two.
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
        # Where nothing takes part, nothing is measured either.
        source_factor = (1.0 if alone else exact.trade_off) / torch.where(source_count > 0, source_count, 1.0)
        target_factor = 1.0 / torch.where(target_count > 0, target_count, 1.0)

        _, target_rows, source_rows = reference.co_tuning_loss(
            exact.source_logits, exact.target_logits, exact.target, exact.relationship.abs(),
            **exact.options | {"reduction": "none", "source_loss": "cross_entropy"},
        )  # fmt: skip

        def loss_size(rows: Tensor, part: Tensor, factor: Tensor) -> Tensor:
            rows = (rows.abs() + part.sum(1)) * factor.abs()
            return rows if exact.reduction == "none" else rows.sum()

        def gradient_size(logits: Tensor, part: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
            constant = (factor * exact.upstream).reshape(-1, 1)
            # A row without a softmax has no finite truth, or no part.
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
        # A sum of exponentials in a few partial sums, each of which rounds once an element.
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
        """By tensor, over what is finite: largest error in units, and relative to the size of the largest number."""
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
        """Its errors. Raises AssertionError where ``outcome`` breaks the rule of this module."""
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
    """Largest errors seen, relative to the size of the largest number of a tensor, beside torch's own."""

    loss: float = 0.0
    torch_loss: float = 0.0
    gradient: float = 0.0
    torch_gradient: float = 0.0
    checks: int = 0

    def add(self, ours: dict[str, tuple[float, float]], torchs: dict[str, tuple[float, float]]) -> None:
        for name in ours.keys() & torchs.keys():  # where torch's formulation is NaN there is nothing to stand beside
            kind = "gradient" if "gradient" in name else "loss"
            setattr(self, kind, max(getattr(self, kind), ours[name][1]))
            setattr(self, f"torch_{kind}", max(getattr(self, f"torch_{kind}"), torchs[name][1]))
        self.checks += 1

    def merge(self, other: Record) -> None:
        for kind in ("loss", "torch_loss", "gradient", "torch_gradient"):
            setattr(self, kind, max(getattr(self, kind), getattr(other, kind)))
        self.checks += other.checks


RECORDS: dict[tuple[str, str], Record] = {}
"""By name of the backend and dtype of the logits; the summary of a test session prints them."""


def verify(
    backend: Backend, problem: Problem, form: str = "both heads", *,
    logits_layout: Layout = CONTIGUOUS, other_layout: Layout = CONTIGUOUS, expectation: Expectation | None = None,
) -> Outcome:  # fmt: skip
    """Run ``problem`` on ``backend`` among poisoned memory and judge all that came out. Raises AssertionError.

    ``expectation`` saves its computation where several backends are held against one problem.
    """
    placed: dict[str, Placed] = {}

    def place(name: str, x: Tensor) -> Tensor:
        if x.dim() == 1 and x.stride(0) == 0:
            return x.to(backend.device)  # an expanded vector stays expanded
        placed[name] = Placed(x, logits_layout if name.endswith("logits") else other_layout, backend.device)
        return placed[name].view

    given = problem.map(place)
    # Of the placed tensors, since an expanded layout repeats one row; and now, since a kernel may write over them.
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


# --------------------------------------------------------------------------------------------------- the table's rows

Edit = Callable[[Problem], None]
"""Changes a problem in place, in float64, before it is cast to the dtype under test."""


@dataclass(frozen=True)
class Case:
    """One row of the table: how to draw a problem. Names of target and relationship kinds are those of the builders."""

    name: str
    why: str
    shape: tuple[int, int, int] = (4, 7, 40)
    target: str = "labels"
    relationship: str = "normalised"
    weight: str = "none"
    upstream: str = "random"
    edits: tuple[Edit, ...] = ()
    relationship_dtype: torch.dtype | None = None
    target_logits_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def build(self, dtype: torch.dtype, seed: int) -> Problem:
        """Draw the problem; the same seed draws the same numbers for every dtype."""
        draw = torch.Generator().manual_seed(seed + zlib.crc32(self.name.encode()))
        batch, target_classes, source_classes = self.shape
        relationship = _relationship(self.relationship, target_classes, source_classes, draw)
        problem = Problem(
            source_logits=2 * _normal(draw, batch, source_classes),
            target_logits=2 * _normal(draw, batch, target_classes),
            target=_target(self.target, batch, target_classes, self.options.get("ignore_index", -100), draw),
            relationship=relationship.to(self.relationship_dtype or torch.promote_types(dtype, torch.float32)),
            upstream=torch.zeros(()),
            weight=_weight(self.weight, target_classes, draw),
            **self.options,
        )
        for edit in self.edits:
            edit(problem)
        problem.source_logits = problem.source_logits.to(dtype)
        problem.target_logits = problem.target_logits.to(self.target_logits_dtype or dtype)
        loss_dtype = compute_dtype(problem.source_logits, problem.target_logits)
        problem.upstream = _upstream(self.upstream, batch if problem.reduction == "none" else None, draw).to(loss_dtype)
        return problem


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _uniform(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draw, dtype=torch.float64)


def _relationship(kind: str, target_classes: int, source_classes: int, draw: torch.Generator) -> Tensor:
    dense = torch.softmax(2 * _normal(draw, target_classes, source_classes), dim=1)
    if kind == "dense":
        return dense
    if kind == "one-hot":
        return F.one_hot(dense.argmax(1), source_classes).double()
    # A quarter of the entries is 0, and never a whole row.
    kept = (_uniform(draw, target_classes, source_classes) > 0.25) | (dense == dense.amax(1, keepdim=True))
    sparse = dense * kept
    sparse /= sparse.sum(1, keepdim=True)
    if kind == "unnormalised":
        sparse *= 0.1 + 3 * _uniform(draw, target_classes, 1)
    elif kind == "unsupervised":
        sparse[::2] = 0
    elif kind == "all unsupervised":
        sparse[:] = 0
    else:
        assert kind == "normalised", kind
    return sparse


def _target(kind: str, batch: int, classes: int, ignore_index: int, draw: torch.Generator) -> Target:
    def labels() -> Tensor:
        # Consecutive classes from a random start: a batch of two or more has supervised and unsupervised ones.
        start = int(torch.randint(classes, (), generator=draw))
        drawn = (torch.arange(batch) + start) % classes
        # A class that is the ignore_index itself appears only where a case asks for ignored rows.
        return torch.where(drawn == ignore_index, (drawn + 1) % classes, drawn)

    def ignoring(every: int, first: int) -> Tensor:
        chosen = labels()
        chosen[first::every] = ignore_index
        return chosen

    share = _uniform(draw, batch).float()
    if kind == "pair, float share":
        return labels(), labels(), float(_uniform(draw, 1))
    if kind == "pair, scalar share":
        return labels(), labels(), torch.tensor(0.3)
    if kind == "pair, shares 0 and 1":
        # An ignored label with no share at all must not matter.
        a, b, share = labels(), labels(), (torch.arange(batch) % 2).float()
        a[:1] = ignore_index
        return a, b, share
    probabilities = torch.softmax(_normal(draw, batch, classes), dim=1)
    targets: dict[str, Callable[[], Target]] = {
        "labels": labels,
        "int32": lambda: labels().int(),
        "ignoring": lambda: ignoring(3, 0),
        "all ignored": lambda: ignoring(1, 0),
        "one label": lambda: torch.full_like(labels(), int(labels()[0])),
        "pair": lambda: (labels(), labels(), share),
        "int32 pair": lambda: (labels().int(), labels().int(), share),
        "half pair": lambda: (labels(), labels(), share.half()),
        "double pair": lambda: (labels(), labels(), share.double()),
        "equal pair": lambda: (labels().fill_(classes - 1), labels().fill_(classes - 1), share),
        # Row 0 ignores both sides, row 2 the first, row 3 the second.
        "pair ignoring": lambda: (ignoring(2, 0), ignoring(3, 0), share),
        "probabilities": lambda: probabilities.float(),
        "half probabilities": lambda: probabilities.bfloat16(),
        "double probabilities": lambda: probabilities,
        "one-hot probabilities": lambda: F.one_hot(labels(), classes).float(),
        "unnormalised probabilities": lambda: (probabilities * 3 * _uniform(draw, batch, 1)).float(),
        "no probabilities": lambda: torch.zeros(batch, classes),
        "probabilities, zero rows": lambda: (probabilities * (torch.arange(batch) % 2)[:, None]).float(),
    }
    return targets[kind]()


def _weight(kind: str, classes: int, draw: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    weight = (0.5 + _uniform(draw, classes)).float()
    if kind == "half":
        return weight.half()
    if kind == "zeros":
        weight[::2] = 0
    return weight


def _upstream(kind: str, rows: int | None, draw: torch.Generator) -> Tensor:
    values = _normal(draw, *(() if rows is None else (rows,)))
    if kind == "zero":
        return torch.zeros_like(values)
    if kind == "gradient scaler":
        return values.sign() * 65536.0
    if kind == "expanded":
        return _normal(draw, 1).expand(rows or 0)
    return values


# ------------------------------------------------------------------------------------------------------------- edits


def source(rows: int | slice, columns: int | slice, value: float) -> Edit:
    """Set source logits."""

    def edit(problem: Problem) -> None:
        problem.source_logits[rows, columns] = value

    return edit


def target(rows: int | slice, columns: int | slice, value: float) -> Edit:
    """Set target logits."""

    def edit(problem: Problem) -> None:
        problem.target_logits[rows, columns] = value

    return edit


def both(rows: int | slice, columns: int | slice, value: float) -> Edit:
    """Set logits of both heads."""

    def edit(problem: Problem) -> None:
        problem.source_logits[rows, columns] = value
        problem.target_logits[rows, columns] = value

    return edit


def scaled(factor: float, offset: float = 0.0) -> Edit:
    """Scale and shift all logits."""

    def edit(problem: Problem) -> None:
        problem.source_logits.mul_(factor).add_(offset)
        problem.target_logits.mul_(factor).add_(offset)

    return edit


def masked_where_not_a_label(problem: Problem) -> None:
    """-inf wherever the label distribution is 0 in every second column; the label itself keeps its logit."""
    p = problem.distribution()
    q = p @ problem.relationship.double()
    problem.source_logits.masked_fill_(q == 0, -math.inf)
    every_second = torch.arange(p.shape[1]) % 2 == 0
    problem.target_logits.masked_fill_((p == 0) & every_second, -math.inf)


def staircase(step: float) -> Edit:
    """Every 16 columns a step up (or down): a running maximum is overtaken again and again."""

    def edit(problem: Problem) -> None:
        problem.source_logits += step * (torch.arange(problem.source_logits.shape[1]) // 16)
        problem.target_logits += step * (torch.arange(problem.target_logits.shape[1]) // 16)

    return edit


def labels_of_class(label: int) -> Edit:
    """Every row has this label."""

    def edit(problem: Problem) -> None:
        assert isinstance(problem.target, Tensor)
        problem.target.fill_(label)

    return edit


def predicts_the_relationship(problem: Problem) -> None:
    """Source logits log(q) + constant: the source head is exactly right, the gradient vanishes."""
    q = problem.distribution() @ problem.relationship.double()
    problem.source_logits.copy_(torch.log(q) + 0.7)


def rows_that_cancel(problem: Problem) -> None:
    """Every second row of R has a sum of exactly 0, in whatever order, and entries that are not."""
    signs = torch.tensor([0.25, -0.25]).repeat(problem.relationship.shape[1] // 2)
    problem.relationship[::2] = 0
    problem.relationship[::2, : len(signs)] = signs.to(problem.relationship.dtype)


def supervised_late(problem: Problem) -> None:
    """Rows of R have no entry in their first 130 columns, as where classes are matched by hand."""
    problem.relationship[:, :130] = 0


def supervised_almost(bits: int) -> Edit:
    """Rows of R have a sum that is off 1 by almost ``2**-bits``."""

    def edit(problem: Problem) -> None:
        problem.relationship *= 1 + 0.95 * 2.0**-bits

    return edit


def garbage_where_unsupervised(value: float) -> Edit:
    """Source logits of rows without source supervision, which nobody may look at."""

    def edit(problem: Problem) -> None:
        q = problem.distribution() @ problem.relationship.double()
        problem.source_logits[(q == 0).all(1), ::3] = value

    return edit


def garbage_where_ignored(value: float) -> Edit:
    """Logits of ignored rows, which nobody may look at."""

    def edit(problem: Problem) -> None:
        ignored = (problem.distribution() == 0).all(1)
        problem.source_logits[ignored, ::3] = value
        problem.target_logits[ignored, ::3] = value

    return edit


# ---------------------------------------------------------------------------------------------------------- the cases

_INF, _NAN = math.inf, math.nan

_TAILS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 127, 128, 129, 257)
"""One below, at and above the width of every vector (4 to 64 elements), and of the start of a row (64 elements)."""


def _sizes() -> list[Case]:
    tails = [
        Case(f"N_s={n}", "vector tails of either head; N_t runs through the same widths backwards", (3, m, n))
        for n, m in zip(_TAILS, reversed(_TAILS), strict=True)
    ]
    # The loops over pairs, probabilities and KL differ from that over labels, each has tails of its own.
    others = [
        Case(f"{kind}, {loss}, N_s={n}", "vector tails of this target form's loop", (3, 19, n), kind,
             options={"source_loss": loss})
        for kind in ("labels", "pair", "probabilities") for loss in ("cross_entropy", "kl")
        for n in (1, 15, 16, 17, 33, 65, 129) if (kind, loss) != ("labels", "cross_entropy")
    ]  # fmt: skip
    shapes = [
        ((48, 200, 1000), "the paper's heads and batch; 1000 is no multiple of 16"),
        ((1, 200, 1000), "one row: a row's mean is the row"),
        ((1, 1, 1), "everything of size one"),
        ((3, 1, 40), "N_t = 1: the target head's loss and gradient are 0"),
        ((5, 2, 1001), "an odd head of the common size, and the smallest real target head"),
        ((3, 1000, 20), "ImageNet's head as target, with a small source head"),
        ((2, 9, 21841), "ImageNet-21k's head"),
        ((2, 9, 30522), "BERT's vocabulary: larger than any cache line of partial sums"),
        ((300, 40, 401), "more than 100000 elements: the parallel path, and an uneven split of the rows"),
    ]
    cases = [Case("x".join(map(str, shape)), why, shape) for shape, why in shapes]
    cases.append(Case("2x9x21841, R in bfloat16", "the same with a smaller R", (2, 9, 21841),
                      relationship_dtype=torch.bfloat16, dtypes=(torch.bfloat16,)))  # fmt: skip
    empty = [
        Case(f"empty batch, {kind}, {reduction}", "NaN, 0 or an empty loss, as F.cross_entropy", (0, 7, 40), kind,
             options={"reduction": reduction})
        for kind in ("labels", "pair", "probabilities") for reduction in ("mean", "sum", "none")
    ]  # fmt: skip
    return [*tails, *others, *cases, *empty]


def _options() -> list[Case]:
    # The full cross of target forms, reductions and the options of the target term: they meet in the mean's divisor.
    target_term = [
        Case(f"{kind}, {reduction}, weight {weight}, smoothing {smoothing}", "options meet in the divisor of the mean",
             (6, 9, 21), kind, weight=weight, options={"reduction": reduction, "label_smoothing": smoothing})
        for kind, reduction, weight, smoothing in itertools.product(
            ("labels", "ignoring", "pair", "pair ignoring", "probabilities", "probabilities, zero rows"),
            ("mean", "sum", "none"), ("none", "random", "zeros"), (0.0, 0.1),
        )
    ]  # fmt: skip
    # And the full cross of what meets in the divisor of the source term's mean.
    source_term = [
        Case(f"{kind}, {reduction}, {relationship}, {loss}", "meet in the divisor of the source term's mean",
             (6, 9, 21), kind, relationship, options={"reduction": reduction, "source_loss": loss})
        for kind, reduction, relationship, loss in itertools.product(
            ("labels", "ignoring", "pair", "pair ignoring", "probabilities, zero rows"), ("mean", "sum", "none"),
            ("unnormalised", "unsupervised", "all unsupervised"), ("cross_entropy", "kl"),
        )
    ]  # fmt: skip
    kinds = {
        "int32": "labels of 4 bytes",
        "int32 pair": "labels of 4 bytes, and their stride",
        "half pair": "shares in half precision, upcast exactly",
        "double pair": "shares in double, not to be rounded on the way",
        "pair, float share": "one share for the batch, a Python float (Beta draws in mixup)",
        "pair, scalar share": "one share for the batch, a tensor of no dimension",
        "pair, shares 0 and 1": "a side without share contributes nothing, not even when it is ignored",
        "equal pair": "both labels equal: Q counts them once each",
        "one label": "all rows read the same row of R",
        "one-hot probabilities": "must equal labels",
        "half probabilities": "a teacher's output under autocast",
        "double probabilities": "not to be rounded on the way, except to the compute dtype",
        "unnormalised probabilities": "Q of the target head differs from 1",
    }
    forms = [Case(kind, why, target=kind) for kind, why in kinds.items()]
    forms += [
        Case(f"{kind}, {reduction}", "no row takes part: NaN mean as F.cross_entropy, gradient exactly 0",
             target=kind, options={"reduction": reduction})
        for kind in ("all ignored", "no probabilities") for reduction in ("mean", "sum", "none")
    ]  # fmt: skip
    scalars: list[tuple[str, str, dict[str, Any]]] = [
        ("ignore_index=3", "a real class is ignored, as F.cross_entropy allows", {"ignore_index": 3}),
        ("ignore_index=-1", "the other habit", {"ignore_index": -1}),
        ("trade_off=0", "a warm-up's first step: the source gradient is 0", {"trade_off": 0.0}),
        ("trade_off=-0.7", "linear in the trade-off whatever its sign", {"trade_off": -0.7}),
        ("trade_off=1e4", "the source term dominates", {"trade_off": 1e4}),
        ("label_smoothing=1", "the label itself no longer counts", {"label_smoothing": 1.0}),
    ]
    forms += [Case(name, why, target="ignoring", options=options) for name, why, options in scalars]
    forms.append(Case("half weight", "a weight in half precision", weight="half"))
    # With label smoothing as well, the loss is infinite and F.cross_entropy's gradient inf - inf, which is no standard.
    forms.append(Case("no weight at all", "a divisor of 0: NaN as F.cross_entropy", weight="zeros",
                      edits=(labels_of_class(2),)))  # fmt: skip
    for dtype in DTYPES:
        forms += [
            Case(f"R in {dtype}, {kind}, {loss}", "the relationship has a dtype of its own", target=kind,
                 relationship_dtype=dtype, options={"source_loss": loss})
            for kind in ("labels", "pair", "probabilities") for loss in ("cross_entropy", "kl")
        ]  # fmt: skip
        forms.append(Case(f"target head in {dtype}", "an fp32 head beside a half one", target_logits_dtype=dtype))
    forms += [
        Case(f"rows of R that cancel, {kind}, {reduction}", "supervised rows with Q = 0: entries matter, not their sum",
             (4, 7, 90), kind, edits=(rows_that_cancel,), options={"reduction": reduction})
        for kind in ("labels", "pair, shares 0 and 1", "pair, scalar share", "one-hot probabilities")
        for reduction in ("mean", "none")
    ]  # fmt: skip
    forms += [
        Case(f"supervised late, {kind}", "the beginning of a row of R does not say whether it has entries", (4, 7, 150),
             kind, edits=(supervised_late,))
        for kind in ("labels", "pair", "one-hot probabilities")
    ]  # fmt: skip
    forms += [
        Case(f"wide R in {dtype}, {kind}", "a row of logits and one of R, two numbers in a register",
             (5, 7, 150), kind, relationship, relationship_dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for kind, relationship in (("ignoring", "unsupervised"), ("labels", "unnormalised"),
                                   ("one-hot probabilities", "normalised"))
    ]  # fmt: skip
    forms += [
        Case(f"Q almost 1, {bits} bits", "nobody may take it for 1 where that is seen", (4, 7, 150),
             options={"reduction": "none"}, edits=(supervised_almost(bits),))
        for bits in (11, 14, 22)
    ]  # fmt: skip
    upstreams = {
        "zero": "the loss is multiplied by 0",
        "gradient scaler": "65536, as a GradScaler starts: fp16 gradients of a mean survive, others become inf",
    }
    forms += [
        Case(f"upstream {kind}, {reduction}", why, upstream=kind, target="ignoring", options={"reduction": reduction})
        for kind, why in upstreams.items() for reduction in ("mean", "none")
    ]  # fmt: skip
    expanded = "loss.sum().backward() sends a tensor of stride 0"
    forms.append(Case("upstream expanded", expanded, upstream="expanded", options={"reduction": "none"}))
    # Options are arithmetic on rows, the dtype is how elements are loaded: every option meets every dtype somewhere in
    # the table, but not every combination of options does.
    crossed = [
        replace(case, dtypes=(torch.float32, DTYPES[1 + zlib.crc32(case.name.encode()) % 3]))
        for case in (*target_term, *source_term)
    ]
    return [*crossed, *forms]


def _numbers() -> list[Case]:
    """Values of the logits. Rows are edited one at a time: the others must not notice."""
    wide = (4, 90, 300)
    cases = [
        Case("q=0 meets -inf", "contributes 0, never NaN (a masked vocabulary)", edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, long", "the same through whole vectors", wide, edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, KL", "q log q of 0 is 0", wide, options={"source_loss": "kl"},
             edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, pair", "where neither side has mass", wide, "pair", edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, probabilities", "P has no zeros here, R has", wide, "one-hot probabilities",
             edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, zero weight", "w = 0 takes the label's mass away", wide, weight="zeros",
             edits=(target(slice(None), slice(0, None, 2), -_INF),)),
        Case("smoothing meets -inf", "smoothing gives mass to the masked class: +inf, as F.cross_entropy", wide,
             options={"label_smoothing": 0.1, "reduction": "none"}, edits=(target(1, 5, -_INF),)),
        Case("all the mass at -inf", "loss +inf, gradient of the formula", relationship="one-hot",
             options={"reduction": "none"}, edits=(source(1, slice(0, 39), -_INF), target(2, slice(0, 6), -_INF))),
        Case("trade_off=0 meets an infinite loss", "0 * inf is NaN, as the formula says", relationship="dense",
             options={"trade_off": 0.0}, edits=(source(1, 3, -_INF),)),
        Case("NaN in an ignored row", "nobody looks at it", (7, 5, 70), "ignoring",
             edits=(garbage_where_ignored(_NAN),)),
        Case("-inf row, ignored", "nobody looks at it", (7, 5, 70), "ignoring", edits=(garbage_where_ignored(-_INF),)),
        Case("+inf in an ignored pair", "nobody looks at it", (7, 5, 70), "pair ignoring",
             edits=(garbage_where_ignored(_INF),)),
        Case("NaN where unsupervised", "nobody looks at the source head there", (7, 5, 70), relationship="unsupervised",
             edits=(garbage_where_unsupervised(_NAN),)),
        Case("+inf where unsupervised, KL", "nobody looks at the source head there", (7, 5, 70), "pair", "unsupervised",
             options={"source_loss": "kl"}, edits=(garbage_where_unsupervised(_INF),)),
        Case("offset 1e4", "softmax does not change, and neither may the loss: q . z must not be summed as it stands",
             wide, edits=(scaled(1.0, 1e4),)),
        Case("offset -1e4", "the same below", wide, edits=(scaled(1.0, -1e4),)),
        Case("offset 1e4, KL pair", "the same in the other loops", wide, "pair", options={"source_loss": "kl"},
             edits=(scaled(1.0, 1e4),)),
        Case("logits of 1e4", "one-hot softmax: exp underflows everywhere else", wide, edits=(scaled(5e3),)),
        Case("logits of 30", "peaked, but nothing underflows to 0", wide, edits=(scaled(15.0),)),
        Case("tiny logits", "uniform softmax", wide, edits=(scaled(1e-3),)),
        Case("equal logits", "zero differences, no redo", wide, edits=(scaled(0.0, 3.0),)),
        Case("huge spread", "differences near the largest float32", (3, 5, 130), options={"reduction": "none"},
             edits=(both(slice(None), slice(0, 2), -3e4), both(slice(None), slice(2, 4), 3e4))),
        Case("exact prediction, KL", "loss and gradient vanish, only rounding is left", wide, relationship="dense",
             options={"source_loss": "kl"}, edits=(predicts_the_relationship,)),
        Case("exact prediction, KL pair", "the same for a mixture", wide, "pair", "dense",
             options={"source_loss": "kl"}, edits=(predicts_the_relationship,)),
        Case("unnormalised pair", "Q of a mixture of unnormalised rows", wide, "pair", "unnormalised"),
    ]  # fmt: skip
    for loss in ("cross_entropy", "kl"):
        cases += [
            Case(f"q>0 meets -inf, {loss}, {reduction}", "loss +inf, gradient of the formula", relationship="dense",
                 options={"source_loss": loss, "reduction": reduction}, edits=(source(1, 3, -_INF),))
            for reduction in ("mean", "none")
        ]  # fmt: skip
    for kind in ("labels", "pair", "probabilities"):
        cases += [
            Case(f"row of -inf, {kind}", "NaN for this row, and for no other", (4, 9, 70), kind,
                 options={"reduction": "none"}, edits=(source(1, slice(None), -_INF), target(2, slice(None), -_INF))),
            Case(f"+inf, {kind}", "NaN for this row, and for no other", (4, 9, 70), kind,
                 options={"reduction": "none"}, edits=(source(1, 66, _INF), target(2, 3, _INF))),
        ]  # fmt: skip
        for column in (0, 40, 69):
            cases.append(
                Case(f"NaN in column {column}, {kind}", "start, body, tail: none may swallow it", (4, 9, 70), kind,
                     options={"reduction": "none"}, edits=(source(1, column, _NAN), target(2, column % 9, _NAN)))
            )  # fmt: skip
    # A row is swept once with the maximum of its start, and again where the true maximum lies far above.
    for column in (0, 15, 16, 63, 64, 65, 127, 299):
        cases.append(
            Case(f"maximum in column {column}", "far above all others, wherever it lies", (3, 90, 300),
                 edits=(source(1, column, 5e3), target(1, column % 90, 5e3)))
        )  # fmt: skip
    for height in (20.0, 55.0, 59.0, 60.0, 61.0, 65.0, 80.0, 88.0, 89.0, 100.0, 200.0):
        cases.append(
            Case(f"late maximum {height:g} above", "about the height where one sweep no longer does, and exp overflows",
                 (3, 90, 300), edits=(scaled(0.5), source(1, 250, height), target(1, 80, height)))
        )  # fmt: skip
    # The CPU keeps the exponentials of a long row in its gradient, which in place are the logits of the second sweep.
    for kind, edits in (
        ("labels", (source(1, 1500, 5e3),)),
        ("pair", (source(1, 1500, _NAN),)),
        ("probabilities", (source(1, 1500, -_INF), source(2, 1700, 200.0))),
    ):
        cases.append(
            Case(f"long row swept twice, {kind}", "a row is long from 1639 floats or 820 doubles on", (3, 5, 1701),
                 kind, options={"reduction": "none"}, edits=edits)
        )  # fmt: skip
    starts = {"-inf": -_INF, "-1e4": -1e4, "-80": -80.0}
    cases += [
        Case(f"start of {name}", "the first elements say nothing about the maximum", (3, 90, 300),
             "one-hot probabilities", "dense", options={"reduction": "none"},
             edits=(source(1, slice(0, 128), value), target(1, slice(0, 70), value)))
        for name, value in starts.items()
    ]  # fmt: skip
    stairs = (3, 300, 300)
    cases += [
        Case(
            "staircase up", "the maximum is overtaken again and again, never by much", stairs, edits=(staircase(50.0),)
        ),
        Case("steep staircase up", "and by more than exp can hold", stairs, edits=(staircase(300.0),)),
        Case("staircase down", "the first maximum stays", stairs, edits=(staircase(-50.0),)),
    ]
    return cases


CASES = (*_sizes(), *_options(), *_numbers())
assert len({case.name for case in CASES}) == len(CASES), "two cases have one name"


def error_lines(records: dict[tuple[str, str], Record]) -> list[str]:
    """The table: of those whom the conformance table judges, not of the kernels that faults are planted in."""
    names = [*(backend.name for backend in TABLE_BACKENDS), "triton-ttsem"]
    lines = [f"{'backend':20}{'logits':16}{'checks':>8}{'loss':>12}{'torch':>12}{'gradient':>12}{'torch':>12}"]
    for (name, dtype), record in sorted(records.items(), key=lambda item: item[0]):
        if name in names:
            errors = (record.loss, record.torch_loss, record.gradient, record.torch_gradient)
            lines.append(f"{name:20}{dtype:16}{record.checks:8}" + "".join(f"{error:12.1e}" for error in errors))
    return lines if len(lines) > 1 else []
