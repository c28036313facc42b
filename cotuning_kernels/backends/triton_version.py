"""Finds Triton and enters its kernels for tensors on GPUs; triton itself is imported with the first call."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cotuning_kernels.backends.cuda import cuda_build
from cotuning_kernels.backends.operations import NAMESPACE, SCHEMAS
from cotuning_kernels.backends.registry import REGISTRY

__all__ = ["missing_reason"]

_LEAST_VERSION = (3, 5)
_INSTALL = "pip install 'triton>=3.5' (Linux; a torch for GPUs brings its own)"


def missing_reason() -> str | None:
    """Return in one sentence why Triton cannot serve, or ``None``. Does not import triton, which takes a second."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return f"triton is not installed; {_INSTALL}"
    # Read the package's own version: its distribution has other names for other GPUs.
    found = re.search(r"__version__\s*=\s*[\"']((\d+)\.(\d+)[^\"']*)", Path(spec.origin).read_text(encoding="utf-8"))
    if found is None:
        return f"the triton in {spec.origin} does not say its version; {_INSTALL}"
    if (int(found[2]), int(found[3])) < _LEAST_VERSION:
        return f"triton {found[1]} is too old, 3.5 or newer is needed; {_INSTALL}"
    return None


def _imported_when_called(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        from cotuning_kernels.backends.triton import IMPLEMENTATIONS

        return IMPLEMENTATIONS[name](*args, **kwargs)

    return call


_library = torch.library.Library(NAMESPACE, "IMPL")


def _register(*, as_default: bool) -> None:
    """Serve GPU tensors where Triton is asked for by name and, if ``as_default``, where no backend is."""
    for name in SCHEMAS:
        for overload in (f"{name}.triton", name) if as_default else (f"{name}.triton",):
            _library.impl(overload, _imported_when_called(name), "CUDA")


if (_reason := missing_reason()) is None:
    _register(as_default=cuda_build() is None)
    REGISTRY.add("triton", "cuda")
else:
    REGISTRY.add_missing("triton", _reason)
