"""Shared by the recipes: a task with real images that takes a minute on a CPU.

The source task is seven kinds of clothes of Fashion-MNIST, on which a network is pretrained first; the target task is
the other three, with a few images each. In your own code the first part is ``from_pretrained``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from demo_data import FASHION_CLASSES, fetch_fashion_mnist, read_idx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

TARGET = (2, 5, 9)  # pullover, sandal, ankle boot: each has relatives among the other seven
SOURCE = tuple(label for label in range(len(FASHION_CLASSES)) if label not in TARGET)
CACHE = Path(__file__).resolve().parent.parent / ".cache"


class FashionTask(TensorDataset):
    """``images_per_class`` images of some kinds of clothes, ``(N, 1, 28, 28)`` in [0, 1], labelled from 0."""

    def __init__(self, kinds: tuple[int, ...], images_per_class: int, *, test: bool = False) -> None:
        CACHE.mkdir(exist_ok=True)
        folder, name = fetch_fashion_mnist(CACHE), "t10k" if test else "train"
        images = torch.from_numpy(read_idx(folder / f"{name}-images-idx3-ubyte.gz", dimensions=3).copy())
        labels = torch.from_numpy(read_idx(folder / f"{name}-labels-idx1-ubyte.gz", dimensions=1).astype("int64"))
        chosen = torch.cat([(labels == kind).nonzero()[:images_per_class, 0] for kind in kinds])
        self.classes = [FASHION_CLASSES[kind] for kind in kinds]
        super().__init__(
            images[chosen, None].float() / 255, torch.arange(len(kinds)).repeat_interleave(images_per_class)
        )


def plain_logits(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def pretrain(
    model: nn.Module, *, steps: int = 150, logits_of: Callable[[nn.Module, Tensor], Tensor] = plain_logits
) -> nn.Module:
    """Train a classifier of ``len(SOURCE)`` classes on the source task, in place of real pretrained weights."""
    images, labels = FashionTask(SOURCE, 300).tensors
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        loss = F.cross_entropy(logits_of(model, images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, logits_of: Callable[[nn.Module, Tensor], Tensor] = plain_logits) -> float:
    """Accuracy of a classifier of the target task, on 300 test images."""
    images, labels = FashionTask(TARGET, 100, test=True).tensors
    device = next(model.parameters()).device  # a trainer may have left it on a GPU
    return (logits_of(model.eval(), images.to(device)).argmax(1).cpu() == labels).double().mean().item()


def run(main: Callable[[], float], description: str | None) -> None:
    """Run a recipe as a program. Its only option is ``--help``; others are refused, not ignored."""
    formatter = argparse.RawTextHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=formatter).parse_args()
    print(f"test accuracy {main():.1%}")
