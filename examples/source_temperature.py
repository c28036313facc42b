"""The temperature of a pretrained classifier, from images of its own classes that it was not trained on.

    python examples/source_temperature.py imagenet/val --model timm:resnet50

prints the value for ``--temperature`` of image_classification.py. The folder has one sub-folder for each class of the
classifier, in the order of their sorted names (for ImageNet the WordNet numbers, n01440764 first); a few
thousand images are enough (``--images-per-class``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import image_classification as images
import numpy as np
import torch
from command_line import UserError, device, exit_code, number
from torch.utils.data import DataLoader
from tqdm import tqdm

import cotuning_kernels as ck


def fit(options: argparse.Namespace) -> float:
    if not options.data.is_dir():
        raise UserError(f"{options.data} is no folder: give one with a sub-folder a class of the classifier.")
    classifier, (mean, deviation) = images.make_classifier(options.model, options.weights)
    classifier.to(options.device)
    classes = sorted(path.name for path in options.data.iterdir() if path.is_dir())
    listed = images.list_images(options.data, classes)
    if options.images_per_class is not None:
        labels = np.array(listed.labels)
        kept = [np.flatnonzero(labels == label)[: options.images_per_class] for label in range(len(classes))]
        listed = images.chosen(listed, np.concatenate(kept).tolist())
    data = images.StillImages(listed, images.Pixels(options.size, options.crop, mean, deviation))
    found = []
    with torch.no_grad():
        for inputs, labels in tqdm(DataLoader(data, options.batch_size, num_workers=options.workers), leave=False):
            outputs = classifier(inputs.to(options.device))
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            if logits.shape[1] != len(classes):
                raise UserError(
                    f"{options.data} has {len(classes)} sub-folders, {options.model} has {logits.shape[1]} classes: "
                    "give one for each class, in the order of the classifier."
                )
            found.append((logits.cpu(), labels))
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    temperature = ck.fit_temperature(logits, labels).temperature
    right = (logits.argmax(1) == labels).double().mean().item()
    print(f"{len(labels)} images, {right:.1%} right: --temperature {temperature:.4f}")
    return temperature


def main(arguments: list[str] | None = None) -> int:
    return exit_code("source_temperature", lambda: fit(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, help="folder with a sub-folder a class of the classifier")
    add("--model", required=True, help="timm:NAME, torchvision:NAME or MODULE:FUNCTION")
    add("--weights", type=Path, help="a state dict for the model, instead of the weights that it comes with")
    add("--images-per-class", type=number(int, 1), metavar="N", help="at most so many, the first ones")
    add("--batch-size", type=number(int, 1), default=48)
    add("--size", type=number(int, 1), default=256, help="images are resized to it")
    add("--crop", type=number(int, 1), default=224, help="what the network sees: the centre")
    add("--workers", type=number(int, 0), default=2, help="processes that load images")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
