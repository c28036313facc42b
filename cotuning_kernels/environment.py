"""The environment report: versions, the backends that serve, and why the others do not.

``python -m cotuning_kernels`` prints it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import cotuning_kernels
from cotuning_kernels import backends

__all__ = ["report"]

_OPTIONAL = {
    "matplotlib": "pictures: pip install 'cotuning-kernels[plot]'",
    "triton": "kernels for GPUs: pip install 'cotuning-kernels[triton]'; torch for GPUs brings its own",
}


def report() -> str:
    """The environment report, as text: put it into a bug report."""
    sections = {
        "versions": _versions(),
        "backends": _backends(),
        "C++ extension": _extension(),
        "machine": _machine(),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<24} {value}" for name, value in rows]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("cotuning_kernels", f"{cotuning_kernels.__version__} in {Path(cotuning_kernels.__file__).parent}"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, _version(name) or "missing") for name in ("numpy", "safetensors", "tqdm")),
    ]
    for name, use in _OPTIONAL.items():
        rows.append((name, _version(name) or f"not installed ({use})"))
    return rows


def _backends() -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            rows.append((device, "no device that this torch can use"))
            continue
        rows.append((f"{device} is served by", backends.select(device)))
        rows.append(("  also there", ", ".join(backends.available(device)[1:]) or "nothing"))
    for name in ("cpp", "cuda", "triton"):
        if reason := backends.missing_reason(name):
            rows.append((name, f"missing: {reason}"))
    if build := backends.cuda_build():
        rows.append(("cuda was built with", build))
    return rows


def _extension() -> list[tuple[str, str]]:
    extension = backends.extension()
    if extension is None:
        return [("built", "no")]
    isas = ", ".join(backends.cpu_isas())
    forced = os.environ.get("COTUNING_KERNELS_CPU_ISA")
    return [
        ("compiler", extension.compiler),
        ("built with torch", extension.built_with_torch),
        ("instruction sets", isas),
        ("fast path", f"missing: {reason}" if (reason := backends.missing_reason("fast_path")) else "in use"),
        ("in use", f"{backends.cpu_isa()} ({'COTUNING_KERNELS_CPU_ISA' if forced else 'the fastest of them'})"),
    ]


def _machine() -> list[tuple[str, str]]:
    return [
        ("system", platform.platform()),
        ("processor", f"{platform.machine()}, {os.cpu_count()} logical cores"),
        ("torch threads", str(torch.get_num_threads())),
    ]
