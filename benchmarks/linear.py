"""Time and memory of two linear heads and their loss: logits in chunks, against all logits at once.

``python -m benchmarks linear`` prints a table: processor time of one thread and peak memory of forward and backward,
the gradients included, with glibc's default malloc. The ways are:

* *linear heads*: ``functional.linear_co_tuning_loss``;
* *unfused*: both heads, then ``F.cross_entropy`` with class probabilities ``R[y]`` for the source head;
* *unfused, supervised rows*: the same, but the source head gets only the rows with source supervision;
* *logits, fused loss*: both heads, then ``functional.co_tuning_loss`` in place;
* *linear_cross_entropy*: torch's function (2.15), in chunks, on the supervised rows; the target head as above.

Liger's fused linear losses need a GPU with Triton, and take class indices only.

Each measurement runs in a separate process. The ways take turns, one call each, for the given number of rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cotuning_kernels as ck
from benchmarks.memory import resident_rise
from benchmarks.problems import DTYPES
from benchmarks.processes import run_apart

__all__ = ["SIZES", "WAYS", "Step", "measure"]

SIZES = ((1024, 768, 30522), (8192, 768, 30522), (4096, 1024, 128256))  # rows, width, source classes
TARGET_CLASSES = 9


class Step:
    """The inputs of every way: features, two heads, labels and a relationship."""

    def __init__(self, rows: int, width: int, classes: int, share: float, dtype: torch.dtype) -> None:
        torch.manual_seed(2020)
        self.source = nn.Linear(width, classes, dtype=dtype)
        self.target = nn.Linear(width, TARGET_CLASSES, dtype=dtype)
        self.features = torch.randn(rows, width, dtype=dtype, requires_grad=True)
        self.labels = torch.randint(1, TARGET_CLASSES, (rows,))
        self.labels[torch.arange(rows) >= share * rows] = 0  # the class without source supervision
        self.relationship = torch.randn(TARGET_CLASSES, classes).mul(3).softmax(dim=1)
        self.relationship[0] = 0

    def first(self, rows: int) -> Step:
        """The same heads with fewer rows."""
        step = Step.__new__(Step)
        step.__dict__.update(self.__dict__, features=self.features.detach()[:rows], labels=self.labels[:rows])
        return step

    def clear(self) -> None:
        """Free the gradients."""
        for tensor in (self.features, *self.source.parameters(), *self.target.parameters()):
            tensor.grad = None


def linear_heads(step: Step) -> Tensor:
    loss = ck.functional.linear_co_tuning_loss(
        step.features, step.source.weight, step.source.bias, step.target.weight, step.target.bias, step.labels,
        step.relationship, trade_off=1.0,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return loss


def unfused(step: Step) -> Tensor:
    source_logits = step.source(step.features)
    translated = step.relationship.to(source_logits.dtype)[step.labels]
    source_term = F.cross_entropy(source_logits, translated, reduction="sum") / (step.labels > 0).sum()
    return F.cross_entropy(step.target(step.features), step.labels) + source_term


def unfused_supervised(step: Step) -> Tensor:
    rows = step.labels > 0
    source_logits = step.source(step.features[rows])
    source_term = F.cross_entropy(source_logits, step.relationship.to(source_logits.dtype)[step.labels[rows]])
    return F.cross_entropy(step.target(step.features), step.labels) + source_term


def fused_loss(step: Step) -> Tensor:
    loss = ck.functional.co_tuning_loss(
        step.source(step.features), step.target(step.features), step.labels, step.relationship, trade_off=1.0,
        inplace=ck.backends.select(step.features.device.type) != "reference",
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return loss


def linear_cross_entropy(step: Step) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    rows = step.labels > 0
    translated = step.relationship.to(step.features.dtype)[step.labels[rows]]
    source_term = F.linear_cross_entropy(
        step.features[rows], step.source.weight, translated, linear_bias=step.source.bias,
        options=LinearCrossEntropyOptions(),
    )  # fmt: skip
    return F.cross_entropy(step.target(step.features), step.labels) + source_term


WAYS: dict[str, Callable[[Step], Tensor]] = {
    "linear heads": linear_heads,
    "unfused": unfused,
    "unfused, supervised rows": unfused_supervised,
    "logits, fused loss": fused_loss,
}
if hasattr(F, "linear_cross_entropy"):
    WAYS["linear_cross_entropy"] = linear_cross_entropy


def measure(way: str, step: Step, calls: int = 1) -> dict[str, float]:
    """Median seconds of processor time of a forward and backward, and the rise of the peak resident memory."""
    seconds: list[float] = []
    torch.set_num_threads(1)
    small = step.first(4)
    small.labels = torch.tensor([0, 1, 2, 0])
    WAYS[way](small).backward()  # load code
    step.clear()

    def call() -> None:
        start = time.process_time()
        WAYS[way](step).backward()
        seconds.append(time.process_time() - start)

    peak = resident_rise(call)
    for _ in range(calls - 1):
        step.clear()
        call()
    return {"seconds": statistics.median(seconds), "bytes": float(peak or 0)}


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks linear", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", nargs=3, type=int, action="append", metavar=("ROWS", "WIDTH", "CLASSES"))
    parser.add_argument("--share", type=float, default=1.0, help="of the rows that have source supervision")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="measure here, print JSON: one size, dtype and way")
    options = parser.parse_args(arguments)
    sizes = [tuple(each) for each in options.sizes or SIZES]
    if options.alone:
        rows, width, classes = sizes[0]
        step = Step(rows, width, classes, options.share, DTYPES[options.dtypes[0]])
        print(json.dumps(measure(options.ways[0], step)))
        return 0
    print(f"one thread, {options.share:.0%} of the rows supervised, {options.rounds} rounds, torch {torch.__version__}")
    for size in sizes:
        for dtype in options.dtypes:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
            for _ in range(options.rounds):
                for way in options.ways:
                    flags = ["--alone", f"--share={options.share}", "--dtypes", dtype, "--ways", way]
                    printed = run_apart("linear", *flags, "--sizes", *map(str, size), malloc={})
                    found[way].append(json.loads(printed.splitlines()[-1]))
            print(f"{size[0]} x {size[1]} x {size[2]}, {dtype}")
            for way, each in found.items():
                seconds = statistics.median(x["seconds"] for x in each)
                peak = statistics.median(x["bytes"] for x in each)
                print(f"  {way:26}{seconds:9.2f} s{peak / 2**20:9.0f} MiB", flush=True)
    return 0
