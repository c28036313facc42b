"""The reverse method against the regression's optimum, scikit-learn, the authors' procedure and Bayes' rule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cotuning_kernels import learn_relationship, learn_reverse_relationship
from cotuning_kernels.relationship import Relationship, reverse
from cotuning_kernels.relationship.reverse import INVERSE_PENALTIES, bayes, regression_path
from support.backends import Backend

N_T, N_S = 6, 40
PENALTIES = INVERSE_PENALTIES[4:14]  # scikit-learn takes long to converge at the others
LogitsAndLabels = tuple[Tensor, Tensor]


def classes_like_source_classes(
    draw: torch.Generator, rows: int, prototypes: Tensor, dtype: torch.dtype = torch.float32
) -> LogitsAndLabels:
    """Logits around one prototype per class: they predict most labels, but not all."""
    labels = torch.randint(0, len(prototypes), (rows,), generator=draw)
    noise = torch.randn(rows, prototypes.shape[1], generator=draw, dtype=torch.float64)
    return (prototypes[labels] + 2 * noise).to(dtype), labels


def train_and_validation(
    draw: torch.Generator, rows: int = 400, dtype: torch.dtype = torch.float32
) -> tuple[LogitsAndLabels, LogitsAndLabels]:
    prototypes = 2 * torch.randn(N_T, N_S, generator=draw, dtype=torch.float64)
    train = classes_like_source_classes(draw, rows, prototypes, dtype)
    return train, classes_like_source_classes(draw, rows // 2, prototypes, dtype)


def objective(coefficients: Tensor, probabilities: Tensor, labels: Tensor, inverse_penalty: float) -> Tensor:
    """The objective of a regression, written out in float64."""
    logits = probabilities.double() @ coefficients.double().T
    return F.cross_entropy(logits, labels, reduction="sum") + coefficients.double().square().sum() / 2 / inverse_penalty


def above_the_minimum(coefficients: Tensor, probabilities: Tensor, labels: Tensor, inverse_penalty: float) -> float:
    """``f(W) - min f`` from the parabola at ``W``: half of ``gradient' Hessian^-1 gradient``."""

    def flat_objective(flat: Tensor) -> Tensor:
        return objective(flat.view_as(coefficients), probabilities, labels, inverse_penalty)

    point = coefficients.double().flatten()
    slope = torch.func.grad(flat_objective)(point)
    curvature = torch.func.hessian(flat_objective)(point)
    return (slope @ torch.linalg.solve(curvature, slope)).item() / 2


# ------------------------------------------------------------------------------------------------------- the regression


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_fit_is_the_minimum(backend: Backend, dtype: torch.dtype, draw: torch.Generator) -> None:
    if backend.device_code:
        pytest.skip(f"{backend.name}: interpreted, a minute; the conformance table holds its gradients already")
    (logits, labels), _ = train_and_validation(draw)
    probabilities = logits.double().softmax(1).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6
    # The default of 200 is for the default tolerance, 1e-4: 1e-6 at the weakest penalty takes up to 250 on some draws.
    fits = list(
        regression_path(probabilities, labels, N_T, tolerance=tolerance, max_iterations=1000, backend=backend.argument)
    )
    assert [fit.inverse_penalty for fit in fits] == sorted(INVERSE_PENALTIES)
    for fit in fits:
        assert fit.converged
        assert fit.coefficients.dtype == dtype
        exact = objective(fit.coefficients, probabilities, labels, fit.inverse_penalty).item()
        # Logits round like the largest coefficient, which reaches 70 under the weakest penalty, and the objective
        # rounds like its logits: the error was at most 0.27 of this in 4 352 fits from 64 draws, in either dtype.
        rounding = torch.finfo(dtype).eps * (8 + fit.coefficients.abs().max().item())
        assert abs(fit.objective - exact) <= rounding * exact
        # The bound that ended the fit holds.
        above = above_the_minimum(fit.coefficients, probabilities, labels, fit.inverse_penalty)
        gained = min(exact, len(labels) * math.log(N_T) - exact)
        assert above <= fit.gap * gained * (1 + 1e-3) + rounding * exact
        # Rounding may keep the bound above the tolerance; the fit itself is then at most slightly above it: the worst
        # of 24 such fits in 237 paths was 1.01 tolerances above the minimum.
        assert fit.gap <= tolerance or (dtype == torch.float32 and above <= 2 * tolerance * gained)


def test_the_objective_falls_as_the_penalty_gets_weaker(draw: torch.Generator) -> None:
    (logits, labels), _ = train_and_validation(draw)
    fits = list(regression_path(logits.softmax(1), labels, N_T))
    objectives = [fit.objective for fit in fits]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] == pytest.approx(len(labels) * math.log(N_T), rel=1e-2)


def test_a_path_is_the_same_bits_twice(draw: torch.Generator) -> None:
    (logits, labels), _ = train_and_validation(draw)
    first, second = (list(regression_path(logits.softmax(1), labels, N_T)) for _ in range(2))
    assert all(torch.equal(a.coefficients, b.coefficients) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:the regression with C = .* has not converged")  # from a cold start
def test_carrying_on_saves_evaluations(draw: torch.Generator) -> None:
    (logits, labels), _ = train_and_validation(draw, rows=1000)
    probabilities = logits.softmax(1)
    warm = sum(fit.evaluations for fit in regression_path(probabilities, labels, N_T))
    cold = sum(next(regression_path(probabilities, labels, N_T, [c])).evaluations for c in INVERSE_PENALTIES)
    assert warm < cold


def test_too_few_iterations_are_said(draw: torch.Generator) -> None:
    (logits, labels), _ = train_and_validation(draw)
    with pytest.warns(UserWarning, match="C = 100 has not converged in 2 iterations"):
        (fit,) = regression_path(logits.softmax(1), labels, N_T, [100.0], max_iterations=2)
    assert not fit.converged


@pytest.mark.parametrize("penalties", [[], [0.0], [-1.0], [math.nan], ["1"]], ids=str)
def test_penalties_that_are_none(penalties: Sequence[Any], draw: torch.Generator) -> None:
    (logits, labels), _ = train_and_validation(draw, rows=20)
    if penalties == ["1"]:  # float("1") is a number
        assert len(list(regression_path(logits.softmax(1), labels, N_T, penalties))) == 1
        return
    with pytest.raises(ValueError, match="inverse_penalties is"):
        list(regression_path(logits.softmax(1), labels, N_T, penalties))


def test_scikit_learn_finds_the_same_minimum(draw: torch.Generator) -> None:
    """Objectives to 1e-7 of themselves; predicted probabilities to 1e-4."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    (logits, labels), (validation, _) = train_and_validation(draw, dtype=torch.float64)
    probabilities, held_out = logits.softmax(1), validation.softmax(1)
    for fit in regression_path(probabilities, labels, N_T, [1e-2, 1.0, 30.0, 300.0], tolerance=1e-9):
        theirs = linear_model.LogisticRegression(C=fit.inverse_penalty, fit_intercept=False, tol=1e-9, max_iter=10_000)
        theirs.fit(probabilities.numpy(), labels.numpy())
        coefficients = torch.from_numpy(theirs.coef_)
        ours = objective(fit.coefficients, probabilities, labels, fit.inverse_penalty)
        torch.testing.assert_close(
            ours, objective(coefficients, probabilities, labels, fit.inverse_penalty), rtol=1e-7, atol=0
        )
        torch.testing.assert_close(
            (held_out @ fit.coefficients.T).softmax(1), (held_out @ coefficients.T).softmax(1), rtol=0, atol=1e-4
        )


# ----------------------------------------------------------------------------------------------- the authors' procedure


def softmax(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def procedure_of_the_authors(
    train: LogitsAndLabels, validation: LogitsAndLabels, temperature: float, penalties: Sequence[float] = PENALTIES
) -> tuple[Tensor, float]:
    """The relationship of the authors' script, by converged scikit-learn and SciPy, and its validation accuracy."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    optimize, special = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.special")
    x, held_out = (softmax(logits.double().numpy() / temperature) for logits, _ in (train, validation))
    y, held_out_y = train[1].numpy(), validation[1].numpy()
    best, best_accuracy = None, -1.0
    for inverse_penalty in sorted(penalties, reverse=True):
        fit = linear_model.LogisticRegression(C=inverse_penalty, fit_intercept=False, tol=1e-9, max_iter=10_000)
        fit.fit(x, y)
        accuracy = (fit.predict(held_out) == held_out_y).mean()
        if accuracy > best_accuracy:
            best, best_accuracy = fit, accuracy
    logits = held_out @ best.coef_.T

    def negative_log_likelihood(scale: float) -> float:
        return float(-special.log_softmax(scale * logits, axis=1)[np.arange(len(logits)), held_out_y].mean())

    scale = optimize.minimize_scalar(
        negative_log_likelihood, bounds=(1e-3, 1e3), method="bounded", options={"xatol": 1e-9}
    ).x
    target_given_source = softmax(best.coef_.T * scale)  # (N_s, N_t)
    joint = (target_given_source * np.concatenate([x, held_out]).mean(axis=0)[:, None]).T
    return torch.from_numpy(joint / joint.sum(axis=1, keepdims=True)), best_accuracy


@pytest.mark.parametrize("temperature", [1.0, 1.13])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "distance"),
    [(torch.float32, 1e-4, 5e-3), (torch.float64, 1e-8, 1e-4)],
    ids=["as it is by default", "converged"],
)
def test_the_authors_procedure_gives_the_same_relationship(
    temperature: float, dtype: torch.dtype, tolerance: float, distance: float, draw: torch.Generator
) -> None:
    """The distance is the total variation of a row: half the sum of the differences."""
    train, validation = train_and_validation(draw, dtype=dtype)
    ours = learn_reverse_relationship(
        *train, *validation, N_T, temperature=temperature, inverse_penalties=PENALTIES, tolerance=tolerance
    )
    # A validation row between two classes may fall to either side, so another penalty may win by this row.
    chosen = [float(ours.metadata["inverse_penalty"])]
    expected, accuracy = procedure_of_the_authors(train, validation, temperature, chosen)
    _, best_accuracy = procedure_of_the_authors(train, validation, temperature)
    assert accuracy >= best_accuracy - 1.5 / len(validation[0])
    assert (ours.matrix.double() - expected).abs().sum(dim=1).max() / 2 <= distance
    direct_like = torch.full_like(expected, 1 / N_S)  # the tolerance tells relationships apart
    assert (direct_like - expected).abs().sum(dim=1).max() / 2 > 0.05


def test_the_comparison_sees_a_wrong_step(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = train_and_validation(draw)
    expected, _ = procedure_of_the_authors(train, validation, 1.0)

    def without_the_marginal(coefficients: Tensor, temperature: float, source_marginal: Tensor) -> Tensor:
        return bayes(coefficients, temperature, torch.ones_like(source_marginal))

    def without_the_temperature(coefficients: Tensor, temperature: float, source_marginal: Tensor) -> Tensor:
        return bayes(coefficients, 2 * temperature, source_marginal)

    for wrong in (without_the_marginal, without_the_temperature):
        with monkeypatch.context() as patched:
            patched.setattr(reverse, "bayes", wrong)
            ours = learn_reverse_relationship(*train, *validation, N_T, inverse_penalties=PENALTIES)
        assert (ours.matrix.double() - expected).abs().sum(dim=1).max() / 2 > 1e-2


# ---------------------------------------------------------------------------------------------------------- Bayes' rule


def test_bayes_rule_by_hand() -> None:
    # p(t | s): source class 0 is always target 0, source class 1 either.
    coefficients = torch.tensor([[10_000.0, 0.0], [0.0, 0.0]])
    found = bayes(coefficients, 1.0, torch.tensor([0.25, 0.75]))
    # target 0: 1 * 0.25 and 0.5 * 0.75; target 1: 0 and 0.5 * 0.75.
    expected = torch.tensor([[0.25 / 0.625, 0.375 / 0.625], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_a_target_class_that_no_source_class_predicts_still_has_a_row() -> None:
    coefficients = torch.tensor([[0.0, 0.0], [-2000.0, -3000.0]])
    found = bayes(coefficients, 1.0, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found[1], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_a_relationship_between_copies_of_the_source_classes(draw: torch.Generator) -> None:
    """The target classes are source classes: the relationship is nearly the identity."""
    labels = torch.arange(N_T).repeat(50)
    logits = 8.0 * F.one_hot(labels, N_T) + torch.randn(len(labels), N_T, generator=draw)
    with pytest.warns(UserWarning, match="no best temperature on 300 validation rows"):  # every row is right
        found = learn_reverse_relationship(logits, labels, logits, labels, N_T)
    assert found.metadata["regression_temperature"] == "1"
    assert found.matrix.diagonal().min() > 0.95


# -------------------------------------------------------------------------------------------------------- the one call


def test_what_it_returns(draw: torch.Generator, tmp_path: Path) -> None:
    (train, labels), (validation, validation_labels) = train_and_validation(draw)
    labels[::7] = -100
    names = [f"class {t}" for t in range(N_T)]
    found = learn_reverse_relationship(
        train, labels, validation, validation_labels, N_T, temperature=2.0, target_classes=names
    )
    assert (found.method, found.temperature, found.target_classes) == ("reverse", 2.0, tuple(names))
    assert found.counts is not None
    assert torch.equal(found.counts, torch.bincount(labels[labels >= 0], minlength=N_T))
    torch.testing.assert_close(found.matrix.sum(dim=1), torch.ones(N_T))
    assert float(found.metadata["inverse_penalty"]) in INVERSE_PENALTIES
    assert float(found.metadata["regression_validation_accuracy"]) > 1.5 / N_T
    assert float(found.metadata["regression_temperature"]) > 0
    found.save(tmp_path / "reverse.safetensors")
    loaded = Relationship.load(tmp_path / "reverse.safetensors")
    assert (loaded.method, loaded.metadata) == ("reverse", found.metadata)
    assert torch.equal(loaded.matrix, found.matrix)


@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_modes_of_the_caller_change_nothing(mode: str, draw: torch.Generator) -> None:
    """No bfloat16 products, and no autograd error after the whole pass."""
    train, validation = train_and_validation(draw)
    loaders = DataLoader(TensorDataset(*train), 100), DataLoader(TensorDataset(*validation), 100)
    model = nn.Identity()

    def learnt() -> tuple[Relationship, Relationship, Tensor]:
        reverse = learn_reverse_relationship(*train, *validation, N_T)
        through_a_model = learn_relationship(
            model, loaders[0], N_T, method="reverse", validation_loader=loaders[1], progress=False
        )
        probabilities = torch.softmax(train[0], 1)
        (fit,) = regression_path(probabilities, train[1], N_T, [1.0])
        return reverse, through_a_model, fit.coefficients

    expected = learnt()
    context = torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else torch.inference_mode()
    with context:
        found = learnt()
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (x if isinstance(x, Tensor) else x.matrix for x in (ours, theirs))
        assert torch.equal(ours, theirs)
        assert not ours.is_inference()


def test_logits_of_two_dtypes(draw: torch.Generator) -> None:
    train, validation = train_and_validation(draw)
    found = learn_reverse_relationship(*train, validation[0].double(), validation[1], N_T, inverse_penalties=[1.0])
    expected = learn_reverse_relationship(
        train[0].double(), train[1], validation[0].double(), validation[1], N_T, inverse_penalties=[1.0]
    )
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=1e-6)


def test_a_batch_with_another_number_of_source_classes_is_named() -> None:
    batches = [(torch.randn(4, n), torch.tensor([0, 1, 2, 0])) for n in (7, 8)]
    with pytest.raises(ValueError, match="batch 1 of the loader: source_logits has 8 classes, but those before had 7"):
        learn_relationship(nn.Identity(), batches, 3, method="reverse", validation_loader=batches, progress=False)


def test_ignored_rows_do_not_count(draw: torch.Generator) -> None:
    (train, labels), (validation, validation_labels) = train_and_validation(draw)
    more = torch.cat([train, 50 * torch.randn(30, N_S, generator=draw)])
    more_labels = torch.cat([labels, torch.full((30,), -100)])
    more[-1, 0] = math.nan
    with_them = learn_reverse_relationship(more, more_labels, validation, validation_labels, N_T)
    without = learn_reverse_relationship(train, labels, validation, validation_labels, N_T)
    assert torch.equal(with_them.matrix, without.matrix)


@pytest.mark.parametrize("empty", ["unsupervised", "uniform", "error"])
def test_a_class_without_a_training_row(empty: str, draw: torch.Generator) -> None:
    (train, labels), validation = train_and_validation(draw)
    labels[labels == 2] = -100
    if empty == "error":
        with pytest.raises(ValueError, match="no sample of 1 of 6 target classes: 2"):
            learn_reverse_relationship(train, labels, *validation, N_T, empty=empty)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no sample of 1 of 6")
        found = learn_reverse_relationship(train, labels, *validation, N_T, empty=empty)
    assert torch.equal(found.matrix[2], torch.full((N_S,), 0.0 if empty == "unsupervised" else 1 / N_S))


def test_a_strong_penalty_is_calibrated_away(draw: torch.Generator) -> None:
    """Its coefficients are almost 0; the temperature scales them back up."""
    train, validation = train_and_validation(draw)
    found = learn_reverse_relationship(*train, *validation, N_T, inverse_penalties=[1e-7])
    assert float(found.metadata["regression_temperature"]) < 1e-4
    spread = found.matrix.amax(dim=0) / found.matrix.amin(dim=0)
    assert spread.max() > 3  # at temperature 1 it would be 1 + 1e-5


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")  # on ten rows
def test_what_cannot_be_learnt_from(draw: torch.Generator) -> None:
    (train, labels), (validation, validation_labels) = train_and_validation(draw, rows=20)
    with pytest.raises(ValueError, match="train_logits has 40 source classes, but validation_logits has 39"):
        learn_reverse_relationship(train, labels, validation[:, 1:], validation_labels, N_T)
    with pytest.raises(ValueError, match="validation_labels has no label"):
        learn_reverse_relationship(train, labels, validation, torch.full_like(validation_labels, -100), N_T)
    with pytest.raises(IndexError, match=r"labels\[3\] is 6, expected a class index in \[0, 6\)"):
        learn_reverse_relationship(train, labels.index_fill(0, torch.tensor([3]), N_T), train, labels, N_T)
    broken = train.clone()
    broken[5, 5] = math.nan
    with pytest.raises(ValueError, match=r"train_logits\[5\] has no softmax: a logit is NaN"):
        learn_reverse_relationship(broken, labels, validation, validation_labels, N_T)
    for option in ({"temperature": 0.0}, {"tolerance": -1.0}, {"empty": "zero"}, {"inverse_penalties": []}):
        with pytest.raises(ValueError, match=next(iter(option))):
            learn_reverse_relationship(train, labels, validation, validation_labels, N_T, **option)


def test_from_a_model_and_two_loaders(draw: torch.Generator) -> None:
    train, validation = train_and_validation(draw)
    model = nn.Linear(N_S, N_S)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    loaders = [DataLoader(TensorDataset(*data), batch_size=64) for data in (train, validation)]
    found = learn_relationship(
        model, loaders[0], N_T, method="reverse", validation_loader=loaders[1], temperature=1.5, progress=False
    )
    expected = learn_reverse_relationship(*train, *validation, N_T, temperature=1.5)
    assert torch.equal(found.matrix, expected.matrix)
    assert found.metadata["source_model"] == "Linear"
    assert found.method == "reverse"


def test_a_validation_loader_where_it_is_needed_and_only_there(draw: torch.Generator) -> None:
    train, validation = train_and_validation(draw, rows=20)
    loader = DataLoader(TensorDataset(*train), batch_size=8)
    with pytest.raises(ValueError, match="pass validation_loader"):
        learn_relationship(nn.Identity(), loader, N_T, method="reverse")
    with pytest.raises(ValueError, match="method='direct' has nothing to choose"):
        learn_relationship(nn.Identity(), loader, N_T, validation_loader=loader)
    with pytest.raises(ValueError, match="the validation_loader gave no batch"):
        learn_relationship(nn.Identity(), loader, N_T, method="reverse", validation_loader=[], progress=False)
    bad = [validation, (validation[0].clone().fill_(math.inf), validation[1])]
    with pytest.raises(ValueError, match="batch 1 of the validation_loader: source_logits\\[0\\] has no softmax"):
        learn_relationship(nn.Identity(), loader, N_T, method="reverse", validation_loader=bad, progress=False)
