"""Builds the C++ tests in csrc/tests outside the checkout, once per session and kind."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

# The sanitizers' options that these tests rely on; they override those of the caller's environment.
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "exitcode=99",
    "UBSAN_OPTIONS": "exitcode=99:print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=99:halt_on_error=1:atexit_sleep_ms=0",
}

# The memory sanitizers, used together; and those `cuda_tests` that launch many threads: the other tests would show
# ThreadSanitizer nothing more.
MEMORY = "address,undefined"
THREADS = (
    "textbook",
    "cuda_loss",
    "cuda_loss_same_bits",
    "cuda_scale",
    "cuda_statistics",
    "barriers_order_shared_memory",
)


def tool(*names: str) -> str | None:
    """The path of the first of these programs, from this environment or from the system."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def require(*names: str) -> str:
    """Return :func:`tool`, or skip the test where there is none."""
    found = tool(*names)
    if found is None:
        pytest.skip(f"needs {' or '.join(names)}, which this machine does not have")
    return found


def compiler() -> str:
    return require(os.environ.get("CXX") or "g++", "clang++", "c++")


# The environment variable that gives the session's build folder to pytest-xdist's workers: each kind is built once.
_WORKSPACE = "COTUNING_KERNELS_TEST_BUILDS"


@functools.cache
def workspace() -> Path:
    if _WORKSPACE in os.environ:
        return Path(os.environ[_WORKSPACE])
    folder = tempfile.mkdtemp(prefix="cotuning_kernels_cpp_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_WORKSPACE] = folder
    return Path(folder)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One worker at a time enters the block of this ``name``; the others then find what it made."""
    with (workspace() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; its output and errors come together, and a hang fails."""
    return subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=600, check=False,
        **{"env": ENVIRONMENT, **options},
    )  # fmt: skip


@functools.cache
def launcher(sanitize: str) -> list[str]:
    """The prefix that starts a sanitized program: empty, or ``setarch -R`` where ThreadSanitizer does not work with
    the kernel's address randomisation. Skips the test where the sanitizer does not work at all."""
    if not sanitize:
        return []
    source, program = workspace() / f"probe_{sanitize}.cpp", workspace() / f"probe_{sanitize}"
    with alone(f"probe_{sanitize}"):
        source.write_text("int main() { return 0; }\n")
        compiled = run([compiler(), f"-fsanitize={sanitize}", source, "-o", program])
    if compiled.returncode:
        pytest.skip(f"{compiler()} has no -fsanitize={sanitize}: {compiled.stdout.strip()}")
    words = ""
    for start in ([], ["setarch", platform.machine(), "-R"]):
        if start and tool("setarch") is None:
            continue
        probed = run([*start, program])
        if probed.returncode == 0:
            return start
        words = words or probed.stdout.strip()
    pytest.skip(f"programs with -fsanitize={sanitize} do not start here: {words}")


@functools.cache
def build(sanitize: str = "") -> Path:
    """The build folder of CMakeLists.txt with ``COTUNING_SANITIZE=sanitize``: ``kernel_tests`` and ``cuda_tests``."""
    cmake, cxx = require("cmake"), compiler()
    launcher(sanitize)
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    if ninja is None:
        require("make")
    folder = workspace() / f"build_{sanitize or 'plain'}"
    with alone(folder.name):
        configured = run([
            cmake, "-S", ROOT, "-B", folder, *generator, f"-DCMAKE_CXX_COMPILER={cxx}",
            f"-DCOTUNING_SANITIZE={sanitize}", "-DCOTUNING_CUDA=OFF",
        ])  # fmt: skip
        assert configured.returncode == 0, configured.stdout
        built = run([cmake, "--build", folder, "--parallel", str(min(4, os.cpu_count() or 1))])  # quick if it is built
        assert built.returncode == 0, built.stdout
    return folder


def run_kernel_tests(
    sanitize: str, *arguments: str, seed: int, isa: str | None = None, program: str = "kernel_tests"
) -> subprocess.CompletedProcess[str]:
    """``kernel_tests`` (or ``cuda_tests``) of that build with these arguments, all or the named tests."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "COTUNING_KERNELS_CPU_ISA"}
    if isa is not None:
        environment["COTUNING_KERNELS_CPU_ISA"] = isa
    return run([*launcher(sanitize), build(sanitize) / program, "--seed", str(seed), *arguments], env=environment)


def instruction_sets() -> list[str]:
    """The instruction sets that the plain build has and this processor runs."""
    printed = run_kernel_tests("", "any_nonzero", seed=0).stdout
    return printed.splitlines()[0].split("instruction sets:")[1].split()
