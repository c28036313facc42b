"""A textbook kernel written in torch, with one planted fault or none.

Like a real kernel it computes loss and gradients at once from what it reads from memory, stores half-precision
gradients before the upstream gradient arrives, and scales them then.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from support.backends import Backend
from support.layouts import ABSURD_CLASS
from support.problems import Outcome, Problem, compute_dtype


def _read(x: Tensor, contiguous_anyway: bool) -> Tensor:
    """A copy of what a kernel reads; with the fault, as if the tensor were contiguous."""
    if contiguous_anyway:
        strides = (x.shape[1], 1) if x.dim() == 2 else (1,)
        return torch.as_strided(x, x.shape, strides, x.storage_offset()).clone()
    return x.clone()


def _labels(x: Tensor, fault: str) -> Tensor:
    labels = _read(x, fault == "the labels' stride taken for 1")
    # The poison around labels would raise an IndexError, which catches the fault too, but not as meant here.
    return torch.where(labels == ABSURD_CLASS, torch.zeros_like(labels), labels)


def _distribution(problem: Problem, classes: int, dtype: torch.dtype, fault: str) -> Tensor:
    """``P``, dense."""

    def one_hot(labels: Tensor) -> Tensor:
        rows = torch.zeros(len(labels), classes, dtype=dtype)
        for i, label in enumerate(labels.tolist()):
            if label != problem.ignore_index:
                rows[i, label] = 1
            elif fault == "ignored rows take part":
                rows[i, label % classes] = 1
        return rows

    if isinstance(problem.target, tuple):
        a, b = (one_hot(_labels(labels, fault)) for labels in problem.target[:2])
        share = torch.as_tensor(problem.target[2], dtype=dtype).reshape(-1, 1)
        if fault == "the pair's share swapped":
            share = 1 - share
        return a if fault == "the pair's second label ignored" else share * a + (1 - share) * b
    if problem.target.is_floating_point():
        return problem.target.to(dtype)
    return one_hot(_labels(problem.target, fault))


def _head(z: Tensor, part: Tensor, kl: bool, fault: str) -> tuple[Tensor, Tensor]:
    """Losses and gradients of the rows of one head, with target mass ``part``."""
    takes_part = (part != 0).any(1, keepdim=True)
    vectors = z.shape[1] // 16 * 16 if "tail" in fault else z.shape[1]
    if fault == "NaN swallowed":
        z = z.nan_to_num(-math.inf, math.inf, -math.inf)
    if fault == "-inf taken for a large number":
        z = z.clamp(min=-1e30)
    top = z[:, :64].amax(1, keepdim=True) if "first 64" in fault else z.amax(1, keepdim=True)
    if fault == "no maximum subtracted":
        top = torch.zeros_like(top)
    e = torch.exp(z - top)
    if fault == "exp that flushes below -20":
        e = torch.where(z - top < -20, 0.0, e)
    total = (e[:, :vectors] if fault == "a tail of the sum dropped" else e).sum(1, keepdim=True)
    whole = part.sum(1, keepdim=True)
    origin = torch.zeros_like(top) if fault == "q . z summed as it stands" else top
    product = part * (z - origin)
    if fault != "0 times -inf":
        product = torch.where(part == 0, 0.0, product)
    if fault == "a tail of the dot product dropped":
        product = product[:, :vectors]
    lse = torch.log(total) + (top - origin)
    losses = (lse if fault == "a loss that takes Q for 1" else whole * lse) - product.sum(1, keepdim=True)
    gradients = (1.0 if fault == "a gradient that takes Q for 1" else whole) * e / total - part
    if kl and fault != "the entropy missing in KL":
        losses = losses + (part * torch.log(part) if fault == "KL's 0 log 0" else torch.xlogy(part, part)).sum(1, True)
    nothing = 1e-38 if fault == "ignored rows almost 0" else 0.0
    return torch.where(takes_part, losses, 0.0)[:, 0], torch.where(takes_part, gradients, nothing)


def textbook_kernel(problem: Problem, form: str, _: str, fault: str = "none") -> Outcome:
    alone = form == "source head"
    logits = [problem.source_logits] if alone else [problem.source_logits, problem.target_logits]
    dtype = compute_dtype(*logits)
    strided = fault == "a row stride taken for the width"
    z = [_read(x, strided).to(dtype) for x in logits]
    if fault == "a row read past its end":
        for k, x in enumerate(logits):
            z[k] = torch.as_strided(x, (len(x), x.shape[1] + 1), x.stride(), x.storage_offset()).to(dtype)
    relationship = _read(problem.relationship, fault == "R's row stride taken for the width").to(dtype)
    classes = relationship.shape[0]
    p = _distribution(problem, classes, dtype, fault)
    probabilities = isinstance(problem.target, Tensor) and problem.target.is_floating_point()

    q = p @ relationship
    supervised = (
        torch.ones(classes, dtype=dtype)
        if fault == "unsupervised rows counted"
        else (relationship != 0).any(1).to(dtype)
    )
    smoothed = p.sum(1, keepdim=True)
    if probabilities or fault == "label smoothing of zero rows":
        smoothed = torch.ones(len(p), 1, dtype=dtype)
    smoothing = 0.0 if fault == "label smoothing missing" else problem.label_smoothing
    weight = (
        torch.ones(classes, dtype=dtype)
        if problem.weight is None or fault == "weight missing"
        else problem.weight.to(dtype)
    )
    part = weight * ((1 - smoothing) * p + smoothing / classes * smoothed)
    counted = p if fault == "weight missing in the divisor" else weight * p
    counts = [(p @ supervised).sum(), torch.tensor(float(len(p)), dtype=dtype) if probabilities else counted.sum()]
    if fault == "ignored rows counted":
        counts = [torch.tensor(float(len(p)), dtype=dtype)] * 2
    wants_mean = (problem.reduction == "mean" and fault != "a sum instead of the mean") or (
        problem.reduction == "sum" and fault == "a mean instead of the sum"
    )

    factors = [1.0 if alone else problem.trade_off, 1.0]
    terms, gradients = [], []
    for k, x in enumerate(logits):
        mass = q if k == 0 else part
        if mass.shape[1] < z[k].shape[1]:  # read past its end
            mass = torch.cat([mass, torch.zeros(len(mass), 1, dtype=dtype)], 1)
        if k == 0 and not alone and problem.trade_off == 0 and fault != "a source term with factor 0 computed":
            mass, counts[0] = torch.zeros_like(mass), torch.zeros_like(counts[0])
        rows, gradient = _head(z[k], mass, k == 0 and problem.source_loss == "kl", fault)
        gradient = gradient[:, : x.shape[1]]
        if fault == "a NaN that spreads to other rows":
            gradient = gradient + 0 * rows.sum()
        stored = gradient.to(x.dtype)
        if fault == "a half-precision gradient rounded toward zero" and x.element_size() == 2:
            away = stored.to(dtype).abs() > gradient.abs()
            stored = torch.where(away, torch.nextafter(stored, torch.zeros_like(stored)), stored)
        if wants_mean:
            count = counts[k]
            nothing = k == 0 and count == 0 and bool((p != 0).any()) and fault != "an empty source mean"
            terms.append(rows.sum() if nothing else rows.sum() / count)
            divisor = torch.where(count == 0, 1.0, count)
        else:
            terms.append(rows if problem.reduction == "none" else rows.sum())
            divisor = torch.ones((), dtype=dtype)
        upstream = problem.upstream.reshape(-1, 1)
        if fault == "upstream gradient ignored":
            upstream = torch.ones_like(upstream)
        elif fault == "one upstream gradient for all rows":
            upstream = upstream[:1]
        factor = (1.0 if fault == "trade_off missing in the gradient" else factors[k]) / divisor * upstream
        scaled = (stored.to(dtype) * factor).to(x.dtype)
        if fault == "a gradient off by 1 %":
            scaled = scaled * 1.01
        elif fault == "a gradient of bfloat16 precision":
            scaled = scaled.bfloat16().to(x.dtype)
        elif fault == "the last row's gradient missing":
            scaled[-1:] = 0
        elif fault == "the last column's gradient missing":
            scaled[:, -1:] = 0
        gradients.append(scaled)
        if fault == "logits modified" and x.numel():
            x[0, 0] += 1
        if fault == "a row written past its end":
            torch.as_strided(x, (len(x), x.shape[1] + 1), x.stride(), x.storage_offset())[:, -1] = 0

    if alone:
        return Outcome(terms[0], gradients[0])
    loss = terms[1] + problem.trade_off * terms[0]
    if fault == "terms swapped":
        terms.reverse()
    if fault == "a loss in the logits' dtype":
        loss = loss.to(problem.source_logits.dtype).to(dtype)
    if form == "in place":
        for x, gradient in zip(logits, gradients, strict=True):
            x.copy_(gradient)
    return Outcome(loss, gradients[0], gradients[1], terms[1], terms[0])


def textbook_backend(fault: str) -> Backend:
    return Backend(f"textbook, {fault}", "", run=partial(textbook_kernel, fault=fault))
