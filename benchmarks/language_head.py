"""Time and memory of the 30 000-wordpiece head in a training step of named-entity recognition, fused and unfused.

``python -m benchmarks language_head`` prints a table. It measures forward and backward of the source head (BERT's: a
dense layer, a normalisation and the decoder) and its loss for the tokens of a batch:

* *fused, entities only*: as in ``examples/ner.py``;
* *unfused, entities only*: the same tokens, ``F.cross_entropy`` with class probabilities;
* *linear_cross_entropy*: the same tokens, with torch's function for decoder and loss. With class probabilities it runs
  a linear layer and then the loss: it has chunks for class indices only;
* *all tokens*: the authors' way, which runs the head and a softmax on every token, then picks those of entities;
* *the loss alone*: on given logits, which shows the gain of fusing without the matrix products.

Each way runs in a separate process, so that its peak memory is not mixed with that of another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cotuning_kernels as ck
from benchmarks.memory import measure_here
from benchmarks.processes import SETTLED_MALLOC, run_apart
from benchmarks.timing import interleave

__all__ = ["SIZES", "WAYS", "Step", "measure", "measure_apart"]

SIZES = (1024, 768, 30522)  # tokens, hidden, vocabulary
KINDS = 9
ENTITY_SHARE = 0.17  # of the tokens of CoNLL-2003


class Step:
    """A batch of features and the head of a language model, the same for all ways."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, seed: int = 2020) -> None:
        torch.manual_seed(seed)
        transform = nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.head = nn.Sequential(*transform, self.decoder)
        self.features = torch.randn(tokens, hidden, requires_grad=True)
        self.labels = torch.randint(1, KINDS, (tokens,)).masked_fill(torch.rand(tokens) > ENTITY_SHARE, 0)
        self.entities = self.labels > 0
        self.relationship = torch.randn(KINDS, vocabulary).mul(3).softmax(dim=1)
        self.relationship[0] = 0


def fused(step: Step) -> Tensor:
    logits = step.head(step.features[step.entities])
    return ck.functional.source_label_loss(logits, step.labels[step.entities], step.relationship, inplace=True)


def unfused(step: Step) -> Tensor:
    logits = step.head(step.features[step.entities])
    return F.cross_entropy(logits, step.relationship[step.labels[step.entities]])


def linear_cross_entropy(step: Step) -> Tensor:
    hidden = step.head[:-1](step.features[step.entities])
    target = step.relationship[step.labels[step.entities]]
    return F.linear_cross_entropy(hidden, step.decoder.weight, target, linear_bias=step.decoder.bias)


def all_tokens(step: Step) -> Tensor:
    """The authors' ``nlp/modifier.py``, which adds 1e-10 to each probability."""
    probabilities = step.head(step.features).softmax(dim=-1)[step.entities]
    translated = step.relationship[step.labels[step.entities]]
    return (-translated * torch.log(probabilities + 1e-10)).sum(dim=-1).mean()


def loss_alone(of_logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Step], Tensor]:
    """Leave out the head, whose matrix products are the same for all ways."""

    def run(step: Step) -> Tensor:
        if not hasattr(step, "logits"):
            step.logits = step.head(step.features[step.entities]).detach()  # type: ignore[attr-defined]
        logits = step.logits.requires_grad_()  # type: ignore[attr-defined]
        logits.grad = None
        return of_logits(logits, step.labels[step.entities], step.relationship)

    return run


WAYS: dict[str, Callable[[Step], Tensor]] = {
    "fused, entities only": fused,
    "unfused, entities only": unfused,
    "linear_cross_entropy": linear_cross_entropy,
    "all tokens": all_tokens,
    "the loss alone, fused": loss_alone(lambda z, y, r: ck.functional.source_label_loss(z, y, r)),
    "the loss alone, unfused": loss_alone(lambda z, y, r: F.cross_entropy(z, r[y])),
}


def measure(way: str, tokens: int, hidden: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """Median seconds of a forward and backward pass, and how far the peak of torch's allocations rises in it."""
    torch.set_num_threads(1)
    step = Step(tokens, hidden, vocabulary)
    # Every way needs gradients of the parameters. Allocate them before memory is measured.
    step.head(step.features[:1]).sum().backward()

    def call() -> None:
        WAYS[way](step).backward()

    timing = interleave({way: call}, seconds=0, warmup=1, min_rounds=rounds)[way]
    return {"seconds": timing.median, "bytes": float(measure_here(call).torch)}


def measure_apart(way: str, tokens: int, hidden: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """Run :func:`measure` in a separate process."""
    sizes = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "rounds": rounds}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    printed = run_apart("language_head", *flags, f"--way={way}", malloc=SETTLED_MALLOC)
    found: dict[str, float] = json.loads(printed)
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks language_head", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--tokens", type=int, default=SIZES[0], help="tokens of a batch")
    parser.add_argument("--hidden", type=int, default=SIZES[1])
    parser.add_argument("--vocabulary", type=int, default=SIZES[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=list(WAYS), help="measure only this way and print JSON")
    options = parser.parse_args(arguments)
    sizes = (options.tokens, options.hidden, options.vocabulary, options.rounds)
    if options.way is not None:
        print(json.dumps(measure(options.way, *sizes)))
        return 0
    print(f"{options.tokens} tokens, {ENTITY_SHARE:.0%} of entities, {options.hidden} x {options.vocabulary}, 1 thread")
    for way in WAYS:
        found = measure_apart(way, *sizes)
        print(f"{way:26}{found['seconds'] * 1e3:9.1f} ms{found['bytes'] / 2**20:9.0f} MiB")
    return 0
