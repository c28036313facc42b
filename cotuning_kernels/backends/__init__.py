"""Which backend serves a call, and why another one does not.

``cpp`` is the C++ extension ``cotuning_kernels._C``: importing it registers the CPU implementations of the operations
in :mod:`cotuning_kernels.backends.operations`. Beside it, ``cotuning_kernels._fast_path`` serves the ordinary call of
the loss with the same kernels but without the way through the dispatcher and Python's autograd. ``cuda`` is
``cotuning_kernels._cuda``, a library of operations for the CUDA dispatch key; it loads beside a CPU torch too, which
then has no tensors for it. ``triton`` serves NVIDIA and AMD GPUs without a toolkit; triton is imported with the first
call. ``reference`` is plain PyTorch and runs on every device.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cotuning_kernels.backends import operations as operations
from cotuning_kernels.backends import triton_version

__all__ = [
    "available",
    "cpu_isa",
    "cpu_isas",
    "cuda_build",
    "cuda_loss_plan",
    "extension",
    "missing_reason",
    "select",
    "use_cpu_isa",
    "without_fast_path",
]

_REBUILD = (
    "install a C++17 compiler (Debian: apt install g++) and run `pip install --force-reinstall --no-deps .` in a "
    "checkout of cotuning_kernels"
)


def _shadows_an_installed_package() -> str | None:
    """What to say in a checkout, where Python finds this folder first: it has no kernels, and another one has."""
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


_extension: ModuleType | None = None
_missing: dict[str, str] = {}
_shadowed: str | None = None
try:
    _extension = importlib.import_module("cotuning_kernels._C")
except ModuleNotFoundError:
    _shadowed = _shadows_an_installed_package()
    _missing["cpp"] = _shadowed or f"the C++ extension was not built; {_REBUILD}"
except ImportError as error:
    # It is there, and somebody expects it to serve: the slow way is not taken without a word.
    _missing["cpp"] = f"the C++ extension does not load ({error}); {_REBUILD}"
    warnings.warn(f"cotuning_kernels runs without its kernels: {_missing['cpp']}", RuntimeWarning, stacklevel=2)
else:
    if (_request := _extension.unmet_isa_request()) is not None:
        raise RuntimeError(
            f"COTUNING_KERNELS_CPU_ISA is {_request!r}, expected one of {', '.join(_extension.cpu_isas())} (or unset)"
        )

_fast_path: ModuleType | None = None
if _extension is not None:
    # Against another torch than its own it could do anything, a crash included: the version decides, not the loader.
    _torch_version = torch.__version__.partition("+")[0]
    if _extension.built_with_torch != _torch_version:
        _missing["fast_path"] = f"it was built with torch {_extension.built_with_torch}, and this is {_torch_version}"
    else:
        try:
            _fast_path = importlib.import_module("cotuning_kernels._fast_path")
        except ModuleNotFoundError:
            _missing["fast_path"] = "it did not compile when the package was installed; `pip install -v .` shows why"
        except ImportError as error:
            _missing["fast_path"] = str(error)

# Serves the ordinary call of the loss, or returns NotImplemented; None where the fast path is missing.
fast_path_loss: Callable[..., Any] | None = None if _fast_path is None else _fast_path.co_tuning_loss


def _load_cuda() -> ctypes.CDLL | None:
    """The CUDA operations; None, with the reason in ``_missing``, where they cannot serve."""
    folder = Path(__file__).parents[1]
    paths = [folder / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    again = "run `pip install --force-reinstall --no-deps .` in a checkout of cotuning_kernels"
    if path is None:
        _missing["cuda"] = _shadowed or (
            f"the CUDA kernels were not built; have the CUDA toolkit (nvcc) on the path and {again}, without "
            "COTUNING_KERNELS_CUDA=0 (which make sets where there is no card)"
        )
        return None
    if torch.version.hip is not None:
        _missing["cuda"] = "this torch is for ROCm, and the kernels are for NVIDIA's cards"
        return None
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        _missing["cuda"] = f"the CUDA kernels do not load ({error}); {again}"
        warnings.warn(f"cotuning_kernels runs without its CUDA kernels: {_missing['cuda']}", RuntimeWarning, 2)
        return None
    library.cotuning_kernels_cuda_build.restype = ctypes.c_char_p
    return library


_cuda = _load_cuda()


def _unfit_devices() -> str | None:
    """Why the CUDA kernels cannot run on what torch sees: an old driver, or a card that they were not compiled for."""
    compiler, _, architectures = (cuda_build() or "").partition(": ")
    needed = int(compiler.removeprefix("nvcc ").partition(".")[0])
    driver = _driver_version()
    if driver is not None and driver < needed:
        return f"they were built with {compiler} and need a driver for CUDA {needed}, and this one is for {driver}"
    for device in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_capability(device)
        if not any(_runs_on(card, name) for name in architectures.split()):
            name = torch.cuda.get_device_name(device)
            return f"they were built for {architectures}, and the {name} is {card[0]}.{card[1]}; install again here"
    return None


def _driver_version() -> int | None:
    """The major version of CUDA that the driver is for; None where it does not say."""
    version = ctypes.c_int()
    try:
        status: int = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value // 1000 if status == 0 else None


def _runs_on(card: tuple[int, int], name: str) -> bool:
    """Machine code runs on later members of its generation, PTX on every later card."""
    major, minor = map(int, name.removesuffix("+PTX").rstrip("af").split("."))
    return (major, minor) <= card and (major == card[0] or name.endswith("+PTX"))


_devices_are_checked = False


def _check_devices() -> None:
    """Once, when there is a first tensor on a GPU: others must serve it where the CUDA kernels would only raise."""
    global _devices_are_checked
    _devices_are_checked = True
    if "cuda" in _served_by["cuda"] and torch.cuda.is_available() and (reason := _unfit_devices()) is not None:
        _served_by["cuda"].remove("cuda")
        _missing["cuda"] = reason
        warnings.warn(f"cotuning_kernels runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)


# The kernels that serve each device, fastest first.
_served_by: dict[str, list[str]] = {
    "cpu": ["cpp"] if _extension is not None else [],
    "cuda": ["cuda"] if _cuda is not None else [],
}
_NAMES = ("auto", "cpp", "cuda", "triton", "reference")

if (_reason := triton_version.missing_reason()) is None:
    triton_version.register(as_default=not _served_by["cuda"])
    _served_by["cuda"].append("triton")
else:
    _missing["triton"] = _reason


def select(device_type: str, backend: str = "auto") -> str:
    """The name of the backend that serves tensors on ``device_type``.

    ``"auto"`` takes the fastest kernel there is and the reference only where there is none.

    Raises:
        ValueError: ``backend`` is not a name of a backend.
        RuntimeError: the backend asked for is not built, or does not serve this device; says how to get it.
    """
    if device_type == "cuda" and not _devices_are_checked and not torch.compiler.is_compiling():
        _check_devices()
    kernels = _served_by.get(device_type, ())
    if backend == "auto":
        return kernels[0] if kernels else "reference"
    if backend == "reference" or backend in kernels:
        return backend
    if backend not in _NAMES:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, _NAMES))}")
    reason = _missing.get(backend, f"it does not serve tensors on {device_type!r}")
    raise RuntimeError(f"backend {backend!r} cannot be used: {reason}")


def available(device_type: str) -> list[str]:
    """Every backend that serves ``device_type``, fastest first; the reference is always the last."""
    return [*_served_by.get(device_type, ()), "reference"]


def missing_reason(backend: str) -> str | None:
    """Why ``backend`` is not there, or ``None`` where it is."""
    return _missing.get(backend)


def extension() -> ModuleType | None:
    """The module of the C++ extension: build information, and the instruction set in use."""
    return _extension


def cpu_isas() -> list[str]:
    """The instruction sets that were built and that this processor runs, fastest first; empty without the extension."""
    return [] if _extension is None else list(_extension.cpu_isas())


def cpu_isa() -> str | None:
    """The instruction set in use. ``COTUNING_KERNELS_CPU_ISA`` chooses another one at start."""
    return None if _extension is None else str(_extension.cpu_isa())


def cuda_build() -> str | None:
    """What the CUDA kernels were compiled with and for, ``"nvcc 13.0: 8.0 9.0+PTX"``; None where they are missing."""
    return None if _cuda is None else _cuda.cotuning_kernels_cuda_build().decode()


def cuda_loss_plan(
    rows: int,
    source_classes: int,
    target_classes: int = 0,
    *,
    source_dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    shared_memory: int = 227 << 10,
) -> dict[str, Any]:
    """What the CUDA backend launches for the loss of such a batch. Needs the C++ extension, but no device.

    Args:
        rows, source_classes, target_classes: ``B``, ``N_s`` and ``N_t`` (0: the source term alone).
        source_dtype, target_dtype: of the logits; the target head's is the source head's where it is not given.
        shared_memory: bytes that a block may ask for on the card: 64 KB on 7.5, 163 on 8.0, 99 on 8.6 and 12.0, 227 on
            9.0 and 10.0.

    Returns:
        ``blocks``, ``threads`` a block, ``shared_bytes`` of dynamic shared memory a block; for each head
        ``threads_per_row``; ``vectors`` of 16 bytes that a row of logits touches at most; ``staged_logits`` and
        ``staged_target``, for how many of them the logits and the target distribution are kept in shared memory, so
        that they are read once; ``kept_target``, of how many more the target distribution is kept in registers.

    Raises:
        RuntimeError: there is no C++ extension.
        ValueError: a dtype that logits cannot have.
    """
    if _extension is None:
        raise RuntimeError(f"the plans are part of backend 'cpp', which cannot be used: {_missing['cpp']}")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of ScalarType
    target_dtype = target_dtype or source_dtype
    for name, dtype in (("source_dtype", source_dtype), ("target_dtype", target_dtype)):
        if dtype not in dtypes:
            raise ValueError(f"{name} is {dtype}, expected one of {', '.join(map(str, dtypes))}")
    types = dtypes.index(source_dtype), dtypes.index(target_dtype)
    plan: dict[str, Any] = _extension.cuda_loss_plan(rows, source_classes, target_classes, *types, shared_memory)
    return plan


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Use another instruction set within a ``with`` block, in the whole process. For tests and measurements.

    Raises:
        RuntimeError: there is no C++ extension, or it has no such instruction set for this processor.
    """
    if _extension is None:
        raise RuntimeError(f"backend 'cpp' cannot be used: {_missing['cpp']}")
    before = cpu_isa()
    _extension.set_cpu_isa(name)
    try:
        yield
    finally:
        _extension.set_cpu_isa(before)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Every call goes through the operations within a ``with`` block, in the whole process. For tests."""
    global fast_path_loss
    before, fast_path_loss = fast_path_loss, None
    try:
        yield
    finally:
        fast_path_loss = before
