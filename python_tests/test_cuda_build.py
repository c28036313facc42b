"""The CUDA library as it was built: what it links, and for which cards. It needs no device. (What nvcc made of the
kernels: test_cuda_machine_code.py.)"""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_builds import ENVIRONMENT, ROOT, require, run
from test_build import needed_libraries, symbols, unstable_symbols
from test_cuda_machine_code import KERNELS, KERNELS_OF_THE_LOSS, resources_of

import cotuning_kernels
from cotuning_kernels import backends

PACKAGE = Path(cotuning_kernels.__file__).parent


@pytest.fixture
def library() -> Path:
    if reason := backends.missing_reason("cuda"):
        pytest.skip(reason)
    return next(PACKAGE.glob("_cuda*.so"))


# ---------------------------------------------------------------------------------------------------- links and loads


def test_the_library_needs_only_the_stable_abi(library: Path) -> None:
    """Then it loads beside a CPU torch and beside any CUDA torch."""
    assert "aoti_torch_get_dim" in symbols("-D", "--undefined-only", library)
    assert unstable_symbols(library) == []
    foreign = re.compile("torch|c10|cuda|python|nv")
    assert [name for name in needed_libraries(library) if foreign.search(name)] == ["libtorch_cpu.so"]


def test_the_operations_are_registered(library: Path) -> None:
    from cotuning_kernels.backends import schema

    for name in schema._SCHEMAS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"{schema.NAMESPACE}::{name}", "CUDA")
        assert registered, name
    assert backends.select("cuda") == "cuda"


def test_it_loads_in_a_torch_for_cuda(library: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built for the CPU alone")
    assert backends.missing_reason("cuda") is None


def test_cmake_builds_the_same(tmp_path: Path) -> None:
    """All kernels in the same way, for what TORCH_CUDA_ARCH_LIST asks for; one file is built, for one card and not
    optimised, to be quick."""
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
    assert {"-O3", "-std=c++17"} <= set(commands["passes.cu"].split())
    built = run(
        [cmake, "--build", tmp_path, "--target", "csrc/kernels/cuda/CMakeFiles/cotuning_kernels_cuda.dir/passes.cu.o"]
    )
    assert built.returncode == 0, built.stdout
    (compiled,) = tmp_path.rglob("passes.cu.o")
    used = resources_of(compiled)
    assert {usage.architecture for usage in used} == {"sm_80"}
    assert len(used) == KERNELS - KERNELS_OF_THE_LOSS


# ------------------------------------------------------------------------------------------------- what is compiled for


@pytest.fixture(scope="module")
def choice() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "build_support" / "cuda.py"))


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
    _no_cards(choice, monkeypatch, ["8.9"])
    assert choice["architectures"]("nvcc") == ["8.9"]


def test_else_all_that_nvcc_knows(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = require("nvcc")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    _no_cards(choice, monkeypatch)
    chosen = choice["architectures"](nvcc)
    assert {"7.5", "8.0", "9.0"} <= {name.removesuffix("+PTX") for name in chosen}
    assert [name for name in chosen if name.endswith("+PTX")] == chosen[-1:]


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
