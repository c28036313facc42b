"""Drawings and photographs of things: the stamps of Tux Paint (GPL-2), from Debian's archive; not in this repository.

Many stamps are variants of one another (mirrored, another colour, the same animal again). So a whole family of stamps
goes into one part of the data. Files of a class whose names share a word are one family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from command_line import UserError
from demo_data import FULL, Images, ImageSet, fetch_debian_package
from torch import Tensor

INSTALLED_AT = Path("/usr/share/tuxpaint/stamps")
# The sub-folders of a class, and their sub-folders that belong to another class. All have enough families for three
# parts.
CLASSES: dict[str, tuple[list[str], list[str]]] = {
    "bird": (["animals/birds"], []),
    "building": (["town/houses"], []),
    "flower": (["plants/flowers"], []),
    "fruit": (["food/fruit"], []),
    "household": (["household"], []),
    "insect": (["animals/insects"], []),
    "mammal": (["animals/mammals", "animals/marsupials"], ["animals/mammals/aquatic"]),
    "monument": (["town/monuments", "town/cartoon"], []),
    "space": (["space"], []),
    "vegetable": (["food/vegetables"], []),
    "vehicle": (["vehicles"], []),
    "water animal": (["animals/fish", "animals/shellfish", "animals/mammals/aquatic"], []),
}
# Words for how a thing is drawn, not what it is.
NOT_NAMES = {
    "outline", "filled", "with", "mirror", "photo", "cartoon", "red", "green", "blue", "yellow", "white", "black",
    "golden", "brown", "small", "large", "little", "left", "right",
}  # fmt: skip


def tux_paint(cache: Path, *, images_per_class: int, seed: int, say: Callable[[str], None] = print) -> Images:
    """Trains on one image from each of ``images_per_class`` families; a quarter of the others is for validation."""
    root = fetch_stamps(cache, say)
    random = np.random.default_rng(seed)
    train: list[tuple[Path, int]] = []
    validation: list[tuple[Path, int]] = []
    test: list[tuple[Path, int]] = []
    for label, name in enumerate(CLASSES):
        groups = families(stamps_of(root, name))
        if len(groups) < images_per_class + 4:
            raise UserError(
                f"{name} has {len(groups)} families of stamps, expected {images_per_class + 4} or more: train on fewer "
                "images a class."
            )
        order = random.permutation(len(groups)).tolist()
        first, rest = order[:images_per_class], order[images_per_class:]
        train += [(groups[i][int(random.integers(len(groups[i])))], label) for i in first]
        validation += [(path, label) for i in rest[: len(rest) // 4] for path in groups[i]]
        test += [(path, label) for i in rest[len(rest) // 4 :] for path in groups[i]]

    def image_set(chosen: list[tuple[Path, int]]) -> ImageSet:
        pictures = torch.stack([picture(path) for path, _ in chosen])
        return ImageSet(pictures, torch.tensor([label for _, label in chosen]))

    return Images(list(CLASSES), image_set(train), image_set(validation), image_set(test))


def fetch_stamps(cache: Path, say: Callable[[str], None] = print) -> Path:
    unpacked = cache / "tuxpaint-stamps"
    for folder in (INSTALLED_AT, unpacked):
        if (folder / "animals").is_dir():
            return folder
    fetch_debian_package("tuxpaint-stamps-default", "161 MB", "usr/share/tuxpaint/stamps", unpacked, say)
    return unpacked


def stamps_of(root: Path, name: str) -> list[Path]:
    folders, others = CLASSES[name]
    found = {path for folder in folders for path in (root / folder).rglob("*.png")}
    return sorted(found - {path for other in others for path in (root / other).rglob("*.png")})


def families(paths: list[Path]) -> list[list[Path]]:
    """Group files whose names share a word, directly or through other files."""
    groups: list[tuple[set[str], list[Path]]] = []
    for path in paths:
        words, members = words_of(path), [path]
        apart = []
        for group_words, group_members in groups:
            if group_words & words:
                words, members = words | group_words, group_members + members
            else:
                apart.append((group_words, group_members))
        groups = [*apart, (words, members)]
    return [members for _, members in groups]


def words_of(path: Path) -> set[str]:
    """The first five letters of each word, to merge plurals: ``towTruck_mirror`` gives tow, truck."""
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", path.stem)} - NOT_NAMES
    return {word[:5] for word in words} or {path.parent.name}


def picture(path: Path) -> Tensor:
    """``(3, 160, 160)`` uint8: the whole stamp on white, with a margin."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", stamp.size, "white"), stamp).convert("RGB")
    inner = ImageOps.pad(on_white, (142, 142), Image.Resampling.BICUBIC, color="white")
    framed = ImageOps.expand(inner, (FULL - 142) // 2, fill="white")
    return torch.from_numpy(np.array(framed)).permute(2, 0, 1)
