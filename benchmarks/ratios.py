"""One table: how many times faster and smaller cotuning_kernels is than the formulations people use today.

    python -m benchmarks ratios                     about six minutes: every shape, float32, one thread
    python -m benchmarks ratios --full              both dtypes, one and two threads, longer
    python -m benchmarks ratios --shapes 48x200x1000 --parts loss --json result.json

All contestants are first checked to return the same loss and gradients. ``benchmarks/README.md`` explains the numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import cotuning_kernels as ck
from benchmarks import language_head, memory, reverse_relationship
from benchmarks.contestants import (
    LOSS_CONTESTANTS,
    OURS,
    RELATIONSHIP_CONTESTANTS,
    TEMPERATURE_CONTESTANTS,
    ExpectedLoss,
    check_loss,
    check_relationship,
    check_temperature,
    forward_and_backward,
    our_backend,
    prepare,
    unavailable,
)
from benchmarks.problems import (
    CALIBRATION_CLASSES,
    CALIBRATION_ROWS,
    DTYPES,
    RELATIONSHIP_BATCHES,
    RELATIONSHIP_SHAPE,
    SHAPES,
    TEMPERATURES,
    CalibrationProblem,
    LossProblem,
    RelationshipProblem,
    Shape,
    parse_shape,
)
from benchmarks.processes import run_apart
from benchmarks.timing import Timing, host_stopwatch, interleave, synchronizer

__all__ = ["Row", "environment", "main", "missed_floors", "render_table"]

_CHECKOUT = Path(__file__).resolve().parents[1]
PARTS = ("loss", "memory", "relationship", "temperature", "reverse", "language_head")
COMPILED = tuple(contestant.name for contestant in LOSS_CONTESTANTS if contestant.compiles)

# The promises of cotuning_kernels on a CPU with one thread: at least this many times faster than tllib ...
FLOORS_FLOAT32 = dict(zip(SHAPES, (4.5, 4.5, 5.0, 5.0, 3.5, 3.5), strict=True))
FLOOR_BFLOAT16 = 4.0
# ... than torch.compile at each of these shapes; than the authors' calibration; and than tllib's relationship, in one
# update and in batches, with the system's malloc, where half of tllib's time is fresh memory for its copies.
FLOOR_COMPILED = 2.8
FLOOR_TEMPERATURE = 25.0
FLOOR_RELATIONSHIP = 8.0
FLOOR_RELATIONSHIP_BATCHES = 4.0
# The whole path of penalties against two ways to call scikit-learn; the wordpiece head against the authors' way.
FLOORS_REVERSE = {"same objectives": 5.0, "of 2020": 10.0}
FLOOR_LANGUAGE_HEAD = 4.0

MEMORY_SHAPE = Shape(32768, 200, 1000)


@dataclass
class Row:
    """One line of the table.

    Attributes:
        measurement: its name in the table.
        dtype: dtype of the logits.
        threads: torch's threads.
        unit: ``"s"`` or ``"B"``.
        values: per contestant, median seconds or peak bytes.
        ratios: per baseline, its value over ours.
        spreads: per baseline, half the distance between the quartiles of the round-by-round ratio, relative to it.
        floors: per baseline, the least promised ratio.
        rounds: how often each contestant was timed; 0 for memory.
    """

    measurement: str
    dtype: str
    threads: int
    unit: str
    values: dict[str, float]
    ratios: dict[str, float]
    spreads: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    rounds: int = 0

    @classmethod
    def of_times(
        cls, measurement: str, dtype: str, threads: int, times: dict[str, Timing], floors: dict[str, float]
    ) -> Row:
        ours = times[OURS]
        baselines = {name: timing for name, timing in times.items() if name != OURS}
        spreads = {}
        for name, timing in baselines.items():
            low, high = timing.ratio_quartiles(ours)
            spreads[name] = (high - low) / 2 / timing.ratio_to(ours)
        return cls(
            measurement,
            dtype,
            threads,
            "s",
            {name: timing.median for name, timing in times.items()},
            {name: timing.ratio_to(ours) for name, timing in baselines.items()},
            spreads,
            {name: floor for name, floor in floors.items() if name in baselines},
            len(ours.seconds),
        )

    @classmethod
    def of_bytes(cls, measurement: str, dtype: str, threads: int, peaks: dict[str, int]) -> Row:
        ratios = {name: peak / max(peaks[OURS], 1) for name, peak in peaks.items() if name != OURS}
        return cls(measurement, dtype, threads, "B", {name: float(peak) for name, peak in peaks.items()}, ratios)


def missed_floors(rows: Iterable[Row]) -> list[str]:
    """A sentence for each ratio that is below its floor."""
    return [
        f"{row.measurement}, {row.dtype}, {row.threads} thread(s): {row.ratios[name]:.2f} times {name}, "
        f"promised {floor:g}"
        for row in rows
        for name, floor in row.floors.items()
        if not row.ratios[name] >= floor
    ]


def render_table(rows: Sequence[Row]) -> str:
    """A Markdown table with aligned columns."""
    baselines = list(dict.fromkeys(name for row in rows for name in row.ratios))
    header = ["measured", "dtype", "threads", OURS, *baselines, "promised"]
    lines = [header]
    for row in rows:
        cells = []
        for name in baselines:
            ratio, spread = row.ratios.get(name), row.spreads.get(name)
            text = "" if ratio is None else f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"
            cells.append(text if spread is None else f"{text} ±{100 * spread:.0f}%")
        floors = sorted(set(row.floors.values()), reverse=True)
        verdict = "missed" if missed_floors([row]) else "met"
        promised = f"{', '.join(f'{floor:g}' for floor in floors)}: {verdict}" if floors else ""
        lines.append(
            [row.measurement, row.dtype, str(row.threads), _quantity(row.values[OURS], row.unit), *cells, promised]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _quantity(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value / 1e-6:.3g} µs"


class Bench:
    """Runs the parts and collects their rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device: str = arguments.device
        self.rows: list[Row] = []
        self.notes: list[str] = []
        clock = time.process_time if arguments.processor_time else time.perf_counter
        wait = synchronizer(self.device)
        self.interleave = partial(
            interleave, seconds=arguments.seconds, stopwatch=host_stopwatch(clock, before=wait, after=wait)
        )
        self.contestants = []
        for contestant in LOSS_CONTESTANTS:
            reason = None if contestant.name == OURS else unavailable(contestant, self.device)
            if contestant.compiles and arguments.no_compile:
                reason = "left out by --no-compile"
            if reason:
                self.notes.append(f"{contestant.name} is not measured: {reason}.")
            else:
                self.contestants.append(contestant)

    def run(self) -> None:
        arguments = self.arguments
        work: list[tuple[str, Callable[[], None]]] = []
        for threads in arguments.threads:
            if "loss" in arguments.parts:
                for dtype in arguments.dtype:
                    for shape in arguments.shapes:
                        work.append((f"loss {shape} {dtype}", partial(self.loss, shape, dtype, threads)))
            if "relationship" in arguments.parts:
                for batch in RELATIONSHIP_BATCHES:
                    work.append((f"relationship by {batch}", partial(self.relationship, batch, threads)))
            if "temperature" in arguments.parts:
                for temperature in TEMPERATURES:
                    work.append((f"temperature {temperature}", partial(self.temperature, temperature, threads)))
        once = [part for part in ("relationship", "temperature") if part in arguments.parts]
        if once and not arguments.system_malloc:
            work.append((f"{' and '.join(once)}, system malloc", partial(self.with_system_malloc, once)))
        if "memory" in arguments.parts:
            for dtype in arguments.dtype:
                work.append((f"memory of the loss {dtype}", partial(self.loss_memory, dtype)))
            for threads in arguments.threads:
                work.append(("memory of the relationship", partial(self.relationship_memory, threads)))
        if "reverse" in arguments.parts:
            work.append(("reverse relationship", self.reverse))
        if "language_head" in arguments.parts:
            work.append(("language head", self.language_head))
        with tqdm(work, unit="measurement") as progress:
            for description, measure in progress:
                progress.set_description(description)
                measure()

    def loss(self, shape: Shape, dtype: str, threads: int) -> None:
        """Time forward and backward of every contestant."""
        torch.set_num_threads(threads)
        problem = LossProblem.make(shape, DTYPES[dtype], device=self.device)
        steps = prepare(self.contestants, problem)
        expected = ExpectedLoss(problem)
        for contestant in self.contestants:
            check_loss(contestant, steps[contestant.name], expected)
        del expected
        times = self.interleave(
            {name: forward_and_backward(step) for name, step in steps.items()},
            turn=self.arguments.turn,
            before_each=problem.clear_gradients,
            warmup=10 if shape.batch * shape.source_classes < 2**20 else 2,
        )
        floor = FLOORS_FLOAT32.get(shape) if dtype == "float32" else FLOOR_BFLOAT16 if shape in SHAPES else None
        floors = {} if floor is None else {"tllib": floor, **dict.fromkeys(COMPILED, FLOOR_COMPILED)}
        self.rows.append(Row.of_times(f"loss {shape}", dtype, threads, times, self._promised(floors, threads)))

    def relationship(self, batch: int, threads: int) -> None:
        """Time the way from batches of logits to the relationship."""
        torch.set_num_threads(threads)
        problem = RelationshipProblem.make(RELATIONSHIP_SHAPE, batch=batch, device=self.device)
        check_relationship(problem)
        times = self.interleave(
            {name: partial(learn, problem) for name, learn in RELATIONSHIP_CONTESTANTS.items()},
            warmup=1,
        )
        floor = FLOOR_RELATIONSHIP if batch >= RELATIONSHIP_SHAPE.batch else FLOOR_RELATIONSHIP_BATCHES
        floors = self._promised({"tllib": floor}, threads) if self.arguments.system_malloc else {}
        name = f"relationship {RELATIONSHIP_SHAPE}, batches of {batch}"
        self.rows.append(Row.of_times(name, "float32", threads, times, floors))

    def temperature(self, temperature: float, threads: int) -> None:
        """Time the way from logits and labels to the temperature."""
        torch.set_num_threads(threads)
        problem = CalibrationProblem.make(CALIBRATION_ROWS, CALIBRATION_CLASSES, temperature, device=self.device)
        for name, error in check_temperature(problem).items():
            self.notes.append(
                f"T near {temperature} by {name}, {threads} thread(s): off by {error:.1e} of its exact value."
            )
        times = self.interleave(
            {name: partial(fit, problem) for name, fit in TEMPERATURE_CONTESTANTS.items()},
            warmup=0,
            min_rounds=3,
        )
        floors = self._promised({"authors": FLOOR_TEMPERATURE}, threads)
        name = f"temperature {CALIBRATION_ROWS}x{CALIBRATION_CLASSES}, T near {temperature}"
        self.rows.append(Row.of_times(name, "float32", threads, times, floors))

    def reverse(self) -> None:
        """Time the regression along the authors' penalties once, always in processor time of one CPU thread."""
        if importlib.util.find_spec("sklearn") is None:
            self.notes.append("The reverse relationship is not measured: scikit-learn is not installed.")
            return
        rows, target_classes, source_classes = reverse_relationship.SIZES
        probabilities, labels = reverse_relationship.make_problem(rows, target_classes, source_classes)
        found, seconds = reverse_relationship.measure(list(FLOORS_REVERSE), probabilities, labels, target_classes)
        objectives = reverse_relationship.check_objectives(found, probabilities, labels)
        for way in FLOORS_REVERSE:
            excess = max(value / objectives[OURS][c] - 1 for c, value in objectives[way].items())
            self.notes.append(f"scikit-learn, {way}: objectives are up to {excess:.1e} above ours.")
        name = f"reverse relationship {rows}x{source_classes} into {target_classes}"
        self._single(name, seconds, self._promised(FLOORS_REVERSE, 1))

    def language_head(self) -> None:
        """Time a training step of the wordpiece head, each way in a separate process."""
        tokens, hidden, vocabulary = language_head.SIZES
        ways = {OURS: "fused, entities only", "all tokens": "all tokens"}
        found = {
            name: language_head.measure_apart(way, tokens, hidden, vocabulary, rounds=5) for name, way in ways.items()
        }
        name = f"head of {vocabulary} wordpieces, {tokens} tokens"
        seconds = {contestant: values["seconds"] for contestant, values in found.items()}
        self._single(name, seconds, self._promised({"all tokens": FLOOR_LANGUAGE_HEAD}, 1))
        peaks = {contestant: int(values["bytes"]) for contestant, values in found.items()}
        self.rows.append(Row.of_bytes(f"torch memory, {name}", "float32", 1, peaks))

    def _single(self, name: str, seconds: dict[str, float], floors: dict[str, float]) -> None:
        times = {contestant: Timing((value,)) for contestant, value in seconds.items()}
        self.rows.append(Row.of_times(name, "float32", 1, times, floors))

    def with_system_malloc(self, parts: list[str]) -> None:
        """Run ``parts`` in a process with the system's malloc, as in a program that does them once."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = ["ratios", "--system-malloc", "--parts", *parts]
            command += ["--threads", *map(str, self.arguments.threads), "--seconds", str(self.arguments.seconds)]
            command += ["--device", self.device, "--json", str(result)]
            command += ["--allow-reference"] if self.arguments.allow_reference else []
            command += ["--processor-time"] if self.arguments.processor_time else []
            run_apart(*command, malloc={})
            for row in json.loads(result.read_text())["rows"]:
                self.rows.append(Row(**row | {"measurement": f"{row['measurement']}, system malloc"}))

    def loss_memory(self, dtype: str) -> None:
        """Measure the peak of a forward and backward pass beyond the logits, gradients included."""
        names = [contestant.name for contestant in self.contestants if self.arguments.full or not contestant.compiles]
        peaks = {name: memory.measure_loss(name, MEMORY_SHAPE, dtype, device=self.device) for name in names}
        self._memory_rows(f"loss {MEMORY_SHAPE}", dtype, 1, peaks)
        gradients = MEMORY_SHAPE.logits * DTYPES[dtype].itemsize
        self.notes.append(f"The gradients of the loss {MEMORY_SHAPE} alone, in {dtype}: {gradients / 1e6:.1f} MB.")

    def relationship_memory(self, threads: int) -> None:
        """Measure the peak of learning a relationship beyond the logits."""
        peaks = {
            name: memory.measure_relationship(
                name, RELATIONSHIP_SHAPE, RELATIONSHIP_BATCHES[0], threads=threads, device=self.device
            )
            for name in RELATIONSHIP_CONTESTANTS
        }
        self._memory_rows(f"relationship {RELATIONSHIP_SHAPE}", "float32", threads, peaks)
        matrix = RELATIONSHIP_SHAPE.target_classes * RELATIONSHIP_SHAPE.source_classes * 4
        self.notes.append(f"The relationship {RELATIONSHIP_SHAPE} alone, in float32: {matrix / 1e6:.1f} MB.")

    def _memory_rows(self, name: str, dtype: str, threads: int, peaks: dict[str, memory.Peak]) -> None:
        resident = {contestant: peak.resident for contestant, peak in peaks.items() if peak.resident is not None}
        if resident:
            self.rows.append(Row.of_bytes(f"resident memory, {name}", dtype, threads, resident))
        allocated = {contestant: peak.torch for contestant, peak in peaks.items()}
        self.rows.append(Row.of_bytes(f"torch memory, {name}", dtype, threads, allocated))

    def _promised(self, floors: dict[str, float], threads: int) -> dict[str, float]:
        kernel = our_backend(self.device) != "reference"
        return floors if threads == 1 and self.device == "cpu" and kernel else {}


def environment(device: str, clock: str) -> dict[str, str]:
    """Describe the software and the machine of a measurement."""
    return {
        "backend": our_backend(device),
        "package": "a checkout" if Path(ck.__file__).parents[1] == _CHECKOUT else "installed",
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clock": clock,
        "malloc": " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_")) or "default",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ratios", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="BxN_txN_s")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default float32; with --full both")
    parser.add_argument("--threads", nargs="+", type=int, help="default 1; with --full 1 and 2")
    parser.add_argument("--seconds", type=float, help="timed seconds of each measurement; default 2, with --full 8")
    parser.add_argument(
        "--turn",
        type=float,
        default=0.005,
        help="seconds of consecutive calls before the next loss contestant's turn; 0: one call (default 0.005)",
    )
    parser.add_argument("--full", action="store_true", help="both dtypes, one and two threads, longer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor time, not elapsed time: for a busy machine and one thread",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes longest")
    parser.add_argument("--system-malloc", action="store_true", help="do not set MALLOC_MMAP_MAX_=0")
    parser.add_argument("--allow-reference", action="store_true", help="measure plain PyTorch if no kernel was built")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a promised ratio is missed")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parsed = parser.parse_args(arguments)
    if parsed.processor_time and (parsed.device != "cpu" or (parsed.threads or [1]) != [1] or parsed.full):
        parser.error(
            "--processor-time adds up the threads and does not count a GPU: use one thread on the CPU, without --full"
        )
    parsed.dtype = parsed.dtype or (list(DTYPES) if parsed.full else ["float32"])
    parsed.threads = parsed.threads or ([1, 2] if parsed.full else [1])
    parsed.seconds = parsed.seconds if parsed.seconds is not None else (8.0 if parsed.full else 2.0)
    if parsed.json and not parsed.json.absolute().parent.is_dir():
        parser.error(f"--json {parsed.json}: there is no folder {parsed.json.absolute().parent}; create it")
    reason = unavailable(next(c for c in LOSS_CONTESTANTS if c.name == OURS), parsed.device)
    if reason and not parsed.allow_reference:
        parser.exit(2, f"Nothing to measure: {reason}. --allow-reference measures plain PyTorch instead.\n")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit status."""
    parsed = _parse(arguments)
    machine = environment(parsed.device, "processor time" if parsed.processor_time else "time passed")
    bench = Bench(parsed)
    bench.run()
    missed = missed_floors(bench.rows)
    print()
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    print()
    print(render_table(bench.rows))
    print()
    print(f"{OURS} in seconds or MB; the others as multiples of it (more than 1 is slower or larger).")
    print("± is half the distance between the quartiles of the round-by-round ratio.")
    for note in bench.notes:
        print(note)
    for sentence in missed:
        print(f"Below the promise: {sentence}.")
    if parsed.json:
        result = {"environment": machine, "rows": [vars(row) for row in bench.rows], "notes": bench.notes}
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"Written to {parsed.json}.")
    return 1 if missed and parsed.check else 0
