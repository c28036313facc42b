"""Two simulated CUDA devices, for a torch that is built with CUDA, on a machine with nvcc and g++.

    PYTHONPATH=python_tests python -m support.simulated_gpu -m pytest python_tests/gpu/test_cuda_device.py

The CUDA extension is the one that ``pip install .`` makes: nvcc compiles the same sources. It links to the CUDA runtime
as a shared library, and tools/cuda_emulator/runtime replaces that library's functions by ones that run our kernels
through the emulator. So everything from the public functions down to ``<<<...>>>`` is what runs on a GPU: dispatch to
CUDA, device guards, streams, the caching allocator, autograd's threads, captured graphs.
tools/cuda_emulator/runtime/runtime.cpp says what the runtime guarantees and what it cannot show;
simulated_gpu_operations.py says how torch's own kernels are replaced.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from support import emulated_cuda
from support.cpp_builds import compiler, run, tool
from support.paths import ROOT, TESTS

__all__ = ["build", "environment", "missing", "object_name"]

TORCH = Path(torch.__file__).parent
FLAGS = (*emulated_cuda.FLAGS, "-fno-gnu-unique")


def missing() -> str | None:
    """Why no device can be simulated here."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not (ROOT / "csrc").is_dir() or not emulated_cuda.emulator_sources(ROOT):
        return "the sources of the kernels are not here"
    if sys.platform != "linux" or _toolkit() is None:
        return "there is no CUDA toolkit (nvcc)"
    return None if tool("g++") else "there is no g++"


@functools.cache
def _toolkit() -> Path | None:
    """The folder with ``include`` and ``lib64``, which nvcc itself knows."""
    nvcc = tool("nvcc")
    if nvcc is None:
        return None
    words = run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]).stdout
    top = next((line.partition("TOP=")[2] for line in words.splitlines() if "TOP=" in line), "")
    return Path(top) if top and (Path(top) / "include" / "cuda_runtime_api.h").is_file() else None


def _extension(root: Path) -> list[Path]:
    return emulated_cuda.sources(root, "cuda", "cuda_extension")


def _runtime(root: Path) -> list[Path]:
    # The controls belong to the emulated extension and change its plans.
    emulator = [path for path in emulated_cuda.emulator_sources(root) if path.name != "controls.cpp"]
    return [*emulator, *sorted((root / "tools" / "cuda_emulator" / "runtime").glob("*.cpp"))]


def object_name(source: Path) -> str:
    return f"{source.parent.name}_{source.name}.o"


def _command(source: Path, root: Path) -> list[str | Path]:
    toolkit, nvcc = _toolkit(), tool("nvcc")
    assert toolkit is not None
    assert nvcc is not None
    if source.suffix == ".cu":  # as build_support/nvcc.py says; PTX alone, since no device will run it
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        return [nvcc, *flags, "-gencode", "arch=compute_90,code=compute_90"]
    if source.parent.name == "ops":
        of_torch: list[str | Path] = ["-isystem", TORCH / "include"]
        return [compiler(), *FLAGS, '-DCOTUNING_CUDA_BUILD="nvcc 0.0 (simulated): 9.0+PTX"', *of_torch]
    seen = [compiler(), *FLAGS, "-fvisibility=default"]  # its functions and kernels are found by their names
    if source.name == "runtime.cpp":
        return [*seen, "-isystem", toolkit / "include"]
    return [*seen, "-I", emulated_cuda.headers(root)]


def build(folder: Path, root: Path = ROOT) -> None:
    """Build everything that :func:`environment` needs in ``folder``, from a checkout's sources. Files that exist may be
    in use and are not built again."""
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        path = folder / object_name(source)
        if not path.exists():
            finished = run([*_command(source, root), "-c", source, "-o", path])
            assert finished.returncode == 0, finished.stdout
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        extension, runtime = (pool.map(compiled, listed(root)) for listed in (_extension, _runtime))
    # Programs that load the driver by its name get the few functions that are simulated.
    named = "-Wl,-soname,libcuda.so.1"
    of_torch = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    libraries: dict[Path, list[str | Path]] = {
        folder / "libsimulated_runtime.so": [named, *runtime, "-ldl", "-lpthread"],
        _package(folder) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}": [
            *extension, f"-L{_toolkit()}/lib64", "-lcudart", *of_torch
        ],
    }  # fmt: skip
    for library, inputs in libraries.items():
        if library.exists():
            continue
        linked = run([compiler(), "-shared", "-o", library, *inputs])
        assert linked.returncode == 0, linked.stdout


def _package(folder: Path) -> Path:
    """The installed package without its CUDA extension, and the entry point through which torch gets its operations."""
    found = importlib.util.find_spec("cotuning_kernels")
    assert found is not None
    assert found.origin is not None
    package = folder / "cotuning_kernels"
    package.mkdir(exist_ok=True)
    for entry in Path(found.origin).parent.iterdir():
        if not entry.name.startswith("_cuda.") and not (package / entry.name).exists():
            (package / entry.name).symlink_to(entry)
    metadata = folder / "simulated_gpu-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated_gpu\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\nsimulated = support.simulated_gpu_operations:install\n"
    )
    return package


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that has the devices."""
    paths = [str(folder), str(TESTS), sysconfig.get_path("platlib"), str(ROOT)]
    return os.environ | {
        "LD_PRELOAD": str(folder / "libsimulated_runtime.so"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # the package of `folder`, not one beside the working directory
        "COTUNING_SIMULATED_GPU": "1",
    }


def main() -> None:
    if reason := missing():
        raise SystemExit(f"no device can be simulated here: {reason}")
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        finished = subprocess.run([sys.executable, *sys.argv[1:]], env=environment(Path(name)))
    raise SystemExit(finished.returncode)


if __name__ == "__main__":
    main()
