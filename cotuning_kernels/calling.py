"""Runs a user's classifier: moves its inputs, finds its logits, keeps its modules' training modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "evaluating", "inputs_in", "logits_in"]


def call(model: Callable[..., Any], inputs: Tensor | Mapping[str, Any], device: torch.device | None) -> Any:
    """``model(inputs)``, or ``model(**inputs)`` for a mapping, its tensors moved to ``device`` if one is given."""

    def moved(value: Any) -> Any:
        if device is None or not isinstance(value, Tensor):
            return value
        # A non-blocking copy to the CPU may be read before it is complete.
        return value.to(device, non_blocking=device.type != "cpu")

    if isinstance(inputs, Mapping):
        return model(**{name: moved(value) for name, value in inputs.items()})
    return model(moved(inputs))


def inputs_in(batch: Any) -> Any:
    """The inputs in a loader's batch: the first of a tuple or list, or a mapping without its ``"labels"``.

    Batches of transformers contain the labels; its classifiers would compute their own loss from them.
    """
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch[0] if isinstance(batch, tuple | list) else batch


def logits_in(output: Any) -> Tensor | None:
    """The logits in a classifier's output: a tensor, ``.logits``, ``["logits"]`` or the first item of a tuple or list.

    ``None`` if none of these is a tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    return logits if isinstance(logits, Tensor) else None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has its old mode back, frozen BatchNorm layers included."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
