"""What compute-sanitizer's output says: errors, none, or that the machine refuses the tool."""

from __future__ import annotations

import re

__all__ = ["REFUSALS", "Refused", "first_error"]

# A virtual machine may not let a tool debug its card.
REFUSALS = ("Device not supported", "LibraryNotLoaded", "Unable to find injection library")
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", re.M)
_COUNT = re.compile(r"(\d+) (?:error|hazard)")
_REPORT = re.compile(
    r"^=+ (?:Error: )?((?:Invalid|Uninitialized|Race reported|Potential|Barrier error|Misaligned|Program hit).*)"
    r"(?:\n=+\s+(at .*))?",
    re.M,
)


class Refused(Exception):
    """The machine does not let compute-sanitizer look at its card."""


def first_error(output: str) -> str | None:
    """Return the first error that compute-sanitizer reports, with their number, or ``None`` if it reports none.

    Raises:
        Refused: the machine refuses the tool, which has looked at nothing.
    """
    for refusal in REFUSALS:
        if refusal in output:
            raise Refused(refusal)
    summaries = _SUMMARY.findall(output)
    if not summaries:
        return "it printed no summary, so it looked at nothing"
    if not any(int(count) for summary in summaries for count in _COUNT.findall(summary)):
        return None
    report = _REPORT.search(output)
    return " ".join(part for part in (report.groups() if report else ()) if part) + f" ({summaries[-1]})"
