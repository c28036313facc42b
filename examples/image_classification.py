"""The paper's protocol on your images: several ways of fine-tuning side by side, from one seed, resumable.

    python examples/image_classification.py DATA --model timm:resnet50 --temperature 1.13 --output results/cub

``DATA`` has ``train``, ``val`` and ``test`` (without ``val``, every fifth training image), each with one sub-folder
per class; the ``paper_*.py`` files read four data sets of the paper in their published form. The protocol is that of
the authors' script: images resized to 256 x 256; random crops and flips to train, the centre to validate, ten crops
to test; SGD with Nesterov's momentum 0.9 and weight decay 5e-4, the new head at ten times the rate, the rate divided by
ten after two thirds.

Methods: ``plain`` fine-tuning; ``linear-probe`` (only the new head is trained); ``lp-ft`` (a probe by L-BFGS, then
plain fine-tuning from its head, Kumar et al. 2022); ``l2-sp`` (the distance to the pretrained weights is penalised
instead of their size, Li et al. 2018); ``co-tuning`` (direct relationship); ``co-tuning-reverse``;
``co-tuning-uncalibrated`` (temperature 1, the paper's ablation); ``lp-co-tuning`` (Co-Tuning from the probe's head).
``--temperature`` is the pretrained classifier's, which ``source_temperature.py`` fits on images of its own classes.

A run may be killed at any moment: the same command resumes from the last checkpoint and skips finished methods. On the
same machine the result has the same bits as without the interruption.

Under ``torchrun`` each process takes its share of every batch, and the first one tests and writes:

    torchrun --nproc-per-node 4 examples/image_classification.py DATA --model timm:resnet50 --output results/cub

On several machines ``--output`` is a shared folder. The batches are those of one process. So are the weights, up to
rounding, if the network has no dropout and no BatchNorm in training, whose statistics cover only a process's share.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import importlib
import io
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

try:
    import numpy as np
    import torch
    from command_line import UserError, device, exit_code, number, share
    from linear_probe import features_of, fit_head, head_layer
    from PIL import Image
    from torch import Tensor, distributed, nn
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, Dataset, Sampler
    from tqdm import tqdm
    from training_progress import Progress

    import cotuning_kernels as ck
    from cotuning_kernels.atomic_file import remove, write_atomically
    from cotuning_kernels.distributed import ShardSampler, global_mean_loss, rank_and_size
except ImportError as missing:
    sys.exit(f"image_classification: {missing}: pip install '.[demo]' in the project's folder.")

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
STOPPED = "stopped; the same command goes on"
METHODS = (
    "plain", "linear-probe", "lp-ft", "l2-sp", "co-tuning", "co-tuning-reverse", "co-tuning-uncalibrated",
    "lp-co-tuning",
)  # fmt: skip
FROM_PROBE = ("lp-ft", "lp-co-tuning")  # they begin with the new head that a linear probe fits
# Errors of torch.load and load_state_dict for a file that is truncated, no checkpoint, or of another network.
DAMAGED = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError, OSError)


Made = TypeVar("Made")


# ---------------------------------------------------------------------------------------------------- several processes


@contextmanager
def process_group(options: argparse.Namespace) -> Iterator[None]:
    """Join the processes that torchrun has started, each on its own device; only the first one prints."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield
        return
    if options.batch_size % processes:
        raise UserError(
            f"--batch-size {options.batch_size} cannot be shared by {processes} processes: give a multiple."
        )
    kind = torch.device(options.device).type
    if kind == "cuda":
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(options.device)
    # The others wait while the first one tests, which may exceed NCCL's limit of ten minutes.
    # With a GPU present, torch's default backend would serve only the GPU, even for a run on the CPU.
    distributed.init_process_group(backend="gloo" if kind == "cpu" else None, timeout=timedelta(days=1))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank_and_size()[0] == 0 else nowhere):
            yield
    finally:
        distributed.destroy_process_group()


def by_the_first(make: Callable[[], Made]) -> Made:
    """Run ``make`` in the first process; all processes return its result or raise its error."""
    rank, processes = rank_and_size()
    if processes == 1:
        return make()
    made: list[Any] = [None, None]
    if rank == 0:
        try:
            made[0] = make()
        except (UserError, OSError) as error:
            made[1] = error
    distributed.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    result: Made = made[0]
    return result


# ------------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class ImageList:
    """Paths and labels of one part of the data."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Parts:
    """Without ``validation``, methods that need it take a fifth of the training images."""

    classes: tuple[str, ...]
    train: ImageList
    validation: ImageList | None
    test: ImageList


def read_folder(folder: Path) -> Parts:
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise UserError(f"{folder} has no folders train and test, each with one sub-folder a class: make them.")
    classes = tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
    train = list_images(folder / "train", classes)
    if (folder / "val").is_dir():
        validation = list_images(folder / "val", classes)
    else:
        train, validation = split_off_a_fifth(train, classes)
    return Parts(classes, train, validation, list_images(folder / "test", classes))


def list_images(folder: Path, classes: Sequence[str]) -> ImageList:
    others = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if others:
        raise UserError(f"{folder} has a class {others[0]} that train has not: the parts must have the same classes.")
    found = [
        (path, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    if not found:
        raise UserError(f"{folder} has no image in its sub-folders ({', '.join(sorted(ENDINGS))}).")
    return ImageList(tuple(path for path, _ in found), tuple(label for _, label in found))


def sample(parts: Parts, sampling_rate: float, images_per_class: int | None, seed: int) -> Parts:
    """A share of each training class's images, at least one and at most ``images_per_class``.

    With the same seed, a smaller sample is a subset of a larger one; every method has the same sample.
    """
    random, kept = np.random.default_rng(seed), []
    for label, name in enumerate(parts.classes):
        members = [i for i, own in enumerate(parts.train.labels) if own == label]
        if not members:
            raise UserError(f"the class {name} has no training image: add some, or remove its folder.")
        number = max(1, round(sampling_rate * len(members)))
        kept += random.permutation(members)[:number][:images_per_class].tolist()
    return replace(parts, train=chosen(parts.train, sorted(kept)))


def split_off_a_fifth(images: ImageList, classes: Sequence[str]) -> tuple[ImageList, ImageList]:
    """The remaining images, and every fifth."""
    fifth = range(0, len(images), 5)
    remaining = chosen(images, sorted(set(range(len(images))) - set(fifth)))
    lost = set(images.labels) - set(remaining.labels)
    if lost:
        raise UserError(
            f"every fifth training image is held out to validate, and the class {classes[min(lost)]} has no other: "
            "take more images of each class, or give validation images apart (a folder val)."
        )
    return remaining, chosen(images, fifth)


def chosen(images: ImageList, indices: Sequence[int]) -> ImageList:
    return ImageList(tuple(images.paths[i] for i in indices), tuple(images.labels[i] for i in indices))


@dataclass(frozen=True)
class Pixels:
    """The network's input: sizes, and each channel's mean and standard deviation for values from 0 to 1."""

    full: int
    crop: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def load(path: Path, size: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            return in_colours(image).resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged file may raise any error, an enormous one DecompressionBombError
        raise UserError(f"{path} cannot be read as an image ({error}): remove or replace it.") from None


def in_colours(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. Pillow alone would clip 16-bit grey values at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("grey values of 32 bits, of unknown range; 8 or 16 are wanted")
    return image.convert("RGB")


def as_tensor(image: Image.Image, pixels: Pixels) -> Tensor:
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(pixels.mean)[:, None, None]) / torch.tensor(pixels.deviation)[:, None, None]


def random_crop(image: Image.Image, pixels: Pixels, random: np.random.Generator) -> Tensor:
    """8% to 100% of the area at an aspect between 3/4 and 4/3, scaled to the crop, flipped half of the time."""
    size = image.size[0]
    for _ in range(10):
        area, aspect = size**2 * random.uniform(0.08, 1.0), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < width <= size and 0 < height <= size:
            break
    else:
        width = height = size
    left, top = int(random.integers(size - width + 1)), int(random.integers(size - height + 1))
    box = (left, top, left + width, top + height)
    image = image.resize((pixels.crop, pixels.crop), Image.Resampling.BILINEAR, box=box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return as_tensor(image, pixels)


def crops(image: Image.Image, pixels: Pixels, ten: bool) -> Tensor:
    """``(1, 3, crop, crop)``, the centre; or ``(10, ...)``, the corners and the centre, each also flipped."""
    crop = pixels.crop
    margin = image.size[0] - crop
    places = [(margin // 2, margin // 2)]
    if ten:
        places += [(0, 0), (margin, 0), (0, margin), (margin, margin)]
    values = as_tensor(image, pixels)
    cut = torch.stack([values[:, top : top + crop, left : left + crop] for left, top in places])
    return torch.cat([cut, cut.flip(3)]) if ten else cut


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Indexed by ``(image, draw)``: the random crop depends on the two and the seed, not on the worker or the order."""

    def __init__(self, images: ImageList, pixels: Pixels, seed: int) -> None:
        self.images, self.pixels, self.seed = images, pixels, seed

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        i, draw = index
        random = np.random.default_rng([self.seed, draw])
        return random_crop(load(self.images.paths[i], self.pixels.full), self.pixels, random), self.images.labels[i]


class Batches(Sampler[list[tuple[int, int]]]):
    """This process's share of batches ``first`` to ``last`` of an endless shuffled sequence that the seed decides."""

    def __init__(self, number_of_images: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.number_of_images, self.batch_size, self.seed, self.first, self.last = (
            number_of_images, batch_size, seed, first, last
        )  # fmt: skip

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled = -1, np.empty(0, dtype=int)
        for batch in range(self.first, self.last):
            indices = []
            for draw in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                epoch, place = divmod(draw, self.number_of_images)
                if epoch != shuffled[0]:
                    shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.number_of_images)
                indices.append((int(shuffled[1][place]), draw))
            rank, processes = rank_and_size()
            yield indices[rank::processes]


class StillImages(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: ImageList, pixels: Pixels, *, ten: bool = False) -> None:
        self.images, self.pixels, self.ten = images, pixels, ten

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        cut = crops(load(self.images.paths[i], self.pixels.full), self.pixels, self.ten)
        return cut if self.ten else cut[0], self.images.labels[i]


# ------------------------------------------------------------------------------------------------------------ the model


def make_classifier(name: str, weights: Path | None) -> tuple[nn.Module, Normalisation]:
    """``timm:NAME`` and ``torchvision:NAME`` with their pretrained weights, or the result of ``MODULE:FUNCTION``.

    ``weights`` is a state dict to load instead. Also returns the normalisation of the model's images.
    """
    source, _, entry = name.partition(":")
    normalisation = IMAGENET
    try:
        module = importlib.import_module("torchvision.models" if source == "torchvision" else source)
        if source == "timm":
            model = module.create_model(entry, pretrained=weights is None)
            config = importlib.import_module("timm.data").resolve_model_data_config(model)
            normalisation = tuple(config["mean"]), tuple(config["std"])
        elif source == "torchvision":
            published = module.get_model_weights(entry).DEFAULT
            model = module.get_model(entry, weights=None if weights else published)
            transforms = published.transforms()
            normalisation = tuple(transforms.mean), tuple(transforms.std)
        else:
            model = getattr(module, entry)()
        if weights is not None:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        classifier: nn.Module = model.eval()
    except (ImportError, *DAMAGED) as error:
        missing = isinstance(error, ModuleNotFoundError) and source in ("timm", "torchvision") and error.name == source
        mend = f": pip install {source}" if missing else ""
        raise UserError(f"the model {name} cannot be made ({type(error).__name__}: {error!s:.300}){mend}.") from None
    return classifier, normalisation


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel
IMAGENET: Normalisation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def two_headed(classifier: nn.Module, num_classes: int, options: argparse.Namespace) -> ck.CoTuningModel:
    """Add a target head. A trial run on a noise image finds a wrong head or size before training."""
    crop = options.pixels.crop
    noise = torch.randn(1, 3, crop, crop, generator=torch.Generator().manual_seed(0)).to(options.device)
    try:
        return ck.CoTuningModel.from_classifier(
            classifier, num_classes, head=options.head, example_input=noise, bound_source=options.bound_source
        )
    except (TypeError, ValueError) as error:
        # Name the argument as this program's option.
        said = str(error).replace("head='", "--head '").replace("head=", "--head")
        raise UserError(f"{options.model}: {said}.") from None
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{options.model} cannot be run on images of --crop {crop} with a second head ({error!s:.200}): give the "
            "size that it was made for, or name its head with --head."
        ) from None


def relationship_of(method: str, classifier: nn.Module, parts: Parts, options: argparse.Namespace) -> ck.Relationship:
    """Learn the relationship once and keep it beside the results."""
    file = options.output / f"relationship-{method}.safetensors"

    def load_relationship() -> ck.Relationship | None:
        try:
            return ck.Relationship.load(file) if file.exists() else None
        except ValueError as error:
            raise UserError(f"{error}: remove it, and the same command learns it again.") from None

    before = by_the_first(load_relationship)
    if before is not None:
        return before

    def loader(images: ImageList) -> DataLoader[Any]:
        data = StillImages(images, options.pixels)
        return DataLoader(data, options.batch_size, sampler=ShardSampler(data), num_workers=options.workers)

    train, validation = parts.train, None
    if method == "co-tuning-reverse":
        validation = parts.validation
        if validation is None:  # the network still trains on all images
            train, validation = split_off_a_fifth(train, parts.classes)
    try:
        learnt = ck.learn_relationship(
            classifier, loader(train), target_classes=parts.classes, device=options.device,
            temperature=1.0 if method == "co-tuning-uncalibrated" else options.temperature,
            method="direct" if validation is None else "reverse",
            validation_loader=None if validation is None else loader(validation),
            checkpoint=options.output / f"statistics-{method}.safetensors", distributed=True,
            progress=rank_and_size()[0] == 0,
        )  # fmt: skip
    except ValueError as error:  # damaged statistics, or logits that have no softmax
        raise UserError(f"{method}: {error}.") from None
    by_the_first(lambda: learnt.save(file))
    return learnt


def uses_source_head(method: str) -> bool:
    return "co-tuning" in method


def objective_of(
    method: str,
    model: ck.CoTuningModel,
    relationship: ck.Relationship | None,
    *,
    trade_off: float = 2.3,
    warm_up: int = 0,
    l2_sp: float = 0.01,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """``(images, labels, iteration) -> loss`` of a method; also freezes what the method does not train.

    ``trade_off`` grows from 0 to its value over the first ``warm_up`` iterations.
    """
    if method == "linear-probe":
        model.requires_grad_(False)
        model.target_head.requires_grad_(True)
    # DDP reads requires_grad when constructed. A network may have parameters that it never uses.
    forward = DistributedDataParallel(model, find_unused_parameters=True) if distributed.is_initialized() else model
    if uses_source_head(method):
        assert relationship is not None
        criterion = ck.FusedCoTuningLoss(relationship, trade_off).to(next(model.parameters()).device)

        def co_tuning(images: Tensor, labels: Tensor, iteration: int) -> Tensor:
            criterion.trade_off = trade_off * min(1.0, (iteration + 1) / max(1, warm_up))
            return global_mean_loss(criterion, *forward(images), labels).loss

        return co_tuning
    anchors: list[tuple[Tensor, Tensor]] = []
    if method == "l2-sp":
        new = {id(p) for p in model.target_head.parameters()}
        anchors = [(p, p.detach().clone()) for p in model.parameters() if id(p) not in new]

    def target_head_only(images: Tensor, labels: Tensor, iteration: int) -> Tensor:
        loss = F.cross_entropy(forward(images).target_logits, labels)
        if anchors:
            distance = torch.stack([(p - anchor).square().sum() for p, anchor in anchors]).sum()
            loss = loss + l2_sp / 2 * distance
        return loss

    return target_head_only


def optimizer_of(method: str, model: ck.CoTuningModel, lr: float) -> torch.optim.Optimizer:
    """The paper's SGD: the new head at ten times the rate; weight decay on parameters that L2-SP does not penalise.

    A head that a probe has fitted is not new: it has the rate of the rest.
    """
    multiplier = 1.0 if method in FROM_PROBE else 10.0
    groups = model.param_groups(lr, new_head_multiplier=multiplier, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    for group in optimizer.param_groups:
        if method == "l2-sp" and group["name"] != "target_head":
            group["weight_decay"] = 0.0
    return optimizer


# ------------------------------------------------------------------------------------------------------------- training


def run_method(method: str, classifier: nn.Module, parts: Parts, options: argparse.Namespace) -> dict[str, Any]:
    """Train with one method, or resume it, and return the result."""
    result_file = options.output / f"{method}.json"

    def finished() -> dict[str, Any] | None:
        mend = "remove it, and the same command trains this method again"
        return read_json(result_file, ("method", *MEASURED), mend) if result_file.exists() else None

    before = by_the_first(finished)
    if before is not None:
        print(f"{method}: finished before")
        return before
    torch.manual_seed(options.seed)
    model = two_headed(classifier, len(parts.classes), options)
    if options.freeze_batchnorm:
        model.freeze_batchnorm()
    if options.batchnorm_momentum is not None:
        model.set_batchnorm_momentum(options.batchnorm_momentum)
    if method in FROM_PROBE:
        by_the_first(lambda: begin_with_probe(method, model, parts, options))  # DDP passes it on
    relationship = relationship_of(method, classifier, parts, options) if uses_source_head(method) else None
    loss_of = objective_of(
        method, model, relationship, trade_off=options.trade_off, warm_up=options.warm_up, l2_sp=options.l2_sp
    )
    optimizer = optimizer_of(method, model, options.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [options.iterations * 2 // 3], gamma=0.1)
    rank, processes = rank_and_size()
    torch.manual_seed(options.seed + rank)  # the same dropout for every method, different in every process
    progress = Progress(checkpoint_of(method, options), model, optimizer, schedule)
    progress.load()
    writer = tensorboard(options, method, progress.iteration) if rank == 0 else None
    first, begun = progress.iteration, time.perf_counter()
    # A linear probe uses the pretrained features, so BatchNorm keeps its pretrained statistics.
    model.train(method != "linear-probe")
    sampler = Batches(len(parts.train), options.batch_size, options.seed, first, options.iterations)
    # A separate generator: otherwise a starting DataLoader would draw from the generator of dropout.
    loader = DataLoader(
        TrainingImages(parts.train, options.pixels, options.seed), batch_sampler=sampler, num_workers=options.workers,
        generator=torch.Generator(),
    )  # fmt: skip
    bar = {"desc": f"{method:<24}", "initial": first, "total": options.iterations, "disable": rank > 0, "leave": False}
    for images, labels in tqdm(loader, **bar):
        loss = loss_of(images.to(options.device), labels.to(options.device), progress.iteration)
        optimizer.zero_grad()
        loss.backward()
        if options.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        schedule.step()
        progress.iteration += 1
        if writer is not None:
            writer.add_scalar("loss", loss.item(), progress.iteration)
        if progress.iteration % options.checkpoint_every == 0:
            progress.seconds += time.perf_counter() - begun
            progress.save()
            begun = time.perf_counter()
    progress.seconds += time.perf_counter() - begun
    if writer is not None:
        writer.close()

    def tested() -> dict[str, Any]:
        head = model.target_model()
        result = {
            "method": method,
            "validation_accuracy": parts.validation and accuracy(head, parts.validation, options, ten=False),
            "test_accuracy_ten_crops": accuracy(head, parts.test, options, ten=True),
            "training_seconds": round(progress.seconds, 1),
            "training_images": len(parts.train),
            **{name: getattr(options, name) for name in RECORDED},
            "processes": processes,
        }
        torch_save(options.output / f"{method}.weights.pt", head.state_dict())
        write_atomically(result_file, (json.dumps(result, indent=2) + "\n").encode())
        remove(progress.path)
        return result

    return by_the_first(tested)


def begin_with_probe(method: str, model: ck.CoTuningModel, parts: Parts, options: argparse.Namespace) -> None:
    """Fit the target head on the features of the training images' centres; a checkpoint has a later state of it."""
    if checkpoint_of(method, options).exists():
        return
    loader = DataLoader(StillImages(parts.train, options.pixels), options.batch_size, num_workers=options.workers)
    try:
        head = head_layer(model)
    except TypeError as error:
        raise UserError(f"{options.model}, {method}: {error}.") from None
    fit_head(head, *features_of(model, loader), weight_decay=options.probe_decay)


def checkpoint_of(method: str, options: argparse.Namespace) -> Path:
    folder: Path = options.output
    return folder / f"{method}.checkpoint.safetensors"


MEASURED = ("validation_accuracy", "test_accuracy_ten_crops")
RECORDED = (
    "model", "sampling_rate", "images_per_class", "seed", "iterations", "batch_size", "lr", "trade_off", "warm_up",
    "temperature", "l2_sp", "probe_decay", "freeze_batchnorm", "clip", "bound_source",
)  # fmt: skip


def read_json(path: Path, needed: Sequence[str], mend: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {mend}.") from None
    if not isinstance(content, dict) or not set(needed) <= content.keys():
        raise UserError(f"{path} is damaged, or of something else: {mend}.")
    return content


def torch_save(path: Path, content: Any) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageList, options: argparse.Namespace, *, ten: bool) -> float:
    """Accuracy of the mean probability over an image's crops."""
    data = StillImages(images, options.pixels, ten=ten)
    right, batch_size = 0, max(1, options.batch_size // (10 if ten else 1))
    for inputs, labels in DataLoader(data, batch_size, num_workers=options.workers):
        number = inputs.shape[1] if ten else 1
        outputs = model(inputs.flatten(0, 1).to(options.device) if ten else inputs.to(options.device))
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        probabilities = logits.softmax(dim=1).unflatten(0, (-1, number)).mean(dim=1)
        right += int((probabilities.argmax(dim=1).cpu() == labels).sum())
    return right / len(images)


def tensorboard(options: argparse.Namespace, method: str, iteration: int) -> Any:
    """A writer that drops entries that an interrupted run wrote after its last checkpoint."""
    if options.tensorboard is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard.") from None
    return SummaryWriter(str(options.tensorboard / method), purge_step=iteration + 1)


# ---------------------------------------------------------------------------------------------------------- the program


def run(options: argparse.Namespace, parts: Parts) -> list[dict[str, Any]]:
    """All methods on one sample of the training images."""
    if options.crop > options.size:
        raise UserError(f"--crop {options.crop} is cut out of images of --size {options.size}: give a smaller crop.")
    classifier, (mean, deviation) = make_classifier(options.model, options.weights)
    options.pixels = Pixels(
        options.size, options.crop, tuple(options.mean or mean), tuple(options.deviation or deviation)
    )
    options.output.mkdir(parents=True, exist_ok=True)
    by_the_first(lambda: check_folder(options, parts))
    parts = sample(parts, options.sampling_rate, options.images_per_class, options.seed)
    print(f"{len(parts.classes)} classes, {len(parts.train)} training images, {len(parts.test)} test images")
    classifier.to(options.device)
    methods = list(options.methods)
    if options.temperature == 1 and {"co-tuning", "co-tuning-uncalibrated"} <= set(methods):
        methods.remove("co-tuning")
        print("--temperature is 1: co-tuning is co-tuning-uncalibrated, which is run once (see source_temperature.py)")
    results = [run_method(method, copy.deepcopy(classifier), parts, options) for method in methods]
    by_the_first(lambda: write_csv(options.output / "results.csv", results))
    print(f"{'method':24}{'validation':>12}{'ten crops':>12}")
    for result in results:
        validation = "" if result["validation_accuracy"] is None else f"{result['validation_accuracy']:.1%}"
        print(f"{result['method']:24}{validation:>12}{result['test_accuracy_ten_crops']:12.1%}")
    return results


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, table.getvalue().encode())


def check_folder(options: argparse.Namespace, parts: Parts) -> None:
    """Check that the output folder's results have the same protocol, and images with the same names."""
    names = (*RECORDED, "data", "weights", "head", "pixels", "batchnorm_momentum")
    settings = {name: str(getattr(options, name)) for name in names}
    settings |= {"images": summary(parts, options.data), "processes": str(rank_and_size()[1])}
    file = options.output / "settings.json"
    if not file.exists():
        write_atomically(file, (json.dumps(settings, indent=2) + "\n").encode())
        return
    before = read_json(file, (), "give another --output, or remove this one with its results")
    changed = [
        f"{name} was {before.get(name)}, is {value}" for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        raise UserError(f"{options.output} is of other settings ({'; '.join(changed)}): give another --output.")


def summary(parts: Parts, folder: Path) -> str:
    """The number of images, and a digest of class names, image names and labels."""
    lists = {"to train": parts.train, "to validate": parts.validation, "to test": parts.test}
    counts = ", ".join(f"{len(images)} {part}" for part, images in lists.items() if images is not None)
    names = [
        (part, os.path.relpath(path, folder), label)
        for part, images in lists.items()
        if images is not None
        for path, label in zip(images.paths, images.labels, strict=True)
    ]
    digest = hashlib.sha256(json.dumps([parts.classes, names]).encode()).hexdigest()
    return f"{counts}, names {digest[:12]}"


def main(arguments: list[str] | None = None) -> int:
    return exit_code("image_classification", lambda: run_on_folder(arguments), STOPPED)


def run_on_folder(arguments: list[str] | None) -> None:
    parser = parser_of(
        (__doc__ or "").split("\n\n")[0], "folder with train, test and perhaps val, each with one sub-folder a class"
    )
    parser.add_argument("--sampling-rate", type=share, default=1.0, help="of the training images of each class; the "
        "paper: 0.15, 0.3, 0.5, 1")  # fmt: skip
    options = parser.parse_args(arguments)
    with process_group(options):
        run(options, read_folder(options.data))


def parser_of(description: str, data: str) -> argparse.ArgumentParser:
    """The parser shared by this program and those of the paper's data sets."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("data", type=Path, help=data)
    add("--model", required=True, help="timm:NAME, torchvision:NAME or MODULE:FUNCTION")
    add("--weights", type=Path, help="a state dict for the model, instead of the weights that it comes with")
    add("--head", metavar="NAME", help="of the classifier's last layer, where it is not found by itself")
    for name, kind in (("mean", number(float)), ("deviation", number(float, 0, above=True))):
        add(f"--{name}", type=kind, nargs=3, metavar=("R", "G", "B"), help="to normalise images with, on a scale from "
            "0 to 1; by default the model's own, or ImageNet's")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--output", type=Path, default=Path("results"), help="for results, checkpoints and weights")
    add("--images-per-class", type=number(int, 1), metavar="N", help="at most so many training images of each class; "
        "the paper at the large end: 1000")  # fmt: skip
    add("--temperature", type=number(float, 0, above=True), default=1.0, help="of the classifier; "
        "source_temperature.py fits it")  # fmt: skip
    add("--trade-off", type=number(float, 0), default=2.3, help="weight of the source term")
    add("--warm-up", type=number(int, 0), default=0, metavar="N", help="iterations over which the trade-off grows "
        "from 0")  # fmt: skip
    add("--l2-sp", type=number(float, 0), default=0.01, help="weight of the penalty of l2-sp")
    add("--probe-decay", type=number(float, 0), default=0.1, help="weight decay of the linear probe with which lp-ft "
        "and lp-co-tuning begin")  # fmt: skip
    add("--iterations", type=number(int, 1), default=9000)
    add("--batch-size", type=number(int, 1), default=48)
    add("--lr", type=number(float, 0), default=1e-3, help="of all but the new head, which has ten times that")
    add("--batchnorm-momentum", type=number(float, 0, 1), help="of every BatchNorm layer; by default the model's own")
    add("--freeze-batchnorm", action="store_true", help="BatchNorm in evaluation mode: the better choice where batches "
        "or images are few; the paper trained it")  # fmt: skip
    add("--clip", type=number(float, 0, above=True), metavar="X", help="largest norm of all gradients together; a "
        "network that diverges, or whose BatchNorm is frozen, often needs about 5")  # fmt: skip
    add("--bound-source", action=argparse.BooleanOptionalAction, default=True, help="bound the source head's gradient "
        "into the backbone by the target head's; the paper did not")  # fmt: skip
    add("--size", type=number(int, 1), default=256, help="images are resized to it")
    add("--crop", type=number(int, 1), default=224, help="what the network sees")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    add("--checkpoint-every", type=number(int, 1), default=500, metavar="N", help="iterations")
    add("--workers", type=number(int, 0), default=2, help="processes that load images")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tensorboard", type=Path, metavar="DIR", help="write the losses there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
