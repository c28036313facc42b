"""The operations in Triton, for NVIDIA and AMD GPUs without a toolkit. Importing this imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cotuning_kernels.backends.registry import REGISTRY

if (_reason := REGISTRY.missing_reason("triton")) is not None:
    raise ImportError(f"the Triton kernels cannot be used: {_reason}")

from cotuning_kernels.backends.triton.class_sums import add_class_sums_
from cotuning_kernels.backends.triton.loss import co_tuning_loss, co_tuning_loss_
from cotuning_kernels.backends.triton.scale import scale_gradients_
from cotuning_kernels.backends.triton.temperature import temperature_terms
from cotuning_kernels.backends.triton.translate import translate_labels
from cotuning_kernels.backends.triton.warmup import warmup

__all__ = ["IMPLEMENTATIONS", "warmup"]

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "co_tuning_loss": co_tuning_loss,
    "co_tuning_loss_": co_tuning_loss_,
    "scale_gradients_": scale_gradients_,
    "translate_labels": translate_labels,
    "add_class_sums_": add_class_sums_,
    "temperature_terms": temperature_terms,
}
