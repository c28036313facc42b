"""The shared command line of the programs here: argument types, one-sentence errors and exit codes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something outside the program is missing or wrong. The message is one sentence with the fix."""


def exit_code(name: str, program: Callable[[], Any], stopped: str = "stopped") -> int:
    """Run the program: 0 on success, 1 after an error with one sentence on standard error, 130 after Ctrl-C."""
    try:
        program()
    except UserError as error:
        # A DataLoader worker passes its whole traceback as the message, which ends in the sentence.
        print(f"{name}: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return 1
    except OSError as error:  # a file cannot be written, the disk is full
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    return 0


def number(
    kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> Any:
    """An argparse type: a finite number from ``least`` to ``most``; ``above`` excludes ``least`` itself."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)) or (above and value == least):
            raise ValueError
        return value

    bounds = [f"above {least:g}" if above else f"of at least {least:g}"] if math.isfinite(least) else []
    bounds += [f"at most {most:g}"] if math.isfinite(most) else []
    what = "whole number" if kind is int else "finite number"
    parse.__name__ = f"{what} {' and '.join(bounds)}".strip()  # argparse: "invalid <name> value"
    return parse


share = number(float, 0, 1, above=True)


def device(text: str) -> str:
    """An argparse type: a device that this torch can compute on."""
    import torch

    try:
        torch.zeros(1, device=text).add(1).item()  # the device "meta" has no values to give
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # The first line of torch's message is the cause, the rest is the trace.
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device of this torch ({str(error).splitlines()[0]})"
        ) from None
    return text
