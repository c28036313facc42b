"""The compiled Triton kernels, on a machine without a GPU: registers, spills, widths of accesses, bytes.

``python -m tools.machine_code.triton`` prints the table of docs/triton.md, our kernels beside those of liger-kernel
(``pip install liger-kernel``); ``python -m tools.machine_code`` renews the recorded table.

The operations run on CPU tensors as they would on a GPU, up to the launch. A driver that reports the requested GPU
makes Triton specialise and compile the same kernels as for a user; none is run. The machine code is then read with the
disassemblers that Triton ships (NVIDIA), or from the assembly that Triton keeps (AMD).
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

__all__ = [
    "KERNELS",
    "TABLE",
    "TARGETS",
    "Compiled",
    "compiled_for",
    "measure",
    "measure_all",
    "ordinary_path",
    "worse",
]

_ROOT = Path(__file__).resolve().parents[2]
TABLE = _ROOT / "python_tests" / "recorded" / f"triton_static_{'.'.join(triton.__version__.split('.')[:2])}.json"
"""The table of the installed Triton: another version is another compiler."""

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

# ----------------------------------------------------------------------------------------------------------- compiling


class _Driver(DriverBase):
    """Reports a GPU that does not exist."""

    _devices = itertools.count(10_000)  # Triton caches kernels by device: a new number never gives another target's

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, next(self._devices)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is run")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One launch that was not run: its compiled kernel, and its arguments by name."""

    name: str
    grid: tuple[int, ...]
    kernel: Any
    arguments: dict[str, Any]


_compiled_before = tempfile.TemporaryDirectory(prefix="triton_static_")


@contextmanager
def compiled_for(target: GPUTarget, *, afresh: bool = False) -> Iterator[list[Compiled]]:
    """Compile the launches within the ``with`` block for ``target`` and collect them in the list; run none.

    Triton's cache serves kernels that this process has compiled before; ``afresh`` compiles them again.
    """
    launches: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Compiled(self.fn.__name__, grid, kernel, arguments))
        return kernel

    driver = triton.runtime.driver
    with (
        tempfile.TemporaryDirectory() as empty,
        triton.knobs.cache.scope(),
        mock.patch.object(driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.version, "hip", "a GPU of AMD" if target.backend == "hip" else None),
    ):
        triton.knobs.cache.dir = empty if afresh else _compiled_before.name
        yield launches


# ----------------------------------------------------------------------------------------------------------- measuring

_BYTES = {"": 4, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "short": 2, "sshort": 2, "byte": 1, "dword": 4, "dwordx2": 8,
              "dwordx3": 12, "dwordx4": 16}  # fmt: skip


def measure(compiled: Compiled) -> dict[str, Any]:
    """Numbers of one kernel that should not grow, and the widths of its accesses by number of bytes.

    ``bytes`` is the traffic of one program if all threads make every access once and no mask is off: that of a full
    tile for a kernel without loops, that of one iteration and the rest for a kernel with loops.

    Accesses, bytes and instructions are those of every program. In a kernel that counts its programs, that part ends at
    the first atomic; the code of the last programs alone comes after it (``finish``, in instructions).
    """
    if "cubin" in compiled.kernel.asm:
        return _measure_nvidia(compiled.kernel)
    return _measure_amd(compiled.kernel)


def _measure_nvidia(kernel: Any) -> dict[str, Any]:
    usage, sass = _disassemble(kernel.asm["cubin"])
    words = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    operations = [operation for operation, _ in _instructions(sass)]
    atomics = [k for k, x in enumerate(operations) if x.startswith(("ATOM", "RED")) and "REDUX" not in x]
    everyones = operations[: atomics[0] + 1 if atomics else len(operations)]
    widths = accesses(everyones)
    threads = kernel.metadata.num_warps * 32
    return _numbers(
        registers=int(words["REG"]),
        stack=int(words["STACK"]) + int(words["LOCAL"]),
        spills=sum(operation.startswith(("LDL", "STL")) for operation in operations),
        shared=kernel.metadata.shared,
        atomics=len(atomics),
        instructions=len(everyones),
        finish=len(operations) - len(everyones),
        widths=widths,
        threads=threads,
    )


def accesses(operations: Iterable[str]) -> collections.Counter[str]:
    """Loads and stores of NVIDIA's machine code by width, as ``"load 16"``."""
    widths: collections.Counter[str] = collections.Counter()
    for operation in operations:
        kind, *modifiers = operation.split(".")
        if kind in ("LDG", "STG"):
            width = next((m for m in modifiers if m in _BYTES), "")
            widths[f"{'load' if kind == 'LDG' else 'store'} {_BYTES[width]}"] += 1
    return widths


def _measure_amd(kernel: Any) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    atomics = [found.end() for found in re.finditer(r"^\s+(?:global|buffer|flat)_atomic", assembly, re.M)]
    everyones = assembly[: atomics[0] if atomics else len(assembly)]
    widths: collections.Counter[str] = collections.Counter()
    for access, size in re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_([a-z0-9]+)", everyones, re.M):
        widths[f"{access} {_AMD_BYTES[size]}"] += 1
    return _numbers(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),  # spilled scalar registers go to lanes of these, not to memory
        shared=number("group_segment_fixed_size"),
        atomics=len(atomics),
        instructions=_count_amd(everyones),
        finish=_count_amd(assembly) - _count_amd(everyones),
        widths=widths,
        threads=kernel.metadata.num_warps * 64,
    )


def _count_amd(assembly: str) -> int:
    return len(re.findall(r"^\s+[vs]_\w+|^\s+(?:global|buffer|flat|ds)_\w+", assembly, re.M))


def _numbers(*, widths: collections.Counter[str], threads: int, **others: int) -> dict[str, Any]:
    moved = threads * sum(count * int(width.split()[1]) for width, count in widths.items())
    return others | {"threads": threads, "bytes": moved, "accesses": dict(sorted(widths.items()))}


@cache
def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as text, from the tools that Triton ships."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            finished = subprocess.run(
                [str(tools / command[0]), *command[1:], file.name], capture_output=True, text=True
            )
            if finished.returncode:
                raise RuntimeError(f"{command[0]} failed: {finished.stderr.strip()}")
            return finished.stdout + finished.stderr

        return run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")


def _instructions(sass: str) -> Iterator[tuple[str, str]]:
    """``(operation, the rest of its line)``."""
    for found in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^\n]*)", sass, re.M):
        yield found[1], found[2]


# ------------------------------------------------------------------------------------------------------ ordinary path

_BRANCH = re.compile(r"(?P<guard>@!?U?P\w+\s+)?(?P<kind>BRA|EXIT|RET|BRX|JMP)\b(?P<rest>.*)")
_ARITHMETIC = re.compile(r"\b(FFMA|FMUL|FADD|F2FP|HADD2|FFMA2|FMUL2)")


def path_of(compiled: Compiled) -> list[str]:
    """The operations on the ordinary path of a kernel for NVIDIA's GPUs."""
    _, sass = _disassemble(compiled.kernel.asm["cubin"])
    return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in ordinary_path(sass)]


def ordinary_path(sass: str) -> list[str]:
    """Instructions that a program executes for a row that takes part and is finite: one side of each ``if``.

    The path ends at the first atomic, since only the last program runs the code after it. At a branch it takes the side
    that leads to more exponentials and more stores of computed numbers, and of equals the shorter one: rows that take
    no part compute nothing, and rows that are not finite come back to the ordinary path. A loop counts once.
    """
    before, atomic, _ = sass.partition("ATOM")
    blocks, follow = _basic_blocks(before + atomic + " ;")
    best: dict[int, tuple[tuple[int, int], list[int]] | None] = {}

    def longest(block: int) -> tuple[tuple[int, int], list[int]] | None:
        if block not in best:
            best[block] = None  # a loop does not come back here
            ways = [way for way in map(longest, follow[block]) if way]
            if ways or not follow[block]:
                (work, length), rest = max(ways, default=((0, 0), []))
                best[block] = (work + _work(blocks[block]), length - len(blocks[block])), [block, *rest]
        return best[block]

    found = longest(0)
    assert found is not None, "no way through the kernel"
    return [text for block in found[1] for text in blocks[block]]


def _work(code: list[str]) -> int:
    stores = sum("STG" in text for text in code) if any(map(_ARITHMETIC.search, code)) else 0
    return sum("MUFU.EX2" in text for text in code) + stores


def _basic_blocks(sass: str) -> tuple[list[list[str]], list[list[int]]]:
    """Straight pieces of the code, and the pieces that may follow each: a jump beyond the code goes to the last one."""
    blocks: list[list[str]] = [[]]
    names: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            if blocks[-1]:
                blocks.append([])
            names[label[1]] = len(blocks) - 1
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            blocks[-1].append(found[1])
            if _BRANCH.match(found[1]):
                blocks.append([])
    follow: list[list[int]] = []
    for number, code in enumerate(blocks):
        branch = _BRANCH.match(code[-1]) if code else None
        after = [number + 1] if number + 1 < len(blocks) else []
        if branch is None:
            follow.append(after)
            continue
        to = re.search(r"`\((\.L_x_\d+)\)", branch["rest"]) if branch["kind"] == "BRA" else None
        goes = [names.get(to[1], len(blocks) - 1)] if to else []
        is_sure = not branch["guard"] and not re.match(r"(\.\S+)?\s+!?U?P\w+\s*,|\.DIV", branch["rest"])
        follow.append(goes if is_sure else goes + after)
    return blocks, follow


# ------------------------------------------------------------------------------------------------------------- kernels

_ROWS = 48


def _loss(
    dtype: torch.dtype, target_classes: int, source_classes: int, target: str = "labels", *, heads: int = 2,
    gradient: bool = True, relationship: torch.dtype = torch.float32, stride: int | None = None, draws: bool = False,
    **options: Any,
) -> Callable[[], Any]:  # fmt: skip
    """``stride``: the row stride of the source logits, if it is more than their width. ``draws``: random values for the
    relationship, for a call that is run and not only compiled."""

    def call() -> Any:
        from cotuning_kernels.backends.triton.co_tuning_loss import co_tuning_loss

        labels = torch.zeros(_ROWS, dtype=torch.int64)
        shares = torch.ones(_ROWS, dtype=torch.float64)
        rows = _ROWS if target == "probabilities" else target_classes
        table = torch.empty(rows, source_classes, dtype=relationship)
        if draws:
            numbers = torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            table.copy_(numbers.softmax(1))
        arguments: dict[str, Any] = {
            "target": torch.empty(_ROWS, target_classes) if target == "probabilities" else labels,
            "target_b": labels if target == "pair" else None,
            "mix": None if target == "labels" else shares,
            "relationship": table,
            "weight": None,
            "trade_off": torch.tensor(2.3, dtype=torch.float64),
            "label_smoothing": 0.0,
            "ignore_index": -100,
            "reduction": 1,
            "kl_divergence": False,
            "source_gradient": gradient,
            "target_gradient": gradient,
        }
        source = torch.empty(_ROWS, stride or source_classes, dtype=dtype)[:, :source_classes]
        head = torch.empty(_ROWS, target_classes, dtype=dtype) if heads == 2 else None
        return co_tuning_loss(source, head, *(arguments | options).values())

    return call


def _sparse_loss(dtype: torch.dtype, target_classes: int, source_classes: int, entries: int) -> Callable[[], Any]:
    """A relationship of so many entries a row."""

    def call() -> Any:
        from cotuning_kernels.backends.triton.co_tuning_loss import sparse_co_tuning_loss

        crow = entries * torch.arange(target_classes + 1)
        rows = crow, torch.arange(entries).repeat(target_classes), torch.empty(target_classes * entries)
        heads = (torch.empty(_ROWS, n, dtype=dtype) for n in (source_classes, target_classes))
        labels = torch.zeros(_ROWS, dtype=torch.int64)
        options = None, torch.tensor(2.3, dtype=torch.float64), 0.0, -100, 1, False
        return sparse_co_tuning_loss(*heads, labels, None, None, *rows, *options, True, True)

    return call


def _scale(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> Any:
        from cotuning_kernels.backends.triton.scale_gradients import scale_gradients_

        gradients = torch.empty(_ROWS, 1000, dtype=dtype), torch.empty(_ROWS, 200, dtype=dtype)
        return scale_gradients_(*gradients, torch.ones(2), torch.ones(()))

    return call


def _others() -> None:
    from cotuning_kernels.backends.triton import IMPLEMENTATIONS

    logits, labels = torch.empty(_ROWS, 1000), torch.zeros(_ROWS, dtype=torch.int64)
    IMPLEMENTATIONS["translate_labels"](labels, None, None, torch.empty(200, 1000), -100)
    sums, counts = torch.zeros(200, 1000, dtype=torch.float64), torch.zeros(200, dtype=torch.int64)
    IMPLEMENTATIONS["add_class_sums_"](sums, counts, logits, labels, 1.0, -100)
    IMPLEMENTATIONS["temperature_terms"](logits, labels, 1.0, -100)


_F32, _BF16, _F16, _F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
_EVERY = tuple(TARGETS)
_ONE = ("sm_90",)
_TWO = ("sm_90", "gfx942")

KERNELS: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "loss, 200 x 1000, float32": (_EVERY, _loss(_F32, 200, 1000)),
    "loss, 200 x 1000, bfloat16": (_EVERY, _loss(_BF16, 200, 1000)),
    "loss, 200 x 1000, float16": (_ONE, _loss(_F16, 200, 1000)),
    "loss, 200 x 1000, float64": (_TWO, _loss(_F64, 200, 1000, relationship=_F64)),
    "loss, 200 x 1000, float32, forward only": (_ONE, _loss(_F32, 200, 1000, gradient=False)),
    "loss, 200 x 1000, float32, pair, KL": (_TWO, _loss(_F32, 200, 1000, "pair", kl_divergence=True)),
    "loss, 200 x 1000, float32, probabilities, smoothing": (
        _TWO, _loss(_F32, 200, 1000, "probabilities", label_smoothing=0.1),
    ),
    "loss, source head of 1000, bfloat16, R in bfloat16": (
        _ONE, _loss(_BF16, 200, 1000, heads=1, relationship=_BF16),
    ),
    "loss, 200 x 1002, float32": (_ONE, _loss(_F32, 200, 1002)),
    "loss, source head of 1000 in rows of 1004, bfloat16": (_TWO, _loss(_BF16, 200, 1000, heads=1, stride=1004)),
    "loss, source head of 1000 in rows of 1001, float32": (_TWO, _loss(_F32, 200, 1000, heads=1, stride=1001)),
    "loss, 9 x 30522, float32": (_TWO, _loss(_F32, 9, 30522)),
    "loss, 9 x 30522, bfloat16": (_EVERY, _loss(_BF16, 9, 30522)),
    "loss, source head of 32000, float32": (_TWO, _loss(_F32, 9, 32000, heads=1)),
    "loss, source head of 32000, bfloat16, R in bfloat16": (
        _TWO, _loss(_BF16, 9, 32000, heads=1, relationship=_BF16),
    ),
    "loss, source head of 128256, bfloat16, R in bfloat16": (
        _TWO, _loss(_BF16, 9, 128256, heads=1, relationship=_BF16),
    ),
    "loss, 1000 x 16384, float32": (_TWO, _loss(_F32, 1000, 16384)),
    "loss, 1000 x 8192, float32, pair, KL": (_ONE, _loss(_F32, 1000, 8192, "pair", kl_divergence=True)),
    "loss, 1000 x 21841, bfloat16, pair, KL": (_TWO, _loss(_BF16, 1000, 21841, "pair", kl_divergence=True)),
    "loss, 1000 x 21840, bfloat16, sparse": (_TWO, _sparse_loss(_BF16, 1000, 21840, 64)),
    "scaling, 200 x 1000, float32": (_ONE, _scale(_F32)),
    "scaling, 200 x 1000, bfloat16": (_TWO, _scale(_BF16)),
    "translation, class sums, temperature, 200 x 1000": (_TWO, _others),
}  # fmt: skip
"""By name: the targets that it is compiled for (the core for all of them, the others for one GPU or one of each
maker) and the call whose launches are measured."""


def launches_of(name: str, target: str) -> list[Compiled]:
    with compiled_for(TARGETS[target]) as launches:
        KERNELS[name][1]()
    return launches


def measure_all(names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """``{"target: kernel of call": numbers}``."""
    table: dict[str, dict[str, Any]] = {}
    for name in KERNELS if names is None else names:
        for target in KERNELS[name][0]:
            for compiled in launches_of(name, target):
                table[f"{target}: {compiled.name.removesuffix('_kernel')} of {name}"] = measure(compiled)
    return table


_MAY_NOT_GROW = ("registers", "stack", "spills", "shared", "atomics", "bytes")


def worse(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A sentence for each number that is worse; instructions may grow by a twentieth, accesses not at all."""
    said = [f"{name} {before[name]} -> {now[name]}" for name in _MAY_NOT_GROW if now[name] > before[name]]
    for name in ("instructions", "finish"):
        if now[name] > before[name] * 1.05:
            said.append(f"{name} {before[name]} -> {now[name]}")
    accesses = [sum(numbers["accesses"].values()) for numbers in (before, now)]
    if accesses[1] > accesses[0]:
        said.append(f"accesses {before['accesses']} -> {now['accesses']}")
    return said


def table() -> dict[str, Any]:
    """The new content of :data:`TABLE`."""
    return {"triton": triton.__version__, "kernels": measure_all()}


def recorded() -> dict[str, Any]:
    """The recorded table of the installed Triton; without one, a table that is of no version and has no kernel."""
    if not TABLE.exists():
        return {"triton": None, "kernels": {}}
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


# ------------------------------------------------------------------------------------------------- beside liger-kernel


def _liger(dtype: torch.dtype, classes: int) -> Callable[[], Any]:
    def call() -> Any:
        from liger_kernel.ops.cross_entropy import cross_entropy_forward

        logits = torch.zeros(_ROWS, classes, dtype=dtype, requires_grad=True)
        labels = torch.zeros(_ROWS, dtype=torch.int64)
        return cross_entropy_forward(logits, labels, None, -100, 0.0, 0.0, "mean", None, False)

    return call


def instructions_by_element(compiled: Compiled, width: int, sweeps: int, writes: int, only: str = r"\S") -> float:
    """Instructions of all threads per element of a row, for a kernel with one row per program. Loops that only read
    count ``sweeps`` times, loops that also write ``writes`` times, other code once; both sides of an ``if`` too. Loops
    without reads do not count: they fill the gradients of rows that take no part with zeros. ``only``: a
    pattern for the beginning of the operations that count."""
    _, sass = _disassemble(compiled.kernel.asm["cubin"])
    sass = re.split(r"\bATOM", sass)[0]  # only the last program runs the code after it
    text = sass.splitlines()
    loops = _loop_ranges(sass)
    issued = 0
    for line, instruction in enumerate(text):
        if re.match(rf"\s+/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+\s+)?{only}", instruction):
            around = ["\n".join(text[first : last + 1]) for first, last in loops if first <= line <= last]
            reads = all("LDG" in x for x in around)
            turns = writes if any("STG" in x for x in around) else sweeps
            issued += (turns if around else 1) if reads else 0
    return issued * compiled.kernel.metadata.num_warps * 32 / width


def _loop_ranges(sass: str) -> list[tuple[int, int]]:
    """Lines from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for line, text in enumerate(sass.splitlines()):
        if found := re.match(r"\s*(\.L_x_\d+):", text):
            labels[found[1]] = line
        elif (found := re.search(r"\bBRA\S*\s.*`\((\.L_x_\d+)\)", text)) and found[1] in labels:
            ranges[found[1]] = labels[found[1]], line
    # The branch to itself after the end of a kernel is no loop.
    return [(first, last) for first, last in ranges.values() if last - first > 2]


def path_by_element(compiled: Compiled, width: int) -> float:
    """Instructions of all threads per element of a row, on the ordinary path of a kernel with one row per program."""
    return len(path_of(compiled)) * compiled.kernel.metadata.num_warps * 32 / width


def bytes_by_logit(call: Callable[[], Any], width: int, loops: bool) -> float:
    """Bytes per logit that an interpreted call loads and stores; accesses that are masked off do not count."""
    sys.path.insert(0, str(_ROOT / "python_tests"))
    from support.triton_interpreter import interpreted, traffic
    from support.triton_stand_in import MODULES

    modules = list(MODULES)
    if not loops:
        from liger_kernel.ops import cross_entropy

        modules.append(cross_entropy)
    with interpreted(*modules), traffic() as moved:
        call()
    return (moved["load"] + moved["store"]) / (_ROWS * width)


def liger_table() -> str:
    """A Markdown table: liger-kernel's cross entropy with gradient, and ours of the source head, for sm_90."""
    rows = [
        "| classes, dtype | kernel | launches | threads | registers | spills | shared memory | widest load, store "
        "(bytes) | instructions an element | bytes moved a logit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for classes, dtype in itertools.product((1000, 16384, 21841, 32000), (_F32, _BF16)):
        ours = _loss(dtype, 9, classes, heads=1, relationship=dtype, draws=True)
        for who, call in (("liger", _liger(dtype, classes)), ("ours", ours)):
            with compiled_for(TARGETS["sm_90"]) as launches:
                call()
            (kernel,) = launches
            numbers = measure(kernel)
            widest = [max(int(w.split()[1]) for w in numbers["accesses"] if w.startswith(k)) for k in ("load", "store")]
            rows.append(
                f"| {classes}, {str(dtype).removeprefix('torch.')} | {who} | {len(launches)} | {numbers['threads']} | "
                f"{numbers['registers']} | {numbers['spills']} | {numbers['shared']} | {widest[0]}, {widest[1]} | "
                f"{path_by_element(kernel, classes):.1f} | "
                f"{bytes_by_logit(call, classes, who == 'ours'):.1f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    print(liger_table())
