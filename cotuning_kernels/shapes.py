"""The shapes of ``F.cross_entropy`` as rows: ``(C,)``, ``(B, C)`` and ``(B, C, d1, ...)`` become ``(rows, C)``.

The class dimension moves to the end. That copies the logits, and their gradient in the backward pass, unless the
classes are already last in memory (``channels_last``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["class_dimension", "logits_as_rows", "shape_of_labels", "target_as_rows"]


def class_dimension(logits: Tensor) -> int:
    """The dimension that holds the classes: 0 for logits ``(C,)``, else 1."""
    return 0 if logits.dim() == 1 else 1


def shape_of_labels(logits: Tensor) -> tuple[int, ...]:
    """The shape of class indices for these logits: the logits' shape without the class dimension."""
    classes = class_dimension(logits)
    return (*logits.shape[:classes], *logits.shape[classes + 1 :])


def logits_as_rows(logits: Tensor) -> Tensor:
    """Logits, or class probabilities, as ``(rows, C)``."""
    if logits.dim() == 2:
        return logits
    return logits[None] if logits.dim() == 1 else logits.movedim(1, -1).flatten(0, -2)


def target_as_rows(target: Any, shape: tuple[int, ...]) -> Any:
    """Class indices, class probabilities or a mixup pair for logits whose labels have this shape.

    A share of shape ``(B,)`` is repeated for each row of a sample. Anything else is returned unchanged; the checks
    reject it.
    """
    if isinstance(target, tuple) and len(target) == 3:
        labels_a, labels_b, share = target
        if isinstance(share, Tensor) and share.dim() and share.shape == shape[:1]:
            share = share.view(-1, *(1 for _ in shape[1:])).expand(shape)
        return _flat(labels_a), _flat(labels_b), _flat(share)
    if isinstance(target, Tensor) and target.is_floating_point():
        return logits_as_rows(target)
    return _flat(target)


def _flat(value: Any) -> Any:
    return value.reshape(-1) if isinstance(value, Tensor) else value
