"""Loads ``cotuning_kernels._cuda``, the operations for the CUDA dispatch key, and checks the cards that it meets.

The library loads beside a CPU torch too, which then has no tensors for it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import warnings
from pathlib import Path
from typing import Any

import torch

from cotuning_kernels.backends.cpp import extension, shadowing
from cotuning_kernels.backends.registry import REGISTRY
from cotuning_kernels.backends.torch_version import too_old_for_kernels
from cotuning_kernels.dtypes import FLOATING, named

__all__ = ["cuda_build", "cuda_loss_plan", "driver_version", "unfit_cards", "unfit_devices"]

_REBUILD = "run `pip install --force-reinstall --no-deps .` in a checkout of cotuning_kernels"


def _load() -> str | None:
    """Load the library; return what it was compiled with and for, or ``None`` where it cannot serve."""
    folder = Path(__file__).parents[1]
    paths = [folder / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        not_built = (
            f"the CUDA kernels were not built; have the CUDA toolkit (nvcc) on the path and {_REBUILD}, without "
            "COTUNING_KERNELS_CUDA=0 (which make sets where there is no card)"
        )
        checkout = shadowing() if REGISTRY.missing_reason("cpp") else None
        REGISTRY.add_missing("cuda", checkout or too_old_for_kernels() or not_built)
        return None
    if torch.version.hip is not None:
        REGISTRY.add_missing("cuda", "this torch is for ROCm, and the kernels are for NVIDIA's cards")
        return None
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        reason = too_old_for_kernels() or f"the CUDA kernels do not load ({error}); {_REBUILD}"
        REGISTRY.add_missing("cuda", reason)
        warnings.warn(f"cotuning_kernels runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
        return None
    library.cotuning_kernels_cuda_build.restype = ctypes.c_char_p
    REGISTRY.add("cuda", "cuda", check=unfit_devices)
    build: bytes = library.cotuning_kernels_cuda_build()
    return build.decode()


def unfit_devices() -> dict[int, str]:
    """Return the cards that the kernels cannot run on, by index, with the reasons."""
    cards = [
        (torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        for device in range(torch.cuda.device_count())
    ]
    return unfit_cards(cuda_build() or "", driver_version(), cards)


def unfit_cards(build: str, driver: tuple[int, int] | None, cards: list[tuple[str, tuple[int, int]]]) -> dict[int, str]:
    """Return the cards that kernels cannot run on: the driver is too old, or they were not compiled for the card.

    Machine code runs with every driver of the toolkit's major version, PTX only with a driver of its minor version too.

    Args:
        build: what :func:`cuda_build` returns.
        driver: the version of CUDA that the driver serves, such as (13, 0); ``None`` if unknown.
        cards: name and compute capability of each.
    """
    compiler, _, architectures = build.partition(": ")
    needed = _numbers(compiler.split()[1])
    update = f"update the driver, or {_REBUILD} with a CUDA toolkit of the driver's version"
    reasons = {}
    for index, (name, card) in enumerate(cards):
        fitting = [built_for for built_for in architectures.split() if _runs_on(card, built_for)]
        if driver is not None and driver[0] < needed[0]:
            reasons[index] = (
                f"they were built with {compiler} and need a driver for CUDA {needed[0]}, and this one is for "
                f"{driver[0]}.{driver[1]}; {update}"
            )
        elif not fitting:
            reasons[index] = (
                f"they were built for {architectures}, and the {name} is {card[0]}.{card[1]}; install again here"
            )
        elif driver is not None and driver < needed and not any(_has_machine_code(card, x) for x in fitting):
            reasons[index] = (
                f"they have only PTX of {compiler} for the {name}, which needs a driver for CUDA "
                f"{needed[0]}.{needed[1]}, and this one is for {driver[0]}.{driver[1]}; {update}"
            )
    return reasons


def _numbers(version: str) -> tuple[int, int]:
    major, minor = map(int, version.split("."))
    return major, minor


def _runs_on(card: tuple[int, int], built_for: str) -> bool:
    """Machine code runs on later members of its generation, PTX on every later card."""
    capability = _numbers(built_for.removesuffix("+PTX").rstrip("af"))
    return capability <= card and (_has_machine_code(card, built_for) or built_for.endswith("+PTX"))


def _has_machine_code(card: tuple[int, int], built_for: str) -> bool:
    capability = _numbers(built_for.removesuffix("+PTX").rstrip("af"))
    return capability <= card and capability[0] == card[0]


def driver_version() -> tuple[int, int] | None:
    """Return the version of CUDA that the driver serves, such as (13, 0); ``None`` where the driver does not say it."""
    version = ctypes.c_int()
    try:
        status: int = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 else None


_BUILD = _load()


def cuda_build() -> str | None:
    """Return what the kernels were compiled with and for, ``"nvcc 13.0: 8.0 9.0+PTX"``; ``None`` where none loaded."""
    return _BUILD


def cuda_loss_plan(
    rows: int,
    source_classes: int,
    target_classes: int = 0,
    *,
    source_dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    shared_memory: int = 227 << 10,
    multiprocessors: int = 0,
) -> dict[str, Any]:
    """Return what the CUDA backend launches for the loss of a batch. Needs the C++ extension, but no device.

    Args:
        rows: ``B``, the rows of the batch.
        source_classes: ``N_s``, the columns of the source logits.
        target_classes: ``N_t``, the columns of the target logits; 0 leaves the source term alone.
        source_dtype: the dtype of the source logits.
        target_dtype: the dtype of the target logits; by default that of the source logits.
        shared_memory: the bytes of shared memory that a block may ask for on the card: 64 KB on compute capability
            7.5, 163 KB on 8.0, 99 KB on 8.6 and 12.0, 227 KB on 9.0 and 10.0.
        multiprocessors: those of the card, such as 132 on an H100; 0 plans without this number. With it, few rows get a
            block each, and few long rows several.

    Returns:
        ``blocks``, ``threads`` a block and ``shared_bytes``, the dynamic shared memory a block. ``parts``: how many
        blocks of further launches divide a row of the source head; 0 where rows are not divided. ``source`` and
        ``target`` hold for each head: ``threads_per_row``; ``vectors``, the most vectors of 16 bytes that a row of
        logits touches; ``staged_logits`` and ``staged_target``, for how many of these the logits and the target
        distribution stay in shared memory, so that they are read once; ``kept_target``, for how many more the target
        distribution stays in registers.

    Raises:
        RuntimeError: the C++ extension is missing.
        ValueError: a dtype that logits cannot have.
    """
    loaded = extension()
    if loaded is None:
        reason = REGISTRY.missing_reason("cpp")
        raise RuntimeError(f"the plans are part of backend 'cpp', which cannot be used: {reason}")
    target_dtype = target_dtype or source_dtype
    for name, dtype in (("source_dtype", source_dtype), ("target_dtype", target_dtype)):
        if dtype not in FLOATING:
            raise ValueError(f"{name} is {dtype}, expected one of {named(FLOATING)}")
    types = FLOATING.index(source_dtype), FLOATING.index(target_dtype)
    plan: dict[str, Any] = loaded.cuda_loss_plan(
        rows, source_classes, target_classes, *types, shared_memory, multiprocessors
    )
    return plan
