"""What the programs here do alike at the command line: one sentence for what is wrong, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something outside the program is missing or wrong. The message is one sentence with the mend."""


def exit_code(name: str, program: Callable[[], Any], stopped: str = "stopped") -> int:
    """Run it: 0, or 1 with a sentence on standard error; 130 after Ctrl-C, as shells have it."""
    try:
        program()
    except (UserError, OSError) as error:  # OSError: a file cannot be written, the disk is full
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    return 0
