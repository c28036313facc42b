"""The operations in Triton, for NVIDIA and AMD GPUs without a toolkit. Importing this imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cotuning_kernels.backends.registry import REGISTRY

if (_reason := REGISTRY.missing_reason("triton")) is not None:
    raise ImportError(f"the Triton kernels cannot be used: {_reason}")

from cotuning_kernels.backends.triton import (
    class_sums,
    co_tuning_loss,
    scale_gradients,
    temperature_terms,
    translate_labels,
)
from cotuning_kernels.backends.triton.warmup import warmup

__all__ = ["IMPLEMENTATIONS", "warmup"]

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "co_tuning_loss": co_tuning_loss.co_tuning_loss,
    "co_tuning_loss_": co_tuning_loss.co_tuning_loss_,
    "sparse_co_tuning_loss": co_tuning_loss.sparse_co_tuning_loss,
    "sparse_co_tuning_loss_": co_tuning_loss.sparse_co_tuning_loss_,
    "scale_gradients_": scale_gradients.scale_gradients_,
    "translate_labels": translate_labels.translate_labels,
    "add_class_sums_": class_sums.add_class_sums_,
    "temperature_terms": temperature_terms.temperature_terms,
}
