"""The arguments of a call, and its outcome by the reference and by torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotuning_kernels import reference

Target = Tensor | tuple[Tensor, Tensor, Tensor | float]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        """Every floating tensor as dense float64 on the CPU, from which the truth is computed."""
        return self.map(lambda _, x: (x.double() if x.is_floating_point() else x).detach().cpu().clone())

    def distribution(self) -> Tensor:
        """``P``, the dense ``(B, N_t)`` target distribution."""
        classes = torch.eye(self.relationship.shape[0], dtype=torch.float64)
        return reference.translate_labels(self.target, classes, ignore_index=self.ignore_index)


@dataclass
class Outcome:
    """The results of one call, or arrays of the same shapes. None: not part of this form of the call."""

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
    """The reference, differentiated by autograd, in the problem's dtype."""
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

    if problem.trade_off == 0 and form != "source head":  # as if no class had source supervision
        z_source, relationship = 0 * z_source.nan_to_num(), torch.zeros_like(relationship)
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
    """The dtype in which losses are computed and returned."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
