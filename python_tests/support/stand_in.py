"""Kernels written for another device serve CPU tensors within a ``with`` block.

This is how the GPU backends run the conformance table on a machine without a GPU: the emulated CUDA kernels and the
interpreted Triton kernels stand in for the CPU implementations of the operations, and everything above the operations
(the public functions, autograd, checks) is what users run.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from cotuning_kernels.backends import dense_rows, operations
from cotuning_kernels.backends.registry import REGISTRY

__all__ = ["cpu_served_by"]


@contextmanager
def cpu_served_by(backend: str, implementations: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """``backend=backend`` and ``"auto"`` use ``implementations`` (operation: function) for tensors on the CPU.

    The other operations keep their CPU implementation. Sparse relationships, which ``implementations`` may leave out,
    become dense rows for them.
    """
    of_rows = (dense_rows.sparse_co_tuning_loss, dense_rows.sparse_co_tuning_loss_)
    if "co_tuning_loss" in implementations:
        implementations = {each.__name__: partial(each, "auto") for each in of_rows} | implementations
    library = torch.library.Library(operations.NAMESPACE, "IMPL")
    # Torch 2.6 lacks the argument, and has nothing to override.
    overriding: dict[str, Any] = (
        {"allow_override": True} if "allow_override" in inspect.signature(library.impl).parameters else {}
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for operation, function in implementations.items():
                library.impl(operation, function, "CPU", **overriding)
        with REGISTRY.override(serving={"cpu": [backend]}):
            yield
    finally:
        library._destroy()
