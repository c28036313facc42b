"""One page about this machine: how the time of the loss grows, beside other formulations and beside a copy.

    python -m benchmarks page --output benchmark_page     about ten minutes; writes page.md, pictures and page.json
    python -m benchmarks page --device cuda               the same on a GPU, in the device's time
    python -m benchmarks page --limit 100                 as much of it as fits into 100 s, the shapes first

A *copy* reads the logits of both heads and writes as many bytes. A forward and backward pass needs at least this time
when nothing stays in the caches. The *share of the copy* is its time over ours. On a GPU, times are the device's, with
empty caches (:class:`benchmarks.timing.DeviceStopwatch`). Each row of the relationship that a label names must then be
read once as well, so the copy counts these bytes too. Another table has the host's time of a call.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from tqdm import tqdm

from benchmarks import memory, ratios
from benchmarks.contestants import (
    LOSS_CONTESTANTS,
    OURS,
    TRITON,
    ExpectedLoss,
    LossContestant,
    check_loss,
    forward_and_backward,
    prepare,
    unavailable,
)
from benchmarks.problems import DTYPES, SHAPES, LossProblem, Shape
from benchmarks.timing import DeviceStopwatch, Timing, capture, host_stopwatch, interleave, synchronizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Memory", "Point", "measure", "measure_memory", "sweeps", "write_page"]

Case = tuple[Shape, str, int]
Key = TypeVar("Key")
Value = TypeVar("Value")

COPY = "copy of the logits"
# Compared at every shape: the formulation that people move from, and PyTorch's best single call ...
BESIDE = ("tllib", "F.cross_entropy")
# ... and all contestants at the shapes of the promises (torch.compile takes a while for each).
CONTESTANTS = (*LOSS_CONTESTANTS, TRITON)
EVERYBODY = tuple(contestant.name for contestant in CONTESTANTS if contestant.name != OURS)
# Logits of a step when the classes grow: with gradients they fit a cache of 32 MB, and they keep two threads busy.
SWEEP_ELEMENTS = 2**21


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        sweep: a key of :func:`sweeps`.
        shape: ``[B, N_t, N_s]``.
        seconds: medians by name; :data:`COPY` is the copy. On a GPU, seconds of the device.
        loss_bytes: bytes of both heads' logits.
        host_seconds: on a GPU, medians by name of the time until the host has queued a call; else empty.
        relationship_bytes: on a GPU, bytes of the distinct rows of the relationship that the labels name; else 0, since
            a processor's caches keep these rows from call to call.
        warm_seconds: on a GPU, the median of ours from the caches that the same call left.
        graph_seconds: on a GPU, the median of a captured graph of ours, from empty caches.
        behind: on a GPU, by name the share of the samples in which the host was not ahead of the device. Medians leave
            them out, unless that is all of them.
    """

    sweep: str
    shape: list[int]
    dtype: str
    threads: int
    seconds: dict[str, float]
    loss_bytes: int
    host_seconds: dict[str, float] = field(default_factory=dict)
    relationship_bytes: int = 0
    warm_seconds: float = 0.0
    graph_seconds: float = 0.0
    behind: dict[str, float] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return Shape(*self.shape).logits

    def share_of_copy(self) -> float:
        bound = self.seconds[COPY] * (1 + self.relationship_bytes / (2 * self.loss_bytes))
        return bound / self.seconds[OURS]

    def copy_bandwidth(self) -> float:
        """The bytes that the copy reads and writes in a second."""
        return 2 * self.loss_bytes / self.seconds[COPY]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one forward and backward pass beyond the logits, both gradients included.

    Attributes:
        shape: ``[B, N_t, N_s]``.
        peaks: bytes by name.
        gradient_bytes: bytes of both gradients, as many as the logits have.
    """

    shape: list[int]
    dtype: str
    peaks: dict[str, int]
    gradient_bytes: int


def sweeps(
    largest_batch: int = 131_072, largest_head: int = 262_144, threads: Sequence[int] = (1, 2), most_rows: int = 2**31
) -> dict[str, list[Case]]:
    """The cases of each sweep: shape, dtype, threads of the host. Every batch is cut to ``most_rows``."""
    batches = [4**k for k in range(9) if 4**k < largest_batch] + [largest_batch]
    heads = [columns for columns in (10, 32, 100, 320, 1000, 3200, 10_000, 32_000, 100_000) if columns < largest_head]
    heads.append(largest_head)
    cases = {
        "shapes": [(shape, dtype, number) for dtype in DTYPES for number in threads for shape in SHAPES],
        "batch": [(Shape(batch, 200, 1000), "float32", 1) for batch in batches],
        "source classes": [(Shape(max(1, SWEEP_ELEMENTS // n), 100, n), "float32", 1) for n in heads],
    }
    return {
        sweep: list(dict.fromkeys((_cut(shape, most_rows), dtype, number) for shape, dtype, number in each))
        for sweep, each in cases.items()
    }


def _cut(shape: Shape, most_rows: int) -> Shape:
    return shape._replace(batch=min(shape.batch, most_rows))


def measure(
    sweep: str, shape: Shape, dtype: str, threads: int, *, device: str, seconds: float, compiled: bool = True
) -> Point:
    """Compare all contestants with the reference, then time them and the copy in turns.

    ``compiled`` is false to leave out the contestants that compile first, which takes seconds for each shape.
    """
    torch.set_num_threads(threads)
    problem = LossProblem.make(shape, DTYPES[dtype], device=device)
    on_a_gpu = torch.device(device).type == "cuda"
    if on_a_gpu:
        problem = problem.with_labels_on_the_device()
    names = (OURS, *(EVERYBODY if sweep == "shapes" else BESIDE))
    contestants = [
        each
        for each in CONTESTANTS
        if each.name in names and (compiled or not each.compiles)
        and (each.name == OURS or unavailable(each, device) is None)
    ]  # fmt: skip
    steps = prepare(contestants, problem)
    _check(contestants, steps, problem)
    logits = (problem.source_logits.detach(), problem.target_logits.detach())
    copies = tuple(map(torch.empty_like, logits))

    def copy() -> None:
        for to, values in zip(copies, logits, strict=True):
            to.copy_(values)

    calls = {name: forward_and_backward(step) for name, step in steps.items()}
    run = partial(interleave, seconds=seconds, before_each=problem.clear_gradients)
    host: dict[str, Timing] = {}
    warm = graph = 0.0
    behind: dict[str, float] = {}
    if on_a_gpu:
        # A turn is one call, since the caches are emptied before each; max_rounds keeps this to a few seconds.
        times = run({**calls, COPY: copy}, stopwatch=DeviceStopwatch(device), max_rounds=200)
        host = run(calls, stopwatch=host_stopwatch(before=synchronizer(device)), max_rounds=200)
        warm, graph = _warm_and_graph(steps[OURS], problem, device, seconds)
        behind = {name: each.behind for name, each in times.items()}
    else:
        times = run({**calls, COPY: copy}, turn=0.002)
    medians, host_medians = ({name: each.median for name, each in found.items()} for found in (times, host))
    size = sum(each.numel() * each.element_size() for each in logits)
    relationship = 0
    if on_a_gpu:
        row = problem.relationship[0]
        relationship = problem.labels.unique().numel() * row.numel() * row.element_size()
    return Point(
        sweep, list(shape), dtype, threads, medians, size, host_medians, relationship, warm, graph, behind
    )  # fmt: skip


def _warm_and_graph(
    step: Callable[[], torch.Tensor], problem: LossProblem, device: str, seconds: float
) -> tuple[float, float]:
    """Medians of a step from warm caches, and of its captured graph from empty ones."""

    def call() -> tuple[torch.Tensor, ...]:  # adds to no gradient of an earlier call
        return torch.autograd.grad(step(), (problem.source_logits, problem.target_logits))

    def median(timed: Callable[[], object], *, warm: bool) -> float:
        stopwatch = DeviceStopwatch(device, warm=warm)
        return interleave({OURS: timed}, seconds=seconds, stopwatch=stopwatch, max_rounds=200)[OURS].median

    _, graph = capture(call)
    return median(call, warm=True), median(graph.replay, warm=False)


def measure_memory(shape: Shape, dtype: str, *, device: str) -> Memory:
    """Resident bytes on Linux with a CPU, in a process for each, else the bytes that torch allocates, in this one."""
    here = torch.device(device).type == "cuda"  # a process would take seconds to start, and torch counts exactly
    peaks = {}
    for name in (OURS, *BESIDE):
        peak = (memory.measure_loss_here if here else memory.measure_loss)(name, shape, dtype, device=device)
        peaks[name] = peak.torch if peak.resident is None else peak.resident
    return Memory(list(shape), dtype, peaks, shape.logits * DTYPES[dtype].itemsize)


def _check(
    contestants: Iterable[LossContestant], steps: dict[str, Callable[[], torch.Tensor]], problem: LossProblem
) -> None:
    expected = ExpectedLoss(problem)
    for contestant in contestants:
        check_loss(contestant, steps[contestant.name], expected)


# --------------------------------------------------------------------------------------------------------- the page


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.{0 if seconds >= 1e-5 else 1}f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _multiples(values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name] / values[OURS]:.2f}x" if name in values else "" for name in names]


def _everybody_in(measured: Sequence[Mapping[str, float]]) -> list[str]:
    return [name for name in EVERYBODY if any(name in each for each in measured)]


def _table(points: Sequence[Point]) -> str:
    names = _everybody_in([point.seconds for point in points])
    columns = ["B x N_t x N_s", "dtype", "threads", "ours", *names, "share of a copy", "the copy"]
    rows = (
        [
            str(Shape(*point.shape)), point.dtype, str(point.threads), _time(point.seconds[OURS]),
            *_multiples(point.seconds, names), f"{100 * point.share_of_copy():.0f} %",
            f"{point.copy_bandwidth() / 1e9:.0f} GB/s",
        ]
        for point in points
    )  # fmt: skip
    return _markdown(columns, rows)


def _host_table(points: Sequence[Point]) -> str:
    names = _everybody_in([point.host_seconds for point in points])
    rows = (
        [str(Shape(*each.shape)), each.dtype, _time(each.host_seconds[OURS]), *_multiples(each.host_seconds, names)]
        for each in points
    )
    return _markdown(["B x N_t x N_s", "dtype", "ours", *names], rows)


def _caches_table(points: Sequence[Point]) -> str:
    rows = (
        [
            str(Shape(*each.shape)), each.dtype, _time(each.seconds[OURS]), _time(each.warm_seconds),
            _time(each.graph_seconds), f"{100 * each.behind.get(OURS, 0):.0f} %",
            ", ".join(name for name, share in each.behind.items() if share == 1) or "none",
        ]
        for each in points
    )  # fmt: skip
    columns = ["empty caches", "warm caches", "graph, empty caches", "left out", "always waits"]
    return _markdown(["B x N_t x N_s", "dtype", *columns], rows)


def _threads_table(points: Sequence[Point]) -> str:
    by_key = {(Shape(*point.shape), point.dtype, point.threads): point.seconds[OURS] for point in points}
    rows = (
        [str(shape), dtype, f"{seconds / by_key[shape, dtype, 2]:.2f}x"]
        for (shape, dtype, threads), seconds in by_key.items()
        if threads == 1 and (shape, dtype, 2) in by_key
    )
    return _markdown(["B x N_t x N_s", "dtype", "speed-up by two threads"], rows)


def _memory_table(memories: Sequence[Memory]) -> str:
    rows = (
        [
            str(Shape(*each.shape)), each.dtype, f"{each.gradient_bytes / 1e6:.1f} MB",
            f"{each.peaks[OURS] / 1e6:.1f} MB", *_multiples(each.peaks, BESIDE),
        ]
        for each in memories
    )  # fmt: skip
    return _markdown(["B x N_t x N_s", "dtype", "the gradients", "ours", *BESIDE], rows)


def _plot_growth(axes: Axes, points: Sequence[Point], index: int, label: str) -> None:
    for name in (OURS, *BESIDE, COPY):
        style = "--" if name == COPY else "-"
        axes.plot(
            [point.shape[index] for point in points],
            [1e9 * point.seconds[name] / point.elements for point in points],
            style, marker="o", markersize=3, linewidth=2 if name == OURS else 1, label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ns a logit (forward and backward)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plot_bars(axes: Axes, points: Sequence[Point], values: dict[str, Callable[[Point], float]], label: str) -> None:
    """Draw a group of bars for each point, with a bar for each named value."""
    height = 0.8 / len(values)
    for bar, (name, value) in enumerate(values.items()):
        middles = [row + (bar - (len(values) - 1) / 2) * height for row in range(len(points))]
        axes.barh(middles, [value(point) for point in points], height, label=name)
    axes.set_yticks(range(len(points)), [str(Shape(*point.shape)) for point in points])
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.grid(axis="x", alpha=0.3)
    if len(values) > 1:
        axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))


def _ratio_to_ours(name: str, point: Point) -> float:
    return point.seconds[name] / point.seconds[OURS]


def write_page(points: Sequence[Point], memories: Sequence[Memory], environment: dict[str, str], output: Path) -> Path:
    """Write ``page.md`` with its pictures, and ``page.json`` with all measurements."""
    from matplotlib.figure import Figure

    output.mkdir(parents=True, exist_ok=True)
    of = {sweep: [point for point in points if point.sweep == sweep] for sweep in ("shapes", "batch", "source classes")}
    plain = [point for point in of["shapes"] if point.dtype == "float32" and point.threads == 1]
    others = [name for name in EVERYBODY if all(name in point.seconds for point in plain)]
    ratios_to_ours: dict[str, Callable[[Point], float]] = {name: partial(_ratio_to_ours, name) for name in others}
    share_of_copy: dict[str, Callable[[Point], float]] = {COPY: lambda point: 100 * point.share_of_copy()}
    pictures: dict[str, tuple[Sequence[Point], Callable[[Axes], None]]] = {
        "batch": (of["batch"], lambda axes: _plot_growth(
            axes, of["batch"], 0, "rows of a batch (200 target, 1000 source classes)"
        )),
        "source_classes": (of["source classes"], lambda axes: _plot_growth(
            axes, of["source classes"], 2, f"source classes (about {SWEEP_ELEMENTS} logits a step)"
        )),
        "ratios": (plain, lambda axes: _plot_bars(axes, plain, ratios_to_ours, "times ours (float32, one thread)")),
        "copy": (plain, lambda axes: _plot_bars(axes, plain, share_of_copy, "% of a copy (float32, one thread)")),
    }  # fmt: skip
    for name, (shown, draw) in pictures.items():
        if not shown:  # left out after the limit
            continue
        figure = Figure(figsize=(6.5, 3.6), layout="constrained")
        draw(figure.subplots())
        figure.savefig(output / f"{name}.png", dpi=120)
    measured = {
        "environment": environment,
        "points": [asdict(point) for point in points],
        "memory": [asdict(each) for each in memories],
    }
    (output / "page.json").write_text(json.dumps(measured, indent=1) + "\n")
    page = output / "page.md"
    on_a_gpu = any(point.host_seconds for point in points)
    page.write_text(_PAGE.format(
        machine=", ".join(f"{name}: {value}" for name, value in environment.items()), ours=OURS,
        clock=_DEVICE_CLOCK if on_a_gpu else "", shapes=_table(of["shapes"]),
        beside=(
            _GPU.format(caches=_caches_table(of["shapes"]), host=_host_table(of["shapes"])) if on_a_gpu
            else _THREADS.format(threads=_threads_table(of["shapes"]))
        ),
        memory=_memory_table(memories),
        apart="as torch counts it" if on_a_gpu else "each measured in a separate process",
    ))  # fmt: skip
    return page


_PAGE = """\
# The Co-Tuning loss on one machine

{machine}

Forward and backward of the whole loss through the public API; medians of turns in one process. The table has the time
of `{ours}`, and the others as multiples of it. The *share of a copy* is the time of one copy of the logits over ours.
It is at most 100 % when nothing stays in the caches: the loss reads the logits and writes as many gradients.{clock}

{shapes}

![ratios of the others to ours](ratios.png) ![share of a copy](copy.png)

## How it grows

![with the batch](batch.png) ![with the source classes](source_classes.png)

{beside}
## Memory

The peak of one forward and backward pass beyond the logits, gradients included, {apart}. The others are multiples of
ours.

{memory}
"""

_DEVICE_CLOCK = """

Times are the device's own, from a call's first operation to its last. Before each call the caches are emptied, by work
that keeps the device busy until the host has queued the call. The labels are on the device, except for tllib, whose
relationship is on the host: its copies make the host wait for the device, and then the device for the host."""

_GPU = """\
## Caches and graphs

Times of `cotuning_kernels`. *Warm* caches hold what the same call left there. Samples in which the host was not ahead
of the device are left out of every median, except for contestants that always make the host wait.

{caches}

## The host

The time until the host has queued a call to an idle device. Where it is longer than the device's time, a loop of the
loss alone waits for Python and PyTorch.

{host}
"""

_THREADS = """\
## Two threads

{threads}
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark_page"), help="a folder; default %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds a measurement; default %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--largest-batch", type=int, default=131_072, help="rows; 131072 needs about 8 GB")
    parser.add_argument("--largest-head", type=int, default=262_144, help="source classes")
    parser.add_argument("--rows", type=int, default=2**31, help="cut every batch to this many rows, for a slow device")
    parser.add_argument("--eager", action="store_true", help="without the contestants that compile")
    parser.add_argument("--limit", type=float, help="seconds after which the rest is left out; compilers come last")
    parsed = parser.parse_args(arguments)
    ours = next(contestant for contestant in LOSS_CONTESTANTS if contestant.name == OURS)
    if reason := unavailable(ours, parsed.device):
        parser.exit(2, f"Nothing to measure: {reason}.\n")
    threads = (1,) if torch.device(parsed.device).type == "cuda" else (1, 2)
    run = partial(measure, device=parsed.device, seconds=parsed.seconds)
    cases = sweeps(parsed.largest_batch, parsed.largest_head, threads, parsed.rows)
    points: dict[tuple[str, Case], Point] = {}
    memories: dict[tuple[Shape, str], Memory] = {}
    compiled = parsed.limit is None and not parsed.eager
    work: list[Callable[[], object]] = [
        partial(_keep, points, (sweep, case), partial(run, sweep, *case, compiled=compiled))
        for sweep, each in cases.items()
        for case in each
    ]
    work += [
        partial(_keep, memories, (shape, dtype), partial(measure_memory, shape, dtype, device=parsed.device))
        for shape, dtype in dict.fromkeys((shape, dtype) for shape, dtype, _ in cases["shapes"])
    ]
    if parsed.limit is not None and not parsed.eager:
        work += [partial(_keep, points, ("shapes", case), partial(run, "shapes", *case)) for case in cases["shapes"]]
    left_out = _work_through(work, parsed.limit)
    environment = ratios.environment(parsed.device, "time passed" if len(threads) > 1 else "the device's")
    if len(threads) == 1:
        nothing = interleave({"": lambda: None}, seconds=0, stopwatch=DeviceStopwatch(parsed.device))[""].median
        environment["two events with nothing between them"] = _time(nothing)
    if left_out:
        environment["left out after the limit"] = f"{left_out} of {len(work)} measurements"
    page = write_page(list(points.values()), list(memories.values()), environment, parsed.output)
    print(f"Written to {page}.")
    return 0


def _keep(found: dict[Key, Value], key: Key, measured: Callable[[], Value]) -> None:
    found[key] = measured()


def _work_through(work: Sequence[Callable[[], object]], limit: float | None) -> int:
    """Measure in this order until ``limit`` seconds have passed, and return how many measurements are left."""
    end = math.inf if limit is None else time.monotonic() + limit
    for done, each in enumerate(tqdm(work, unit="measurement")):
        if time.monotonic() > end:
            return len(work) - done
        each()
    return 0
