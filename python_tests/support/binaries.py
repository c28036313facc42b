"""Symbols, dependencies and CUDA resources of object files and shared libraries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.cpp_builds import require, run
from tools.machine_code import cuda

KERNELS_OF_THE_LOSS = 4
# 8 for split rows, 4 for the temperature, 8 for the class sums, 1 to scale, 1 to translate.
KERNELS = KERNELS_OF_THE_LOSS + 22


def symbols(*options: str | Path) -> list[str]:
    """Mangled names as nm lists them, with their version."""
    listed = run([require("nm"), *options])
    assert listed.returncode == 0, listed.stdout
    return [line.split()[-1] for line in listed.stdout.splitlines() if re.match(r"[0-9a-f ]+ [A-Za-z] ", line)]


def unstable_symbols(library: Path) -> list[str]:
    """Undefined symbols of ``library`` that are neither torch's stable C ABI, nor Python's, nor a runtime library's.

    The runtimes' symbols have a version (``exp@GLIBC_2.29``) or a C++ namespace that is not torch's.
    """
    listed = run([require("nm"), "-C", "-D", "--undefined-only", library])
    assert listed.returncode == 0, listed.stdout
    names = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
    stable = re.compile(r"aoti_|torch_|_?Py|_ITM_|__gmon_start__")
    return [
        name
        for name in names
        if re.search(r"\b(at|c10|caffe2|torch)::", name) or not ("::" in name or "@" in name or stable.match(name))
    ]


def needed_libraries(library: Path) -> list[str]:
    listed = run([require("readelf"), "-d", library])
    assert listed.returncode == 0, listed.stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listed.stdout)


def resources_of(file: Path) -> list[cuda.Usage]:
    """Resources of each CUDA kernel in the file; skips the test where there is no disassembler."""
    try:
        return cuda.resources(file)
    except LookupError as reason:
        pytest.skip(str(reason))
