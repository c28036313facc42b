"""Compiles the kernels of a training step before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cotuning_kernels.backends.operations import KL_DIVERGENCE, REDUCTIONS
from cotuning_kernels.backends.triton import co_tuning_loss, scale_gradients

__all__ = ["warmup"]

_TARGETS = ("labels", "pair", "probabilities")


def warmup(
    source_classes: int,
    target_classes: int,
    *,
    dtype: torch.dtype = torch.float32,
    relationship_dtype: torch.dtype = torch.float32,
    target: str = "labels",
    weight: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
    device: torch.device | str = "cuda",
) -> int:
    """Compile the kernels of a training step and an evaluation with these shapes and options; run nothing.

    Without a warm-up the first step compiles, which takes a second or two. One kernel serves every batch size.

    Args:
        source_classes: ``N_s``, the columns of the source logits.
        target_classes: ``N_t``, the columns of the target logits.
        dtype: the dtype of both heads' logits.
        relationship_dtype: the dtype of the relationship.
        target: the form of the targets: ``"labels"``, ``"pair"`` or ``"probabilities"``.
        weight: whether the classes have weights (float32).
        label_smoothing: as for the loss.
        reduction: as for the loss.
        source_loss: as for the loss.
        device: the GPU to compile for.

    Returns:
        The number of kernels.

    Raises:
        ValueError: an unknown ``target``, ``reduction`` or ``source_loss``.
    """
    _one_of("target", target, _TARGETS)
    _one_of("reduction", reduction, REDUCTIONS)
    _one_of("source_loss", source_loss, KL_DIVERGENCE)
    batch = 2

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    labels = new(batch, dtype=torch.int64)
    forms = {
        "labels": (labels, None, None),
        "pair": (labels, labels, new(batch, dtype=torch.float64)),
        "probabilities": (new(batch, target_classes, dtype=torch.float32), None, new(batch, dtype=torch.float64)),
    }
    rows = batch if target == "probabilities" else target_classes
    arguments: Any = (
        *forms[target],
        new(rows, source_classes, dtype=relationship_dtype),
        new(target_classes, dtype=torch.float32) if weight else None,
        new(dtype=torch.float64),
        label_smoothing,
        -100,
        REDUCTIONS[reduction],
        KL_DIVERGENCE[source_loss],
    )
    logits = new(batch, source_classes, dtype=dtype), new(batch, target_classes, dtype=dtype)
    gradients = torch.empty_like(logits[0]), torch.empty_like(logits[1])
    with torch.cuda.device_of(labels):
        step, reduced = co_tuning_loss.plan(*logits, *gradients, *arguments)
        evaluation, _ = co_tuning_loss.plan(*logits, None, None, *arguments)
        launches = step, evaluation, scale_gradients.plan(*gradients, reduced[2], torch.empty_like(reduced[0]))
        for launch in launches:
            launch.compile()
    return len(launches)


def _one_of(name: str, given: object, expected: Iterable[str]) -> None:
    if given not in tuple(expected):
        raise ValueError(f"{name} is {given!r}, expected one of {', '.join(map(repr, expected))}")
