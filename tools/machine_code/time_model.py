"""A model of time: what the data sheet of a card and the machine code of a kernel say, without a card.

    python -m tools.machine_code.time_model                                  # the table of docs/gpu.md
    python -m tools.machine_code.time_model --cards H200 --shapes 8192x9x32000 --dtypes bfloat16

A kernel needs at least the time of each of three things. *Memory*: it reads the logits, the rows of R that the labels
name, and writes the gradient, once each, at the bandwidth of the data sheet. *Issue*: a multiprocessor issues four
instructions of a warp in a clock. *Exponentials*: a multiprocessor computes 16 in a clock. The *bound* is the longest
of them, as if the other two ran behind it and no launch, latency or dependency cost anything. So a measured time is
above it, and how far above is what a card has to tell.

Rows are the source head's alone, with the gradient and R in float32. The machine code is nvcc's of the
installed library (or ``--library``), and that which Triton compiles for the card, ours and liger-kernel's if it is
installed. Liger's kernel has one label a row and reads no R.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.machine_code import cuda

__all__ = [
    "CARDS",
    "Bounds",
    "Card",
    "Counts",
    "along_the_row",
    "bounds",
    "card_named",
    "cuda_counts",
    "distinct_rows",
    "moved_bytes",
]

_LANES = 32
# "CUDA C++ Programming Guide": a multiprocessor of 8.0 to 12.0 has four schedulers, each of which issues one
# instruction of a warp in a clock, and it computes 16 exponentials in a clock (table of arithmetic throughput, `ex2`).
_ISSUED_A_CLOCK = 4
_EXPONENTIALS_A_CLOCK = 16


@dataclass(frozen=True)
class Card:
    """A card as its maker describes it.

    Attributes:
        name: part of the name that the driver gives it.
        capability: 90 for compute capability 9.0.
        bandwidth: bytes a second of its memory.
        multiprocessors: their number.
        clock: boost clock in Hz; where the maker gives float32 operations, these by 256 a multiprocessor and clock.
    """

    name: str
    capability: int
    bandwidth: float
    multiprocessors: int
    clock: float


CARDS = (
    # NVIDIA H100 and H200 data sheets (SXM): 3.35 and 4.8 TB/s, 67 TFLOPS; 132 multiprocessors (H100 white paper).
    Card("H100", 90, 3.35e12, 132, 1.98e9),
    Card("H200", 90, 4.8e12, 132, 1.98e9),
    # NVIDIA HGX B200 data sheet: 8 TB/s, 75 TFLOPS a GPU; 148 multiprocessors (as the driver reports them).
    Card("B200", 100, 8.0e12, 148, 1.98e9),
    # NVIDIA Ada and RTX Blackwell white papers.
    Card("RTX 4090", 89, 1.008e12, 128, 2.52e9),
    Card("RTX 5090", 120, 1.792e12, 170, 2.407e9),
)


def card_named(name: str) -> Card | None:
    """The card whose name is part of ``name``, such as ``"NVIDIA H200"``; ``None`` if there is no data sheet of it.

    Only the SXM form of an H100 has these numbers.
    """
    return next((card for card in CARDS if card.name in name and "PCIe" not in name and "NVL" not in name), None)


# ------------------------------------------------------------------------------------------------------------ the model


class Counts(NamedTuple):
    """Of one kernel, an element of a row of logits: instructions, and exponentials among them, of one lane."""

    instructions: float
    exponentials: float


class Bounds(NamedTuple):
    """The least seconds of a launch, by what limits it."""

    memory: float
    issue: float
    exponentials: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def limit(self) -> str:
        """The name of the longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def distinct_rows(batch: int, target_classes: int) -> float:
    """How many rows of R a batch with random labels names, on average."""
    return float(target_classes * (1 - (1 - 1 / target_classes) ** batch))


def moved_bytes(logits: int, itemsize: int, relationship: float) -> float:
    """Bytes of the logits, read once, of as many gradients, and of the ``relationship``'s bytes that are read."""
    return 2 * logits * itemsize + relationship


def bounds(card: Card, logits: int, moved: float, counts: Counts) -> Bounds:
    """The three times of a launch over ``logits`` elements that moves ``moved`` bytes."""
    clocks = card.multiprocessors * card.clock
    return Bounds(
        moved / card.bandwidth,
        logits * counts.instructions / _LANES / (_ISSUED_A_CLOCK * clocks),
        logits * counts.exponentials / (_EXPONENTIALS_A_CLOCK * clocks),
    )


# --------------------------------------------------------------------------------------------------------- the counts


def cuda_architecture(library: Path, capability: int) -> str:
    """The machine code of ``library`` that the card runs: the latest of its generation that is not later than it.

    Raises:
        LookupError: the library has none; the driver would compile its PTX.
    """
    numbers = {int(usage.architecture.removeprefix("sm_")) for usage in cuda.resources(library)}
    fitting = [number for number in numbers if number <= capability and number // 10 == capability // 10]
    if not fitting:
        raise LookupError(f"{library.name} has no machine code for {capability / 10}")
    return f"sm_{max(fitting)}"


@functools.cache
def cuda_counts(library: Path, capability: int, classes: int, dtype: torch.dtype) -> Counts:
    """Those of the CUDA loss for ordinary rows of ``classes``, averaged over how rows of R lie to rows of logits.

    Raises:
        LookupError: the library has no machine code for the card, or the loops of such a row are not in it.
        ValueError: no block can keep so long a row.
    """
    architecture = cuda_architecture(library, capability)
    elsewhere = cuda.share_elsewhere(classes, dtype)
    instructions = sum(
        share * cuda.instructions_of_a_row(library, architecture, classes, dtype, alike)
        for alike, share in ((True, 1 - elsewhere), (False, elsewhere))
        if share
    )
    loops = cuda.sweeps(cuda._code_of(library, architecture, dtype), dtype, True, "shared memory")
    exponentials = sum(loop.accesses.get("EX2", 0) for loop in loops.values())
    return Counts(instructions, exponentials * dtype.itemsize / 16)


def along_the_row(sass: str) -> tuple[int, int]:
    """Instructions and exponentials of a thread on the ordinary way from the entry to the first atomic.

    Of all ways that only go forward and compute exponentials, that is the shortest among those with the most stores to
    global memory. A row whose sums are taken once more makes no further store, and a row without supervision computes
    no exponential. A loop counts once.
    """
    lines = re.split(r"\bATOM", sass)[0].splitlines()
    labels = {found[1]: k for k, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    # By line, for ways without (False) and with exponentials: stores, instructions below 0, exponentials.
    best: dict[tuple[int, bool], tuple[int, int, int]] = {(0, False): (0, 0, 0)}
    for (k, line), computes in itertools.product(enumerate(lines), (False, True)):
        if (k, computes) not in best:
            continue
        stores, instructions, exponentials = best[k, computes]
        found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^\n;]*)", line)
        following = [k + 1]
        if found is not None:
            name = found[2]
            stores += name.startswith("STG")
            instructions -= 1
            exponentials += name.startswith("MUFU.EX2")
            ends = name.split(".")[0] in ("BRA", "EXIT", "RET") and ".DIV" not in name
            conditional = found[1] is not None or re.match(r"\s*!?U?P\d", found[3])
            if ends and not conditional:
                following = []
            branch = re.search(r"`\((\.L_x_\d+)\)", found[3]) if name.startswith("BRA") and ends else None
            if branch is not None and labels.get(branch[1], -1) > k:
                following.append(labels[branch[1]])
        way = (stores, instructions, exponentials)
        for after in ((line, exponentials > 0) for line in following):
            best[after] = max(best.get(after, way), way)
    _, instructions, exponentials = best[len(lines), True]
    return -instructions, exponentials


def triton_counts(capability: int, classes: int, dtype: torch.dtype) -> Counts:
    """Those of the Triton loss for ordinary or kept rows of the source head.

    Raises:
        LookupError: rows of so many classes are looped over, which this reader does not count.
    """
    from tools.machine_code import triton as machine

    kernel = _only_launch(capability, machine._loss(dtype, 9, classes, heads=1))
    head = kernel.arguments["SOURCE"]
    if not head.whole and not head.kept:
        raise LookupError(f"rows of {classes} classes do not stay in registers")
    instructions, exponentials = along_the_row(machine._disassemble(kernel.kernel.asm["cubin"])[1])
    threads = kernel.kernel.metadata.num_warps * _LANES
    return Counts(instructions * threads / classes, exponentials * threads / classes)


def liger_counts(capability: int, classes: int, dtype: torch.dtype) -> Counts:
    """Those of liger-kernel's cross entropy with gradient, both sides of each ``if``.

    Raises:
        LookupError: liger-kernel is not installed.
    """
    from tools.machine_code import triton as machine

    if importlib.util.find_spec("liger_kernel") is None:
        raise LookupError("liger-kernel is not installed")
    kernel = _only_launch(capability, machine._liger(dtype, classes))
    turns = -(-classes // kernel.arguments["BLOCK_SIZE"])
    instructions, exponentials = (
        machine.instructions_by_element(kernel, classes, turns, turns, only) for only in (r"\S", "MUFU.EX2")
    )
    return Counts(instructions, exponentials)


def _only_launch(capability: int, call: Callable[[], Any]) -> Any:
    from triton.backends.compiler import GPUTarget

    from tools.machine_code import triton as machine

    with machine.compiled_for(GPUTarget("cuda", capability, _LANES)) as launches:
        call()
    (kernel,) = launches
    return kernel


# ---------------------------------------------------------------------------------------------------------- the table


def _counted(count: Callable[[], Counts]) -> Counts | None:
    try:
        return count()
    except (ImportError, LookupError, ValueError) as reason:
        print(f"not counted: {reason}", file=sys.stderr)
        return None


def _cell(card: Card, logits: int, counts: Counts | None) -> str:
    """Instructions an element, and the microseconds that instructions and exponentials need."""
    if counts is None:
        return ""
    of = bounds(card, logits, 0.0, counts)
    return f"{counts.instructions:.1f}: {of.issue * 1e6:.1f}, {of.exponentials * 1e6:.1f}"


def table(
    library: Path | None, cards: Sequence[Card], shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype]
) -> str:
    """Markdown, by card, dtype and shape ``(B, N_t, N_s)``."""
    rows = [
        "| card | dtype | B x N_s | memory, us | CUDA | Triton | liger-kernel | limits CUDA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        for dtype in dtypes:
            for batch, target_classes, classes in shapes:
                arguments = (card.capability, classes, dtype)
                ours = _counted(functools.partial(cuda_counts, library, *arguments)) if library is not None else None
                kernels = [ours, *(_counted(functools.partial(of, *arguments)) for of in (triton_counts, liger_counts))]
                logits = batch * classes
                moved = moved_bytes(logits, dtype.itemsize, 4 * classes * distinct_rows(batch, target_classes))
                bound = bounds(card, logits, moved, ours or Counts(0.0, 0.0))
                rows.append(
                    f"| {card.name} | {str(dtype).removeprefix('torch.')} | {batch}x{classes} | "
                    f"{bound.memory * 1e6:.1f} | {' | '.join(_cell(card, logits, counts) for counts in kernels)} | "
                    f"{bound.limit} |"
                )
    return "\n".join(rows)


SHAPES = ((4096, 200, 1000), (512, 9, 30_522), (256, 1000, 21_841))


def _shape(text: str) -> tuple[int, int, int]:
    batch, target_classes, classes = map(int, text.split("x"))
    return batch, target_classes, classes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code.time_model", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = {card.name: card for card in CARDS}
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--cards", nargs="+", choices=names, default=list(names), metavar="CARD")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="BxN_txN_s")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2])
    parser.add_argument("--library", type=Path, help="the CUDA kernels; default: those of the installed package")
    parsed = parser.parse_args(arguments)
    library = parsed.library
    if library is None:
        try:
            library = cuda.library()
        except LookupError as reason:
            print(f"not counted: {reason}", file=sys.stderr)
    print(
        table(
            library, [names[name] for name in parsed.cards], parsed.shapes, [getattr(torch, x) for x in parsed.dtypes]
        )
    )


if __name__ == "__main__":
    main()
