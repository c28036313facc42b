"""Small classifiers, and the arguments with which tests run ``examples/image_classification.py`` on them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def small_classifier() -> nn.Module:
    """A classifier with BatchNorm statistics and dropout, which a resumed run could get wrong."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(72, 7),
    )  # fmt: skip


def without_noise() -> nn.Module:
    """A classifier without BatchNorm and dropout: several processes train it as one process does."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 7)
    )


class TwoEnds(nn.Module):
    """``one`` reads the image and ``two`` the features of ``one``: the model does not show which is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3 * 16 * 16, 7), nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x.flatten(1)))


def brightness() -> nn.Module:
    """A classifier of blue, green and red whose logits are the mean of each colour, so it is far from certain."""
    head = nn.Linear(3, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight[[0, 1, 2], [2, 1, 0]] = 1
        head.weight[3] = 0.5
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def two_ends() -> nn.Module:
    torch.manual_seed(1)
    return TwoEnds()


def of_one_size() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 7))


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return [
        str(data), "--model=support.image_runner:small_classifier", f"--output={output}", "--size=20", "--crop=16",
        "--batch-size=8", "--workers=0", "--iterations=12", "--lr=0.01", "--trade-off=0.5", "--temperature=1.2",
        "--device=cpu", *more,
    ]  # fmt: skip


class StoppedError(Exception):
    """Stands for anything that ends a process."""
