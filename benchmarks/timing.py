"""Interleaved timing: A B C, A B C, ... in one process, so that a slow moment of the machine hits all of them.

A *stopwatch* runs a call and returns its seconds: :func:`host_stopwatch` by a clock of the host,
:class:`DeviceStopwatch` by the clock of a GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

__all__ = [
    "DeviceStopwatch",
    "Stopwatch",
    "Timing",
    "capture",
    "finished",
    "host_stopwatch",
    "interleave",
    "synchronizer",
]

Result = TypeVar("Result")
Call = Callable[[], object]
Stopwatch = Callable[[Call], float]


def _nothing() -> None:
    pass


def host_stopwatch(
    clock: Callable[[], float] = time.perf_counter, *, before: Call = _nothing, after: Call = _nothing
) -> Stopwatch:
    """Return a stopwatch that reads ``clock``. A call's result is freed after its time ends.

    Args:
        before: runs before the time starts. With a :func:`synchronizer` a call does not pay for earlier work.
        after: runs before the time ends. With a :func:`synchronizer` the time includes the call's work on the device,
            without one it ends when the host has queued that work.
    """

    def timed(call: Call) -> float:
        before()
        start = clock()
        result = call()
        after()
        elapsed = clock() - start
        del result
        return elapsed

    return timed


class DeviceStopwatch:
    """Seconds of a CUDA device from a call's first operation to the end of its last, by the device's clock.

    Before each call the device zeroes memory, then reads other memory. Both are several times as large as the caches,
    so the call finds none of its operands in a cache, and no earlier writes are pending. This work also keeps the
    device busy until the host has queued the call, so the call's operations run back to back, as in a training step
    whose host is ahead. Otherwise the time of a small call would be Python's. If the device was idle before the host
    had queued the call, the device gets twice as much work before the next calls, up to a limit; the untimed rounds
    find the right amount. A call that makes the host wait (a copy from the host's memory, say) leaves the device idle,
    and its time includes that.

    Attributes:
        ahead: whether the host had queued the last call before the device began it.

    Args:
        device: a CUDA device.
        warm: leave the caches as the same call left them. The call then runs once, untimed, and the device sleeps
            until the host has queued it again. It must not change its operands.
    """

    # A millisecond on a card with 3 TB/s; the host of every contestant needs less than half of it.
    _MOST_TURNS = 16
    _SLEEP_CYCLES = 100_000  # about as long as one zeroing
    # AMD's cards report their L2 cache, but have a cache of 256 MB behind it.
    _LEAST_BYTES_ON_AMD = 1 << 30

    def __init__(self, device: str, *, warm: bool = False) -> None:
        self.ahead = True
        self._device, self._warm, self._turns = torch.device(device), warm, 1
        with torch.cuda.device(self._device):
            size = 4 * torch.cuda.get_device_properties(self._device).L2_cache_size
            size = size if torch.version.hip is None else max(size, self._LEAST_BYTES_ON_AMD)
            self._zeroed, self._read = (torch.zeros(size // 4, device=self._device) for _ in range(2))
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            self._prepare(call)
            self._start.record()
            result = call()
            self.ahead = not self._start.query()
            self._end.record()
            self._end.synchronize()
            del result
        if not self.ahead and self._turns < self._MOST_TURNS:
            self._turns *= 2
        return float(self._start.elapsed_time(self._end)) / 1e3

    def _prepare(self, call: Call) -> None:
        """Set the caches, and keep the device busy."""
        if self._warm:
            call()
            torch.cuda._sleep(self._turns * self._SLEEP_CYCLES)
            return
        for _ in range(self._turns):
            self._zeroed.zero_()
        self._read.sum()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a contestant: one entry a round, the mean over its turn in that round.

    Attributes:
        seconds: the entries of the rounds in which the host was ahead of the device, or of all rounds if it never was:
            then the call itself makes the host wait.
        behind: the share of the rounds in which the host was not ahead (:class:`DeviceStopwatch`).
    """

    seconds: tuple[float, ...]
    behind: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timing) -> float:
        """The ratio of this median to that of ``other``."""
        return self.median / other.median

    def ratio_quartiles(self, other: Timing) -> tuple[float, float]:
        """The quartiles of the ratio taken round by round, where both calls are close in time."""
        return _quartiles([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    turn: float = 0.0,
    before_each: Call = _nothing,
    stopwatch: Stopwatch | None = None,
    warmup: int = 3,
    min_rounds: int = 5,
    max_rounds: int = 2000,
) -> dict[str, Timing]:
    """Run rounds in which every contestant has one turn, in the given order, until they have used up ``seconds``.

    Args:
        calls: the calls to time, by name.
        seconds: a budget for all timed calls together. At least ``min_rounds`` and at most ``max_rounds`` rounds run.
        turn: seconds of a turn. The fastest contestant makes as many consecutive calls as fit, and the others make as
            many. With 0 a turn is one call, and every call finds the caches as the others left them.
        before_each: runs before each call of every contestant, outside its time.
        stopwatch: times a call; the default measures elapsed time. Rounds after which its attribute ``ahead`` is false
            are left out and counted.
        warmup: untimed rounds of one call each before the first timed round.
    """
    stopwatch = stopwatch or host_stopwatch()

    def timed(call: Call) -> float:
        before_each()
        return stopwatch(call)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    behind: dict[str, list[float]] = {name: [] for name in calls}
    # A garbage collection during a call would count as its time, whichever call made the garbage.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        fastest = turn
        for _ in range(warmup):
            fastest = min(timed(call) for call in calls.values())
        repeats = max(1, round(turn / fastest)) if fastest > 0 else 1
        used = 0.0
        for done in range(max_rounds):
            if done >= min_rounds and used >= seconds:
                break
            for name, call in calls.items():
                elapsed, ahead = 0.0, True
                for _ in range(repeats):
                    elapsed += timed(call)
                    ahead = ahead and getattr(stopwatch, "ahead", True)
                (samples if ahead else behind)[name].append(elapsed / repeats)
                used += elapsed
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(tuple(times or behind[name]), len(behind[name]) / max(1, len(times) + len(behind[name])))
        for name, times in samples.items()
    }


def capture(step: Callable[[], Result]) -> tuple[Result, torch.cuda.CUDAGraph]:
    """Return the step's result, and the graph that computes it again into the same memory.

    The step first runs once on a side stream, as PyTorch requires, so that the capture contains no setup.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return result, graph


def synchronizer(device: str) -> Call:
    """Return a function that waits for the device to finish its work; on a CPU it does nothing."""
    return partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else _nothing


def finished(call: Call, device: str) -> Call:
    """Return ``call`` followed by a wait for the device to finish it."""
    synchronize = synchronizer(device)

    def call_and_wait() -> None:
        call()
        synchronize()

    return call_and_wait


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
