"""The paper's protocol at the large end: COCO-70, 70 classes of objects with up to a thousand images each.

    python examples/paper_coco70.py COCO70 --model torchvision:resnet50

The folder has ``classes.txt``, and for each of ``train``, ``dev`` and ``test`` a folder of images and a list (``.txt``)
of lines ``FILE CLASS``. There are 800 images of each class to train on, 100 to validate and 100 to test.
"""

from __future__ import annotations

import sys
from pathlib import Path

from image_classification import ImageList, Parts
from paper_protocol import DataSet, image_list, label_of, main, rows_of


def read(folder: Path) -> Parts:
    classes = tuple(rows_of(folder / "classes.txt", str))

    def part(name: str) -> ImageList:
        def image(line: str) -> tuple[Path, int]:
            file, number = line.replace(",", " ").rsplit(maxsplit=1)
            return locate(folder, name, file.strip()), label_of(int(number), classes)

        return image_list(rows_of(folder / f"{name}.txt", image))

    return Parts(classes, part("train"), part("dev"), part("test"))


def locate(folder: Path, part: str, file: str) -> Path:
    """The path of a listed file, which is relative to the data set's folder or to that of the part."""
    return folder / file if (folder / file).exists() else folder / part / file


COCO_70 = DataSet(
    name="COCO-70",
    source="https://github.com/thuml/CoTuning (its README says how the pieces are put together)",
    read=read,
    classes=70,
    train=56000,
    validation=7000,
    test=7000,
    quoted="The paper's Co-Tuning has 85.65% at https://beta.hyper.ai/en/papers/co-tuning-for-transfer-learning, "
    "which says neither at which sampling rate nor with which network.",
)

if __name__ == "__main__":
    sys.exit(main(COCO_70, __doc__))
