"""Checks of single operations, shared by tests of several rooms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from support.layouts import CONTIGUOUS, LAYOUTS, Placed, bits

# Adds to the given sums and counts: (sums, counts, logits, labels, inverse temperature) -> None.
AddClassSums = Callable[[Tensor, Tensor, Tensor, Tensor, float], None]
# (logits, labels, inverse temperature) -> [NLL, first derivative, second derivative, rows].
TemperatureTerms = Callable[[Tensor, Tensor, float], Tensor]


def _labelled(dtype: torch.dtype, width: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed + width)
    logits = 3 * torch.randn(11, width, generator=draw, dtype=torch.float64)
    logits[1, -1] += 200  # a maximum far above the start of the row
    logits = logits.to(dtype)
    labels = torch.randint(min(width, 4), (11,), generator=draw)
    labels[::4] = -100
    return logits, labels


def check_class_sums(
    add: AddClassSums, dtype: torch.dtype, width: int, inverse_temperature: float, seed: int, device: str = "cpu"
) -> None:
    """Sums of softmax by class: a row adds only to its own class, an ignored row to none; nothing else is written."""
    logits, labels = _labelled(dtype, width, seed)
    softmax = torch.softmax(logits.double() * inverse_temperature, 1)
    exact = torch.stack([softmax[labels == t].sum(0) for t in range(6)])
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for layout in (CONTIGUOUS, *(x for x in LAYOUTS if x.name == "odd columns")):
        placed = Placed(logits, layout, device)
        sums = Placed(torch.ones(6, width, dtype=torch.float64), device=device)
        counts = torch.full((6,), 5, device=device)
        add(sums.view, counts, placed.view, labels.to(device), inverse_temperature)
        placed.assert_unchanged("logits")
        sums.assert_margins_unchanged("sums")
        # exp(x) is off by x ulps if x itself was rounded, and the sums start at 1.
        tolerance = eps * exact * (4 + 20 * inverse_temperature) + 4 * torch.finfo(torch.float64).eps
        assert ((sums.view.cpu() - 1 - exact).abs() <= tolerance).all()
        assert (counts - 5).tolist() == [int((labels == t).sum()) for t in range(6)]


def check_temperature_terms(
    terms_of: TemperatureTerms,
    dtype: torch.dtype,
    width: int,
    inverse_temperature: float,
    seed: int,
    device: str = "cpu",
) -> None:
    """NLL and its derivatives in the inverse temperature, against autograd through ``F.cross_entropy`` in float64."""
    logits, labels = _labelled(dtype, width, seed)
    b = torch.tensor(inverse_temperature, dtype=torch.float64, requires_grad=True)
    nll = F.cross_entropy(logits.double() * b, labels, reduction="sum")
    (first,) = torch.autograd.grad(nll, b, create_graph=True)
    (second,) = torch.autograd.grad(first, b)
    exact = torch.stack([nll.detach(), first.detach(), second])
    # The derivatives are differences of moments: where these nearly cancel, the error is an ulp of the moments.
    largest = logits[labels >= 0].double().abs().topk(2).values[:, 1]  # the late maximum is far from the rest
    moments = torch.stack([(largest * inverse_temperature).sum(), largest.sum(), largest.square().sum()])
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for layout in (CONTIGUOUS, *(x for x in LAYOUTS if x.name == "odd columns")):
        placed = Placed(logits, layout, device)
        terms = terms_of(placed.view, labels.to(device), inverse_temperature).cpu()
        placed.assert_unchanged("logits")
        assert ((terms[:3] - exact).abs() <= 8 * eps * (exact.abs() + moments)).all(), (terms, exact)
        assert terms[3] == (labels >= 0).sum()


def check_backward_twice(loss: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> None:
    """A second backward pass through a retained graph gives the same bits, even after the first gradient changed."""
    first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.fill_(7.0)
    second = torch.autograd.grad(loss, inputs, upstream)
    for name, x, y in zip(("first", "second"), kept, second, strict=False):
        assert torch.equal(bits(x), bits(y)), f"the gradient of the {name} input differs in the second backward pass"
