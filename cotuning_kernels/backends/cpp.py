"""Loads the C++ extensions: ``cotuning_kernels._C``, and beside it ``cotuning_kernels._fast_path``.

Importing ``_C`` registers the CPU implementations of the operations in :mod:`cotuning_kernels.backends.operations`.
``_fast_path`` serves the ordinary call of the loss with the same kernels, without torch's dispatcher and without
Python's autograd.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cotuning_kernels.backends.registry import REGISTRY
from cotuning_kernels.backends.torch_version import too_old_for_kernels

__all__ = ["cpu_isa", "cpu_isas", "extension", "shadowing", "use_cpu_isa", "without_fast_path"]

_REBUILD = (
    "install a C++17 compiler (Debian: apt install g++) and run `pip install --force-reinstall --no-deps .` in a "
    "checkout of cotuning_kernels"
)


def shadowing() -> str | None:
    """Return a sentence where this folder is a checkout that hides an installed package with kernels, else ``None``."""
    here = Path(__file__).resolve().parents[1]
    if (here.parent / "pyproject.toml").is_file():
        for folder in sys.path:
            other = Path(folder).resolve() / here.name
            if other != here and any(other.glob("_C.*")):
                return (
                    f"these are the sources in {here}, which Python finds before the installed package, {other}; start "
                    "Python in another folder, or run `pip install -e .` in this one"
                )
    return None


def _load_extension() -> ModuleType | None:
    try:
        loaded = importlib.import_module("cotuning_kernels._C")
    except ModuleNotFoundError:
        not_built = f"the C++ extension was not built; {_REBUILD}"
        hidden = shadowing()
        REGISTRY.add_missing("cpp", hidden or too_old_for_kernels() or not_built)
        if hidden is not None:
            warnings.warn(f"cotuning_kernels runs without its kernels: {hidden}", RuntimeWarning, stacklevel=2)
        return None
    except ImportError as error:
        # The extension exists but does not load: warn before the reference serves instead.
        reason = too_old_for_kernels() or f"the C++ extension does not load ({error}); {_REBUILD}"
        REGISTRY.add_missing("cpp", reason)
        warnings.warn(f"cotuning_kernels runs without its kernels: {reason}", RuntimeWarning, stacklevel=2)
        return None
    if (request := loaded.unmet_isa_request()) is not None:
        raise RuntimeError(
            f"COTUNING_KERNELS_CPU_ISA is {request!r}, expected one of {', '.join(loaded.cpu_isas())} (or unset)"
        )
    REGISTRY.add("cpp", "cpu")
    return loaded


def _load_fast_path(built_with_torch: str) -> Callable[..., Any] | None:
    # Beside another torch than its own the module may load and then crash, so the version decides, not the loader.
    version = torch.__version__.partition("+")[0]
    if built_with_torch != version:
        REGISTRY.add_missing("fast_path", f"it was built with torch {built_with_torch}, and this is {version}")
        return None
    try:
        loss: Callable[..., Any] = importlib.import_module("cotuning_kernels._fast_path").co_tuning_loss
    except ModuleNotFoundError:
        reason = "it did not compile when the package was installed; `pip install -v .` shows why"
        REGISTRY.add_missing("fast_path", reason)
        return None
    except ImportError as error:
        REGISTRY.add_missing("fast_path", str(error))
        return None
    return loss


_EXTENSION = _load_extension()
if _EXTENSION is not None:
    REGISTRY.fast_path_loss = _load_fast_path(_EXTENSION.built_with_torch)


def extension() -> ModuleType | None:
    """Return the module of the C++ extension, with its build information; ``None`` where it is missing."""
    return None if REGISTRY.missing_reason("cpp") else _EXTENSION


def cpu_isas() -> list[str]:
    """Return the instruction sets that were built and that this processor runs, fastest first.

    The list is empty without the C++ extension.
    """
    loaded = extension()
    return [] if loaded is None else list(loaded.cpu_isas())


def cpu_isa() -> str | None:
    """Return the instruction set in use; ``COTUNING_KERNELS_CPU_ISA`` chooses another one at start."""
    loaded = extension()
    return None if loaded is None else str(loaded.cpu_isa())


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Use another instruction set within a ``with`` block, in the whole process. For tests and measurements.

    Raises:
        RuntimeError: the C++ extension is missing, or it has no such instruction set for this processor.
    """
    loaded = extension()
    if loaded is None:
        raise RuntimeError(f"backend 'cpp' cannot be used: {REGISTRY.missing_reason('cpp')}")
    before = loaded.cpu_isa()
    loaded.set_cpu_isa(name)
    try:
        yield
    finally:
        loaded.set_cpu_isa(before)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Send every call through the operations within a ``with`` block, in the whole process. For tests."""
    with REGISTRY.override(missing={"fast_path": "it is switched off by backends.without_fast_path()"}):
        yield
