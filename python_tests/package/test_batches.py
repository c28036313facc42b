"""Batches and targets in the forms that data sets, collators and mixing give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import cotuning_kernels as ck
from cotuning_kernels import functional

N_S, N_T, B = 11, 5, 6


class Mixed(Dataset[Any]):
    """``(image, (label_a, label_b, share of label_a))``: mixing inside the data set."""

    def __len__(self) -> int:
        return B

    def __getitem__(self, i: int) -> tuple[Tensor, tuple[int, int, float]]:
        return torch.zeros(3), (i % N_T, (i + 1) % N_T, 0.1 * (i + 1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", ["list", "column"])
def test_a_collated_mixup_triple_is_a_mixup_pair(form: str, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    _, collated = next(iter(DataLoader(Mixed(), B)))
    assert isinstance(collated, list)
    labels_a, labels_b, share = collated
    given = collated if form == "list" else (labels_a, labels_b, share[:, None])
    relationship = torch.softmax(torch.randn(N_T, N_S), 1)
    logits = [torch.randn(B, n, requires_grad=True) for n in (N_S, N_T)]

    def terms(target: Any) -> list[Tensor]:
        found = functional.co_tuning_loss(*logits, target, relationship, return_terms=True, backend=backend)
        return [*found, *torch.autograd.grad(found.loss, logits)]

    # The definition of mixup: the mean of both losses, weighted by the share.
    a, b = (
        functional.co_tuning_loss(*logits, labels, relationship, reduction="none", backend=backend)
        for labels in (labels_a, labels_b)
    )
    found = terms(given)
    torch.testing.assert_close(found[0], (share * a + (1 - share) * b).mean().float())
    torch.testing.assert_close(found, terms((labels_a, labels_b, share)), rtol=0, atol=0)
    translated = [functional.translate_labels(t, relationship) for t in (given, (labels_a, labels_b, share))]
    torch.testing.assert_close(*translated, rtol=0, atol=0)


@pytest.mark.parametrize("target", [[torch.zeros(B, dtype=torch.long)] * 2, [1, 2, 3]])
def test_other_lists_are_refused_in_words(target: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="target"):
        functional.co_tuning_loss(torch.randn(B, N_S), torch.randn(B, N_T), target, torch.ones(N_T, N_S) / N_S)


def test_shares_that_fit_no_batch_are_refused() -> None:
    labels = torch.zeros(B, dtype=torch.long)
    for shape in ((B, 2), (B, 1, 1), (B - 1, 1)):
        with pytest.raises(ValueError, match=r"the share, has shape"):
            functional.co_tuning_loss(
                torch.randn(B, N_S),
                torch.randn(B, N_T),
                (labels, labels, torch.rand(shape)),
                torch.ones(N_T, N_S) / N_S,
            )


class Classifier(nn.Module):
    """Takes ``labels`` and computes its own loss with them, as the classifiers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, N_S)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(pixel_values)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits.view(-1, N_S), labels.view(-1))}
        return {"logits": logits} | loss


@pytest.mark.parametrize("form", ["mapping", "triple"])
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_a_relationship_from_other_batches(form: str, method: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = Classifier(), torch.randn(20, 8), torch.arange(20) % N_T
    pairs = [({"pixel_values": x[i : i + 5]}, y[i : i + 5]) for i in range(0, 20, 5)]
    batches = [
        {**inputs, "labels": labels} if form == "mapping" else (inputs, labels, torch.arange(5))
        for inputs, labels in pairs
    ]
    more = {"validation_loader": batches, "inverse_penalties": (1.0,)} if method == "reverse" else {}
    found = ck.learn_relationship(model, batches, N_T, method=method, progress=False, **more)
    more = more | ({"validation_loader": pairs} if more else {})
    expected = ck.learn_relationship(model, pairs, N_T, method=method, progress=False, **more)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=0)


def test_class_names_behind_a_concatenation() -> None:
    class Named(TensorDataset):
        def __init__(self, classes: list[str]) -> None:
            super().__init__(torch.randn(10, 8), torch.arange(10) % len(classes))
            self.classes = classes

    model = nn.Linear(8, N_S)
    names = ["ant", "bee"]
    both = ConcatDataset([Named(names), Subset(Named(names), range(8))])
    for data in (both, Subset(both, range(15)), ConcatDataset([both, Named(names)])):
        relationship = ck.learn_relationship(model, DataLoader(data, 5), progress=False)
        assert relationship.target_classes == ("ant", "bee")
    # Parts that disagree number their classes differently: better no names than wrong ones.
    other = ConcatDataset([Named(names), Named(["cat", "dog"])])
    assert ck.learn_relationship(model, DataLoader(other, 5), 2, progress=False).target_classes is None


def test_a_relationship_without_target_classes_is_refused() -> None:
    for make in (ck.FusedCoTuningLoss, lambda r: functional.translate_labels(torch.zeros(0, dtype=torch.long), r)):
        with pytest.raises(ValueError, match=r"relationship has shape \(0, 11\), expected at least one row"):
            make(torch.zeros(0, N_S))
