"""Measures the recorded tables of ``python_tests/recorded`` again, on a machine without a GPU.

    python -m tools.machine_code                       # says whether each table still holds
    python -m tools.machine_code --write               # renews them: look at the differences before you commit them
    python -m tools.machine_code --write instructions  # renews this one

A table that cannot be measured here (without nvcc, for instance) stays unchanged, and the command says why. Triton's
kernels have a table for each version of Triton; the command measures that of the installed one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The tests' helpers build the C++ programs and interpret Triton's kernels.
sys.path.append(str(Path(__file__).resolve().parents[2] / "python_tests"))


def _triton() -> tuple[Path, Any]:
    from tools.machine_code import triton

    return triton.TABLE, triton.table()


def _cuda() -> tuple[Path, Any]:
    from tools.machine_code import cuda

    return cuda.TABLE, cuda.measure(cuda.library())._asdict()


def _instructions() -> tuple[Path, Any]:
    from support.cpp_builds import build, compiler
    from tools.machine_code import instructions

    return instructions.TABLE, instructions.measure(build() / "count_instructions", compiler())._asdict()


TABLES: dict[str, Callable[[], tuple[Path, Any]]] = {"instructions": _instructions, "cuda": _cuda, "triton": _triton}
"""By name: returns the file and its new content; LookupError or ImportError if it cannot be measured."""


def main(arguments: Sequence[str]) -> int:
    """Measure, compare or write, and return 1 if a table no longer holds."""
    import pytest

    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"default all: {', '.join(TABLES)}")
    parser.add_argument("--write", action="store_true", help="write the tables")
    parsed = parser.parse_args(arguments)
    if unknown := [name for name in parsed.tables if name not in TABLES]:
        parser.error(f"there is no table {unknown[0]!r}: expected {', '.join(TABLES)}")
    changed = False
    for name in parsed.tables or TABLES:
        try:
            file, measured = TABLES[name]()
        except (ImportError, LookupError, pytest.skip.Exception) as reason:
            print(f"{name}: not measured: {reason}")
            continue
        if file.exists() and json.loads(json.dumps(measured)) == json.loads(file.read_text()):
            print(f"{name}: {file.name} holds")
        elif parsed.write:
            file.write_text(json.dumps(measured, indent=1) + "\n")
            print(f"{name}: wrote {file.name}")
        else:
            changed = True
            print(f"{name}: {file.name} differs; --write renews it")
    return int(changed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
