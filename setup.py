"""Builds ``cotuning_kernels._C`` with ninja from the sources in ``csrc/sources.txt``.

No C++ compiler, or ``COTUNING_KERNELS_PURE_PYTHON=1``: the package installs without the extension, the reference serves
every call, and ``python -m cotuning_kernels`` says what is missing.
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

from backend import TORCH_REQUIREMENT, find_compiler, find_torch, pure_python  # noqa: E402

CSRC = ROOT / "csrc"
# The oldest torch that the extension loads in, as torch/headeronly/version.h encodes it: 2.13.0.
TORCH_TARGET_VERSION = "0x020d000000000000"
COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


class Source(NamedTuple):
    path: Path
    group: str
    flags: list[str]


def read_sources(machine: str) -> list[Source]:
    """The lines of ``csrc/sources.txt`` that hold for this processor."""
    sources = []
    for line in (CSRC / "sources.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        path, group, processors, *flags = line.split()
        if processors in ("any", machine):
            sources.append(Source(CSRC / path, group, flags))
    return sources


def shell_words(words: list[str]) -> str:
    """A command line for a ninja file: ninja gives it to a shell, and ``$`` is its own."""
    return shlex.join(words).replace("$", "$$")


class BuildWithNinja(build_ext):
    """One object a source, each with its own flags, in parallel, rebuilt only when it changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        torch = find_torch()
        if torch is None:
            raise SystemExit(f"cotuning_kernels: building needs {TORCH_REQUIREMENT}; run `pip install torch` first")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self._write_ninja_file(build / "build.ninja", output, torch, pybind11.get_include())
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]
        if subprocess.run(command).returncode:
            raise SystemExit(
                "cotuning_kernels: the C++ extension did not compile (the compiler's words are above). To install "
                "without it: COTUNING_KERNELS_PURE_PYTHON=1 pip install ."
            )

    def _write_ninja_file(self, path: Path, output: Path, torch: Path, pybind11_include: str) -> None:
        from ninja.ninja_syntax import Writer, escape_path
        from setuptools._distutils.sysconfig import get_python_inc

        command = find_compiler() or []
        compiler = shell_words(command)
        includes = [torch / "include", pybind11_include, get_python_inc()]
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        definitions = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f'-DCOTUNING_COMPILER="{version}"']
        with path.open("w") as file:
            writer = Writer(file, width=1_000_000)
            writer.rule(
                "compile",
                f"{compiler} -MMD -MF $out.d {' '.join(COMPILE_FLAGS)} $flags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            library_path = shell_words([f"-L{torch / 'lib'}"])
            # Linked by name and without a path to it: `import torch` has loaded the library by then.
            writer.rule("link", f"{compiler} -shared $in -o $out {library_path} -ltorch_cpu")
            objects = []
            for source in read_sources(platform.machine()):
                flags = list(source.flags)
                if source.group == "extension":
                    flags += definitions + [word for include in includes for word in ("-isystem", str(include))]
                name = "_".join(source.path.relative_to(CSRC).with_suffix(".o").parts)
                objects += writer.build(
                    escape_path(name), "compile", escape_path(str(source.path)), variables={"flags": shell_words(flags)}
                )
            writer.build(escape_path(str(output)), "link", objects)


if pure_python():
    print("cotuning_kernels: no C++ compiler is used; installing the pure Python part", file=sys.stderr)

setup(
    ext_modules=[] if pure_python() else [Extension("cotuning_kernels._C", [])],
    cmdclass={"build_ext": BuildWithNinja},
)
