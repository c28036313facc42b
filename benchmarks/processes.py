"""Runs a command of ``python -m benchmarks`` in a separate process that imports the same packages as this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

__all__ = ["SETTLED_MALLOC", "run_apart"]

# By default glibc returns large blocks to the system when they are freed, and the next step pays for zeroed pages
# again. At 100 MB these page faults take most of every formulation's time and hide the difference.
SETTLED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def run_apart(*arguments: str, malloc: Mapping[str, str]) -> str:
    """Return the output of ``python -m benchmarks ARGUMENTS``.

    Args:
        arguments: the command and its options.
        malloc: glibc's variables for the new process, which replace this process's.

    Raises:
        RuntimeError: the command failed; the message has its standard error.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # Import the same benchmarks, not another one in the working directory.
    path = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path), "PYTHONSAFEPATH": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], env=environment | path | dict(malloc),
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode != 0:
        raise RuntimeError(f"python -m benchmarks {' '.join(arguments)} failed:\n{child.stderr.strip()}")
    return child.stdout
