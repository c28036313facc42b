"""What nvcc made of the CUDA kernels, read out of the built library: the tables of docs/cuda.md. It needs no GPU.

``python -m tools.machine_code.cuda [LIBRARY]`` prints them, for the installed library or another one.
``python -m tools.machine_code`` renews the recorded table. The disassembler is ``cuobjdump`` of the CUDA toolkit, or
the one that the triton wheel carries.

Instructions per element are counted on the shortest path once around each loop over a row. Only paths count that
access memory as the plan for the shape says: with its number of 16-byte loads and stores, and no narrower ones. If no
loop has such a path, that is an error.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import cotuning_kernels
from cotuning_kernels import backends

__all__ = [
    "TABLE",
    "Instruction",
    "Usage",
    "around_a_loop",
    "cuobjdump",
    "differences",
    "disassemble",
    "instructions_of_a_row",
    "measure",
    "parse",
    "resources",
    "sweeps",
    "turns_of_a_row",
]

TABLE = Path(__file__).resolve().parents[2] / "python_tests" / "recorded" / "cuda_machine_code.json"
TOLERANCE = 0.05

# ------------------------------------------------------------------------------------------------------------- reading


def library() -> Path:
    """The built library; LookupError, with the reason, where there is none."""
    if reason := backends.missing_reason("cuda"):
        raise LookupError(reason)
    return next(Path(cotuning_kernels.__file__).parent.glob("_cuda*.so"))


def cuobjdump() -> str:
    """The path of cuobjdump; LookupError if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.is_file():
            return str(carried)
    raise LookupError("needs cuobjdump, of the CUDA toolkit or of the triton wheel, which are not here")


def run_cuobjdump(*arguments: str | Path) -> str:
    """The output of cuobjdump."""
    finished = subprocess.run([cuobjdump(), *map(str, arguments)], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(map(str, arguments))} failed: {finished.stderr.strip()}")
    return finished.stdout


class Usage(NamedTuple):
    """The resources of one kernel's thread; ``shared`` is a block's static shared memory, in bytes."""

    architecture: str
    kernel: str
    registers: int
    stack: int
    local: int
    shared: int


def resources(file: Path) -> list[Usage]:
    """The resources of every kernel of every architecture."""
    found, architecture, kernel = [], "", ""
    for line in run_cuobjdump("-res-usage", file).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif kernel:
            used = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}
            found.append(Usage(architecture, kernel, used["REG"], used["STACK"], used["LOCAL"], used["SHARED"]))
            kernel = ""
    return found


class Instruction(NamedTuple):
    """``@P0 LDG.E.128 R4, [R2.64]`` is ``("LDG.E.128", "R4, [R2.64]", True)``."""

    operation: str
    operands: str
    predicated: bool


Code = dict[int, Instruction]  # by address


def parse(sass: str) -> dict[str, Code]:
    """The kernels in a disassembly."""
    kernels: dict[str, Code] = {}
    for text in re.split(r"^\s*Function : ", sass, flags=re.M)[1:]:
        kernels[text.split(maxsplit=1)[0]] = {
            int(line[1], 16): Instruction(line[3], line[4], line[2] is not None)
            for line in re.finditer(
                r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*) *([^;\n]*?) *;", text, re.M
            )
        }
    return kernels


@functools.cache
def disassemble(file: Path, architecture: str) -> dict[str, Code]:
    """The kernels for an architecture such as ``"sm_90"``. Cached, because it takes a second."""
    return parse(run_cuobjdump("-arch", architecture, "-sass", file))


_TYPES = {"f": "float32", "d": "float64", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}


def readable(kernel: str) -> str:
    """A readable name such as ``"loss, bfloat16"`` for a kernel's mangled name."""
    match = re.search(r"\d+([a-z_]+)_kernel(?:I(f|d|NS_8BFloat16E|NS_7Float16E)E)?", kernel)
    if match is None:
        return kernel
    return match[1].replace("_", " ") + (f", {_TYPES[match[2]]}" if match[2] else "")


# ------------------------------------------------------------------------------------------------------ around a loop


def access(operation: str) -> str | None:
    """The access that an operation counts as: ``"LDG 16"``, ``"STS 4"``, ``"EX2"`` (an exponential), else None."""
    name, *modifiers = operation.split(".")
    if name == "MUFU":
        return "EX2" if "EX2" in modifiers else None
    if name not in ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LD", "ST"):
        return None
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return f"{name} {next((widths[m] for m in modifiers if m in widths), 4)}"


def target(instruction: Instruction) -> int | None:
    """The target of a branch. BRA.DIV is taken by warps whose lanes have diverged, and is not followed."""
    if instruction.operation.split(".")[0] != "BRA" or ".DIV" in instruction.operation:
        return None
    match = re.search(r"0x([0-9a-f]+)", instruction.operands)
    return int(match[1], 16) if match else None


def successors(code: Code, address: int, following: dict[int, int]) -> Iterator[int]:
    instruction = code[address]
    branch = target(instruction)
    if branch is not None:
        yield branch
    ends = instruction.operation.split(".")[0] in ("BRA", "EXIT", "RET") and ".DIV" not in instruction.operation
    # The condition is a predicate before the instruction, or among its operands.
    conditional = instruction.predicated or re.match(r"!?U?P\d", instruction.operands)
    if address in following and (not ends or conditional):
        yield following[address]


def around_a_loop(code: Code, wanted: dict[str, int]) -> int | None:
    """Instructions on the shortest path once around any loop that makes exactly the accesses ``wanted``; None if there
    is no such path. A loop goes from the target of a branch back to that branch; a path does not leave it."""
    addresses = sorted(code)
    following = dict(itertools.pairwise(addresses))
    loops = [(head, address) for address in addresses if (head := target(code[address])) is not None and head < address]
    shortest: int | None = None
    for head, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        inside = {address: code[address] for address in addresses if head <= address <= last}
        has = collections.Counter(access(instruction.operation) for instruction in inside.values())
        if all(has[what] >= count for what, count in wanted.items()):
            way = _once_around(inside, head, last, wanted, following, shortest)
            shortest = way or shortest
    return shortest


def _once_around(
    code: Code, head: int, last: int, wanted: dict[str, int], following: dict[int, int], limit: int | None
) -> int | None:
    """Breadth-first search over pairs of address and accesses so far; shorter than ``limit``, or None."""
    names = list(wanted)
    goal = tuple(wanted.values())
    wave, seen, steps = {(head, (0,) * len(names))}, set(), 0
    while wave and (limit is None or steps + 1 < limit):
        steps += 1
        seen |= wave
        further = set()
        for address, counts in wave:
            for counts_after in _after(code[address], counts, names, goal):
                if address != last:
                    further |= {
                        (after, counts_after) for after in successors(code, address, following) if after in code
                    }
                elif counts_after == goal:
                    return steps
        wave = further - seen
    return None


def _after(
    instruction: Instruction, counts: tuple[int, ...], names: list[str], goal: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """The counts after an instruction. With a predicate it is always issued, but may access nothing."""
    what = access(instruction.operation)
    if what is None or instruction.predicated:
        yield counts
    if what in names:
        k = names.index(what)
        if counts[k] < goal[k]:
            yield (*counts[:k], counts[k] + 1, *counts[k + 1 :])


# ---------------------------------------------------------------------------------------------------- a row of a shape

SHAPES = (1000, 21841, 30522)
TARGET_CLASSES = 200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(dtype, torch.float32) for dtype in DTYPES] + [(dtype, dtype) for dtype in DTYPES[1:]]
"""The dtypes of logits and of R of an ordinary row."""


def named(dtype: torch.dtype, of_r: torch.dtype) -> str:
    """``"bfloat16"`` for logits beside R in float32, ``"bfloat16 as R"`` beside R in bfloat16."""
    return str(dtype).removeprefix("torch.") + ("" if of_r == torch.float32 else " as R")


class Loop(NamedTuple):
    """One turn of a loop in one of the three sweeps: its instructions and accesses by vector of 16 bytes of logits."""

    instructions: float
    accesses: dict[str, int]


class Turns(NamedTuple):
    """How often the warps of a row take a turn of each kind, and how many vectors of a lane one turn has. The sums and
    the gradient take ``pairs`` and ``singles`` whose part of R is in shared memory, then ``rest``."""

    fours: int = 0
    masked_fours: int = 0
    masked_pairs: int = 0
    pairs: int = 0
    singles: int = 0
    rest: int = 0


KEPT = {"staged_target": "shared memory", "kept_target": "registers"}
"""Where R is kept between sweeps, by the name of its size in the plan; else ``"nowhere"``."""

_LANES = 32


def turns_of_a_row(count: int, staged: int, threads: int) -> Turns:
    """The turns of all warps over ``count`` whole vectors, ``staged`` of them with R in shared memory: the loops of
    csrc/kernels/cuda/ordinary_row.cuh."""
    step, taken = 2 * threads, Turns()
    for warp in range(threads // _LANES):
        first = k = 2 * _LANES * warp
        fours = masked_fours = masked_pairs = pairs = singles = rest = 0
        while k + step < count - 2 * _LANES + 1:
            fours, k = fours + 1, k + 2 * step
        while k + step < count:
            masked_fours, k = masked_fours + 1, k + 2 * step
        while k < count:
            masked_pairs, k = masked_pairs + 1, k + step
        k = first
        while k < staged - 2 * _LANES + 1:
            pairs, k = pairs + 1, k + step
        for start in range(k, count, step):
            for begin in (start, start + _LANES):
                singles += begin < staged
                rest += max(staged, begin) < min(begin + _LANES, count)
        one = (fours, masked_fours, masked_pairs, pairs, singles, rest)
        taken = Turns(*(a + b for a, b in zip(taken, one, strict=True)))
    return taken


def turn(
    code: Code, dtype: torch.dtype, sweep: str, vectors: int, *, of_r: torch.dtype = torch.float32, alike: bool = True,
    where: str = "shared memory", masked: bool = False,
) -> Loop:  # fmt: skip
    """A turn over ``vectors`` vectors of staged logits: of the source head, with R in the dtype ``of_r``, or of the
    target head, which reads no R. (Other loops with as many accesses are longer.) ``alike``: the row of R has the same
    offset in 16 bytes as the logits. ``where`` R is kept. ``masked``: only accesses under a predicate count."""
    count = 16 // dtype.itemsize
    # A row of R with another offset needs one more aligned vector than its elements fill.
    loads = count * of_r.itemsize // 16 + (0 if alike else 1)
    # 16-bit words of R take the place of the logits, and exponentials that of R's numbers.
    narrow = of_r.itemsize == 2 and where == "shared memory"
    accesses = {"LDG 16": 1, "STS 16": 1}
    if sweep == "sums":
        accesses = {"LDG 16": loads, "LDS 16": 1, "EX2": count}
        stores = (count // 4 if where == "shared memory" else 0) + (dtype == torch.float32 or narrow)
        if stores:  # float32 exponentials take the place of the logits
            accesses["STS 16"] = stores
    elif sweep == "gradient":
        read = {"shared memory": {"LDS 16": 1 + count // 4}, "registers": {"LDS 16": 1}}
        accesses = {"STG 16": 1} | read.get(where, {"LDS 16": 1, "LDG 16": loads})
        if dtype != torch.float32 and not narrow:
            accesses["EX2"] = count
    elif sweep == "target sums":
        accesses = {"LDS 16": 1, "EX2": count}
    elif sweep == "target gradient":
        accesses = {"STG 16": 1, "LDS 16": 1, "EX2": count}
    if masked:
        code = {
            address: x if x.predicated or access(x.operation) is None else x._replace(operation="NOP")
            for address, x in code.items()
        }
    instructions = around_a_loop(code, {what: vectors * number for what, number in accesses.items()})
    if instructions is None:
        raise LookupError(f"{dtype}: there is no way around a loop with {vectors} times {accesses} ({sweep})")
    return Loop(instructions / vectors, accesses)


def sweeps(
    code: Code, dtype: torch.dtype, alike: bool, where: str, of_r: torch.dtype = torch.float32
) -> dict[str, Loop]:
    """The loops of long rows, by sweep."""
    pairs = 2 if where == "shared memory" else 1
    return {"maximum": turn(code, dtype, "maximum", 4)} | {
        sweep: turn(code, dtype, sweep, pairs, of_r=of_r, alike=alike, where=where) for sweep in ("sums", "gradient")
    }


def _code_of(file: Path, architecture: str, dtype: torch.dtype) -> Code:
    name = f"loss, {str(dtype).removeprefix('torch.')}"
    (code,) = (code for kernel, code in disassemble(file, architecture).items() if readable(kernel) == name)
    return code


@functools.cache
def _turn(
    file: Path, architecture: str, dtype: torch.dtype, sweep: str, vectors: int, of_r: torch.dtype, alike: bool,
    where: str, masked: bool,
) -> float:  # fmt: skip
    code = _code_of(file, architecture, dtype)
    return vectors * turn(code, dtype, sweep, vectors, of_r=of_r, alike=alike, where=where, masked=masked).instructions


def instructions_of_a_row(
    file: Path, architecture: str, classes: int, dtype: torch.dtype, alike: bool, of_r: torch.dtype = torch.float32
) -> float:
    """Instructions per element and lane: the source head with its gradient, staged as the plan for the shape says. A
    warp's instruction counts for all its lanes, idle ones too. Code that runs once per row, or at the ends of rows, is
    left out."""
    plan = backends.cuda_loss_plan(256, classes, source_dtype=dtype)["source"]
    if plan["staged_logits"] == 0:
        raise ValueError(f"classes is {classes}, whose {dtype} logits no block can keep: expected fewer")
    count = classes * dtype.itemsize // 16 - (0 if alike else 1)
    turns = turns_of_a_row(count, min(plan["staged_target"], count), plan["threads_per_row"])
    of_rest = "registers" if plan["kept_target"] else "nowhere"
    total = _maximum(file, architecture, dtype, turns)
    for taken, vectors, where in (
        (turns.pairs, 2, "shared memory"), (turns.singles, 1, "shared memory"), (turns.rest, 1, of_rest),
    ):  # fmt: skip
        if taken:
            total += taken * sum(
                _turn(file, architecture, dtype, sweep, vectors, of_r, alike, where, False)
                for sweep in ("sums", "gradient")
            )
    return total * _LANES / classes


def _maximum(file: Path, architecture: str, dtype: torch.dtype, turns: Turns) -> float:
    """Instructions of a row's warps for its maximum."""
    kinds = ((turns.fours, 4, False), (turns.masked_fours, 4, True), (turns.masked_pairs, 2, True))
    return sum(
        taken * _turn(file, architecture, dtype, "maximum", vectors, torch.float32, True, "", masked)
        for taken, vectors, masked in kinds if taken
    )  # fmt: skip


def instructions_of_a_target_row(file: Path, architecture: str, classes: int, dtype: torch.dtype) -> float:
    """The same for a row of the target head with a label, beside a source head of 1000 classes."""
    plan = backends.cuda_loss_plan(256, 1000, classes, source_dtype=dtype)["target"]
    turns = turns_of_a_row(classes * dtype.itemsize // 16, 0, plan["threads_per_row"])
    total = _maximum(file, architecture, dtype, turns) + turns.rest * sum(
        _turn(file, architecture, dtype, sweep, 1, torch.float32, True, "", False)
        for sweep in ("target sums", "target gradient")
    )
    return total * _LANES / classes


def share_elsewhere(classes: int, dtype: torch.dtype, of_r: torch.dtype = torch.float32) -> float:
    """The share of pairs of a row of logits and a row of R whose offsets in 16 bytes differ, for dense matrices."""
    vector, of_row, rows = 16 // dtype.itemsize, 16 // of_r.itemsize, range(16)
    pairs = [(classes * i % vector, classes * j % of_row) for i in rows for j in rows]
    return sum((b - a) % of_row != 0 for a, b in pairs) / len(pairs)


# ------------------------------------------------------------------------------------------------------------ the table


class Measured(NamedTuple):
    """The numbers of the committed table; for all of them less is better."""

    nvcc: str
    registers: dict[str, int]
    instructions: dict[str, float]


def measure(file: Path) -> Measured:
    """Registers of every kernel and, if the library is for sm_90, instructions per element."""
    used = resources(file)
    registers = {f"{usage.architecture}: {readable(usage.kernel)}": usage.registers for usage in used}
    instructions = {}
    if any(usage.architecture == "sm_90" for usage in used):
        for classes in SHAPES:
            for dtype, of_r in PAIRS:
                for alike in (True, False) if share_elsewhere(classes, dtype, of_r) else (True,):
                    name = f"sm_90: {classes}, {named(dtype, of_r)}, {'alike' if alike else 'elsewhere'}"
                    instructions[name] = round(instructions_of_a_row(file, "sm_90", classes, dtype, alike, of_r), 2)
        for dtype in DTYPES:
            name = f"sm_90: target head of {TARGET_CLASSES}, {named(dtype, torch.float32)}"
            instructions[name] = round(instructions_of_a_target_row(file, "sm_90", TARGET_CLASSES, dtype), 2)
    return Measured((backends.cuda_build() or "").partition(":")[0], registers, instructions)


def recorded() -> Measured:
    return Measured(**json.loads(TABLE.read_text()))


def differences(now: Measured, before: Measured) -> list[str]:
    """A sentence for each number that is off by more than a twentieth: worse, or so much better that the table would
    hide the next change. Cards that the table or the library lacks are left out."""
    said = []
    for what in ("registers", "instructions"):
        numbers, table = getattr(now, what), getattr(before, what)
        cards = {name.partition(":")[0] for name in numbers} & {name.partition(":")[0] for name in table}
        for name in sorted(numbers.keys() | table.keys()):
            if name.partition(":")[0] not in cards:
                continue
            if name not in numbers or name not in table:
                said.append(f"{name}: {what} only in {'the table' if name in table else 'the library'}")
                continue
            ratio = numbers[name] / table[name]
            change = f"{name}: {what} {table[name]} -> {numbers[name]}"
            if ratio > 1 + TOLERANCE:
                said.append(f"{change}, worse")
            elif ratio < 1 - TOLERANCE:
                said.append(f"{change}, better: renew the table (python -m tools.machine_code --write cuda)")
    return said


# ------------------------------------------------------------------------------------------------------------- printing


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def usage_table(file: Path) -> str:
    """Usage by kernel and architecture; kernels of one name with the same numbers share a line."""
    used = resources(file)
    architectures = sorted({usage.architecture for usage in used}, key=lambda name: int(name.removeprefix("sm_")))
    rows: list[list[object]] = []
    for kernel in sorted({usage.kernel for usage in used}, key=readable):
        of = {usage.architecture: usage.registers for usage in used if usage.kernel == kernel}
        rows.append([readable(kernel), *(of.get(architecture, "") for architecture in architectures)])
    for name in sorted({readable(usage.kernel).partition(",")[0] for usage in used}):
        named = [usage for usage in used if readable(usage.kernel).partition(",")[0] == name]
        bytes_of = [{usage.shared for usage in named if usage.architecture == a} for a in architectures]
        rows.append([f"bytes of static shared memory, {name}", *("-".join(map(str, sorted(x))) for x in bytes_of)])
    for what, count in (("stack or local memory", _stack), ("spills (loads and stores of local memory)", _spills)):
        rows.append([f"{what}, all kernels", *(count(file, architecture, used) for architecture in architectures)])
    return _table(["registers", *architectures], rows)


def _stack(_file: Path, architecture: str, used: list[Usage]) -> int:
    return sum(usage.stack + usage.local for usage in used if usage.architecture == architecture)


def _spills(file: Path, architecture: str, _used: list[Usage]) -> int:
    return sum(
        instruction.operation.split(".")[0] in ("LDL", "STL")
        for code in disassemble(file, architecture).values()
        for instruction in code.values()
    )


def instructions_table(file: Path, architecture: str) -> str:
    """By shape: instructions per element, what the plan keeps, and the share of rows with different offsets."""
    rows: list[list[object]] = []
    for dtype, of_r in PAIRS:
        row: list[object] = [named(dtype, of_r)]
        for classes in SHAPES:
            plan = backends.cuda_loss_plan(256, classes, source_dtype=dtype)["source"]
            elsewhere = share_elsewhere(classes, dtype, of_r)
            numbers = [instructions_of_a_row(file, architecture, classes, dtype, True, of_r)]
            if elsewhere:
                numbers.append(instructions_of_a_row(file, architecture, classes, dtype, False, of_r))
            kept = sum(plan[name] for name in KEPT) / plan["vectors"]
            row.append(f"{', '.join(f'{x:.1f}' for x in numbers)} (R kept {kept:.0%}, {elsewhere:.0%} elsewhere)")
        target = instructions_of_a_target_row(file, architecture, TARGET_CLASSES, dtype)
        rows.append([*row, f"{target:.1f}"])
    heads = [*(f"{n} alike, elsewhere" for n in SHAPES), f"target head of {TARGET_CLASSES}"]
    return _table([f"{architecture}: logits", *heads], rows)


def sweeps_table(file: Path, architecture: str) -> str:
    """By loop: instructions for a vector of 16 bytes of logits, and its accesses."""
    rows: list[list[object]] = []
    for dtype, of_r in PAIRS:
        for alike in (True, False):
            for where in (*KEPT.values(), "nowhere"):
                # With R in 16 bits, the loop that keeps it nowhere accesses as much as one with R in float32.
                if (where == "registers" and dtype != torch.float32) or (where == "nowhere" and of_r.itemsize == 2):
                    continue
                row: list[object] = [named(dtype, of_r), "alike" if alike else "elsewhere", where]
                for loop in sweeps(_code_of(file, architecture, dtype), dtype, alike, where, of_r).values():
                    accesses = ", ".join(f"{count} {what}" for what, count in loop.accesses.items())
                    row.append(f"{loop.instructions:.3g}: {accesses}")
                rows.append(row)
    return _table(["logits", "R starts", "R is kept", "maximum", "sums", "gradient"], rows)


def widths_table(file: Path, architecture: str) -> str:
    """All accesses to global memory in a kernel's code, by bytes. The narrow ones are for ends of rows, labels, results
    and unaligned data."""
    rows: list[list[object]] = []
    for kernel, code in sorted(disassemble(file, architecture).items(), key=lambda item: readable(item[0])):
        counts = collections.Counter(access(instruction.operation) for instruction in code.values())
        loads, stores = (
            ", ".join(f"{counts[f'{name} {width}']} of {width}" for width in (16, 8, 4, 2) if counts[f"{name} {width}"])
            for name in ("LDG", "STG")
        )
        rows.append([readable(kernel), loads, stores])
    return _table([f"{architecture}", "loads, bytes", "stores, bytes"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="what nvcc made of the CUDA kernels; it needs no GPU")
    parser.add_argument("library", nargs="?", type=Path, help="default: that of the installed cotuning_kernels")
    arguments = parser.parse_args()
    try:
        file = arguments.library or library()
        print(usage_table(file), end="\n\n")
        if any(usage.architecture == "sm_90" for usage in resources(file)):
            for table in (instructions_table, sweeps_table, widths_table):
                print(table(file, "sm_90"), end="\n\n")
    except LookupError as error:
        sys.exit(f"tools.machine_code.cuda: {error}")


if __name__ == "__main__":
    main()
