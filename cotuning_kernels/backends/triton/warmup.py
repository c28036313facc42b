"""Compiles the kernels of a training step before it starts."""

from __future__ import annotations

from typing import Any

import torch

from cotuning_kernels.backends.triton import co_tuning_loss, scale_gradients
from cotuning_kernels.options import LossOptions, OperationOptions, check_options
from cotuning_kernels.targets import OperandTarget

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
    device: torch.device | str = "cuda",
    **options: Any,
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
        device: the GPU to compile for.
        **options: the other options of :func:`cotuning_kernels.functional.co_tuning_loss`, such as ``reduction``.

    Returns:
        The number of kernels.

    Raises:
        TypeError, ValueError: an unknown ``target``, or an option has a wrong name, type or value.
    """
    if target not in _TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(map(repr, _TARGETS))}")
    batch = 2

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    labels = new(batch, dtype=torch.int64)
    class_weights = new(target_classes, dtype=torch.float32) if weight else None
    chosen = LossOptions(class_weights, new(dtype=torch.float64), **options)
    check_options(chosen, target_classes, labels.device)
    forms = {
        "labels": (labels, None, None),
        "pair": (labels, labels, new(batch, dtype=torch.float64)),
        "probabilities": (new(batch, target_classes, dtype=torch.float32), None, new(batch, dtype=torch.float64)),
    }
    rows = batch if target == "probabilities" else target_classes
    arguments = (
        OperandTarget(*forms[target], new(rows, source_classes, dtype=relationship_dtype)),
        OperationOptions(*chosen.in_operations(labels.device)),
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
