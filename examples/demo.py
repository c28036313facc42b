"""Co-Tuning on real weights and real images, next to plain fine-tuning, in a few minutes on a CPU.

Co-Tuning helps when there are few images per class. The demo takes an ImageNet classifier (EfficientNet-Lite0) and five
images of each of ten kinds of clothes (Fashion-MNIST), or your own images with --data, and

1. learns the category relationship: what each target class looks like to the ImageNet classifier,
2. fits a linear probe, and fine-tunes twice from the same seed, with the same batches: plainly, and from the probe with
   Co-Tuning,
3. prints the results, whichever won, and writes three pictures.

``make demo`` runs it; ``python examples/demo.py --help`` lists its options.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

try:
    import matplotlib  # noqa: F401  (the pictures come last: better to miss it now)
    import torch
    from command_line import UserError, exit_code, number
    from demo_data import Batch, Images, ImageSet, fashion_mnist, image_folder
    from demo_pictures import plot_training
    from demo_weights import imagenet_class_names, pretrained_classifier
    from linear_probe import features_of, fit_head, head_layer
    from torch import Tensor, nn
    from torch.nn import functional as F
    from tqdm import tqdm

    import cotuning_kernels as ck
    from cotuning_kernels.calibration import reliability
    from cotuning_kernels.plots import plot_reliability
except ImportError as missing:
    sys.exit(f"demo: {missing}: run `make demo`, or pip install '.[demo]' in the project's folder.")

BATCH_SIZE = 16
# Each way as docs/results.md has it. All gradients together have at most the norm CLIP.
CLIP, PLAIN_RATE, CO_TUNING_RATE, PROBE_DECAY = 5.0, 1e-3, 3e-3, 0.1
CACHE = Path(__file__).resolve().parent.parent / ".cache"


@dataclass
class Arm:
    """One way of training, and its results; a linear probe has no trade-off, no rate and no terms."""

    name: str
    trade_off: float | None
    rate: float | None
    target_terms: list[float]
    source_terms: list[float]
    seconds: float
    model: nn.Module


def main(arguments: list[str] | None = None) -> int:
    return exit_code("demo", lambda: demo(parse(arguments)))


def demo(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    make_folder(options.output)
    images = load_images(options)
    classifier = pretrained_classifier()

    print(f"\n1. What do the {len(images.classes)} target classes look like to the ImageNet classifier?")
    relationship = ck.learn_relationship(
        classifier,
        list(images.train.center_batches(BATCH_SIZE)),
        target_classes=images.classes,
        source_classes=imagenet_class_names(),
    )
    relationship.plot(options.output / "relationship.png")
    print_relationship(relationship)

    print(
        f"\n2. A linear probe, and fine-tuning twice, on {len(images.train)} images: {options.iterations} iterations "
        f"of {BATCH_SIZE}"
    )
    torch.manual_seed(options.seed)
    start = ck.CoTuningModel.from_classifier(classifier, len(images.classes))
    # Statistics of 16 images are noise: keep those of ImageNet.
    start.freeze_batchnorm()
    probe, probed = linear_probe(start, images.train)
    # Plain fine-tuning is Co-Tuning with the source term switched off, but still measured.
    plain = fine_tune("plain", start, relationship, 0.0, PLAIN_RATE, images.train, options)
    co_tuned = fine_tune(
        "Co-Tuning", probed, relationship, options.trade_off, CO_TUNING_RATE, images.train, options, new_head=1.0
    )
    plot_training(
        [plain, co_tuned],
        options.output / "training.png",
        drop_at=rate_drop(options.iterations),
        lowest_source_term=relationship.entropy().mean().item(),
    )

    print(f"\n3. The target heads on {len(images.test)} test images")
    arms = [probe, plain, co_tuned]
    scores = [score(arm, images.test) for arm in arms]
    print_scores(arms, scores)

    print(f"\n4. Calibrating the Co-Tuning model on {len(images.validation)} validation images")
    validation_logits = predict(co_tuned.model, images.validation, "validation")
    temperature = ck.fit_temperature(validation_logits, images.validation.labels).temperature
    before = reliability(scores[-1].logits, images.test.labels)
    after = reliability(scores[-1].logits, images.test.labels, temperature=temperature)
    titles = ("Co-Tuning, test images", f"calibrated, temperature {temperature:.2f}")
    plot_reliability(before, after, options.output / "reliability.png", titles=titles)
    print(
        f"   Temperature {temperature:.2f}; expected calibration error on the test images "
        f"{before.expected_calibration_error:.1%} before, {after.expected_calibration_error:.1%} after"
    )
    print(f"\nPictures: {', '.join(str(options.output / name) for name in PICTURES)}")


PICTURES = ("relationship.png", "training.png", "reliability.png")


def load_images(options: argparse.Namespace) -> Images:
    sizes = {
        "images_per_class": options.images_per_class,
        "validation": options.validation_images,
        "test": options.test_images,
        "seed": options.seed,
    }
    if options.data is not None:
        return image_folder(options.data, **sizes)
    make_folder(CACHE)
    return fashion_mnist(CACHE, **sizes)


def linear_probe(start: ck.CoTuningModel, train: ImageSet) -> tuple[Arm, ck.CoTuningModel]:
    """Train only the new head, on the features of the pretrained network; also returns the model with that head."""
    begun = time.perf_counter()
    model = copy.deepcopy(start)
    features, labels = features_of(model, train.center_batches(BATCH_SIZE))
    fit_head(head_layer(model), features, labels, weight_decay=PROBE_DECAY)
    return Arm("linear probe", None, None, [], [], time.perf_counter() - begun, model.target_model()), model


def fine_tune(
    name: str,
    start: ck.CoTuningModel,
    relationship: ck.Relationship,
    trade_off: float,
    rate: float,
    train: ImageSet,
    options: argparse.Namespace,
    new_head: float = 10.0,
) -> Arm:
    """SGD from a copy of ``start``: the paper's recipe, the new head at ``new_head`` times the rate of the rest."""
    torch.manual_seed(options.seed)  # the same dropout in both arms
    model = copy.deepcopy(start).train()
    criterion = ck.FusedCoTuningLoss(relationship, trade_off)
    measure = ck.FusedCoTuningLoss(relationship)
    optimizer = torch.optim.SGD(
        model.param_groups(rate, new_head_multiplier=new_head, weight_decay=5e-4), momentum=0.9, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [rate_drop(options.iterations)], gamma=0.1)
    target_terms, source_terms = [], []
    begun = time.perf_counter()
    batches = train.random_batches(BATCH_SIZE, options.iterations, options.seed)
    for images, labels in bar(batches, name, options.iterations):
        source_logits, target_logits = model(images)
        loss, target_term, source_term = criterion(source_logits, target_logits, labels, return_terms=True)
        if trade_off == 0:  # the loss leaves the source term out, and the picture shows it
            with torch.no_grad():
                _, _, source_term = measure(source_logits, target_logits, labels, return_terms=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        target_terms.append(target_term.item())
        source_terms.append(source_term.item())
    seconds = time.perf_counter() - begun
    return Arm(name, trade_off, rate, target_terms, source_terms, seconds, model.target_model())


def rate_drop(iterations: int) -> int:
    """The iteration, after two thirds, at which the rate is divided by ten."""
    return 2 * iterations // 3


@dataclass
class Score:
    """``logits`` are ``(N, N_t)``; the other fields are measured on them. The NLL is in nats."""

    logits: Tensor
    accuracy: float
    nll: float


def score(arm: Arm, test: ImageSet) -> Score:
    logits = predict(arm.model, test, arm.name)
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    return Score(logits, accuracy, F.cross_entropy(logits, test.labels).item())


@torch.no_grad()
def predict(model: nn.Module, images: ImageSet, name: str) -> Tensor:
    batches: list[Batch] = list(images.center_batches(64))
    return torch.cat([model(batch.images) for batch in bar(batches, name, len(batches))])


def bar(batches: Iterable[Batch], name: str, total: int) -> Iterable[Batch]:
    return tqdm(batches, desc=f"   {name:<10}", total=total, ncols=80, leave=False)


def print_relationship(relationship: ck.Relationship) -> None:
    names = relationship.target_classes
    width = max(len(name) for name in names)
    for name in names:
        tops = relationship.top_source_classes(name, k=4)
        print(f"   {name:<{width}}  " + ", ".join(f"{source} {share:.0%}" for source, share in tops))


def print_scores(arms: list[Arm], scores: list[Score]) -> None:
    rows = [
        ("", [arm.name for arm in arms]),
        ("trade-off", ["" if arm.trade_off is None else f"{arm.trade_off:g}" for arm in arms]),
        ("rate", ["" if arm.rate is None else f"{arm.rate:g}" for arm in arms]),
        ("test accuracy", [f"{s.accuracy:.1%}" for s in scores]),
        ("test NLL", [f"{s.nll:.3f}" for s in scores]),
        ("training seconds", [f"{arm.seconds:.0f}" for arm in arms]),
    ]
    for name, cells in rows:
        print(f"   {name:<18}" + "".join(f"{cell:>14}" for cell in cells))
    print("   One run of one seed; repeat it with other seeds (--seed) before you trust a difference.")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}): give another with --output.") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count = {"type": number(int, 1), "metavar": "N"}
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="your own images, one sub-folder a class; without it Fashion-MNIST"
    )
    parser.add_argument("--images-per-class", default=5, help="to train on", **count)
    parser.add_argument("--iterations", default=100, help=f"of {BATCH_SIZE} images", **count)
    parser.add_argument(
        "--trade-off", type=number(float, 0), default=2.3, metavar="X", help="weight of the source term"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of images, new head and batches")
    parser.add_argument("--validation-images", default=500, help="for the calibration", **count)
    parser.add_argument("--test-images", default=1500, help="to measure with", **count)
    parser.add_argument("--threads", default=default_threads(), help="for torch", **count)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="for the pictures")
    return parser.parse_args(arguments)


def default_threads() -> int:
    """Half the processors: one per physical core with hyperthreading, and room for other programs without.

    Measured: two threads on two processors, one of them busy, took five times as long as one thread.
    """
    return max(1, (os.cpu_count() or 1) // 2)


if __name__ == "__main__":
    sys.exit(main())
