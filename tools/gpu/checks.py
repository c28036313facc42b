"""The first checks on a card, in the order in which their failure explains the next one's.

    python -m tools.gpu.checks [CHECK ...] [--device cuda] [--repeat 1000]

Each prints OK or an error; the exit status is 1 if one failed. ``values`` and ``limits`` run on a CPU as well.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.timing import DeviceStopwatch
from cotuning_kernels import backends, functional

__all__ = ["CHECKS", "capture", "main"]

Result = TypeVar("Result")

# The norm of a step's error may be this many times the spacing of its dtype: a wrong kernel is orders of magnitude off.
_SPACINGS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WrongError(Exception):
    """The card gives a wrong result."""


@dataclass(frozen=True)
class Batch:
    """One batch of the loss with its relationship; the logits require gradients."""

    source_logits: Tensor
    target_logits: Tensor
    labels: Tensor
    relationship: Tensor
    trade_off: Tensor

    @classmethod
    def make(
        cls, rows: int, target_classes: int, source_classes: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> Batch:
        """Random numbers that are the same on every device."""
        draw = torch.Generator().manual_seed(seed)

        def logits(columns: int) -> Tensor:
            return (3 * torch.randn(rows, columns, generator=draw)).to(device, dtype).requires_grad_()

        return cls(
            logits(source_classes),
            logits(target_classes),
            torch.randint(target_classes, (rows,), generator=draw).to(device),
            torch.randn(target_classes, source_classes, generator=draw).softmax(1).to(device),
            torch.tensor(2.3, dtype=torch.float64, device=device),
        )

    def step(self, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
        """The loss and both gradients."""
        heads = self.source_logits, self.target_logits
        loss = functional.co_tuning_loss(
            *heads, self.labels, self.relationship, trade_off=self.trade_off, backend=backend
        )
        assert isinstance(loss, Tensor)
        source_gradient, target_gradient = torch.autograd.grad(loss, heads)
        return loss.detach(), source_gradient, target_gradient

    def in_float64(self) -> Batch:
        """The same numbers in float64."""
        source_logits, target_logits = (
            x.detach().double().requires_grad_() for x in (self.source_logits, self.target_logits)
        )
        return Batch(source_logits, target_logits, self.labels, self.relationship.double(), self.trade_off)


def compare(batch: Batch, backend: str = "auto") -> None:
    """Compare a step with the reference's in float64.

    Raises:
        WrongError: the loss or a gradient is further off than rounding explains.
    """
    allowed = _SPACINGS * torch.finfo(batch.source_logits.dtype).eps
    names = ("loss", "source gradient", "target gradient")
    for name, ours, right in zip(names, batch.step(backend), batch.in_float64().step("reference"), strict=True):
        error = float((ours.double() - right).norm() / right.norm())
        if not error <= allowed:
            shape = (*batch.source_logits.shape, batch.target_logits.shape[1])
            raise WrongError(
                f"{name} of {batch.source_logits.dtype} {shape}: relative error {error:.2g} > {allowed:.2g}"
            )


def report(device: str, repeat: int) -> None:
    """Check that the CUDA kernels serve and no backend is missing."""
    print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability(), backends.cuda_build())
    print("triton:", backends.missing_reason("triton") or "there")
    if backends.select("cuda") != "cuda":
        raise WrongError(f"{backends.select('cuda')} serves, since cuda is missing: {backends.missing_reason('cuda')}")


def values(device: str, repeat: int) -> None:
    """Small batches in every dtype."""
    for dtype in _DTYPES:
        for rows, target_classes, source_classes in ((1, 5, 37), (48, 200, 1000), (257, 9, 1001)):
            compare(Batch.make(rows, target_classes, source_classes, dtype, device))


def limits(device: str, repeat: int) -> None:
    """Rows that need about 48 KB of shared memory, the driver's default limit, and rows that need all of it."""
    wrong = []
    near_48_kb = ((5960, 5961, 6140, 6141), (7944, 7945, 8142, 8185), (8142,), (2981, 3070))
    for dtype, around in zip(_DTYPES, near_48_kb, strict=True):
        for source_classes in (*around, 10_000, 21_841, 30_522, 40_000):
            try:
                compare(Batch.make(8, 375, source_classes, dtype, device))
            except (RuntimeError, WrongError) as error:
                wrong.append(f"{dtype}, {source_classes} classes: {error}")
    if wrong:
        raise WrongError("\n".join(wrong))


def streams(device: str, repeat: int) -> None:
    """Four streams at once give the same bits as one."""
    shapes = (
        (48, 1000, torch.float32),
        (48, 1000, torch.bfloat16),
        (4096, 1000, torch.float32),
        (64, 21_841, torch.float32),
    )
    batches = [
        Batch.make(rows, 200, columns, dtype, device, seed) for seed, (rows, columns, dtype) in enumerate(shapes)
    ]
    alone = [batch.step() for batch in batches]
    different = [torch.zeros((), dtype=torch.int64, device=device) for _ in batches]
    at_once = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(repeat):
        for batch, stream, right, count in zip(batches, at_once, alone, different, strict=True):
            with torch.cuda.stream(stream):
                for x, y in zip(batch.step(), right, strict=True):
                    count += (x != y).any()
    torch.cuda.synchronize()
    if any(int(count) for count in different):
        raise WrongError(f"steps with other bits, by stream: {[int(count) for count in different]} of {repeat}")


def threads(device: str, repeat: int) -> None:
    """Two host threads whose kernels need different amounts of shared memory."""
    errors = []

    def work(batch: Batch) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(repeat):
                    functional.co_tuning_loss(
                        batch.source_logits, batch.target_logits, batch.labels, batch.relationship,
                        trade_off=batch.trade_off,
                    )  # fmt: skip
        except RuntimeError as error:
            errors.append(error)

    both = [Batch.make(4, 9, columns, torch.float32, device) for columns in (6200, 30_522)]
    torch.cuda.synchronize()
    running = [threading.Thread(target=work, args=(batch,)) for batch in both]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    torch.cuda.synchronize()
    if errors:
        raise WrongError(str(errors[0]))


def graphs(device: str, repeat: int) -> None:
    """A captured graph of two shapes gives the same bits as single steps, even after other launches."""
    big, small = (Batch.make(64, 9, columns, torch.float32, device) for columns in (30_522, 6200))
    right = (*big.step(), *small.step())
    result, graph = capture(lambda: (*big.step(), *small.step()))
    small.step()
    for _ in range(min(repeat, 100)):
        graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(x, y) for x, y in zip(result, right, strict=True)):
        raise WrongError("a replayed graph gives other bits than the step")


def triton(device: str, repeat: int) -> None:
    """The Triton kernels: another batch size must not compile them again."""
    from cotuning_kernels.backends.triton.co_tuning_loss import co_tuning_loss_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in co_tuning_loss_kernel.device_caches.values())

    for dtype in _DTYPES[:3]:
        for columns in (1000, 21_841, 32_000, 40_000):
            compare(Batch.make(48, 200, columns, dtype, device), "triton")
    before = compiled()
    for rows in (1, 17, 47, 4000):
        Batch.make(rows, 200, 1000, torch.float32, device).step("triton")
    if compiled() != before:
        raise WrongError(f"{compiled() - before} more kernels were compiled for other batch sizes, expected none")


def host(device: str, repeat: int) -> None:
    """The time of 48 rows: on the host, on the device from empty caches, and in a graph."""
    stopwatch = DeviceStopwatch(device)
    for dtype in _DTYPES[:2]:
        batch = Batch.make(48, 200, 1000, dtype, device)
        for backend in ("cuda", "triton"):
            if backend not in backends.available("cuda"):
                continue
            step = partial(batch.step, backend)
            step()
            _, graph = capture(step)
            device_time = statistics.median(stopwatch(step) for _ in range(60))
            print(
                f"{dtype} {backend}: host {_microseconds(step, 300):.0f} us, device {device_time * 1e6:.1f} us, "
                f"graph {_microseconds(graph.replay, 300):.1f} us"
            )


def shares(device: str, repeat: int) -> None:
    """The time of a copy of the logits as a share of a step's, by shape."""
    stopwatch = DeviceStopwatch(device)

    def median(call: Callable[[], object]) -> float:
        return statistics.median(stopwatch(call) for _ in range(30))

    shapes = ((32_768, 200, 1000), (4096, 200, 6200), (2048, 200, 10_000), *_MAIN_SHAPES[1:], (8, 9, 262_144))
    for dtype in _DTYPES[:2]:
        for shape in shapes:
            batch = Batch.make(*shape, dtype, device)
            heads = [x.detach() for x in (batch.source_logits, batch.target_logits)]
            copy = median(partial(torch._foreach_copy_, [torch.empty_like(x) for x in heads], heads))
            served = [name for name in backends.available("cuda") if name != "reference"]
            times = {name: median(partial(batch.step, name)) for name in served}
            words = ", ".join(f"{name} {x * 1e6:.0f} us = {copy / x:.0%}" for name, x in times.items())
            print(f"{dtype} {'x'.join(map(str, shape))}: copy {copy * 1e6:.0f} us, {words}", flush=True)


_MAIN_SHAPES = ((4096, 200, 1000), (512, 9, 30_522), (256, 1000, 21_841))


def main_shapes(device: str, repeat: int) -> None:
    """One step of each main shape, for a profiler."""
    for dtype in _DTYPES[:2]:
        for shape in ((48, 200, 1000), *_MAIN_SHAPES):
            Batch.make(*shape, dtype, device).step()
    torch.cuda.synchronize()


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


def _microseconds(call: Callable[[], object], calls: int) -> float:
    """Elapsed microseconds per call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls * 1e6


CHECKS: dict[str, Callable[[str, int], None]] = {
    "report": report,
    "values": values,
    "limits": limits,
    "streams": streams,
    "threads": threads,
    "graphs": graphs,
    "triton": triton,
    "host": host,
    "shares": shares,
}
"""The checks by name. Each takes the device and how often to repeat what fails only now and then."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {**CHECKS, "main shapes": main_shapes}
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help=f"some of {', '.join(known)}; default: all but the last"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeat", type=int, default=1000, help="default %(default)s")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.checks) - set(known):
        parser.error(f"CHECK is {sorted(unknown)[0]!r}, expected some of {', '.join(known)}")
    if torch.device(parsed.device).type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that this torch can use.")
        return 1
    wrong = []
    for name in parsed.checks or CHECKS:
        try:
            known[name](parsed.device, parsed.repeat)
        except Exception as error:  # the next check runs after any error
            wrong.append(name)
            print(f"{name}: WRONG: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{name}: OK", flush=True)
    print(f"wrong: {', '.join(wrong)}" if wrong else "every check is OK")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
