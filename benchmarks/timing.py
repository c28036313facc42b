"""Interleaved timing: A B C, A B C, ... in one process, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["Timing", "interleave", "synchronizer"]


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
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    turn: float = 0.0,
    before_each: Callable[[], object] = lambda: None,
    synchronize: Callable[[], object] = lambda: None,
    warmup: int = 3,
    min_rounds: int = 5,
    max_rounds: int = 2000,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Give every contestant its turn once a round, in the order given, until the rounds have used up ``seconds``.

    Args:
        calls: what to time, by name. What a call returns is dropped at once, outside its time.
        seconds: a budget for all timed calls together. At least ``min_rounds``, at most ``max_rounds`` are run.
        turn: seconds of a turn: the fastest contestant calls as often in a row as fits in, and all others as often as
            it. With 0 a turn is one call, and every call finds the caches as the others left them.
        before_each: run before each call, outside its time, the same for every contestant.
        synchronize: waits for the device's queued work. Run before a call starts and before its time is read, so that
            a call is charged for its own work on the device and for nothing else's.
        warmup: untimed rounds of one call each before the first timed one.
        clock: seconds.
    """

    def timed(call: Callable[[], object]) -> float:
        before_each()
        synchronize()
        start = clock()
        result = call()
        synchronize()
        elapsed = clock() - start
        del result
        return elapsed

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


def synchronizer(device: str) -> Callable[[], object]:
    """Waits until the device has done what it was given; on a CPU there is nothing to wait for."""
    return partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None


def _quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
