"""Builds the extensions with ninja from the sources in ``csrc/sources.txt``.

``cotuning_kernels._C`` has the kernels and the operations. It uses torch's stable ABI and also loads in newer torch.
``cotuning_kernels._fast_path`` saves small batches the overhead of autograd in Python. It needs torch's C++ interface
and serves only beside the torch it was built with. If it does not compile, the rest installs without it.

``cotuning_kernels._cuda`` is built if there is nvcc, for the cards that build_support/nvcc.py chooses. It uses the
stable ABI too and links no library of a CUDA torch, so it also builds and loads beside a CPU torch.

Without a C++ compiler, or with ``COTUNING_KERNELS_PURE_PYTHON=1``, the package installs without the extensions, the
reference serves every call, and ``python -m cotuning_kernels`` says what is missing.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))

import nvcc  # noqa: E402  (not named cuda: torch installs cuda-bindings, which has a module of that name)
from backend import TORCH_REQUIREMENT, find_compiler, find_torch, pure_python  # noqa: E402

CSRC = ROOT / "csrc"
COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


# The groups of sources and the libraries that each extension links.
LINKS = {
    "_C": (("kernels", "extension"), ("torch_cpu",)),
    "_fast_path": (("fast_path",), ("torch_cpu", "torch_python", "c10")),
    "_cuda": (("cuda", "cuda_extension"), ("torch_cpu",)),
}


LONG = ("cuda", "fast_path")
NVCC = None if pure_python() else nvcc.find_nvcc()
EXTENSIONS = [] if pure_python() else [name for name in LINKS if name != "_cuda" or NVCC is not None]


class Source(NamedTuple):
    path: Path
    group: str
    flags: list[str]


def read_sources(machine: str) -> list[Source]:
    """The lines of ``csrc/sources.txt`` that apply to this processor."""
    sources = []
    for line in (CSRC / "sources.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        path, group, processors, *flags = line.split()
        if processors in ("any", machine):
            sources.append(Source(CSRC / path, group, flags))
    return sources


def shell_words(words: list[str]) -> str:
    """A command line for a ninja file: ninja passes it to a shell, and ``$`` is special to ninja itself."""
    return shlex.join(words).replace("$", "$$")


class BuildWithNinja(build_ext):
    """Compiles the sources in parallel, each with its own flags, and only those that changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # a lasting folder: the next installation compiles only changes
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"cotuning_kernels: building needs {TORCH_REQUIREMENT}; run `pip install torch` first")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        outputs = {
            ext.name.rpartition(".")[2]: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        for output in outputs.values():
            output.parent.mkdir(parents=True, exist_ok=True)
        self._write_ninja_file(build / "build.ninja", outputs, torch)
        if self._ninja(build):
            return
        if not self._ninja(build, outputs["_C"]):
            raise SystemExit(
                "cotuning_kernels: the C++ extension did not compile (the compiler's words are above). To install "
                "without it: COTUNING_KERNELS_PURE_PYTHON=1 pip install ."
            )
        if "_cuda" in outputs and not self._ninja(build, outputs["_cuda"]):
            raise SystemExit(
                "cotuning_kernels: the CUDA kernels did not compile (nvcc's words are above). To install without them: "
                "COTUNING_KERNELS_CUDA=0 pip install ."
            )
        print(
            "cotuning_kernels: _fast_path did not compile (the compiler's words are above) and is left out: small "
            "batches on the CPU will take longer, nothing else changes",
            file=sys.stderr,
        )

    def _ninja(self, build: Path, *targets: Path) -> bool:
        import ninja

        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *map(str, targets)]
        return subprocess.run(command).returncode == 0

    def _write_ninja_file(self, path: Path, outputs: dict[str, Path], torch: Path) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer, escape_path
        from setuptools._distutils.sysconfig import get_python_inc

        command = find_compiler() or []
        compiler = shell_words(command)
        includes = [torch / "include", pybind11.get_include(), get_python_inc()]
        torch_flags = [word for include in includes for word in ("-isystem", str(include))]
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        group_flags = {
            "kernels": [],
            "extension": [f'-DCOTUNING_COMPILER="{version}"', *torch_flags],
            "fast_path": torch_flags,
            **self._cuda_flags(torch_flags),
        }
        with path.open("w") as file:
            writer = Writer(file, width=1_000_000)
            writer.rule(
                "compile",
                f"{compiler} -MMD -MF $out.d {' '.join(COMPILE_FLAGS)} $flags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            library_path = shell_words([f"-L{torch / 'lib'}"])
            # Link by name without a run-time path: `import torch` has already loaded the libraries.
            writer.rule("link", f"{compiler} -shared $in -o $out {library_path} $libraries")
            if NVCC is not None:
                nvcc_command = shell_words([str(NVCC)])
                writer.rule(
                    "compile_cuda",
                    f"{nvcc_command} -MD -MF $out.d {' '.join(nvcc.COMPILE_FLAGS)} $flags -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                )
                writer.rule("link_cuda", f"{nvcc_command} -shared -cudart static $in -o $out {library_path} $libraries")
            objects: dict[str, list[str]] = {group: [] for group in group_flags}
            # Start the longest compilations first.
            for source in sorted(read_sources(platform.machine()), key=lambda source: source.group not in LONG):
                if source.group not in objects:
                    continue
                name = "_".join(source.path.relative_to(CSRC).with_suffix(".o").parts)
                flags = shell_words(source.flags + group_flags[source.group])
                rule = "compile_cuda" if source.path.suffix == ".cu" else "compile"
                objects[source.group] += writer.build(
                    escape_path(name), rule, escape_path(str(source.path)), variables={"flags": flags}
                )
            for extension, output in outputs.items():
                groups, libraries = LINKS[extension]
                inputs = [name for group in groups for name in objects[group]]
                names = shell_words([f"-l{library}" for library in libraries])
                rule = "link_cuda" if extension == "_cuda" else "link"
                writer.build(escape_path(str(output)), rule, inputs, variables={"libraries": names})

    def _cuda_flags(self, torch_flags: list[str]) -> dict[str, list[str]]:
        if NVCC is None:
            return {}
        names = nvcc.architectures(NVCC)
        built = f'-DCOTUNING_CUDA_BUILD="nvcc {nvcc.version(NVCC)}: {" ".join(names)}"'
        return {
            "cuda": nvcc.architecture_flags(names),
            "cuda_extension": [built, *torch_flags],
        }


if reason := pure_python():
    print(f"cotuning_kernels: installing the pure Python part: {reason}", file=sys.stderr)

setup(
    ext_modules=[Extension(f"cotuning_kernels.{name}", [], optional=name == "_fast_path") for name in EXTENSIONS],
    cmdclass={"build_ext": BuildWithNinja},
)
