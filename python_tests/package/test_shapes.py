"""The shapes of ``F.cross_entropy``: ``(C,)`` and ``(B, C, d1, ...)`` give what their rows give, in every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cotuning_kernels as ck
from cotuning_kernels import distributed, functional
from cotuning_kernels.calibration import expected_calibration_error, fit_temperature, reliability
from support.backends import Backend

N_S, N_T = 11, 4
SHAPES = {"()": (), "(3, 5)": (3, 5), "(2, 3, 4)": (2, 3, 4), "no rows": (0, 3), "as many places as classes": (2, N_T)}


def problem(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Logits with the classes second, labels with ignored ones, and a relationship with an unsupervised class."""
    draw = torch.Generator().manual_seed(seed)
    source, target = (
        torch.randn(*shape[:1], classes, *shape[1:], generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for classes in (N_S, N_T)
    )
    labels = torch.randint(0, N_T, shape, generator=draw)
    if shape:
        labels = labels.masked_fill(torch.rand(shape, generator=draw) < 0.2, -100)
    relationship = torch.rand(N_T, N_S, generator=draw, dtype=torch.float64).softmax(1)
    relationship[1] = 0
    return source, target, labels, relationship


def by_hand(logits: Tensor) -> Tensor:
    """Flatten to rows, position by position."""
    if logits.dim() == 1:
        return logits[None]
    return (
        torch.stack([place for sample in logits for place in sample.reshape(sample.shape[0], -1).T])
        if len(logits)
        else logits.reshape(0, logits.shape[1])
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_loss_is_that_of_the_rows(backend: Backend, shape: tuple[int, ...], reduction: str, seed: int) -> None:
    source, target, labels, relationship = problem(shape, seed)
    options: dict[str, Any] = {"reduction": reduction, "backend": backend.argument, "label_smoothing": 0.1}
    terms = functional.co_tuning_loss(source, target, labels, relationship, return_terms=True, **options)
    upstream = torch.randn(terms.loss.shape, generator=torch.Generator().manual_seed(seed)).double()
    found = torch.autograd.grad(terms.loss, (source, target), upstream)
    rows = by_hand(source), by_hand(target)
    expected = functional.co_tuning_loss(*rows, labels.flatten(), relationship, return_terms=True, **options)
    for one, other in zip(terms, expected, strict=True):
        assert one.shape == (labels.shape if reduction == "none" else ())
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=0, atol=0, equal_nan=True)
    if labels.numel():
        gradients = torch.autograd.grad(expected.loss, (source, target), upstream.reshape(expected.loss.shape))
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    # torch's own target term, with the same smoothing.
    torch_term = F.cross_entropy(target, labels, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(terms.target_term, torch_term.detach(), rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 3, 4)], ids=str)
def test_every_form_of_target_and_the_source_term_alone(backend: Backend, shape: tuple[int, ...], seed: int) -> None:
    source, target, labels, relationship = problem(shape, seed)
    labels, draw = labels.clamp(min=0), torch.Generator().manual_seed(seed)
    other, share = labels.flip(-1) if shape else labels, torch.rand(shape, generator=draw)
    probabilities = torch.rand_like(target).softmax(0 if target.dim() == 1 else 1).detach()
    forms: list[tuple[Any, Any]] = [
        (probabilities, by_hand(probabilities)),
        ((labels, other, 0.3), (labels.flatten(), other.flatten(), 0.3)),
        ((labels, other, share), (labels.flatten(), other.flatten(), share.flatten())),
    ]
    if shape:
        by_sample = torch.rand(shape[0], generator=draw)
        places = labels[0].numel()
        forms.append(
            ((labels, other, by_sample), (labels.flatten(), other.flatten(), by_sample.repeat_interleave(places)))
        )
    criterion = ck.FusedCoTuningLoss(relationship, backend=backend.argument)
    for given, flat in forms:
        found = criterion(source, target, given)
        torch.testing.assert_close(found, criterion(by_hand(source), by_hand(target), flat), rtol=0, atol=0)
    alone = functional.source_label_loss(source, labels, relationship, backend=backend.argument)
    rows = functional.source_label_loss(by_hand(source), labels.flatten(), relationship, backend=backend.argument)
    torch.testing.assert_close(alone, rows, rtol=0, atol=0)


def test_segmentation_is_what_torch_computes(seed: int) -> None:
    source, target, labels, relationship = problem((2, 3, 4), seed)
    labels, relationship = labels.clamp(min=0), relationship + 0.01
    expected = F.cross_entropy(target, labels) + 2.3 * F.cross_entropy(source, relationship[labels].movedim(-1, 1))
    torch.testing.assert_close(ck.FusedCoTuningLoss(relationship)(source, target, labels), expected)
    terms = distributed.global_mean_loss(ck.FusedCoTuningLoss(relationship), source, target, labels)
    torch.testing.assert_close(terms.loss, expected)


def test_classes_that_lie_last_in_memory_are_not_copied(seed: int) -> None:
    source, target, labels, relationship = problem((2, 3, 4), seed, torch.float32)
    heads = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in (source, target)]

    criterion = ck.FusedCoTuningLoss(relationship.float())

    def copies(*heads: Tensor) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            criterion(*heads, labels)
        return sum(event.name in ("aten::clone", "aten::copy_") for event in profile.events())

    assert copies(*heads) == 0
    assert copies(source, target) > 0


def test_in_place_logits_of_several_dimensions(seed: int) -> None:
    source, target, labels, relationship = problem((2, 3, 4), seed)
    expected = torch.autograd.grad(ck.FusedCoTuningLoss(relationship)(source, target, labels), (source, target))
    loss = ck.FusedCoTuningLoss(relationship, inplace=True)(source * 1, target * 1, labels)
    for one, other in zip(torch.autograd.grad(loss, (source, target)), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 3, 4)], ids=str)
def test_statistics_are_those_of_the_rows(backend: Backend, shape: tuple[int, ...], seed: int) -> None:
    source, _, labels, _ = problem(shape, seed, torch.float32)
    rows, flat = by_hand(source.detach()), labels.flatten()
    one, other = (ck.RelationshipEstimator(N_T, backend=backend.argument) for _ in range(2))
    one.update(source, labels)
    other.update(rows, flat)
    fits = [fit_temperature(*each, backend=backend.argument) for each in ((source, labels), (rows, flat))]
    assert torch.equal(one.sums, other.sums)
    assert torch.equal(one.counts, other.counts)
    assert fits[0] == fits[1]
    assert expected_calibration_error(source.detach(), labels) == expected_calibration_error(rows, flat)
    assert torch.equal(reliability(source, labels).count, reliability(rows, flat).count)


def test_a_relationship_is_learnt_from_a_model_of_maps(seed: int) -> None:
    source, _, labels, _ = problem((6, 3, 4), seed, torch.float32)
    batches = [(source[i : i + 2].detach(), labels[i : i + 2]) for i in range(0, 6, 2)]
    found = ck.learn_relationship(lambda x: x, batches, N_T, progress=False, device="cpu")
    expected = ck.RelationshipEstimator(N_T)
    expected.update(by_hand(source.detach()), labels.flatten())
    torch.testing.assert_close(found.matrix, expected.compute().matrix)
    tokens, words = torch.randn(2, 5, N_S), torch.randint(0, N_T, (2, 5))  # the order of transformers stays
    assert ck.learn_relationship(lambda x: x, [(tokens, words)], N_T, progress=False).num_source_classes == N_S
    square = [(torch.randn(2, 5, 5), words)]
    with pytest.raises(TypeError, match="the classes may be dimension 1 or the last"):
        ck.learn_relationship(lambda x: x, square, N_T, progress=False)


@pytest.mark.parametrize(
    ("source", "target", "labels", "words"),
    [
        ((2, N_S, 3), (2, N_T, 4), (2, 3), "expected the same shape but for the number of classes"),
        ((2, N_S, 3), (2, N_T), (2, 3), "expected the same shape but for the number of classes"),
        ((2, 3, N_S), (2, 3, N_T), (2, 3), r"flatten the others: source_logits.flatten\(0, -2\)"),
        ((N_S,), (N_T,), (1,), r"target has shape \(1,\), expected class indices \(\)"),
        ((2, N_S, 3), (2, N_T, 3), (2, 3, 1), r"target has shape \(2, 3, 1\), expected class indices \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(source: Any, target: Any, labels: Any, words: str) -> None:
    criterion = ck.FusedCoTuningLoss(torch.full((N_T, N_S), 1 / N_S))
    with pytest.raises(ValueError, match=words):
        criterion(torch.randn(source), torch.randn(target), torch.zeros(labels, dtype=torch.int64))
