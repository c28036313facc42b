"""The inputs of all contestants, made once from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "CALIBRATION_CLASSES",
    "CALIBRATION_ROWS",
    "DTYPES",
    "RELATIONSHIP_BATCHES",
    "RELATIONSHIP_SHAPE",
    "SHAPES",
    "TEMPERATURES",
    "CalibrationProblem",
    "LossProblem",
    "RelationshipProblem",
    "Shape",
    "parse_shape",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Logits of a trained classifier spread over a few units; this scale gives rows with clear favourites and
# log-probabilities down to about -25.
_LOGIT_SCALE = 3.0
_CALIBRATION_LOGIT_SCALE = 5.0


class Shape(NamedTuple):
    """``B`` rows (a training batch, or a training set), ``N_t`` target classes, ``N_s`` source classes."""

    batch: int
    target_classes: int
    source_classes: int

    @property
    def logits(self) -> int:
        """The number of logits of both heads, which is also the number of gradient elements."""
        return self.batch * (self.target_classes + self.source_classes)

    def __str__(self) -> str:
        return "x".join(map(str, self))


# The paper's batch of 48 with ImageNet's 1000 source classes; larger batches; a language model's vocabulary with the
# nine tags of CoNLL-2003; ImageNet-21k with 1000 target classes.
SHAPES = (
    Shape(48, 200, 1000),
    Shape(256, 200, 1000),
    Shape(4096, 200, 1000),
    Shape(32768, 200, 1000),
    Shape(512, 9, 30522),
    Shape(256, 1000, 21841),
)

RELATIONSHIP_SHAPE = Shape(50_000, 200, 1000)
# Rows of one update: a large evaluation batch, and all rows at once.
RELATIONSHIP_BATCHES = (256, 50_000)

CALIBRATION_ROWS, CALIBRATION_CLASSES = 20_000, 1000
# The authors' script has the factor 0.884 = 1 / 1.13 for their ImageNet model. 1.6 is a more confident model.
TEMPERATURES = (1.13, 1.6)


def parse_shape(text: str) -> Shape:
    """Turn ``"48x200x1000"`` into a :class:`Shape`.

    Raises:
        ValueError: ``text`` is not three positive integers with ``x`` between them.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"shape is {text!r}, expected B x N_t x N_s such as 48x200x1000")
    return Shape(*map(int, parts))


@dataclass(frozen=True)
class LossProblem:
    """One training step's input to the loss.

    The labels are on the host, as from a data loader, and the logits on the device, as from a model.

    Attributes:
        source_logits: ``(B, N_s)``, a leaf that requires grad.
        target_logits: ``(B, N_t)``, a leaf that requires grad.
        labels: ``(B,)`` int64, on the CPU (see :meth:`with_labels_on_the_device`).
        relationship: ``(N_t, N_s)`` float32, on the device; every row sums to 1.
        relationship_numpy: the relationship on the host, for tllib.
        trade_off: the factor of the source term.
    """

    source_logits: Tensor
    target_logits: Tensor
    labels: Tensor
    relationship: Tensor
    relationship_numpy: npt.NDArray[np.float32]
    trade_off: float = 2.3

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, *, device: str = "cpu", seed: int = 2020) -> LossProblem:
        """Make random logits, labels and relationship. The same seed gives the same numbers on every device."""
        random = torch.Generator().manual_seed(seed)

        def logits(rows: int, columns: int) -> Tensor:
            return _LOGIT_SCALE * torch.randn(rows, columns, generator=random)

        relationship = torch.softmax(logits(shape.target_classes, shape.source_classes), dim=1)
        source_logits = logits(shape.batch, shape.source_classes).to(device, dtype).requires_grad_()
        target_logits = logits(shape.batch, shape.target_classes).to(device, dtype).requires_grad_()
        labels = torch.randint(shape.target_classes, (shape.batch,), generator=random)
        return cls(source_logits, target_logits, labels, relationship.to(device), relationship.numpy())

    def with_labels_on_the_device(self) -> LossProblem:
        """Move the labels to the device: a step that copies them makes the host wait for the device."""
        return replace(self, labels=self.labels.to(self.source_logits.device))

    def clear_gradients(self) -> None:
        """Do what ``optimizer.zero_grad()`` does between steps: the next backward pass makes fresh gradients."""
        self.source_logits.grad = self.target_logits.grad = None


@dataclass(frozen=True)
class RelationshipProblem:
    """A pretrained model's logits on a target training set, in batches.

    Attributes:
        logits: ``(rows, N_s)`` float32 batches, on the device.
        labels: ``(rows,)`` int64 batches, on the CPU. Every class occurs.
        target_classes: ``N_t``.
    """

    logits: list[Tensor]
    labels: list[Tensor]
    target_classes: int

    @classmethod
    def make(cls, shape: Shape, *, batch: int, device: str = "cpu", seed: int = 2020) -> RelationshipProblem:
        """Make random logits of ``shape.batch`` images in batches, and shuffled labels, equally many a class."""
        random = torch.Generator().manual_seed(seed)
        logits = (_LOGIT_SCALE * torch.randn(shape.batch, shape.source_classes, generator=random)).to(device)
        labels = torch.randperm(shape.batch, generator=random) % shape.target_classes
        return cls(list(torch.split(logits, batch)), list(torch.split(labels, batch)), shape.target_classes)


@dataclass(frozen=True)
class CalibrationProblem:
    """Logits that are too confident by a known factor, and labels drawn from the right distribution.

    Attributes:
        logits: ``(rows, classes)`` float32.
        labels: ``(rows,)`` int64, on the logits' device.
        temperature: temperature of the distribution of the labels; a fit to this sample is near it.
    """

    logits: Tensor
    labels: Tensor
    temperature: float

    @classmethod
    def make(
        cls, rows: int, classes: int, temperature: float, *, device: str = "cpu", seed: int = 2020
    ) -> CalibrationProblem:
        """Draw labels from ``softmax(logits / temperature)``; with 1000 classes about half are the largest logit's."""
        random = torch.Generator().manual_seed(seed)
        calibrated = _CALIBRATION_LOGIT_SCALE * torch.randn(rows, classes, generator=random)
        # The argmax of logits plus Gumbel noise is a draw from their softmax.
        gumbel = -torch.log(-torch.log(torch.rand(rows, classes, generator=random).clamp_(1e-20, 1 - 1e-7)))
        labels = (calibrated + gumbel).argmax(1)
        return cls((calibrated * temperature).to(device), labels.to(device), temperature)
