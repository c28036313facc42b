"""When does Co-Tuning help, and when not? Many short runs on real weights and real images, one line of JSON per run.

    pip install '.[experiments]'
    python examples/experiments.py                      # runs of docs/results/plan.toml without a result
    python examples/experiment_tables.py                # docs/results.md and its figures, from the lines

The plan is a list of grids; a grid's runs are the product of its lists. All runs of a seed come before those of the
next, so that whenever you stop, all methods have been compared on the same seeds. A run with a result in docs/results
is not repeated, and a killed run only loses itself. To add a setting, add a grid and run the same command.

A seed decides the training images, the new head, the batches with their crops and flips, and the dropout: two methods
of one seed differ only in the method. All settings share batches of 16, SGD as in the paper, the rate divided by ten
after two thirds, BatchNorm momentum 0.1, 128-pixel crops, one evaluation at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from command_line import UserError, exit_code
from demo_data import Images, ImageSet, fashion_mnist
from demo_weights import pretrained_classifier
from image_classification import METHODS, STOPPED, objective_of, optimizer_of
from torch import Tensor, nn
from torch.nn import functional as F
from tux_paint import tux_paint

import cotuning_kernels as ck
from cotuning_kernels.atomic_file import write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "docs" / "results"
BATCH_SIZE = 16
EVALUATED_AT_ONCE = 8  # fits the caches: 1.6 times as fast as 64 on one core


@dataclass(frozen=True)
class Setting:
    """A run's identity. ``warm_up`` is the share of the iterations over which the trade-off grows from 0."""

    data: str
    network: str
    images_per_class: int
    iterations: int
    lr: float
    method: str
    trade_off: float
    warm_up: float
    temperature: float
    seed: int
    # Fields that the first results lack; the defaults are the values those runs used.
    batchnorm: str = "trained"
    clip: float = 0.0
    bound: bool = False


def read_plan(path: Path) -> list[Setting]:
    """The runs of all grids, without repetition, one seed after the other."""
    found: dict[Setting, None] = {}  # a set that keeps the order
    try:
        grids = tomllib.loads(path.read_text()).get("grid")
    except ValueError as error:  # also bytes that are not UTF-8
        raise UserError(f"{path} is no TOML ({error}): give a plan such as {RESULTS / 'plan.toml'}.") from None
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"{path} has no grids: give a plan with tables [[grid]], such as {RESULTS / 'plan.toml'}.")
    for grid in grids:
        names = [field.name for field in fields(Setting)]
        grid = {field.name: [field.default] for field in fields(Setting) if field.default is not MISSING} | grid
        if set(grid) != set(names):
            raise UserError(f"{path}: a grid has {sorted(grid)}, expected each of {names}")
        for name in names:
            if not isinstance(grid[name], list):
                raise UserError(f"{path}: {name} is {grid[name]!r:.80}, expected a list of values")
        if not set(grid["method"]) <= set(METHODS):
            raise UserError(f"{path}: methods {grid['method']}, expected some of {METHODS}")
        if not set(grid["batchnorm"]) <= {"trained", "frozen"}:
            raise UserError(f"{path}: batchnorm {grid['batchnorm']}, expected trained or frozen")
        found |= {canonical(Setting(*values)): None for values in itertools.product(*(grid[name] for name in names))}
    return sorted(found, key=lambda setting: setting.seed)


def canonical(setting: Setting) -> Setting:
    """Methods without a source term have no trade-off: one run, not one for each value in the grid."""
    content = asdict(setting)
    if not setting.method.startswith("co-tuning"):
        content |= {"trade_off": 0.0, "warm_up": 0.0, "temperature": 1.0, "bound": False}
    if setting.method == "linear-probe":
        content |= {"batchnorm": "trained"}  # it runs in evaluation mode in any case
    for name in ("lr", "trade_off", "warm_up", "temperature", "clip"):
        content[name] = float(content[name])
    return Setting(**content)


# ---------------------------------------------------------------------------------------------------------- the results


def results_file(setting: Setting) -> Path:
    return RESULTS / f"{setting.data}_{setting.network}.jsonl"


def read_results(path: Path) -> dict[Setting, dict[str, Any]]:
    """The result of each setting. A half-written line of a killed run is cut off."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomically(path, whole.encode())
    found = {}
    for line in whole.splitlines():
        content = json.loads(line)
        setting = {field.name: content.pop(field.name) for field in fields(Setting) if field.name in content}
        found[Setting(**setting)] = content
    return found


def append_result(path: Path, setting: Setting, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(setting) | result) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------- what runs of a seed share


@lru_cache(maxsize=1)
def images_of(data: str, images_per_class: int, seed: int) -> Images:
    folder = PROJECT / ".cache"
    folder.mkdir(exist_ok=True)
    if data == "fashion-mnist":
        return fashion_mnist(folder, images_per_class=images_per_class, validation=500, test=1500, seed=seed)
    if data == "tux-paint":
        return tux_paint(folder, images_per_class=images_per_class, seed=seed)
    raise UserError(f"data {data!r}, expected fashion-mnist or tux-paint")


@cache
def classifier_of(network: str) -> nn.Module:
    return pretrained_classifier(int(network.removeprefix("efficientnet-lite")))


@lru_cache(maxsize=8)
def relationship_of(
    data: str, network: str, images_per_class: int, seed: int, reverse: bool, temperature: float
) -> ck.Relationship:
    images = images_of(data, images_per_class, seed)
    return ck.learn_relationship(
        classifier_of(network),
        list(images.train.center_batches(EVALUATED_AT_ONCE)),
        target_classes=images.classes,
        temperature=temperature,
        method="reverse" if reverse else "direct",
        validation_loader=list(images.validation.center_batches(EVALUATED_AT_ONCE)) if reverse else None,
        progress=False,
    )


# ------------------------------------------------------------------------------------------------------------- one run


def run(setting: Setting) -> dict[str, Any]:
    images = images_of(setting.data, setting.images_per_class, setting.seed)
    relationship = None
    if setting.method.startswith("co-tuning"):
        relationship = relationship_of(
            setting.data, setting.network, setting.images_per_class, setting.seed,
            setting.method == "co-tuning-reverse", setting.temperature,
        )  # fmt: skip
    begun = time.process_time()
    model = fine_tune(setting, images, relationship)
    return {
        **measured("validation", model, images.validation),
        **measured("test", model, images.test),
        "training_images": len(images.train),
        "processor_seconds": round(time.process_time() - begun, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def fine_tune(setting: Setting, images: Images, relationship: ck.Relationship | None) -> nn.Module:
    torch.manual_seed(setting.seed)
    model = ck.CoTuningModel.from_classifier(
        classifier_of(setting.network), len(images.classes), bound_source=setting.bound
    )
    # EfficientNet's own momentum, 0.01, would leave its running statistics half those of ImageNet after 100 iterations.
    model.set_batchnorm_momentum(0.1)
    if setting.batchnorm == "frozen":
        model.freeze_batchnorm()
    # A linear probe uses the pretrained features, so BatchNorm keeps its pretrained statistics.
    model.train(setting.method != "linear-probe")
    loss_of = objective_of(
        setting.method, model, relationship,
        trade_off=setting.trade_off, warm_up=round(setting.warm_up * setting.iterations),
    )  # fmt: skip
    optimizer = optimizer_of(setting.method, model, setting.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [setting.iterations * 2 // 3], gamma=0.1)
    torch.manual_seed(setting.seed)  # the same dropout for every method
    batches = images.train.random_batches(BATCH_SIZE, setting.iterations, setting.seed)
    for iteration, (inputs, labels) in enumerate(batches):
        loss = loss_of(inputs, labels, iteration)
        optimizer.zero_grad()
        loss.backward()
        if setting.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        schedule.step()
    return model.target_model()


@torch.no_grad()
def measured(part: str, model: nn.Module, images: ImageSet) -> dict[str, float]:
    logits: Tensor = torch.cat([model(batch.images) for batch in images.center_batches(EVALUATED_AT_ONCE)])
    return {
        f"{part}_accuracy": round((logits.argmax(1) == images.labels).double().mean().item(), 6),
        f"{part}_nll": round(F.cross_entropy(logits, images.labels).item(), 5),
    }


# ---------------------------------------------------------------------------------------------------------- the program


def main(arguments: list[str] | None = None) -> int:
    return exit_code("experiments", lambda: run_plan(arguments), STOPPED)


def run_plan(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--plan", type=Path, default=RESULTS / "plan.toml")
    parser.add_argument("--threads", type=int, default=1, help="for torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = read_plan(options.plan)
    for number, setting in enumerate(plan, start=1):
        path = results_file(setting)
        if setting in read_results(path):
            continue
        result = run(setting)
        append_result(path, setting, result)
        print(
            f"{number}/{len(plan)} {setting} {result['test_accuracy']:.1%} ({result['processor_seconds']:.0f} s)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
