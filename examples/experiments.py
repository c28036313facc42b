"""When does Co-Tuning help, and when not? Many short runs on real weights and real images, one line of JSON per run.

    pip install '.[experiments]'
    python examples/experiments.py --plan docs/results/grid.toml     # the runs of a plan without a result
    python examples/experiment_tables.py                             # docs/results.md and its figure, from the lines

A plan is a list of grids; a grid's runs are the product of its lists. All runs of a seed come before those of the
next, so that whenever you stop, all methods have been compared on the same seeds. A run with a result in docs/results
is not repeated, and a killed run only loses itself. To add a setting, add a grid and run the same command.

A seed decides the training images, the new head, the batches with their crops and flips, and the dropout: two methods
of one seed differ only in the method. All settings share batches of 16, SGD as in the paper, the rate divided by ten
after two thirds, BatchNorm momentum 0.1, one evaluation at the end: on validation images if the seed is 100 or more,
else on test images. So what is chosen by the seeds from 100 on has not seen a test image.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from command_line import UserError, exit_code
from demo_data import Images, ImageSet, digits, fashion_mnist
from demo_weights import pretrained_classifier, squeezenet
from image_classification import FROM_PROBE, METHODS, STOPPED, objective_of, optimizer_of, uses_source_head
from linear_probe import features_of, fit_head, head_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
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
VALIDATION, TEST = 200, 500  # images at most
FIRST_TUNING_SEED = 100
# Beside the methods of the runner: the probe without iterations, and the scores of ck.transferability.
KINDS = (*METHODS, "linear-probe-lbfgs", "scores")


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
    batchnorm: str = "trained"
    clip: float = 0.0
    bound: bool = False
    crop: int = 128
    probe_decay: float = 0.0  # of the head that L-BFGS fits, in methods that begin with it
    l2_sp: float = 0.0  # weight of that method's penalty


def read_plan(path: Path) -> list[Setting]:
    """The runs of all grids, without repetition, one seed after the other."""
    found: dict[Setting, None] = {}  # a set that keeps the order
    try:
        grids = tomllib.loads(path.read_text()).get("grid")
    except ValueError as error:  # also bytes that are not UTF-8
        raise UserError(f"{path} is no TOML ({error}): give a plan such as {RESULTS / 'comparison.toml'}.") from None
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(
            f"{path} has no grids: give a plan with tables [[grid]], such as {RESULTS / 'comparison.toml'}."
        )
    for grid in grids:
        names = [field.name for field in fields(Setting)]
        grid = {field.name: [field.default] for field in fields(Setting) if field.default is not MISSING} | grid
        if set(grid) != set(names):
            raise UserError(f"{path}: a grid has {sorted(grid)}, expected each of {names}")
        for name in names:
            if not isinstance(grid[name], list):
                raise UserError(f"{path}: {name} is {grid[name]!r:.80}, expected a list of values")
        if not set(grid["method"]) <= set(KINDS):
            raise UserError(f"{path}: methods {grid['method']}, expected some of {KINDS}")
        if not set(grid["batchnorm"]) <= {"trained", "frozen"}:
            raise UserError(f"{path}: batchnorm {grid['batchnorm']}, expected trained or frozen")
        found |= {canonical(Setting(*values)): None for values in itertools.product(*(grid[name] for name in names))}
    return sorted(found, key=lambda setting: setting.seed)


def canonical(setting: Setting) -> Setting:
    """Methods without a source term have no trade-off: one run, not one for each value in the grid."""
    content = asdict(setting)
    if not uses_source_head(setting.method):
        content |= {"trade_off": 0.0, "warm_up": 0.0, "temperature": 1.0, "bound": False}
    if setting.method in ("linear-probe", "linear-probe-lbfgs", "scores"):
        content |= {"batchnorm": "frozen", "clip": 0.0}  # the network is in evaluation mode in any case
    if setting.method in ("linear-probe-lbfgs", "scores"):
        content |= {"lr": 0.0, "iterations": 0}
    if setting.method != "linear-probe-lbfgs" and setting.method not in FROM_PROBE:
        content |= {"probe_decay": 0.0}
    if setting.method != "l2-sp":
        content |= {"l2_sp": 0.0}
    for name in ("lr", "trade_off", "warm_up", "temperature", "clip", "probe_decay", "l2_sp"):
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


@lru_cache(maxsize=4)
def images_of(data: str, images_per_class: int, crop: int, seed: int) -> Images:
    folder = PROJECT / ".cache"
    folder.mkdir(exist_ok=True)
    if data == "fashion-mnist":
        images = fashion_mnist(folder, images_per_class=images_per_class, validation=VALIDATION, test=TEST, seed=seed)
    elif data == "digits":
        images = digits(images_per_class=images_per_class, validation=VALIDATION, test=TEST, seed=seed)
    elif data == "tux-paint":
        images = tux_paint(folder, images_per_class=images_per_class, seed=seed)
    else:
        raise UserError(f"data {data!r}, expected fashion-mnist, digits or tux-paint")
    return Images(images.classes, *(part.resized(crop) for part in images[1:]))


@cache
def classifier_of(network: str) -> nn.Module:
    if network == "squeezenet":
        return squeezenet()
    size, _, folded = network.removeprefix("efficientnet-lite").partition("-")
    classifier = pretrained_classifier(int(size))
    if folded:
        fold_batchnorm(classifier)
    return classifier


@torch.no_grad()
def fold_batchnorm(network: nn.Module) -> None:
    """Move each BatchNorm layer into the convolution before it: the same function, without normalisation."""
    modules = dict(network.named_modules())
    convolution: nn.Conv2d | None = None
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d):
            assert convolution is not None
            assert module.running_mean is not None
            assert module.running_var is not None
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, module.running_mean, module.running_var, module.eps,
                module.weight, module.bias,
            )  # fmt: skip
            parent, _, own = name.rpartition(".")
            setattr(modules[parent], own, nn.Identity())


@lru_cache(maxsize=8)
def relationship_of(
    data: str, network: str, images_per_class: int, crop: int, seed: int, reverse: bool, temperature: float
) -> ck.Relationship:
    images = images_of(data, images_per_class, crop, seed)
    return ck.learn_relationship(
        classifier_of(network),
        list(images.train.center_batches(EVALUATED_AT_ONCE)),
        target_classes=images.classes,
        temperature=temperature,
        method="reverse" if reverse else "direct",
        validation_loader=list(images.validation.center_batches(EVALUATED_AT_ONCE)) if reverse else None,
        progress=False,
    )


# What the frozen network gives, computed once for the probes of a seed.
@lru_cache(maxsize=16)
def frozen_features(
    data: str, network: str, images_per_class: int, crop: int, seed: int, part: str, iterations: int = 0
) -> tuple[Tensor, Tensor]:
    """Features and labels of ``"train"``, ``"validation"`` or ``"test"``, or of the ``"batches"`` of training."""
    images = images_of(data, images_per_class, crop, seed)
    model = ck.CoTuningModel.from_classifier(classifier_of(network), len(images.classes))
    if part == "batches":
        return features_of(model, images.train.random_batches(BATCH_SIZE, iterations, seed))
    return features_of(model, getattr(images, part).center_batches(EVALUATED_AT_ONCE))


# ------------------------------------------------------------------------------------------------------------- one run


def run(setting: Setting) -> dict[str, Any]:
    task = (setting.data, setting.network, setting.images_per_class, setting.crop, setting.seed)
    images = images_of(setting.data, setting.images_per_class, setting.crop, setting.seed)
    part = "test" if setting.seed < FIRST_TUNING_SEED else "validation"
    begun = time.process_time()
    result: dict[str, Any]
    if setting.method == "scores":
        batches = list(images.train.center_batches(EVALUATED_AT_ONCE))
        scores = ck.transferability(classifier_of(setting.network), batches, len(images.classes), progress=False)
        result = scores._asdict()
    elif setting.method.startswith("linear-probe"):
        head = probe(setting, task, len(images.classes))
        features, labels = frozen_features(*task, part)
        result = measured(part, head(features), labels)
    else:
        relationship = None
        if uses_source_head(setting.method):
            relationship = relationship_of(*task, setting.method == "co-tuning-reverse", setting.temperature)
        model = fine_tune(setting, images, relationship)
        own: ImageSet = getattr(images, part)
        result = measured(part, predicted(model, own), own.labels)
    return {
        **result,
        "training_images": len(images.train),
        "processor_seconds": round(time.process_time() - begun, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@torch.no_grad()
def probe(setting: Setting, task: tuple[str, str, int, int, int], classes: int) -> nn.Linear:
    """The new head on the features of the pretrained network, by L-BFGS or by the SGD of the other methods."""
    classifier = classifier_of(setting.network)  # its first construction draws random numbers
    torch.manual_seed(setting.seed)
    model = ck.CoTuningModel.from_classifier(classifier, classes)
    head = head_layer(model)
    if setting.method == "linear-probe-lbfgs":
        fit_head(head, *frozen_features(*task, "train"), weight_decay=setting.probe_decay)
        return head
    model.requires_grad_(False)
    head.requires_grad_(True)
    optimizer = optimizer_of(setting.method, model, setting.lr)
    schedule = schedule_of(optimizer, setting.iterations)
    features, labels = frozen_features(*task, "batches", setting.iterations)
    for some, own in zip(features.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        with torch.enable_grad():
            loss = F.cross_entropy(head(some), own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def fine_tune(setting: Setting, images: Images, relationship: ck.Relationship | None) -> nn.Module:
    classifier = classifier_of(setting.network)  # its first construction draws random numbers
    torch.manual_seed(setting.seed)
    model = ck.CoTuningModel.from_classifier(classifier, len(images.classes), bound_source=setting.bound)
    if setting.method in FROM_PROBE:
        batches = images.train.center_batches(EVALUATED_AT_ONCE)
        fit_head(head_layer(model), *features_of(model, batches), weight_decay=setting.probe_decay)
    # EfficientNet's own momentum, 0.01, would leave its running statistics half those of ImageNet after 100 iterations.
    model.set_batchnorm_momentum(0.1)
    if setting.batchnorm == "frozen":
        model.freeze_batchnorm()
    model.train()
    loss_of = objective_of(
        setting.method, model, relationship,
        trade_off=setting.trade_off, warm_up=round(setting.warm_up * setting.iterations), l2_sp=setting.l2_sp,
    )  # fmt: skip
    optimizer = optimizer_of(setting.method, model, setting.lr)
    schedule = schedule_of(optimizer, setting.iterations)
    torch.manual_seed(setting.seed)  # the same dropout for every method
    for iteration, (inputs, labels) in enumerate(
        images.train.random_batches(BATCH_SIZE, setting.iterations, setting.seed)
    ):
        loss = loss_of(inputs, labels, iteration)
        optimizer.zero_grad()
        loss.backward()
        if setting.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        schedule.step()
    return model.target_model()


def schedule_of(optimizer: torch.optim.Optimizer, iterations: int) -> torch.optim.lr_scheduler.MultiStepLR:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [iterations * 2 // 3], gamma=0.1)


@torch.no_grad()
def predicted(model: nn.Module, images: ImageSet) -> Tensor:
    return torch.cat([model(batch.images) for batch in images.center_batches(EVALUATED_AT_ONCE)])


def measured(part: str, logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Accuracy and NLL; an NLL of ``None`` is one that is not finite."""
    nll = F.cross_entropy(logits, labels).item()
    return {
        f"{part}_accuracy": round((logits.argmax(1) == labels).double().mean().item(), 6),
        f"{part}_nll": round(nll, 5) if math.isfinite(nll) else None,
    }


# ---------------------------------------------------------------------------------------------------------- the program


def main(arguments: list[str] | None = None) -> int:
    return exit_code("experiments", lambda: run_plan(arguments), STOPPED)


def run_plan(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--plan", type=Path, default=RESULTS / "comparison.toml", help="what to run")
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
        print(f"{number}/{len(plan)} {setting} ({result['processor_seconds']:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
