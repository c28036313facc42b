"""The loss as a training step calls it: once, between the forward and the backward pass of a network.

    python -m benchmarks cold                                    batches of 48 and 256, one thread
    python -m benchmarks cold --processor-time --network none    on a busy machine; the calls alone, caches warm

The network has been through the caches before each call of the loss, and its instructions and data have replaced the
loss's. The network is MobileNet v1 (Howard and others, 2017) at half width, with two heads. Each step runs its forward
pass, one contestant's loss and the backward pass of that loss, which end at the logits, and the network's backward
pass. The contestants take turns, a step each. *Loss* is the time of the two passes of the loss, *step* that of the
whole step. *A sum* is the sum of the target logits, which shows what autograd itself costs: the least time of any loss.
``--network none`` leaves the network out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import ratios
from benchmarks.contestants import (
    LOSS_CONTESTANTS,
    OURS,
    ExpectedLoss,
    LossFunction,
    check_loss,
    our_backend,
    prepare,
    unavailable,
)
from benchmarks.problems import LossProblem, Shape, parse_shape

__all__ = ["Network", "Times", "main", "measure", "render"]

SHAPES = (Shape(48, 200, 1000), Shape(256, 200, 1000))
# (channels, stride) of the depthwise separable layers of MobileNet v1.
_LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
_UNTIMED_STEPS = 2
A_SUM = "a sum"


class Network(nn.Module):
    """MobileNet v1 at half width, with a source and a target head."""

    def __init__(self, target_classes: int, source_classes: int) -> None:
        super().__init__()
        width = 16
        layers = self._layer(3, width, 2, kernel=3)
        for channels, stride in _LAYERS:
            layers += self._layer(width, width, stride, kernel=3, groups=width)
            layers += self._layer(width, channels // 2, 1, kernel=1)
            width = channels // 2
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.source_head = nn.Linear(width, source_classes)
        self.target_head = nn.Linear(width, target_classes)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int, *, kernel: int, groups: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return self.source_head(features), self.target_head(features)


@dataclass
class Times:
    """Seconds of the loss and of the whole step, one number a step."""

    loss: list[float]
    step: list[float]


def _step(
    network: Network | None, images: Tensor, problem: LossProblem, loss: LossFunction, clock: Callable[[], float]
) -> tuple[float, float]:
    problem_logits = (problem.source_logits, problem.target_logits)
    problem.clear_gradients()
    start = clock()
    if network is not None:
        network.zero_grad()
        logits = network(images)
        with torch.no_grad():  # the contestants' losses are of these leaves
            for leaf, z in zip(problem_logits, logits, strict=True):
                leaf.copy_(z)
    before = clock()
    loss().backward()
    after = clock()
    if network is not None:
        found = [(z, leaf.grad) for z, leaf in zip(logits, problem_logits, strict=True) if leaf.grad is not None]
        torch.autograd.backward([z for z, _ in found], [gradient for _, gradient in found])
    return after - before, clock() - start


def measure(
    shape: Shape, *, pixels: int | None, steps: int, compiled: bool, clock: Callable[[], float]
) -> dict[str, Times]:
    """Check the contestants, then time each in turns. ``pixels``: the size of the images; None for no network."""
    problem = LossProblem.make(shape, torch.float32)
    contestants = [c for c in LOSS_CONTESTANTS if not unavailable(c, "cpu") and (compiled or not c.compiles)]
    losses = prepare(contestants, problem)
    expected = ExpectedLoss(problem)
    for contestant in contestants:
        check_loss(contestant, losses[contestant.name], expected)
    torch.manual_seed(0)
    network = None if pixels is None else Network(shape.target_classes, shape.source_classes)
    images = torch.randn(shape.batch, 3, pixels or 1, pixels or 1)
    losses[A_SUM] = lambda: problem.target_logits.sum()
    times = {name: Times([], []) for name in losses}
    for step in range(_UNTIMED_STEPS + steps):
        for name, loss in losses.items():
            of_loss, of_step = _step(network, images, problem, loss, clock)
            if step >= _UNTIMED_STEPS:
                times[name].loss.append(of_loss)
                times[name].step.append(of_step)
    return times


def render(shape: Shape, times: dict[str, Times]) -> str:
    """A table: medians, and the quartiles of the loss."""
    ours = statistics.median(times[OURS].loss)
    lines = [
        f"| {shape} | loss | quartiles | times ours | share of the step | step |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in times.items():
        loss, step = statistics.median(of.loss), statistics.median(of.step)
        low, _, high = statistics.quantiles(of.loss, n=4)
        lines.append(
            f"| {name} | {loss * 1e6:.0f} µs | {low * 1e6:.0f} to {high * 1e6:.0f} | {loss / ours:.2f} "
            f"| {loss / step:.2%} | {step * 1e3:.1f} ms |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="BxN_txN_s")
    parser.add_argument("--network", choices=("mobilenet", "none"), default="mobilenet")
    parser.add_argument("--pixels", type=int, default=64, help="height and width of the images; default %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each contestant; default %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--processor-time", action="store_true", help="measure processor time, not elapsed time")
    parser.add_argument("--system-malloc", action="store_true", help="do not set MALLOC_MMAP_MAX_=0")
    parsed = parser.parse_args(arguments)
    if parsed.steps < 2:
        parser.error("--steps must be at least 2: the quartiles need two numbers")
    if not our_backend("cpu").startswith("cpp "):
        parser.exit(2, "Nothing to measure: no CPU kernel of cotuning_kernels was built.\n")
    torch.set_num_threads(1)
    clock = time.process_time if parsed.processor_time else time.perf_counter
    machine = ratios.environment("cpu", "processor time" if parsed.processor_time else "time passed")
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    for shape in parsed.shapes:
        times = measure(
            shape,
            pixels=None if parsed.network == "none" else parsed.pixels,
            steps=parsed.steps,
            compiled=not parsed.no_compile,
            clock=clock,
        )
        print(f"\n{render(shape, times)}")
    return 0
