"""The build: one list of sources, no symbol that the linker could mix up, only the stable ABI, the instruction set on
request, the package without the extension, and what distributions hold. Each checker is shown to find a planted
fault."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import cotuning_kernels
from cotuning_kernels import backends
from cotuning_kernels.backends import cpp, torch_version
from support.binaries import needed_libraries, symbols, unstable_symbols
from support.cpp_builds import build, compiler, require, run
from support.paths import ROOT

CSRC = ROOT / "csrc"
PACKAGE = Path(cotuning_kernels.__file__).parent


@pytest.fixture(scope="module")
def setup_py() -> dict[str, Any]:
    """The names that setup.py defines, without building anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setattr(sys, "path", list(sys.path))
        return runpy.run_path(str(ROOT / "setup.py"))


# ------------------------------------------------------------------------------------------------- one list of sources


def unlisted_and_missing(csrc: Path) -> tuple[set[str], set[str]]:
    """Sources on the disk that csrc/sources.txt lacks, and sources in it that are not on the disk."""
    lines = (csrc / "sources.txt").read_text().splitlines()
    listed = {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}
    found = {
        str(path.relative_to(csrc))
        for folder in ("kernels", "ops", "fast_path", "bindings")
        for path in (csrc / folder).rglob("*")
        if path.suffix in (".cpp", ".cu")
    }
    return found - listed, listed - found


def test_every_source_is_in_the_list() -> None:
    assert unlisted_and_missing(CSRC) == (set(), set())


def test_a_forgotten_source_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    (copy / "kernels" / "cpu" / "forgotten.cpp").touch()
    (copy / "ops" / "cpu.cpp").unlink()
    assert unlisted_and_missing(copy) == ({"kernels/cpu/forgotten.cpp"}, {"ops/cpu.cpp"})


def test_cmake_compiles_what_setup_py_compiles(setup_py: dict[str, Any]) -> None:
    sources = [source for source in setup_py["read_sources"](platform.machine()) if source.group in ("kernels", "cuda")]
    compiled = {
        Path(entry["file"]): shlex.split(entry["command"])
        for entry in json.loads((build() / "compile_commands.json").read_text())
    }
    kernels = {path for path in compiled if CSRC / "kernels" in path.parents}
    assert kernels == {source.path for source in sources}
    sources = [source for source in sources if source.group == "kernels"]  # the others have nvcc's flags
    options_of_all = set.intersection(*(set(compiled[source.path]) for source in sources))
    for source in sources:
        assert set(source.flags) <= set(compiled[source.path]), source.path
        own = {option for option in compiled[source.path] if option.startswith("-m")} - options_of_all
        assert own == {flag for flag in source.flags if flag.startswith("-m")}, source.path


def test_cmake_names_a_sanitizer_it_does_not_know(tmp_path: Path) -> None:
    cxx = f"-DCMAKE_CXX_COMPILER={compiler()}"
    configured = run([require("cmake"), "-S", ROOT, "-B", tmp_path, cxx, "-DCOTUNING_SANITIZE=adress"])
    assert configured.returncode != 0
    words = " ".join(configured.stdout.split())
    assert "COTUNING_SANITIZE is adress, expected some of address, undefined and thread" in words


# ---------------------------------------------------------------------------------------------------------- symbols


def foreign_symbols(object_file: Path, isa: str) -> list[str]:
    """Symbols that an object compiled for ``isa`` exports outside its own namespace.

    The linker keeps one copy of an inline function or a template. If it kept a copy compiled for AVX-512, other objects
    would call it on a processor without AVX-512.
    """
    own = re.compile(rf"_ZN?K?(N8cotuning3cpu|8cotuning3cpu)({len(isa)}{isa}|{len(isa) + 6}kRows_{isa}E)")
    return [name for name in symbols("--extern-only", "--defined-only", object_file) if not own.match(name)]


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_an_instruction_set_shares_no_symbol(isa: str, setup_py: dict[str, Any]) -> None:
    require("nm")
    built = {source.path.name for source in setup_py["read_sources"](platform.machine())}
    if f"rows_{isa}.cpp" not in built:
        pytest.skip(f"{isa} is not built for {platform.machine()}")
    (object_file,) = build().rglob(f"rows_{isa}.cpp.*")
    assert len(symbols("--extern-only", "--defined-only", object_file)) > 1
    assert foreign_symbols(object_file, isa) == []


def test_a_shared_symbol_is_noticed(tmp_path: Path) -> None:
    source, object_file = tmp_path / "rows_avx2.cpp", tmp_path / "rows_avx2.o"
    source.write_text(
        "#include <algorithm>\n"
        "namespace cotuning::cpu { inline int shared(int x) { return x + 1; } int kRows_avx2; }\n"
        "namespace cotuning::cpu::avx2 { int own(int x) { return std::max(shared(x), 3); } }\n"
        "namespace cotuning::cpu::avx512 { int other(int x) { return x; } }\n"
    )
    compiled = run([compiler(), "-std=c++17", "-O0", "-c", source, "-o", object_file])
    assert compiled.returncode == 0, compiled.stdout
    found = foreign_symbols(object_file, "avx2")
    assert [name for name in found if "shared" in name]
    assert [name for name in found if "St3max" in name]
    assert [name for name in found if "other" in name]
    assert not [name for name in found if "own" in name or "kRows_avx2" in name]


def test_the_extension_needs_only_the_stable_abi() -> None:
    extension = backends.extension()
    if extension is None:
        pytest.skip(f"no extension: {backends.missing_reason('cpp')}")
    library = Path(str(extension.__file__))
    assert "aoti_torch_get_dim" in symbols("-D", "--undefined-only", library)
    assert unstable_symbols(library) == []
    assert [name for name in needed_libraries(library) if re.search("torch|c10|python", name)] == ["libtorch_cpu.so"]


def test_an_unstable_symbol_is_noticed(tmp_path: Path) -> None:
    source, library = tmp_path / "unstable.cpp", tmp_path / "unstable.so"
    source.write_text(
        "#include <vector>\n"
        "namespace c10 { int get_num_threads(); }\n"
        "namespace at { struct Tensor {}; void fill(std::vector<Tensor>); }\n"
        'extern "C" { int THPVariable_Wrap(); int aoti_torch_get_dim(); int PyList_New(); }\n'
        "int f() { at::fill({}); return c10::get_num_threads() + THPVariable_Wrap(); }\n"
        "int g() { return aoti_torch_get_dim() + PyList_New(); }\n"
    )
    compiled = run([compiler(), "-std=c++17", "-shared", "-fPIC", source, "-o", library])
    assert compiled.returncode == 0, compiled.stdout
    found = "\n".join(unstable_symbols(library))
    assert "c10::get_num_threads" in found
    assert "at::fill" in found
    assert "THPVariable_Wrap" in found
    assert "aoti_torch_get_dim" not in found
    assert "PyList_New" not in found


# ------------------------------------------------------------------------------------------- in a process of its own


def python(code: str, *, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` with this copy of the package, whatever else is installed or lies in the working folder."""
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    return run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **environment},
    )


_LOSS = """
import torch
import cotuning_kernels as ck
from cotuning_kernels import backends
draw = torch.Generator().manual_seed(5)
source, target = (torch.randn(6, n, generator=draw).requires_grad_() for n in (37, 4))
labels = torch.randint(0, 4, (6,), generator=draw)
relationship = torch.rand(4, 37, generator=draw).softmax(1)
loss = ck.functional.co_tuning_loss(source, target, labels, relationship, trade_off=1.7)
loss.backward()
"""


def expected_loss() -> float:
    draw = torch.Generator().manual_seed(5)
    source, target = (torch.randn(6, n, generator=draw) for n in (37, 4))
    labels = torch.randint(0, 4, (6,), generator=draw)
    relationship = torch.rand(4, 37, generator=draw).softmax(1)
    cross_entropy = torch.nn.functional.cross_entropy
    return float(cross_entropy(target, labels) + 1.7 * cross_entropy(source, relationship[labels]))


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    if isa not in backends.cpu_isas():
        pytest.skip(f"{isa} is not built, or not for this processor: {backends.cpu_isas()}")
    code = _LOSS + "print(backends.cpu_isa(), backends.select('cpu'), float(loss.detach()))"
    finished = python(code, COTUNING_KERNELS_CPU_ISA=isa)
    assert finished.returncode == 0, finished.stdout
    used, backend, loss = finished.stdout.split()
    assert (used, backend) == (isa, "cpp")
    assert float(loss) == pytest.approx(expected_loss(), rel=1e-6)


def test_an_unknown_instruction_set_is_a_clear_error() -> None:
    if backends.extension() is None:
        pytest.skip(f"no extension: {backends.missing_reason('cpp')}")
    finished = python("import cotuning_kernels", COTUNING_KERNELS_CPU_ISA="sse9")
    assert finished.returncode == 1
    error = finished.stdout.splitlines()[-1]
    assert "COTUNING_KERNELS_CPU_ISA is 'sse9', expected one of " + ", ".join(backends.cpu_isas()) in error


def test_without_the_extension_the_reference_serves(tmp_path: Path) -> None:
    """The package as on a machine without a compiler: everything but ``_C``."""
    copy = tmp_path / "cotuning_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    code = _LOSS + (
        "assert backends.extension() is None and backends.cpu_isas() == []\n"
        "print(ck.__file__, backends.select('cpu'), float(loss.detach()), float(source.grad.abs().sum()) > 0)\n"
        "ck.functional.co_tuning_loss(source, target, labels, relationship, backend='cpp')\n"
    )
    finished = python(code, package=copy)
    assert finished.returncode == 1, finished.stdout
    path, backend, loss, has_gradient = finished.stdout.splitlines()[0].split()
    assert Path(path).parent == copy
    assert (backend, has_gradient) == ("reference", "True")
    assert float(loss) == pytest.approx(expected_loss(), rel=1e-6)
    error = finished.stdout.splitlines()[-1]
    assert error.startswith("RuntimeError: backend 'cpp' cannot be used: the C++ extension")
    assert "install a C++17 compiler" in error


def floor_of_the_stable_abi() -> tuple[int, int]:
    found = re.search(
        r"TORCH_TARGET_VERSION 0x([0-9a-f]{2})([0-9a-f]{2})0{12}", (CSRC / "ops/stable_abi.h").read_text()
    )
    assert found is not None
    return int(found[1], 16), int(found[2], 16)


def test_one_floor_of_torch(setup_py: dict[str, Any]) -> None:
    """The sources, the build, the package and its metadata agree about the oldest torch."""
    oldest = floor_of_the_stable_abi()
    build = setup_py["pure_python"].__globals__
    assert build["_LEAST_FOR_KERNELS"] == torch_version._LEAST_FOR_KERNELS == oldest
    assert f"torch>={oldest[0]}.{oldest[1]}" == setup_py["TORCH_REQUIREMENT"]
    assert build["_LEAST"] == torch_version._LEAST
    assert f'"torch>={build["_LEAST"][0]}.{build["_LEAST"][1]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "extensions", "said"),
    [
        ("2.9.1+cu128", "built", "need torch 2.10 or newer, and this is torch 2.9.1+cu128; run `pip install --upgrade"),
        ("2.9.1", "left out", "need torch 2.10 or newer, and this is torch 2.9.1; run `pip install --upgrade torch`"),
        ("2.10.0a0+git", "left out", "the C++ extension was not built"),
    ],
)
def test_a_torch_that_the_kernels_do_not_load_in(version: str, extensions: str, said: str, tmp_path: Path) -> None:
    copy = tmp_path / "cotuning_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "_cuda*", "__pycache__"))
    if extensions == "built":
        for name in ("_C", "_cuda"):
            (copy / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("does not load")
    code = (
        f"import torch, warnings; torch.__version__ = {version!r}\n"
        "from cotuning_kernels import backends\n"
        "print(backends.select('cpu'), backends.missing_reason('cpp'), sep='\\n')\n"
        "print(backends.missing_reason('cuda'))\n"
    )
    finished = python(code, package=copy)
    assert finished.returncode == 0, finished.stdout
    assert ("RuntimeWarning: cotuning_kernels runs without its kernels" in finished.stdout) == (extensions == "built")
    *_, backend, cpp, cuda = finished.stdout.splitlines()
    assert backend == "reference"
    assert said in cpp
    assert ("need torch 2.10" in cuda) == ("need torch 2.10" in said)


def test_a_torch_that_is_too_old_for_the_package() -> None:
    finished = python("import torch; torch.__version__ = '2.5.1'; import cotuning_kernels")
    assert finished.returncode == 1
    assert finished.stdout.splitlines()[-1] == (
        "ImportError: cotuning_kernels needs torch 2.6 or newer, and this is torch 2.5.1; run "
        "`pip install --upgrade torch`"
    )


@pytest.mark.parametrize(
    ("installed", "said"), [("2.9.1", "torch 2.9 is installed"), ("2.10.0", None), ("2.5.1", None)]
)
def test_what_is_built_beside_an_older_torch(
    installed: str, said: str | None, setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that would not load are not built. A torch that pip will replace does not count."""
    (tmp_path / "version.py").write_text(f"__version__ = '{installed}'\n")
    pure_python = setup_py["pure_python"]
    monkeypatch.delenv("COTUNING_KERNELS_PURE_PYTHON", raising=False)
    monkeypatch.setitem(pure_python.__globals__, "_torch_folders", lambda: [tmp_path])
    monkeypatch.setitem(pure_python.__globals__, "find_compiler", lambda: ["c++"])
    reason = pure_python()
    assert (reason is None) if said is None else (said in reason and "torch>=2.10" in reason)


def test_sources_that_hide_the_installed_package_say_so(tmp_path: Path) -> None:
    """In a checkout Python finds the checkout's folder first; the message must not say that nothing was built."""
    copy, installed = tmp_path / "checkout" / "cotuning_kernels", tmp_path / "installed"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "_cuda*", "__pycache__"))
    (installed / "cotuning_kernels").mkdir(parents=True)
    (installed / "cotuning_kernels" / "_C.abi3.so").touch()
    code = (
        f"import sys; sys.path.append({str(installed)!r})\n"
        "from cotuning_kernels import backends\n"
        "print(*(backends.missing_reason(name) for name in ('cpp', 'cuda')), sep='\\n')\n"
    )
    finished = python(code, package=copy)
    assert finished.stdout.startswith("the C++ extension was not built; ")
    (copy.parent / "pyproject.toml").touch()
    finished = python(code, package=copy)
    assert finished.returncode == 0, finished.stdout
    *_, warned, _, cpp, cuda = finished.stdout.splitlines()
    assert warned.endswith(f"RuntimeWarning: cotuning_kernels runs without its kernels: {cpp}")
    assert finished.stdout.count("Warning") == 1
    assert cpp == cuda
    said = re.fullmatch(
        rf"these are the sources in {re.escape(str(copy))}, which Python finds before the installed package, (.*); "
        r"start Python in another folder, or run `pip install -e \.` in this one",
        cpp,
    )
    assert said is not None, cpp
    assert any(Path(said[1]).glob("_C.*"))


def test_an_editable_installation_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkout is on the path itself, perhaps under a second name."""
    checkout, pure = tmp_path / "checkout", tmp_path / "pure"
    for folder in (checkout, pure):
        (folder / "cotuning_kernels" / "backends").mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    (checkout / "cotuning_kernels" / "_C.abi3.so").touch()  # for another Python, say
    (tmp_path / "link").symlink_to(checkout)
    monkeypatch.setattr(cpp, "__file__", str(checkout / "cotuning_kernels" / "backends" / "cpp.py"))
    monkeypatch.setattr(sys, "path", [str(checkout), str(tmp_path / "link"), str(pure)])
    assert cpp.shadowing() is None
    (pure / "cotuning_kernels" / "_C.abi3.so").touch()
    assert "before the installed package" in (cpp.shadowing() or "")


_NOT_IN_A_CHECKOUT = (".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".cache")


def test_a_source_distribution_has_what_the_build_reads(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_NOT_IN_A_CHECKOUT))
    code = "import sys; sys.path.insert(0, 'build_support'); import backend; print(backend.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    needed = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "build_support", "tools")
        for path in (ROOT / folder).rglob("*.*")
    }
    missing = {name for name in needed if "__pycache__" not in name} - packed
    assert not missing, f"not in the source distribution: {sorted(missing)}"


def test_a_wheel_takes_no_extension_that_lies_in_the_checkout(tmp_path: Path) -> None:
    """``pip install -e .`` leaves extensions there that fit only one torch, one Python and one processor."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_NOT_IN_A_CHECKOUT))
    (tree / "cotuning_kernels" / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    (tree / "cotuning_kernels" / "_cuda.abi3.so").touch()
    code = "import sys; sys.path.insert(0, 'build_support'); import backend; print(backend.build_wheel('dist'))"
    environment = os.environ | {"COTUNING_KERNELS_PURE_PYTHON": "1"}
    finished = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert "cotuning_kernels/__init__.py" in packed
    assert [name for name in packed if name.endswith(".so")] == []


def test_a_module_of_another_package_does_not_hide_the_build() -> None:
    """A ``.pth`` file of cuda-bindings, which torch 2.10 requires, imports a module ``cuda`` when Python starts."""
    code = "sys.modules['cuda'] = types.ModuleType('cuda'); runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", f"import runpy, sys, types; {code}", "--name"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "cotuning-kernels"
