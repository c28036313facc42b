"""The CUDA library as built: what it links, and for which cards. These tests need no device. (The kernels' machine code
has its tests in test_cuda_machine_code.py.)"""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import cotuning_kernels
from cotuning_kernels import backends
from cotuning_kernels.backends import cuda
from cotuning_kernels.backends.registry import REGISTRY
from support.binaries import (
    KERNELS,
    KERNELS_OF_THE_LOSS,
    needed_libraries,
    resources_of,
    symbols,
    unstable_symbols,
)
from support.cpp_builds import ENVIRONMENT, require, run
from support.paths import ROOT

PACKAGE = Path(cotuning_kernels.__file__).parent


@pytest.fixture
def library() -> Path:
    if reason := backends.missing_reason("cuda"):
        pytest.skip(reason)
    return next(PACKAGE.glob("_cuda*.so"))


# ---------------------------------------------------------------------------------------------------- links and loads


def test_the_library_needs_only_the_stable_abi(library: Path) -> None:
    """So it loads beside a CPU torch and beside any CUDA torch."""
    assert "aoti_torch_get_dim" in symbols("-D", "--undefined-only", library)
    assert unstable_symbols(library) == []
    foreign = re.compile("torch|c10|cuda|python|nv")
    assert [name for name in needed_libraries(library) if foreign.search(name)] == ["libtorch_cpu.so"]


def test_the_operations_are_registered(library: Path) -> None:
    from cotuning_kernels.backends import operations

    for name in operations.OPERATIONS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"{operations.NAMESPACE}::{name}", "CUDA")
        assert registered, name
    assert backends.select("cuda") == "cuda"


def test_it_loads_in_a_torch_for_cuda(library: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built for the CPU alone")
    assert backends.missing_reason("cuda") is None


def test_cmake_builds_the_same(tmp_path: Path) -> None:
    """CMake compiles all kernels in the same way, for the architectures of TORCH_CUDA_ARCH_LIST. To be quick, the test
    builds all files but the loss, for one card and without optimisation."""
    cmake, nvcc, ninja = require("cmake"), require("nvcc"), require("ninja")
    configured = run(
        [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
         f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_CUDA_FLAGS=-Xcicc -O0 -Xptxas -O0"],
        env={**ENVIRONMENT, "TORCH_CUDA_ARCH_LIST": "8.0"},
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout
    commands = {
        Path(entry["file"]).name: entry["command"]
        for entry in json.loads((tmp_path / "compile_commands.json").read_text())
        if nvcc in entry["command"].split()
    }
    names = {path.name for path in (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")}
    assert set(commands) == names
    assert len({command.replace(name, "FILE") for name, command in commands.items()}) == 1
    assert {"-O3", "-std=c++17"} <= set(commands["class_sums.cu"].split())
    others = sorted(names - {"co_tuning_loss.cu", "device.cu"})
    targets = [f"csrc/kernels/cuda/CMakeFiles/cotuning_kernels_cuda.dir/{name}.o" for name in others]
    built = run([cmake, "--build", tmp_path, "--target", *targets])
    assert built.returncode == 0, built.stdout
    used = [usage for name in others for compiled in tmp_path.rglob(f"{name}.o") for usage in resources_of(compiled)]
    assert {usage.architecture for usage in used} == {"sm_80"}
    assert len(used) == KERNELS - KERNELS_OF_THE_LOSS


# ---------------------------------------------------------------------------------------------------- what it runs on


@pytest.mark.parametrize(
    ("cards", "driver", "reason"),
    [
        (["7.5", "8.6", "9.0"], (13, 0), None),  # machine code needs no driver of the toolkit's minor version, 13.1
        (["12.1"], (14, 0), None),  # later in its generation
        (["13.0"], None, None),  # PTX; and a driver that does not tell its version
        (["13.0"], (13, 1), None),
        (
            ["9.0", "13.0"],
            (13, 0),
            r"only PTX of nvcc 13\.1 for the card, which needs a driver for CUDA 13\.1, and .* 13\.0",
        ),
        (
            ["8.0"],
            (12, 9),
            r"need a driver for CUDA 13, and this one is for 12\.9; update the driver, or run `pip install",
        ),
        (["9.0", "10.3"], (13, 1), r"built for 7\.5 8\.0 9\.0 12\.0\+PTX, and the card is 10\.3"),
        (["7.0"], (13, 1), r"the card is 7\.0"),
    ],
)
def test_the_kernels_step_back_where_they_cannot_run(
    monkeypatch: pytest.MonkeyPatch, cards: list[str], driver: tuple[int, int] | None, reason: str | None
) -> None:
    """Checked once, at the first tensor on a GPU. Otherwise every call would raise where other kernels could serve."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(map(int, cards[device].split("."))))
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(cuda, "cuda_build", lambda: "nvcc 13.1: 7.5 8.0 9.0 12.0+PTX")
    with REGISTRY.override(serving={"cuda": []}):
        REGISTRY.add("cuda", "cuda", check=cuda.unfit_devices)
        REGISTRY.add("triton", "cuda")
        if reason is None:
            assert backends.select("cuda") == "cuda"
            return
        last = len(cards) - 1  # a card that can run the kernels keeps them
        with pytest.warns(RuntimeWarning, match=reason):
            assert backends.select("cuda", "auto", last) == "triton"
        assert backends.select("cuda", "auto", last) == "triton"
        with pytest.raises(RuntimeError, match=reason):
            backends.select("cuda", "cuda", last)
        assert backends.select("cuda", "auto", 0) == ("cuda" if last else "triton")
        assert backends.select("cuda") == ("cuda" if last else "triton")


# ------------------------------------------------------------------------------------------------- what is compiled for


@pytest.fixture(scope="module")
def choice() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "build_support" / "nvcc.py"))


def _no_cards(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cards: list[str] | None = None) -> None:
    monkeypatch.setitem(choice["architectures"].__globals__, "_cards", lambda: cards or [])


def test_the_architectures_asked_for(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _no_cards(choice, monkeypatch, ["8.9"])
    for asked in ("8.0;9.0+PTX", "8.0 9.0+PTX", " 8.0, 9.0+PTX;"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        assert choice["architectures"]("nvcc") == ["8.0", "9.0+PTX"]
    flags = choice["architecture_flags"](["8.0", "9.0+PTX"])
    assert flags[1::2] == [
        "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"
    ]  # fmt: skip
    assert choice["cmake_architectures"](["8.0", "9.0+PTX"]) == "80-real;90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST has 'Ampere', expected numbers as in '8\.0;9"):
        choice["architectures"]("nvcc")


def test_the_cards_that_are_there(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = require("nvcc")
    _no_cards(choice, monkeypatch, ["8.9"])
    assert choice["architectures"](nvcc) == ["8.9"]
    # A card older than this nvcc knows, one that it knows, and a newer one.
    _no_cards(choice, monkeypatch, ["1.0", "8.9", "99.0"])
    mine, newest = choice["architectures"](nvcc)
    assert mine == "8.9"
    assert newest.endswith("+PTX")
    _no_cards(choice, monkeypatch, ["1.0"])
    assert choice["architectures"](nvcc) == _of_no_cards(choice, monkeypatch, nvcc)


@pytest.mark.parametrize(
    ("card", "given"),
    [("7.0", None), ("7.5", "7.5"), ("8.6", "8.0"), ("9.0", "9.0"), ("10.3", "10.0"), ("11.0", "10.0+PTX")],
)
def test_a_card_that_nvcc_does_not_know(choice: dict[str, Any], card: str, given: str | None) -> None:
    assert choice["_for_card"](card, {75, 80, 90, 100}) == given


def _of_no_cards(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch, nvcc: str) -> list[str]:
    _no_cards(choice, monkeypatch)
    chosen: list[str] = choice["architectures"](nvcc)
    return chosen


def test_else_all_that_nvcc_knows(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = require("nvcc")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    chosen = _of_no_cards(choice, monkeypatch, nvcc)
    assert {"7.5", "8.0", "9.0"} <= {name.removesuffix("+PTX") for name in chosen}
    assert chosen[-1].endswith("+PTX")
    assert {"10.0", "11.0"}.isdisjoint(chosen)  # 10.0 has PTX, which 11.0 runs


def test_nvcc_is_looked_for(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COTUNING_KERNELS_CUDA", "0")
    assert choice["find_nvcc"]() is None
    monkeypatch.delenv("COTUNING_KERNELS_CUDA")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"CUDA_HOME is .*, but there is no .*/bin/nvcc; unset it"):
        choice["find_nvcc"]()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert choice["find_nvcc"]() == tmp_path / "bin" / "nvcc"
