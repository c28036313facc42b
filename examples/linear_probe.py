"""A linear probe: the target head fitted by L-BFGS on features that the frozen network gives once, in seconds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cotuning_kernels as ck

__all__ = ["features_of", "fit_head", "head_layer"]


def head_layer(model: ck.CoTuningModel) -> nn.Linear:
    """The linear layer that ends the target head."""
    layers = [module for module in model.target_head.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise TypeError("the target head ends in no linear layer, so no probe can be fitted to it")
    return layers[-1]


@torch.no_grad()
def features_of(model: ck.CoTuningModel, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``(n, D)`` features, the inputs of the target head's linear layer in evaluation mode, and ``(n,)`` labels."""
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    device = next(model.parameters()).device
    training = model.training
    hook = head_layer(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model.eval()
        for images, own in batches:
            model(images.to(device))
            labels.append(own.to(device))
    finally:
        hook.remove()
        model.train(training)
    return torch.cat(seen), torch.cat(labels)


def fit_head(layer: nn.Linear, features: Tensor, labels: Tensor, *, weight_decay: float) -> None:
    """Set the layer to the minimum of the mean cross entropy plus ``weight_decay / 2`` times the squared weights."""
    # The problem is convex, so its minimum does not depend on the start; float64 lets the line search end cleanly.
    features = features.double()
    weight = torch.zeros(layer.weight.shape, dtype=features.dtype, device=features.device, requires_grad=True)
    bias = torch.zeros(layer.out_features, dtype=features.dtype, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
