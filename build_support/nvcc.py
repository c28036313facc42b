"""Decides whether to compile the CUDA kernels, with which nvcc, and for which cards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Every generation from Turing on. A card runs code compiled for an earlier member of its generation: 8.6 and 8.9 run
# that for 8.0. The kernels use nothing newer, and each further architecture costs a sixth of the build. A card of a
# generation that is not listed (11.0, or a later one) compiles the newest PTX before its own at first use.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0+PTX", "12.0+PTX")
COMPILE_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


def find_nvcc() -> Path | None:
    """The nvcc in ``$CUDA_HOME``, else the one on the path; None with ``COTUNING_KERNELS_CUDA=0``."""
    if os.environ.get("COTUNING_KERNELS_CUDA") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise SystemExit(f"cotuning_kernels: CUDA_HOME is {home!r}, but there is no {nvcc}; unset it")
        return nvcc
    found = shutil.which("nvcc")
    return Path(found) if found else None


def architectures(nvcc: Path) -> list[str]:
    """Those in ``TORCH_CUDA_ARCH_LIST``, else this machine's, else all that nvcc knows, as in ``8.0``, ``9.0+PTX``."""
    if asked := re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()):
        if wrong := [name for name in asked if name and not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]:
            raise SystemExit(
                f"cotuning_kernels: TORCH_CUDA_ARCH_LIST has {wrong[0]!r}, expected numbers as in '8.0;9.0+PTX'"
            )
        if asked := [name for name in asked if name]:
            return asked
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(map(int, re.findall(r"compute_(\d+)", listed)))
    # A card that nvcc no longer supports gets no kernels. If there is no other card, build for all cards.
    if cards := {name for card in _cards() if (name := _for_card(card, known)) is not None}:
        return sorted(cards, key=lambda name: int(_number(name)))
    chosen = [name for name in ARCHITECTURES if int(_number(name)) in known]
    # An older nvcc does not know the newest cards: they run the PTX of the newest architecture that it knows.
    return [*chosen[:-1], chosen[-1].removesuffix("+PTX") + "+PTX"]


def architecture_flags(names: list[str]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for name in names:
        number = _number(name)
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cmake_architectures(names: list[str]) -> str:
    """The architectures in CMake's form: ``80-real;90`` for 8.0, and 9.0 with PTX."""
    return ";".join(_number(name) + ("" if name.endswith("+PTX") else "-real") for name in names)


def version(nvcc: Path) -> str:
    """nvcc's version, as in ``13.0``."""
    words = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", words)
    return found[1] if found else "unknown"


def _number(name: str) -> str:
    return name.removesuffix("+PTX").replace(".", "")


def _for_card(card: str, known: set[int]) -> str | None:
    """The architecture to build for a card: its own, an earlier one of its generation, or earlier PTX; None if none."""
    number = int(_number(card))
    earlier = max((each for each in known if each <= number), default=None)
    if earlier is None:
        return None
    return f"{earlier // 10}.{earlier % 10}" + ("" if earlier // 10 == number // 10 else "+PTX")


def _cards() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", listed.stdout, re.MULTILINE))) if listed.returncode == 0 else []


if __name__ == "__main__":  # for csrc/kernels/cuda/CMakeLists.txt
    print(cmake_architectures(architectures(Path(sys.argv[1]))))
