"""``python -m benchmarks COMMAND`` measures time or memory. ``COMMAND --help`` lists its options."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from benchmarks.processes import SETTLED_MALLOC

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "ratios": "one table: how many times longer other formulations take",
    "limits": "the parts of a call's time, and the kernel beside two bounds",
    "cold": "the loss in the step of a network, which has replaced the caches' content",
    "page": "a page with pictures: growth, threads, memory, share of a copy; --device cuda for a GPU",
    "memory": "the peak memory of one contestant, as JSON",
    "language_head": "a step of the head of a language model, fused and unfused",
    "linear": "two linear heads whose logits exist by chunks, beside logits that all exist at once",
    "reverse_relationship": "the regression of the reverse relationship against scikit-learn's",
}
"""Each command is a module of this package with a ``main``."""

_SETTLES_MALLOC = ("ratios", "limits", "cold", "page")


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status.

    ``ratios``, ``limits``, ``cold`` and ``page`` restart Python with :data:`~benchmarks.processes.SETTLED_MALLOC`,
    since glibc reads these variables only when a process starts.
    """
    command, *rest = arguments or ["--help"]
    if command not in COMMANDS:
        lines = [__doc__ or "", "", *(f"  {name:22}{what}" for name, what in COMMANDS.items())]
        print("\n".join(lines), file=sys.stdout if command in ("-h", "--help") else sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    if command in _SETTLES_MALLOC and "--system-malloc" not in rest and "MALLOC_MMAP_MAX_" not in os.environ:
        again = [sys.executable, "-m", "benchmarks", command, *rest]
        os.execve(sys.executable, again, os.environ | SETTLED_MALLOC)
    status: int = importlib.import_module(f"benchmarks.{command}").main(rest)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
