"""Instructions per element of a row in the CPU kernels, compared with the recorded table.

Times are noisy on a shared machine; counts repeat exactly (csrc/tests/count_instructions.cpp says how they are taken).
They depend on the compiler: counts of another compiler than the table's cannot be compared.
"""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

__all__ = ["TABLE", "TOLERANCE", "Measured", "differences", "measure", "recorded"]

TABLE = Path(__file__).resolve().parents[2] / "python_tests" / "recorded" / "instruction_counts.json"
TOLERANCE = 0.05


class Measured(NamedTuple):
    """``instructions``: ``"isa operation dtype target_classes source_classes"``, to instructions per element."""

    machine: str
    compiler: str
    instructions: dict[str, float]


def measure(program: Path, compiler: str) -> Measured:
    """Run ``program``, the ``count_instructions`` of CMakeLists.txt that ``compiler`` has built.

    Raises:
        LookupError: nothing can be counted here; the message says why.
    """
    if not program.exists():
        raise LookupError("instructions are counted with ptrace, which needs Linux")
    counted = subprocess.run([program], capture_output=True, text=True, check=False)
    if counted.returncode == 2:
        raise LookupError(f"a process cannot be traced here: {(counted.stdout + counted.stderr).strip()}")
    assert counted.returncode == 0, counted.stdout + counted.stderr
    rows = (line.rpartition(" ") for line in counted.stdout.splitlines())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return Measured(platform.machine(), version, {case: float(instructions) for case, _, instructions in rows})


def recorded() -> Measured:
    return Measured(**json.loads(TABLE.read_text()))


def differences(counts: dict[str, float], table: dict[str, float]) -> list[str]:
    """Cases off by more than the tolerance, in either direction: an outdated table hides the next change."""
    return [
        f"{case}: {count:.3f} instructions an element, {table.get(case, float('nan')):.3f} in {TABLE.name}"
        for case, count in counts.items()
        if not abs(count / table.get(case, float("nan")) - 1) <= TOLERANCE
    ]
