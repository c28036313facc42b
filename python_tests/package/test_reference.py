"""The reference in float64 against three independent checks: ``torch.nn.functional``, the formula summed in Python
floats, and edge cases with the expected numbers written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cotuning_kernels import reference
from support.cases import CASES, Case
from support.problems import Problem, reference_outcome, torch_formulation

_INF, _NAN = math.inf, math.nan


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_torch_functional(case: Case, seed: int) -> None:
    """Every case of the table, called in every way, wherever torch has an equivalent."""
    problem = case.build(torch.float64, seed)
    for form in ("both heads", "source head"):
        ours, torchs = reference_outcome(problem, form).tensors(), torch_formulation(problem, form).tensors()
        for name, x in ours.items():
            expected = torchs[name]
            assert x.shape == expected.shape
            measured = ~expected.isnan()
            assert torch.allclose(x[measured], expected[measured], rtol=1e-9, atol=1e-12), (form, name)


def _row_by_hand(z: Tensor, q: Tensor, kl: bool) -> tuple[float, list[float]]:
    """Loss and gradient of one row, in Python floats with exact sums."""
    logits, mass = z.tolist(), q.tolist()
    top = max(logits)
    total = math.fsum(math.exp(x - top) for x in logits)
    whole = math.fsum(mass)
    loss = math.fsum([whole * (math.log(total) + top), *(-m * x for m, x in zip(mass, logits, strict=True) if m > 0)])
    if kl:
        loss += math.fsum(m * math.log(m) for m in mass if m > 0)
    gradient = [whole * math.exp(x - top) / total - m for m, x in zip(mass, logits, strict=True)]
    return loss, gradient


@pytest.mark.parametrize("kind", ["labels", "pair", "unnormalised probabilities"])
@pytest.mark.parametrize("relationship", ["normalised", "unnormalised"])
@pytest.mark.parametrize("source_loss", ["cross_entropy", "kl"])
def test_equals_the_formula_by_hand(kind: str, relationship: str, source_loss: str, seed: int) -> None:
    """``Q logsumexp(z) - sum q z`` and ``Q softmax(z) - q``, row by row, of both heads."""
    options = {"reduction": "none", "source_loss": source_loss, "trade_off": 0.6}
    problem = Case("by hand", "", (5, 6, 11), kind, relationship, options=options).build(torch.float64, seed)
    outcome = reference_outcome(problem, "both heads")
    assert outcome.target_grad is not None
    assert outcome.target_term is not None
    assert outcome.source_term is not None
    p = _by_hand_distribution(problem)
    for i, row in enumerate(p):
        q = torch.tensor([math.fsum((row * column).tolist()) for column in problem.relationship.T], dtype=torch.float64)
        source, source_grad = _row_by_hand(problem.source_logits[i], q, source_loss == "kl")
        target, target_grad = _row_by_hand(problem.target_logits[i], row, False)
        upstream = float(problem.upstream[i])
        assert float(outcome.source_term[i]) == pytest.approx(source, rel=1e-12, abs=1e-12)
        assert float(outcome.target_term[i]) == pytest.approx(target, rel=1e-12, abs=1e-12)
        assert float(outcome.loss[i]) == pytest.approx(target + 0.6 * source, rel=1e-12, abs=1e-12)
        expected = [0.6 * upstream * x for x in source_grad]
        assert outcome.source_grad[i].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        assert outcome.target_grad[i].tolist() == pytest.approx(
            [upstream * x for x in target_grad], rel=1e-10, abs=1e-13
        )


def _by_hand_distribution(problem: Problem) -> Tensor:
    batch, classes = problem.target_logits.shape
    p = torch.zeros(batch, classes, dtype=torch.float64)
    if isinstance(problem.target, tuple):
        a, b, share = problem.target
        assert isinstance(share, Tensor)
        for i in range(batch):
            p[i, a[i]] += float(share[i])
            p[i, b[i]] += 1 - float(share[i])
    elif problem.target.is_floating_point():
        p += problem.target
    else:
        for i in range(batch):
            p[i, problem.target[i]] = 1.0
    return p


def test_kl_equals_torch_kl_div(draw: torch.Generator) -> None:
    q = torch.softmax(torch.randn(6, 9, generator=draw, dtype=torch.float64), 1)
    z = torch.randn(6, 9, generator=draw, dtype=torch.float64)
    labels = torch.arange(6)
    ours = reference.source_label_loss(z, labels, q, source_loss="kl")
    assert torch.allclose(ours, F.kl_div(torch.log_softmax(z, 1), q, reduction="batchmean"), rtol=1e-12)


# Each class has two source classes, and the logits have a simple softmax: log 1, log 3 -> 1/4, 3/4.
_R = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
_Z = torch.tensor([[math.log(1.0), math.log(3.0)]], dtype=torch.float64)
_T = torch.tensor([[0.0, 0.0, math.log(2.0)]], dtype=torch.float64)  # 1/4, 1/4, 1/2


def _call(
    source: Tensor, target: Tensor, labels: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    source, target = source.clone().requires_grad_(), target.clone().requires_grad_()
    loss, target_term, source_term = reference.co_tuning_loss(source, target, labels, _R, **options)  # type: ignore[arg-type]
    source_grad, target_grad = torch.autograd.grad(loss.sum(), (source, target))
    return loss.detach(), target_term.detach(), source_term.detach(), source_grad, target_grad


def test_numbers_of_one_row() -> None:
    loss, target_term, source_term, source_grad, target_grad = _call(_Z, _T, torch.tensor([0]), trade_off=2.0)
    assert float(target_term) == pytest.approx(math.log(4))
    assert float(source_term) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))
    assert float(loss) == pytest.approx(float(target_term) + 2 * float(source_term))
    assert source_grad.tolist()[0] == pytest.approx([2 * (0.25 - 0.5), 2 * (0.75 - 0.5)])
    assert target_grad.tolist()[0] == pytest.approx([0.25 - 1, 0.25, 0.5])


def test_a_masked_class_without_mass_contributes_nothing() -> None:
    source = torch.tensor([[1.0, -_INF]], dtype=torch.float64)
    target = torch.tensor([[-_INF, 0.0, -_INF]], dtype=torch.float64)
    loss, _, source_term, source_grad, target_grad = _call(source, target, torch.tensor([1]))
    assert float(loss) == 0
    assert float(source_term) == 0
    assert source_grad.tolist() == [[0.0, 0.0]]
    assert target_grad.tolist() == [[0.0, 0.0, 0.0]]


def test_a_masked_class_with_mass_costs_infinity() -> None:
    source = torch.tensor([[1.0, -_INF]], dtype=torch.float64)
    loss, _, source_term, source_grad, _ = _call(source, _T, torch.tensor([0]), trade_off=1.0)
    assert float(source_term) == _INF
    assert float(loss) == _INF
    assert source_grad.tolist() == [[0.5, -0.5]]  # Q softmax - q, as the formula says


@pytest.mark.parametrize("row", [[-_INF, -_INF], [_NAN, 0.0], [_INF, 0.0]])
def test_a_broken_row_is_nan_and_alone(row: list[float]) -> None:
    source = torch.cat([_Z, torch.tensor([row], dtype=torch.float64), _Z])
    loss, _, _, source_grad, target_grad = _call(source, _T.expand(3, 3), torch.tensor([0, 0, 1]), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert source_grad.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert not target_grad.isnan().any()


@pytest.mark.parametrize("value", [_NAN, _INF, -_INF])
def test_an_ignored_row_is_not_looked_at(value: float) -> None:
    source = torch.cat([_Z, torch.full((1, 2), value, dtype=torch.float64)])
    target = torch.cat([_T, torch.full((1, 3), value, dtype=torch.float64)])
    loss, _, _, source_grad, target_grad = _call(source, target, torch.tensor([0, -100]))
    alone, *_ = _call(_Z, _T, torch.tensor([0]))
    assert float(loss) == pytest.approx(float(alone), rel=1e-15)
    assert source_grad[1].tolist() == [0.0, 0.0]
    assert target_grad[1].tolist() == [0.0, 0.0, 0.0]


def test_an_ignore_index_of_64_bits_is_no_label_of_32() -> None:
    """Truncated to 32 bits it would be class 1."""
    expected = _call(_Z.expand(2, 2), _T.expand(2, 3), torch.tensor([0, 1]))
    found = _call(_Z.expand(2, 2), _T.expand(2, 3), torch.tensor([0, 1], dtype=torch.int32), ignore_index=2**32 + 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_an_unsupervised_class_is_not_counted_in_the_source_mean() -> None:
    source, target = _Z.expand(3, 2), _T.expand(3, 3)
    _, target_term, source_term, source_grad, _ = _call(source, target, torch.tensor([0, 2, 1]))
    half, whole = 0.5 * math.log(4) + 0.5 * math.log(4 / 3), math.log(4)
    assert float(source_term) == pytest.approx((half + whole) / 2)
    assert float(target_term) == pytest.approx((math.log(4) + math.log(2) + math.log(4)) / 3)
    assert source_grad[1].tolist() == [0.0, 0.0]


def test_a_mixture_counts_by_its_supervised_share() -> None:
    """Half of class 0 (supervised) and half of class 2 (not): the mean of this one row is the loss of class 0."""
    mixed = (torch.tensor([0]), torch.tensor([2]), torch.tensor([0.5], dtype=torch.float64))
    term = reference.source_label_loss(_Z, mixed, _R)
    assert float(term) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))


def test_means_without_rows() -> None:
    """No supervised row: the source mean is 0. No valid row, or no row at all: NaN, as F.cross_entropy."""
    _, target_term, source_term, source_grad, _ = _call(_Z, _T, torch.tensor([2]))
    assert float(source_term) == 0
    assert float(target_term) == pytest.approx(math.log(2))
    assert source_grad.tolist() == [[0.0, 0.0]]
    for rows in (0, 1):
        labels = torch.full((rows,), -100)
        _, target_term, source_term, source_grad, target_grad = _call(_Z[:rows], _T[:rows], labels)
        assert math.isnan(float(F.cross_entropy(_T[:rows], labels)))
        assert math.isnan(float(target_term))
        assert math.isnan(float(source_term))
        assert not source_grad.any()
        assert not target_grad.any()
        assert float(_call(_Z[:rows], _T[:rows], labels, reduction="sum")[0]) == 0


@pytest.mark.parametrize("bad", [3, -1, 2**31 - 1])
def test_a_label_out_of_range_is_named(bad: int) -> None:
    with pytest.raises(
        IndexError, match=rf"target\[1\] is {bad}, expected a class index in \[0, 3\) or ignore_index=-100"
    ):
        _call(_Z.expand(3, 2), _T.expand(3, 3), torch.tensor([0, bad, 7]))


@pytest.mark.parametrize(
    ("kind", "reduction", "source_loss"),
    [*itertools.product(["ignoring", "pair", "probabilities"], ["mean", "sum", "none"], ["cross_entropy", "kl"])],
)
def test_gradient_equals_finite_differences(kind: str, reduction: str, source_loss: str, seed: int) -> None:
    options = {"reduction": reduction, "source_loss": source_loss, "label_smoothing": 0.1}
    problem = Case("finite differences", "", (3, 4, 5), kind, weight="random", options=options).build(
        torch.float64, seed
    )
    logits = (problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, t: reference.co_tuning_loss(s, t, problem.target, problem.relationship, **problem.options)[0], logits
    )
