"""The scores of transfer_scores, each against an independent computation of its formula."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

import cotuning_kernels as ck
from cotuning_kernels import transfer_scores

N_S, N_T, WIDTH = 12, 4, 7


def problem(seed: int, rows: int = 60, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated ``theta``, labels and features."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N_T, (rows,), generator=generator)
    centres = torch.randn(N_T, width, generator=generator)
    features = centres[labels] + torch.randn(rows, width, generator=generator)
    theta = torch.softmax(features @ torch.randn(width, N_S, generator=generator), 1)
    return theta, labels, features


def test_leep_from_its_definition(seed: int) -> None:
    theta, labels, _ = problem(seed)
    p, y, n = theta.double().numpy(), labels.numpy(), len(labels)
    total = 0.0
    for i in range(n):
        expected_prediction = 0.0
        for z in range(N_S):
            joint = sum(p[k, z] for k in range(n) if y[k] == y[i]) / n
            expected_prediction += joint / (p[:, z].sum() / n) * p[i, z]
        total += math.log(expected_prediction)
    assert transfer_scores.leep(theta, labels, N_T) == pytest.approx(total / n, rel=1e-6)


def test_nce_is_mutual_information_less_entropy(seed: int) -> None:
    theta, labels, _ = problem(seed)
    source_labels = theta.argmax(1)
    entropy = stats.entropy(np.bincount(labels.numpy()))
    expected = mutual_info_score(labels.numpy(), source_labels.numpy()) - entropy  # -H(Y | Z) = I(Y; Z) - H(Y)
    assert transfer_scores.nce(source_labels, labels, N_T, N_S) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("width", [WIDTH, 100])
def test_h_score_with_a_pseudo_inverse(width: int, seed: int) -> None:
    _, labels, features = problem(seed, width=width)
    f, y = features.double().numpy(), labels.numpy()
    g = np.stack([f[y == label].mean(0) for label in y])
    expected = np.trace(np.linalg.pinv(np.cov(f, rowvar=False), rcond=1e-12) @ np.cov(g, rowvar=False))
    assert transfer_scores.h_score(features, labels) == pytest.approx(expected, rel=1e-6)
    if width > len(labels):  # as the docstring of h_score says
        assert expected == pytest.approx(N_T - 1)


@pytest.mark.parametrize("width", [3, WIDTH, 100])
def test_log_me_is_the_largest_evidence(width: int, seed: int) -> None:
    """The density of a normal distribution of covariance ``1/beta + F F^T / alpha``, maximised by a general method."""
    _, labels, features = problem(seed, width=width)
    f, n = features.double().numpy(), len(labels)
    evidences = []
    for label in range(N_T):
        target = (labels == label).double().numpy()

        def negative(log_precisions: Any, target: Any = target) -> float:
            alpha, beta = np.exp(log_precisions)
            covariance = np.eye(n) / beta + f @ f.T / alpha
            return -float(stats.multivariate_normal(np.zeros(n), covariance).logpdf(target)) / n

        starts = [optimize.minimize(negative, start, method="Nelder-Mead") for start in ((0, 0), (3, 2), (5, 5))]
        evidences.append(-min(each.fun for each in starts))
    assert transfer_scores.log_me(features, labels, N_T) == pytest.approx(np.mean(evidences), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("smoothing", [1.0, 0.01])
def test_label_mapping_leaves_each_row_out(smoothing: float, seed: int) -> None:
    theta, labels, _ = problem(seed)
    p, y, right, with_itself = theta.double().numpy(), labels.numpy(), 0, 0
    for i in range(len(y)):
        for left_out in (True, False):
            others = np.arange(len(y)) != i if left_out else np.ones(len(y), dtype=bool)
            sums = np.stack([p[others & (y == t)].sum(0) for t in range(N_T)])
            mapping = (sums + smoothing) / (sums.sum(0) + smoothing * N_T)
            hit = int((p[i] @ mapping.T).argmax() == y[i])
            right, with_itself = right + hit * left_out, with_itself + hit * (not left_out)
    got = transfer_scores.label_mapping_accuracy(theta, labels, N_T, smoothing=smoothing)
    assert got == pytest.approx(right / len(y))
    assert got <= with_itself / len(y)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout, self.head = nn.Linear(5, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, N_S)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.body(x)))
        return logits


def batches(seed: int) -> tuple[Network, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model, y = Network().train(), torch.randint(-1, N_T, (70,)).masked_fill_(torch.arange(70) % 9 == 0, -100)
    y = y.masked_fill(y == -1, -100)
    x = torch.randn(70, 5) + 2 * torch.randn(N_T, 5)[y.clamp(min=0)]
    with torch.no_grad():
        model.head.weight *= 4
    return model, x, y, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 70, 8)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_call_gives_all_of_them(temperature: float, seed: int) -> None:
    model, x, y, loader = batches(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = ck.transferability(model, loader, N_T, temperature=temperature, top=3, progress=False)
        relationship = ck.learn_relationship(model, loader, N_T, temperature=temperature, progress=False)
    assert model.training
    assert not model.head._forward_pre_hooks
    counted = y != -100
    features = model.body(x)[counted].detach()
    theta = torch.softmax(model.head(features).detach() / temperature, 1)
    labels = y[counted]
    assert scores.rows == len(labels)
    assert scores.leep == pytest.approx(transfer_scores.leep(theta, labels, N_T), rel=1e-5)
    assert scores.nce == pytest.approx(transfer_scores.nce(theta.argmax(1), labels, N_T, N_S), rel=1e-5)
    assert scores.log_me == pytest.approx(transfer_scores.log_me(features, labels, N_T), rel=1e-5)
    assert scores.h_score == pytest.approx(transfer_scores.h_score(features, labels), rel=1e-5)
    assert scores.label_mapping_accuracy == transfer_scores.label_mapping_accuracy(theta, labels, N_T)
    assert scores.relationship_entropy == pytest.approx(relationship.entropy().mean().item(), rel=1e-5)
    assert scores.uniform_entropy == pytest.approx(math.log(N_S))
    assert scores.top_mass == pytest.approx(relationship.matrix.topk(3).values.sum(1).mean().item(), rel=1e-5)
    assert scores.majority_share == pytest.approx(labels.bincount().max().item() / len(labels))


def test_a_function_has_no_features(seed: int) -> None:
    model, _, _, loader = batches(seed)
    scores, of_module = (
        ck.transferability(each, loader, N_T, progress=False) for each in (model.eval().__call__, model)
    )
    assert (scores.log_me, scores.h_score) == (None, None)
    assert scores.leep == of_module.leep
    with pytest.raises(ValueError, match="head='nothing' names no module"):
        ck.transferability(model, loader, N_T, head="nothing", progress=False)


def test_tokens_and_convolutional_heads(seed: int) -> None:
    """Features have one row per label: a token's, or the mean over positions."""
    torch.manual_seed(seed)
    y = torch.arange(24).reshape(4, 6) % N_T
    x = torch.randn(4, 6, 5) + 3 * torch.randn(N_T, 5)[y]
    model = Network().eval()
    with torch.no_grad():
        model.head.weight *= 4
    scores = ck.transferability(model, [(x, y)], N_T, progress=False)
    rows = ck.transferability(model, [(x.flatten(0, 1), y.flatten())], N_T, progress=False)
    assert scores == pytest.approx(rows, rel=1e-5)
    pooled = nn.Sequential(nn.Conv2d(5, N_S, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(24, 5, 3, 3) + 3 * torch.randn(N_T, 5)[y.flatten()][..., None, None]
    found = ck.transferability(pooled, [(images, y.flatten())], N_T, progress=False)
    assert found.h_score == pytest.approx(transfer_scores.h_score(images.mean((2, 3)), y.flatten()), rel=1e-5)


def test_a_source_head_that_says_nothing_is_named(seed: int) -> None:
    model, _, _, loader = batches(seed)
    with torch.no_grad():
        model.head.weight *= 0.001
        model.head.bias.zero_()
    with pytest.warns(UserWarning, match=r"says nothing about these images: .*nearly uniform .*entropy 2.48 of 2.48"):
        ck.transferability(model, loader, N_T, progress=False)
    with torch.no_grad():
        model.head.bias[2] = 9.0  # always predicts the same source class
    with pytest.warns(UserWarning, match="do not tell the target classes apart"):
        ck.transferability(model, loader, N_T, progress=False)


def test_what_is_wrong_is_said(seed: int) -> None:
    model, x, _, loader = batches(seed)
    with pytest.raises(ValueError, match="top is 0, expected a positive int"):
        ck.transferability(model, loader, N_T, top=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        ck.transferability(model, loader, N_T, temperature=0)
    with pytest.raises(ValueError, match="no row with a label"):
        ck.transferability(model, [(x, torch.full((70,), -100))], N_T, progress=False)
    assert not model.head._forward_pre_hooks
