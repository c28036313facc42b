"""Interleaved timing: A B C, A B C, ... in one process, so that a slow moment of the machine hits all of them.

A *stopwatch* runs a call and gives its seconds: :func:`host_stopwatch` those of the host, :class:`DeviceStopwatch`
those of a GPU.
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
    """Seconds of ``clock``. What a call returns is dropped outside its time.

    Args:
        before: run before the time starts. With a :func:`synchronizer` a call does not pay for earlier work.
        after: run before the time ends. With a :func:`synchronizer` a call pays for its own work on the device, without
            one only for the time until the host has handed it over.
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
    """Seconds of a CUDA device from the first operation of a call to the end of its last, by the device's own clock.

    The device zeroes memory before each call, and then reads other memory. Either is several times as much as the
    caches hold, so that a call finds none of its operands there, and nothing that is still to be written back. And it
    keeps the device busy until the host has handed the call over, so that the operations follow each other as they do
    within a training step, whose host is ahead: without that, small calls would show how fast Python is. Where the
    host was not ahead, the next calls are preceded by more of it; the untimed rounds are there for that. A call that
    makes the host wait (by copying from its memory, say) leaves the device idle whatever is before it, and pays.
    """

    # On a card that moves 3 TB/s a millisecond, of which no contestant's host needs half.
    _MOST_ZEROINGS = 16
    # AMD's cards have a cache of 256 MB behind the one that they tell of.
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
    """Seconds of one call of a contestant, one entry a round: the mean over its turn in that round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """The seconds that a quarter and three quarters of the rounds stayed under."""
        return _quartiles(self.seconds)

    def ratio_to(self, other: Timing) -> float:
        """How many times longer than ``other`` this took: the ratio of the two medians."""
        return self.median / other.median

    def ratio_quartiles(self, other: Timing) -> tuple[float, float]:
        """The quartiles of the ratio taken round by round: the two calls of a round stand side by side."""
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
    """Give every contestant its turn once a round, in the order given, until the rounds have used up ``seconds``.

    Args:
        calls: what to time, by name.
        seconds: a budget for all timed calls together. At least ``min_rounds``, at most ``max_rounds`` are run.
        turn: seconds of a turn: the fastest contestant calls as often in a row as fits in, and all others as often as
            it. With 0 a turn is one call, and every call finds the caches as the others left them.
        before_each: run before each call, outside its time, the same for every contestant.
        stopwatch: times a call; by default the time that passes.
        warmup: untimed rounds of one call each before the first timed one.
    """
    stopwatch = stopwatch or host_stopwatch()

    def timed(call: Call) -> float:
        before_each()
        return stopwatch(call)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    # A collection in the middle of a call would be charged to it, whoever made the garbage.
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
    """Waits until the device has done what it was given; on a CPU there is nothing to wait for."""
    return partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else _nothing


def finished(call: Call, device: str) -> Call:
    """``call``, and then a wait until the device has done it."""
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
