"""The first checks on a card, in the order in which their failure explains the next one's.

    python -m tools.gpu.checks [CHECK ...] [--device cuda] [--repeat 1000] [--rows ROWS] [--backends cuda triton]

Each prints OK or an error, and its seconds; the exit status is 1 if one failed. ``values`` and ``limits`` run on a CPU
as well. On simulated devices, ``--rows 8 --repeat 2 --backends cuda`` keeps the checks short.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import DeviceStopwatch, capture, interleave
from cotuning_kernels import backends, functional

__all__ = ["CHECKS", "Setting", "main"]

# The norm of a step's error may be this many times the spacing of its dtype: a wrong kernel is orders of magnitude off.
_SPACINGS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WrongError(Exception):
    """The card gives a wrong result."""


@dataclass(frozen=True)
class Setting:
    """Where and how much to check.

    Attributes:
        device: of all tensors.
        repeat: how often to repeat what fails only now and then, and the most samples of a time.
        rows: the most rows of a batch.
        backends: the kernels to check.
    """

    device: str = "cuda"
    repeat: int = 1000
    rows: float = math.inf
    backends: tuple[str, ...] = ("cuda", "triton")

    def batch(
        self, rows: int, target_classes: int, source_classes: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Batch:
        return Batch.make(int(min(rows, self.rows)), target_classes, source_classes, dtype, self.device, seed)

    def served(self) -> list[str]:
        """The kernels to check that serve the device."""
        return [name for name in backends.available("cuda") if name in self.backends]


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


def report(setting: Setting) -> None:
    """Check that the CUDA kernels serve and no backend is missing."""
    print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability(), backends.cuda_build())
    print("triton:", backends.missing_reason("triton") or "there")
    if backends.select("cuda") != "cuda":
        raise WrongError(f"{backends.select('cuda')} serves, since cuda is missing: {backends.missing_reason('cuda')}")


def values(setting: Setting) -> None:
    """Small batches in every dtype."""
    for dtype in _DTYPES:
        for rows, target_classes, source_classes in ((1, 5, 37), (48, 200, 1000), (257, 9, 1001)):
            compare(setting.batch(rows, target_classes, source_classes, dtype))


def limits(setting: Setting) -> None:
    """Rows that need about 48 KB of shared memory, the driver's default limit, and rows that need all of it."""
    wrong = []
    near_48_kb = ((5960, 5961, 6140, 6141), (7944, 7945, 8142, 8185), (8142,), (2981, 3070))
    for dtype, around in zip(_DTYPES, near_48_kb, strict=True):
        for source_classes in (*around, 10_000, 21_841, 30_522, 40_000):
            try:
                compare(setting.batch(8, 375, source_classes, dtype))
            except (RuntimeError, WrongError) as error:
                wrong.append(f"{dtype}, {source_classes} classes: {error}")
    if wrong:
        raise WrongError("\n".join(wrong))


def streams(setting: Setting) -> None:
    """Four streams at once give the same bits as one."""
    shapes = (
        (48, 1000, torch.float32),
        (48, 1000, torch.bfloat16),
        (4096, 1000, torch.float32),
        (64, 21_841, torch.float32),
    )
    batches = [setting.batch(rows, 200, columns, dtype, seed) for seed, (rows, columns, dtype) in enumerate(shapes)]
    alone = [batch.step() for batch in batches]
    different = [torch.zeros((), dtype=torch.int64, device=setting.device) for _ in batches]
    at_once = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(setting.repeat):
        for batch, stream, right, count in zip(batches, at_once, alone, different, strict=True):
            with torch.cuda.stream(stream):
                for x, y in zip(batch.step(), right, strict=True):
                    count += (x != y).any()
    torch.cuda.synchronize()
    if any(int(count) for count in different):
        raise WrongError(f"steps with other bits, by stream: {[int(count) for count in different]} of {setting.repeat}")


def threads(setting: Setting) -> None:
    """Two host threads whose kernels need different amounts of shared memory."""
    errors = []

    def work(batch: Batch) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(setting.repeat):
                    functional.co_tuning_loss(
                        batch.source_logits, batch.target_logits, batch.labels, batch.relationship,
                        trade_off=batch.trade_off,
                    )  # fmt: skip
        except RuntimeError as error:
            errors.append(error)

    both = [setting.batch(4, 9, columns) for columns in (6200, 30_522)]
    torch.cuda.synchronize()
    running = [threading.Thread(target=work, args=(batch,)) for batch in both]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    torch.cuda.synchronize()
    if errors:
        raise WrongError(str(errors[0]))


def graphs(setting: Setting) -> None:
    """A captured graph of two shapes gives the same bits as single steps, even after other launches."""
    big, small = (setting.batch(64, 9, columns) for columns in (30_522, 6200))
    right = (*big.step(), *small.step())
    result, graph = capture(lambda: (*big.step(), *small.step()))
    small.step()
    for _ in range(min(setting.repeat, 100)):
        graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(x, y) for x, y in zip(result, right, strict=True)):
        raise WrongError("a replayed graph gives other bits than the step")


def triton(setting: Setting) -> None:
    """The Triton kernels: another batch size must not compile them again."""
    if "triton" not in setting.served():
        print("triton: left out")
        return
    from cotuning_kernels.backends.triton.co_tuning_loss import co_tuning_loss_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in co_tuning_loss_kernel.device_caches.values())

    for dtype in _DTYPES[:3]:
        for columns in (1000, 21_841, 32_000, 40_000):
            compare(setting.batch(48, 200, columns, dtype), "triton")
    before = compiled()
    for rows in (1, 17, 47, 4000):
        setting.batch(rows, 200, 1000).step("triton")
    if compiled() != before:
        raise WrongError(f"{compiled() - before} more kernels were compiled for other batch sizes, expected none")


def host(setting: Setting) -> None:
    """The time of 48 rows: on the host, on the device from empty caches, and in a graph."""
    stopwatch, calls = DeviceStopwatch(setting.device), min(setting.repeat, 300)
    for dtype in _DTYPES[:2]:
        batch = setting.batch(48, 200, 1000, dtype)
        for backend in setting.served():
            step = partial(batch.step, backend)
            step()
            _, graph = capture(step)
            timing = interleave({backend: step}, seconds=0, stopwatch=stopwatch, min_rounds=min(calls, 60))[backend]
            print(
                f"{dtype} {backend}: host {_microseconds(step, calls):.0f} us, device {timing.median * 1e6:.1f} us, "
                f"graph {_microseconds(graph.replay, calls):.1f} us, host behind in {timing.behind:.0%}"
            )


def shares(setting: Setting) -> None:
    """The time of a copy of the logits as a share of a step's, by shape."""
    stopwatch = DeviceStopwatch(setting.device)
    shapes = ((32_768, 200, 1000), (4096, 200, 6200), (2048, 200, 10_000), *_MAIN_SHAPES[1:], (8, 9, 262_144))
    for dtype in _DTYPES[:2]:
        for shape in shapes:
            batch = setting.batch(*shape, dtype)
            heads = [x.detach() for x in (batch.source_logits, batch.target_logits)]
            calls: dict[str, Callable[[], object]] = {name: partial(batch.step, name) for name in setting.served()}
            calls["copy"] = partial(torch._foreach_copy_, [torch.empty_like(x) for x in heads], heads)
            timings = interleave(calls, seconds=0, stopwatch=stopwatch, min_rounds=min(setting.repeat, 30))
            times = {name: timing.median for name, timing in timings.items()}
            copy = times.pop("copy")
            words = ", ".join(f"{name} {x * 1e6:.0f} us = {copy / x:.0%}" for name, x in times.items())
            rows = len(batch.labels)
            print(f"{dtype} {rows}x{shape[1]}x{shape[2]}: copy {copy * 1e6:.0f} us, {words}", flush=True)


_MAIN_SHAPES = ((4096, 200, 1000), (512, 9, 30_522), (256, 1000, 21_841))


def main_shapes(setting: Setting) -> None:
    """One step of each main shape, for a profiler."""
    for dtype in _DTYPES[:2]:
        for shape in ((48, 200, 1000), *_MAIN_SHAPES):
            setting.batch(*shape, dtype).step()
    torch.cuda.synchronize()


def _microseconds(call: Callable[[], object], calls: int) -> float:
    """Elapsed microseconds per call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls * 1e6


CHECKS: dict[str, Callable[[Setting], None]] = {
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
"""The checks by name."""


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
    parser.add_argument("--rows", type=float, default=math.inf, help="the most rows of a batch; default: no limit")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], choices=["cuda", "triton"])
    parsed = parser.parse_args(arguments)
    setting = Setting(parsed.device, parsed.repeat, parsed.rows, tuple(parsed.backends))
    if unknown := set(parsed.checks) - set(known):
        parser.error(f"CHECK is {sorted(unknown)[0]!r}, expected some of {', '.join(known)}")
    if torch.device(parsed.device).type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that this torch can use.")
        return 1
    wrong = []
    for name in parsed.checks or CHECKS:
        started = time.monotonic()
        try:
            known[name](setting)
        except Exception as error:  # the next check runs after any error
            wrong.append(name)
            print(f"{name}: WRONG: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{name}: OK ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"wrong: {', '.join(wrong)}" if wrong else "every check is OK")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
