"""Peak memory of a call beyond the memory in use before it, each measurement in a separate process.

There are two numbers. *Resident* is the rise of the process's peak resident memory (Linux), whatever allocated it.
*torch* is the peak of torch's own allocations: exact to the byte, but without NumPy's memory and a kernel's own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.contestants import LOSS_CONTESTANTS, RELATIONSHIP_CONTESTANTS, prepare
from benchmarks.problems import DTYPES, LossProblem, RelationshipProblem, Shape, parse_shape
from benchmarks.processes import run_apart

__all__ = ["Peak", "main", "measure_here", "measure_loss", "measure_loss_here", "measure_relationship", "resident_rise"]

# glibc maps every block of 64 KiB or more separately and unmaps it when it is freed: the peak then counts the memory
# in use, not the memory that the allocator keeps.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@dataclass(frozen=True)
class Peak:
    """Bytes that a call needed at its peak beyond the bytes allocated before it.

    Attributes:
        resident: rise of the peak resident memory; ``None`` without Linux's ``/proc``.
        torch: rise of torch's allocations on the measured device.
    """

    resident: int | None
    torch: int


def measure_here(call: Callable[[], object], device: str = "cpu") -> Peak:
    """Run ``call`` in this process: once to load code and make thread pools, then once for each of the two numbers.

    The result of ``call`` is part of its peak. ``call`` must leave nothing else allocated.
    """
    call()
    resident = None if device != "cpu" else resident_rise(call)
    return Peak(resident, _torch_rise(call, device))


def measure_loss(name: str, shape: Shape, dtype: str, *, threads: int = 1, device: str = "cpu") -> Peak:
    """Peak of one forward and backward pass of a loss contestant in a new process, gradients included."""
    return _in_child(["loss", name, str(shape), "--dtype", dtype, "--device", device, "--threads", str(threads)])


def measure_loss_here(name: str, shape: Shape, dtype: str, *, device: str) -> Peak:
    """:func:`measure_loss` in this process, for a device whose memory torch counts."""
    return measure_here(_loss_call(name, LossProblem.make(shape, DTYPES[dtype], device=device)), device)


def measure_relationship(name: str, shape: Shape, batch: int, *, threads: int = 1, device: str = "cpu") -> Peak:
    """Peak of learning a relationship from ``shape.batch`` rows of logits, result included."""
    arguments = ["relationship", name, str(shape), "--batch", str(batch), "--device", device]
    return _in_child([*arguments, "--threads", str(threads)])


def _in_child(arguments: list[str]) -> Peak:
    return Peak(**json.loads(run_apart("memory", *arguments, malloc=_MALLOC).splitlines()[-1]))


def resident_rise(call: Callable[[], object]) -> int | None:
    """Bytes by which the peak resident memory rises in ``call``; ``None`` where ``/proc`` is not Linux's."""
    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        # 5 resets the recorded peak to the memory resident now.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status_bytes("VmRSS")
        result = call()
        peak = _status_bytes("VmHWM")
    except OSError:
        return None
    del result
    return peak - before


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _torch_rise(call: Callable[[], object], device: str) -> int:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    # On the CPU only the profiler records each allocation and each release.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    results = profile.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def _loss_call(name: str, problem: LossProblem) -> Callable[[], object]:
    contestant = next(contestant for contestant in LOSS_CONTESTANTS if contestant.name == name)
    step = prepare([contestant], problem)[name]

    def call() -> object:
        step().backward()
        gradients = problem.source_logits.grad, problem.target_logits.grad
        problem.clear_gradients()
        return gradients

    return call


def _relationship_call(name: str, problem: RelationshipProblem) -> Callable[[], object]:
    return lambda: RELATIONSHIP_CONTESTANTS[name](problem)


def main(arguments: Sequence[str]) -> int:
    """Measure one contestant in this process and print one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("kind", choices=["loss", "relationship"])
    parser.add_argument("name")
    parser.add_argument("shape", type=parse_shape, help="rows x target classes x source classes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="rows of one update of the relationship")
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    if parsed.kind == "loss":
        loss_problem = LossProblem.make(parsed.shape, DTYPES[parsed.dtype], device=parsed.device)
        call = _loss_call(parsed.name, loss_problem)
    else:
        relationship_problem = RelationshipProblem.make(parsed.shape, batch=parsed.batch, device=parsed.device)
        call = _relationship_call(parsed.name, relationship_problem)
    print(json.dumps(asdict(measure_here(call, parsed.device))))
    return 0
