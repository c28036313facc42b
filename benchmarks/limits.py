"""Where a call of the loss spends its time on the CPU, and how far its kernel is from two bounds.

    python -m benchmarks limits                    about a minute; three tables, float32, one thread
    python -m benchmarks limits --system-malloc    the same, with new pages from the system at every step

*Kernel* is the time of the operation on the whole batch less the time of the operation on one row. ``bounds.cpp`` has
two bounds. *Exponentials* computes one exponential for each logit of both heads; it bounds the kernel while the logits
are in a cache. *Streaming copy* reads the logits and writes as many bytes around the cache; it bounds the kernel when
the logits are in memory. A *share* is the bound's time over the kernel's. The third table measures ``inplace=True``,
where the gradients take the place of the logits.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cotuning_kernels as ck
from benchmarks import baselines, ratios
from benchmarks.contestants import LOSS_CONTESTANTS, OURS, ExpectedLoss, our_backend
from benchmarks.problems import SHAPES, LossProblem, Shape, parse_shape
from benchmarks.timing import Timing, host_stopwatch, interleave
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.options import REDUCTIONS

__all__ = ["Limits", "bounds", "compiler_missing", "main", "measure", "measure_in_place", "render"]

Clock = Callable[[], float]

WHOLE, FORWARD, OPERATION, ONE_ROW = "whole call", "forward", "operation", "operation on one row"
EXPONENTIALS, STREAMING_COPY = "exponentials", "streaming copy"
IN_PLACE = "in place"


@dataclass(frozen=True)
class Limits:
    """The measurements of one shape.

    Attributes:
        seconds: medians by name.
        page_faults: page faults of a whole call.
    """

    shape: Shape
    seconds: dict[str, float]
    page_faults: float

    @property
    def kernel(self) -> float:
        return self.seconds[OPERATION] - self.seconds[ONE_ROW]

    @property
    def forward_outside(self) -> float:
        return self.seconds[FORWARD] - self.kernel

    @property
    def backward(self) -> float:
        return self.seconds[WHOLE] - self.seconds[FORWARD]

    def share_of(self, bound: str) -> float:
        return self.seconds[bound] / self.kernel


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def compiler_missing() -> str | None:
    """Return why ``bounds.cpp`` cannot be compiled here, or ``None``."""
    if shutil.which(_compiler()) is None:
        return f"the bounds need a C++ compiler and {_compiler()!r} is not installed (Debian: apt install g++)"
    return None


@functools.cache
def bounds() -> ctypes.CDLL:
    """Compile ``bounds.cpp`` for this processor and load it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bounds.so"
        source = Path(__file__).with_name("bounds.cpp")
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"]
        command = [_compiler(), *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.sum_of_exponentials.restype = ctypes.c_double
    loaded.sum_of_exponentials.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.streaming_copy.restype = None
    loaded.streaming_copy.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return loaded


def _bound_calls(heads: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    copies = [torch.empty_like(head) for head in heads]

    def exponentials() -> None:
        for head in heads:
            bounds().sum_of_exponentials(head.data_ptr(), head.numel())

    def copy() -> None:
        for head, to in zip(heads, copies, strict=True):
            bounds().streaming_copy(head.data_ptr(), head.numel(), to.data_ptr())

    return {EXPONENTIALS: exponentials, STREAMING_COPY: copy}


def _operation_call(problem: LossProblem, rows: int) -> Callable[[], object]:
    source, target = problem.source_logits.detach()[:rows], problem.target_logits.detach()[:rows]
    trade_off = torch.tensor(problem.trade_off, dtype=torch.float64)
    options = (None, trade_off, 0.0, -100, REDUCTIONS["mean"], False)
    run = operation("co_tuning_loss", "cpp")
    return lambda: run(source, target, problem.labels[:rows], None, None, problem.relationship, *options, True, True)


def measure(shape: Shape, *, seconds: float, clock: Clock) -> Limits:
    """Time the parts of a call and the bounds in turns."""
    problem = LossProblem.make(shape, torch.float32)
    criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off)

    def forward() -> Tensor:
        loss: Tensor = criterion(problem.source_logits, problem.target_logits, problem.labels)
        return loss

    def whole() -> None:
        forward().backward()

    times = interleave(
        {
            WHOLE: whole,
            FORWARD: forward,
            OPERATION: _operation_call(problem, shape.batch),
            ONE_ROW: _operation_call(problem, 1),
            **_bound_calls((problem.source_logits.detach(), problem.target_logits.detach())),
        },
        seconds=seconds,
        turn=0.002,
        before_each=problem.clear_gradients,
        stopwatch=host_stopwatch(clock),
    )
    return Limits(shape, {name: each.median for name, each in times.items()}, _page_faults(whole, problem))


def _page_faults(whole: Callable[[], None], problem: LossProblem, calls: int = 10) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        problem.clear_gradients()
        whole()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def measure_in_place(shape: Shape, *, seconds: float, clock: Clock) -> dict[str, Timing]:
    """Time ours with fresh gradients, ours in place, and tllib, each on logits made just before its time starts."""
    problem = LossProblem.make(shape, torch.float32)
    heads: list[Tensor] = []

    def fresh_logits() -> None:
        heads[:] = problem.source_logits.clone(), problem.target_logits.clone()

    def ours(inplace: bool) -> Callable[[], Tensor]:
        criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off, inplace=inplace)
        return lambda: criterion(*heads, problem.labels)

    losses: dict[str, Callable[[], Tensor]] = {
        OURS: ours(False),
        IN_PLACE: ours(True),
        "tllib": lambda: baselines.tllib_loss(
            heads[0], heads[1], problem.labels, problem.relationship_numpy, problem.trade_off
        ),
    }
    expected = ExpectedLoss(problem)
    contestant = next(each for each in LOSS_CONTESTANTS if each.name == OURS)
    for loss_of in losses.values():
        fresh_logits()
        loss = loss_of()
        problem.source_logits.grad, problem.target_logits.grad = torch.autograd.grad(loss, heads)
        expected.check(contestant, loss.detach())
    problem.clear_gradients()

    def call(loss_of: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss_of(), heads)

    return interleave(
        {name: call(loss_of) for name, loss_of in losses.items()},
        seconds=seconds,
        before_each=fresh_logits,
        stopwatch=host_stopwatch(clock),
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if abs(seconds) < 1e-3 else f"{seconds * 1e3:.2f} ms"


def render(limits: Sequence[Limits]) -> str:
    """Render two tables: the parts of a call, and the kernel beside the bounds."""
    lines = ["| B x N_t x N_s | whole call | kernel | rest of the forward pass | backward pass | page faults |"]
    lines += ["|---|---|---|---|---|---|"]
    for each in limits:
        parts = (each.seconds[WHOLE], each.kernel, each.forward_outside, each.backward)
        lines.append(f"| {each.shape} | {' | '.join(map(_time, parts))} | {each.page_faults:.0f} |")
    lines += ["", "| B x N_t x N_s | kernel | exponentials | share | streaming copy | share |"]
    lines += ["|---|---|---|---|---|---|"]
    for each in limits:
        cells = [_time(each.kernel)]
        for bound in (EXPONENTIALS, STREAMING_COPY):
            cells += [_time(each.seconds[bound]), f"{100 * each.share_of(bound):.0f} %"]
        lines.append(f"| {each.shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _render_in_place(shape: Shape, times: dict[str, Timing]) -> str:
    cells = [
        _time(times[OURS].median),
        _time(times[IN_PLACE].median),
        f"{times['tllib'].ratio_to(times[OURS]):.2f}x",
        f"{times['tllib'].ratio_to(times[IN_PLACE]):.2f}x",
    ]
    return (
        "| B x N_t x N_s | fresh gradients | in place | tllib to fresh | tllib to in place |\n|---|---|---|---|---|\n"
        f"| {shape} | {' | '.join(cells)} |"
    )


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks limits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="BxN_txN_s")
    parser.add_argument("--in-place-shape", type=parse_shape, default=SHAPES[3], metavar="BxN_txN_s")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed seconds a shape; default %(default)s")
    parser.add_argument("--processor-time", action="store_true", help="measure processor time, not elapsed time")
    parser.add_argument("--system-malloc", action="store_true", help="do not set MALLOC_MMAP_MAX_=0")
    parsed = parser.parse_args(arguments)
    reason = compiler_missing()
    if not our_backend("cpu").startswith("cpp "):
        reason = "no CPU kernel of cotuning_kernels was built"
    if reason:
        parser.exit(2, f"Nothing to measure: {reason}.\n")
    torch.set_num_threads(1)
    clock = time.process_time if parsed.processor_time else time.perf_counter
    machine = ratios.environment("cpu", "processor time" if parsed.processor_time else "time passed")
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    print(render([measure(shape, seconds=parsed.seconds, clock=clock) for shape in parsed.shapes]), end="\n\n")
    times = measure_in_place(parsed.in_place_shape, seconds=parsed.seconds, clock=clock)
    print(_render_in_place(parsed.in_place_shape, times))
    return 0
