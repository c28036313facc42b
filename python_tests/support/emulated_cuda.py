"""The CUDA kernels on the CPU: g++ compiles them against tools/cuda_emulator, and they take the CPU kernels' place.

The code is the GPU's, from the checks in csrc/ops/cuda.cpp down to the kernels; only the device differs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cotuning_kernels.backends.operations import SCHEMAS
from cotuning_kernels.backends.torch_version import too_old_for_kernels
from support.cpp_builds import alone, compiler, run, tool, workspace
from support.paths import ROOT
from support.stand_in import cpu_served_by

NAMESPACE = "cotuning_kernels_emulated"
TORCH = Path(torch.__file__).parent
# fno-strict-aliasing: a vector of 16 bytes is read from memory of another type, which nvcc allows.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
ORDERS = ("forward", "reverse", "random")


def sources(root: Path, *groups: str) -> list[Path]:
    """The sources that csrc/sources.txt lists in these groups."""
    lines = (root / "csrc" / "sources.txt").read_text().splitlines()
    fields = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [root / "csrc" / path for path, group, *_ in fields if group in groups]


def emulator_sources(root: Path) -> list[Path]:
    return sorted((root / "tools" / "cuda_emulator").glob("*.cpp"))


def headers(root: Path) -> Path:
    """Where the kernels find CUDA's headers when they are compiled for the CPU."""
    return root / "tools" / "cuda_emulator" / "include"


def missing() -> str | None:
    """Why the emulated library cannot be built here, or None."""
    if reason := too_old_for_kernels():
        return reason
    if not (ROOT / "csrc" / "sources.txt").is_file() or not emulator_sources(ROOT):
        return "the sources of the kernels are not here"
    return None if tool("g++", "c++") else "there is no g++ that could compile the kernels for the CPU"


def _compile(source: Path, root: Path, folder: Path) -> Path:
    compiled = folder / f"{source.stem}_{source.suffix[1:]}.o"
    if compiled.exists():
        return compiled
    finished = run([
        compiler(), *FLAGS, "-DCOTUNING_EMULATE",
        "-I", headers(root), "-isystem", TORCH / "include", "-x", "c++", "-c", source, "-o", compiled,
    ])  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    return compiled


def build(root: Path, folder: Path) -> Path:
    """Build the library from a checkout's sources in ``folder``; files that exist are not compiled again."""
    path = folder / "emulated_cuda.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        listed = [*sources(root, "cuda", "cuda_extension"), *emulator_sources(root)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(functools.partial(_compile, root=root, folder=folder), listed))
        linked = run([compiler(), "-shared", *objects, "-o", path, f"-L{TORCH / 'lib'}", "-ltorch_cpu"])
        assert linked.returncode == 0, linked.stdout
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the library: its operations are ``torch.ops.cotuning_kernels_emulated``."""
    with alone("emulated"):
        path = build(ROOT, workspace() / "emulated")
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, signature in SCHEMAS.items():
        definitions.define(name + signature)
    library.definitions = definitions  # type: ignore[attr-defined]  # kept while the process lives
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.cotuning_emulator_schedule.argtypes = (ctypes.c_int, ctypes.c_uint64)
    loaded.cotuning_emulator_plan.argtypes = (ctypes.c_int64,) * 5
    return loaded


def operations() -> dict[str, Callable[..., Any]]:
    library()
    return {
        name: getattr(getattr(torch.ops, NAMESPACE), name).default
        for name in SCHEMAS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    }


@dataclass(frozen=True)
class Plan:
    """The limits within which csrc/kernels/cuda/plan.h plans a launch."""

    shared_bytes: int = 223 << 10
    warp_vectors: int = 128
    max_blocks: int = 4096
    multiprocessors: int = 0
    split_vectors: int = 4096


def schedule(order: str, seed: int = 1) -> None:
    """The order in which blocks and warps run from here on."""
    library().cotuning_emulator_schedule(ORDERS.index(order), seed)


class Counts(NamedTuple):
    """Bytes of rows moved in global memory, by 16-byte and by smaller accesses; and launches."""

    vector_bytes_read: int
    other_bytes_read: int
    vector_bytes_written: int
    other_bytes_written: int
    launches: int


def take_counts() -> Counts:
    """Counts of the emulated kernels since the last call."""
    numbers = (ctypes.c_uint64 * len(Counts._fields))()
    library().cotuning_emulator_take_counts(numbers)
    return Counts(*numbers)


@contextmanager
def emulated(plan: Plan) -> Iterator[None]:
    """CPU tensors are served by the emulated kernels, launched by ``plan``."""
    library().cotuning_emulator_plan(
        plan.shared_bytes, plan.warp_vectors, plan.max_blocks, plan.multiprocessors, plan.split_vectors
    )
    with cpu_served_by("cuda", operations()):
        yield


def using(plan: Plan) -> Callable[[], AbstractContextManager[None]]:
    return lambda: emulated(plan)
