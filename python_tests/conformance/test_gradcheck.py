"""Gradients as autograd sees them: finite differences, backward twice, double backward, gradients written in place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cotuning_kernels as ck
from cotuning_kernels import backends, functional
from support.backends import BACKENDS, Backend
from support.cases import Case
from support.checks import check_backward_twice
from support.layouts import Placed, bits
from support.problems import Problem


def _loss(problem: Problem, source: Tensor, target: Tensor, backend: Backend, **more: Any) -> Tensor:
    loss = functional.co_tuning_loss(
        source, target, problem.target, problem.relationship, backend=backend.argument, **problem.options | more
    )
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize(
    ("kind", "reduction", "source_loss"),
    [
        *itertools.product(
            ["ignoring", "pair", "pair ignoring", "probabilities"], ["mean", "sum", "none"], ["cross_entropy", "kl"]
        )
    ],
)
def test_finite_differences(backend: Backend, kind: str, reduction: str, source_loss: str, seed: int) -> None:
    """Through the public functions, in float64, of both logits at once and of the source head alone."""
    if backend.device_code:
        pytest.skip(f"{backend.name}: interpreted; the conformance table holds its gradients against the reference's")
    options = {"reduction": reduction, "source_loss": source_loss, "label_smoothing": 0.1, "trade_off": 1.7}
    problem = Case("gradcheck", "", (3, 4, 18), kind, "unsupervised", "random", options=options).build(
        torch.float64, seed
    )
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: _loss(problem, s, t, backend), (source, target))
    assert torch.autograd.gradcheck(
        lambda s: functional.source_label_loss(
            s, problem.target, problem.relationship, backend=backend.argument, **problem.source_options
        ),
        (source,),
    )


@pytest.mark.parametrize("head", ["source", "target"])
def test_a_head_that_needs_no_gradient_gets_none(backend: Backend, head: str, seed: int) -> None:
    """As with frozen weights or in evaluation; the other head's gradient does not change."""
    problem = Case("one head", "", (5, 6, 37), "pair").build(torch.float32, seed)
    both = [problem.source_logits.clone().requires_grad_(), problem.target_logits.clone().requires_grad_()]
    expected = torch.autograd.grad(_loss(problem, both[0], both[1], backend), both, problem.upstream)
    wanted = 0 if head == "source" else 1
    one = [x.detach().clone().requires_grad_(k == wanted) for k, x in enumerate(both)]
    loss = _loss(problem, one[0], one[1], backend)
    loss.backward(problem.upstream)  # type: ignore[no-untyped-call]
    gradient = one[wanted].grad
    assert gradient is not None
    assert torch.equal(bits(gradient), bits(expected[wanted]))
    assert one[1 - wanted].grad is None


def test_without_grad_the_loss_is_the_same_and_has_no_graph(backend: Backend, seed: int) -> None:
    problem = Case("no grad", "", (5, 6, 37)).build(torch.float32, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    loss = _loss(problem, source, target, backend)
    with torch.no_grad():
        without = _loss(problem, source, target, backend)
    with torch.inference_mode():
        inference = _loss(problem, source, target, backend)
    assert loss.requires_grad
    assert not without.requires_grad
    assert loss.item() == without.item() == inference.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(backend: Backend, dtype: torch.dtype, reduction: str, seed: int) -> None:
    problem = Case("twice", "", (5, 6, 37), "pair", options={"reduction": reduction}).build(dtype, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    check_backward_twice(_loss(problem, source, target, backend), (source, target), problem.upstream)


def test_two_losses_on_the_same_logits_add_up(backend: Backend, seed: int) -> None:
    """One backward pass through two calls, and through one call twice."""
    problem = Case("sum of losses", "", (5, 6, 37)).build(torch.float64, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()

    def gradients(loss: Tensor) -> Tensor:
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, (source, target))])

    single = gradients(_loss(problem, source, target, backend))
    other = gradients(_loss(problem, source, target, backend, trade_off=0.4))
    loss = _loss(problem, source, target, backend)
    total = gradients(loss * 0.3 + _loss(problem, source, target, backend, trade_off=0.4) + 0.5 * loss.square())
    expected = (0.3 + float(loss.detach())) * single + other
    assert torch.allclose(total, expected, rtol=1e-12, atol=1e-15)


def test_the_terms_are_for_logging_only(backend: Backend, seed: int) -> None:
    problem = Case("terms", "", (5, 6, 37)).build(torch.float32, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    terms = functional.co_tuning_loss(
        source, target, problem.target, problem.relationship, return_terms=True, backend=backend.argument
    )
    assert isinstance(terms, ck.CoTuningTerms)
    assert terms.loss.requires_grad
    assert not terms.target_term.requires_grad
    assert not terms.source_term.requires_grad
    assert float(terms.loss.detach()) == pytest.approx(float(terms.target_term + 2.3 * terms.source_term), rel=1e-6)


def test_double_backward_is_refused(backend: Backend, seed: int) -> None:
    """A wrong second derivative would be silent. The reference is plain PyTorch and has the right one."""
    problem = Case("double backward", "", (3, 4, 5)).build(torch.float64, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    if backend.argument == "reference":
        assert torch.autograd.gradgradcheck(lambda s, t: _loss(problem, s, t, backend), (source, target))
        return
    ways = {
        "grad": lambda f, x: torch.autograd.grad(f(x), x, create_graph=True),
        "backward": lambda f, x: f(x).backward(create_graph=True),
        "hessian": lambda f, x: torch.autograd.functional.hessian(f, x.detach()),
        "hvp": lambda f, x: torch.autograd.functional.hvp(f, x.detach(), torch.ones_like(x)),
    }
    for way in ways.values():
        for f, wanted in (
            (lambda x: _loss(problem, x, target, backend), source),
            (lambda x: _loss(problem, source, x, backend), target),
        ):
            with pytest.raises(RuntimeError, match=r"create_graph=True .* differentiated only once"):
                way(f, wanted)


def test_forward_mode_is_refused(backend: Backend, seed: int) -> None:
    """Forward mode would bypass the operation and give a derivative of 0."""
    problem = Case("forward mode", "", (3, 4, 5)).build(torch.float64, seed)
    source, target = problem.source_logits, problem.target_logits
    tangent = torch.randn(3, 5, dtype=torch.float64)

    def of_source(x: Tensor) -> Tensor:
        return _loss(problem, x, target, backend)

    def dual_tangent() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(
                of_source(torch.autograd.forward_ad.make_dual(source, tangent))
            ).tangent

    if backend.argument == "reference":
        leaf = source.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(of_source(leaf), leaf)
        expected = (gradient * tangent).sum()
        torch.testing.assert_close(dual_tangent(), expected)
        torch.testing.assert_close(torch.func.jvp(of_source, (source,), (tangent,))[1], expected)
        return
    for way in (
        dual_tangent,
        lambda: torch.func.jvp(of_source, (source,), (tangent,)),
        lambda: torch.func.jacfwd(of_source)(source),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            way()


_KERNELS = [backend for backend in BACKENDS if "in place" in backend.forms]


class _Heads(nn.Module):
    """Two linear heads on the same features, as a fine-tuned network ends."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        dtype = problem.source_logits.dtype
        self.source = nn.Linear(8, problem.source_logits.shape[1], dtype=dtype)
        self.target = nn.Linear(8, problem.target_logits.shape[1], dtype=dtype)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.source(features), self.target(features)


@pytest.mark.parametrize("backend", _KERNELS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_trains_the_same_weights(backend: Backend, dtype: torch.dtype, seed: int) -> None:
    """The weight gradients are bit for bit those of the ordinary call; the logits' memory then holds their gradient."""
    problem = Case("in place", "", (5, 6, 37), "pair").build(dtype, seed)
    torch.manual_seed(seed)
    heads = _Heads(problem)
    features = torch.randn(5, 8).to(dtype)
    results = {}
    for inplace in (False, True):
        heads.zero_grad()
        source, target = heads(features)
        before = source.detach().clone()
        loss = _loss(problem, source, target, backend, inplace=inplace)
        loss.backward(problem.upstream)  # type: ignore[no-untyped-call]
        assert torch.equal(before, source.detach()) == (not inplace)
        results[inplace] = [loss.detach(), *(parameter.grad for parameter in heads.parameters())]
    for ordinary, in_place in zip(results[False], results[True], strict=True):
        assert ordinary is not None
        assert in_place is not None
        assert torch.equal(bits(ordinary), bits(in_place))


@pytest.mark.parametrize("backend", _KERNELS, ids=lambda backend: backend.name, indirect=True)
def test_in_place_on_logits_that_an_operation_saved_is_an_error(backend: Backend, seed: int) -> None:
    """``exp`` needs its result for its backward pass. Autograd must raise instead of reading a gradient there."""
    problem = Case("saved", "", (5, 6, 37)).build(torch.float32, seed)
    source = torch.exp(problem.source_logits.requires_grad_())
    target = problem.target_logits.requires_grad_() * 1.0
    loss = _loss(problem, source, target, backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("backend", _KERNELS, ids=lambda backend: backend.name, indirect=True)
@pytest.mark.parametrize("what", ["leaf", "overlapping rows", "columns not dense"])
@pytest.mark.parametrize("head", [0, 1])
def test_in_place_refuses_logits_it_would_spoil(backend: Backend, what: str, head: int, seed: int) -> None:
    """A ValueError that names the argument, before anything is written to either head."""
    problem = Case("refused", "", (5, 6, 37)).build(torch.float32, seed)
    leaves = [Placed(problem.source_logits), Placed(problem.target_logits)]
    logits = [placed.view.detach().requires_grad_() for placed in leaves]
    passed = [x * 1.0 for x in logits]
    if what == "leaf":
        passed[head] = logits[head]
    elif what == "overlapping rows":
        passed[head] = (logits[head][:1] * 1.0).expand(5, -1)
    else:
        passed[head] = (logits[head].repeat(1, 2) * 1.0)[:, ::2]
    before = [x.detach().clone() for x in passed]
    name = ("source_logits", "target_logits")[head]
    with pytest.raises(ValueError, match=rf"{name} .*inplace=True"):
        _loss(problem, passed[0], passed[1], backend, inplace=True)
    for x, y in zip(before, passed, strict=True):
        assert torch.equal(x, y.detach())


@pytest.mark.parametrize("backend", _KERNELS, ids=lambda backend: backend.name, indirect=True)
def test_in_place_without_grad_leaves_the_logits_alone(backend: Backend, seed: int) -> None:
    """A criterion with inplace=True also evaluates: without grad mode it writes no gradient."""
    problem = Case("evaluation", "", (5, 6, 37)).build(torch.float32, seed)
    source, target = Placed(problem.source_logits), Placed(problem.target_logits)
    expected = _loss(problem, source.view, target.view, backend)
    with torch.no_grad():
        loss = _loss(problem, source.view, target.view, backend, inplace=True)
    assert loss.item() == expected.item()
    source.assert_unchanged("source_logits")
    target.assert_unchanged("target_logits")


def test_in_place_needs_a_kernel(seed: int) -> None:
    problem = Case("reference", "", (5, 6, 37)).build(torch.float32, seed)
    source, target = problem.source_logits.requires_grad_() * 1.0, problem.target_logits.requires_grad_() * 1.0
    with pytest.raises(ValueError, match="inplace=True needs a kernel"):
        _loss(problem, source, target, BACKENDS[0], inplace=True)


def test_auto_is_the_fastest_backend_there_is(seed: int) -> None:
    problem = Case("auto", "", (5, 6, 37)).build(torch.float32, seed)
    chosen = backends.select("cpu")
    loss = functional.co_tuning_loss(
        problem.source_logits, problem.target_logits, problem.target, problem.relationship, **problem.options
    )
    named = functional.co_tuning_loss(
        problem.source_logits, problem.target_logits, problem.target, problem.relationship, backend=chosen,
        **problem.options,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    assert isinstance(named, Tensor)
    assert chosen == ("reference" if backends.extension() is None else "cpp")
    assert torch.equal(loss, named)
