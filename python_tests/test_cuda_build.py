"""The CUDA library as it was built: what it links, for which cards, what nvcc made of the kernels. It needs no device.

The machine code is read with ``cuobjdump`` of the CUDA toolkit, or of the one that the triton wheel carries."""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_builds import ENVIRONMENT, ROOT, require, run, tool
from test_build import needed_libraries, symbols, unstable_symbols

import cotuning_kernels
from cotuning_kernels import backends

PACKAGE = Path(cotuning_kernels.__file__).parent


@pytest.fixture
def library() -> Path:
    if reason := backends.missing_reason("cuda"):
        pytest.skip(reason)
    return next(PACKAGE.glob("_cuda*.so"))


def cuobjdump() -> str:
    if found := tool("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.is_file():
            return str(carried)
    pytest.skip("needs cuobjdump, of the CUDA toolkit or of the triton wheel, which are not here")


def built_architectures() -> list[str]:
    return re.findall(r"\d+\.\d", (backends.cuda_build() or "").partition(":")[2])


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


# ------------------------------------------------------------------------------------------------------ machine code


def resources(file: Path) -> list[tuple[str, str, dict[str, int]]]:
    """Architecture, kernel, and what it uses: registers, stack, local and shared memory."""
    listed = run([cuobjdump(), "-res-usage", file])
    assert listed.returncode == 0, listed.stdout
    found, architecture = [], ""
    for line, following in zip(listed.stdout.splitlines(), [*listed.stdout.splitlines()[1:], ""], strict=True):
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        if match := re.match(r"\s*Function (\S+):", line):
            usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", following)}
            found.append((architecture, match[1], usage))
    return found


@functools.cache
def instructions(file: Path, architecture: str) -> dict[str, collections.Counter[str]]:
    """How often each instruction stands in each kernel."""
    listed = run([cuobjdump(), "-arch", architecture, "-sass", file])
    assert listed.returncode == 0, listed.stdout[-2000:]
    counted: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kernel = ""
    for line in listed.stdout.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = match[1]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            counted[kernel][match[1]] += 1
    return counted


KERNELS_OF_THE_LOSS = 4
KERNELS = KERNELS_OF_THE_LOSS + 10  # 4 of the temperature, 4 of the class sums, one each that scales and translates


def test_no_kernel_spills_or_uses_local_memory(library: Path) -> None:
    used = resources(library)
    architectures = {f"sm_{name.replace('.', '')}" for name in built_architectures()}
    assert {architecture for architecture, _, _ in used} == architectures
    assert len(used) == KERNELS * len(architectures)
    for architecture, kernel, usage in used:
        assert usage["STACK"] == usage["LOCAL"] == 0, (architecture, kernel, usage)
        assert usage["REG"] <= 128, (architecture, kernel, usage)


def test_rows_are_accessed_by_16_bytes(library: Path) -> None:
    for name in built_architectures():
        counted = instructions(library, f"sm_{name.replace('.', '')}")
        assert len(counted) == KERNELS
        for kernel, counts in counted.items():
            words = collections.Counter()
            for instruction, number in counts.items():
                words[instruction.split(".")[0], "128" in instruction.split(".")] += number
            assert words["LDL", False] + words["LDL", True] + words["STL", False] + words["STL", True] == 0, kernel
            assert words["LDG", True] > 0, (name, kernel)
            # The statistics write no row of the logits' kind.
            if re.search("loss|scale|translate", kernel):
                assert words["STG", True] > 0, (name, kernel)
            # What is staged.
            if "loss" in kernel:
                assert words["LDS", True] > 0, (name, kernel)
                assert words["STS", True] > 0, (name, kernel)


def test_the_library_carries_ptx_for_later_cards(library: Path) -> None:
    """Where the list says +PTX, and for no other."""
    listed = run([cuobjdump(), "-lptx", library])
    carried = {f"sm_{name.replace('.', '')}" for name in re.findall(r"(\d+\.\d)\+PTX", backends.cuda_build() or "")}
    assert set(re.findall(r"\.(sm_\d+)[a-z]?\.ptx", listed.stdout)) == carried, listed.stdout


def test_local_memory_and_narrow_access_are_noticed(tmp_path: Path) -> None:
    """The two readers above, on a kernel with an array that is indexed by a variable and reads of one float."""
    nvcc = require("nvcc")
    source, cubin = tmp_path / "faulty.cu", tmp_path / "faulty.cubin"
    source.write_text(
        "__global__ void faulty(const float* x, float* y, int k) {\n"
        "  float kept[32];\n"
        "  for (int i = 0; i < 32; ++i) kept[(i * k) % 32] = x[threadIdx.x + 97 * i];\n"
        "  y[threadIdx.x] = kept[k % 32] + kept[(k + 7) % 32];\n"
        "}\n"
    )
    compiled = run([nvcc, "-arch=sm_80", "-cubin", source, "-o", cubin])
    assert compiled.returncode == 0, compiled.stdout
    ((_, kernel, usage),) = resources(cubin)
    assert "faulty" in kernel
    assert usage["STACK"] + usage["LOCAL"] > 0
    listed = run([cuobjdump(), "-sass", cubin]).stdout
    assert re.search(r"\bSTL\b|\bSTL\.", listed)
    assert "LDG.E.128" not in listed


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
    used = resources(compiled)
    assert {architecture for architecture, _, _ in used} == {"sm_80"}
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
