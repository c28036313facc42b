"""The instructions that the CPU kernels run for an element of a row may not grow unnoticed.

Times are noise on a shared machine; counts repeat exactly (csrc/tests/count_instructions.cpp says how they are taken).
They belong to a compiler: with another one than the table's there is nothing to compare. After a change that is meant,
rewrite the table and say in the commit what changed and why::

    python python_tests/builds/test_instruction_counts.py
"""

from __future__ import annotations

import functools
import json
import platform

import pytest

from support.cpp_builds import build, compiler, run
from support.paths import RECORDED

TABLE = RECORDED / "instruction_counts.json"
TOLERANCE = 0.05


def compiler_version() -> str:
    return run([compiler(), "--version"]).stdout.splitlines()[0]


@functools.cache
def counted() -> dict[str, float]:
    """``"isa operation dtype target_classes source_classes": instructions an element``."""
    program = build() / "count_instructions"
    if not program.exists():
        pytest.skip("needs Linux: instructions are counted with ptrace")
    printed = run([program])
    if printed.returncode == 2:
        pytest.skip(f"a process cannot be traced here: {printed.stdout.strip()}")
    assert printed.returncode == 0, printed.stdout
    rows = (line.rpartition(" ") for line in printed.stdout.splitlines())
    return {case: float(instructions) for case, _, instructions in rows}


def differences(counts: dict[str, float], table: dict[str, float]) -> list[str]:
    """What is off by more than the tolerance, either way: a table that lags behind hides the next change."""
    return [
        f"{case}: {count:.3f} instructions an element, {table.get(case, float('nan')):.3f} in {TABLE.name}"
        for case, count in counts.items()
        if not abs(count / table.get(case, float("nan")) - 1) <= TOLERANCE
    ]


def test_no_kernel_runs_more_instructions_than_the_table_says() -> None:
    table = json.loads(TABLE.read_text())
    if (platform.machine(), compiler_version()) != (table["machine"], table["compiler"]):
        pytest.skip(f"the table is for {table['compiler']} on {table['machine']}, here is {compiler_version()}")
    assert counted(), "no instruction set of this processor is counted"
    assert not (found := differences(counted(), table["instructions"])), "\n".join(found)


def test_counts_repeat_and_a_slower_kernel_is_noticed() -> None:
    first = counted()
    assert run([build() / "count_instructions"]).stdout.split() == [
        word for case, count in first.items() for word in (*case.split(), f"{count:.4f}")
    ]
    assert not differences(first, first)
    slower = {case: count * 1.06 for case, count in first.items()}
    assert len(differences(slower, first)) == len(first)
    assert differences({"a case that the table lacks": 1.0}, first)


if __name__ == "__main__":
    counts = {"machine": platform.machine(), "compiler": compiler_version(), "instructions": counted()}
    TABLE.write_text(json.dumps(counts, indent=2) + "\n")
    print(f"wrote {TABLE}")
