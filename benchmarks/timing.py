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

import torch

__all__ = ["DeviceStopwatch", "Stopwatch", "Timing", "finished", "host_stopwatch", "interleave", "synchronizer"]

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
    had queued the call, more memory is zeroed before the next calls; the untimed rounds find the right amount. A call
    that makes the host wait (a copy from the host's memory, say) leaves the device idle, and its time includes that.
    """

    # A millisecond on a card with 3 TB/s; the host of every contestant needs less than half of it.
    _MOST_ZEROINGS = 16
    # AMD's cards report their L2 cache, but have a cache of 256 MB behind it.
    _LEAST_BYTES_ON_AMD = 1 << 30

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            size = 4 * torch.cuda.get_device_properties(self._device).L2_cache_size
            size = size if torch.version.hip is None else max(size, self._LEAST_BYTES_ON_AMD)
            self._zeroed, self._read = (torch.zeros(size // 4, device=self._device) for _ in range(2))
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._zeroings = 1

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            for _ in range(self._zeroings):
                self._zeroed.zero_()
            self._read.sum()
            self._start.record()
            result = call()
            ahead = not self._start.query()
            self._end.record()
            self._end.synchronize()
            del result
        if not ahead and self._zeroings < self._MOST_ZEROINGS:
            self._zeroings *= 2
        return float(self._start.elapsed_time(self._end)) / 1e3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a contestant: one entry a round, the mean over its turn in that round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of the seconds."""
        return _quartiles(self.seconds)

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
        stopwatch: times a call; the default measures elapsed time.
        warmup: untimed rounds of one call each before the first timed round.
    """
    stopwatch = stopwatch or host_stopwatch()

    def timed(call: Call) -> float:
        before_each()
        return stopwatch(call)

    samples: dict[str, list[float]] = {name: [] for name in calls}
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
                elapsed = sum(timed(call) for _ in range(repeats))
                samples[name].append(elapsed / repeats)
                used += elapsed
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(times)) for name, times in samples.items()}


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


def _quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
