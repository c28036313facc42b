"""The paper's protocol on CUB-200-2011: 200 kinds of birds.

    python examples/paper_cub200.py CUB_200_2011 --model torchvision:resnet50

The folder has ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt`` and ``images``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from image_classification import Parts
from paper_protocol import DataSet, image_list, main, rows_of


def read(folder: Path) -> Parts:
    names = dict(rows_of(folder / "classes.txt", numbered))
    order = {number: label for label, number in enumerate(sorted(names))}
    class_of = dict(rows_of(folder / "image_class_labels.txt", numbered))
    in_training = dict(rows_of(folder / "train_test_split.txt", numbered))

    def image(line: str) -> tuple[str, Path, int]:
        number, path = numbered(line)
        return in_training[number], folder / "images" / path, order[int(class_of[number])]

    images = rows_of(folder / "images.txt", image)
    train, test = (image_list([(path, label) for own, path, label in images if own == flag]) for flag in "10")
    return Parts(tuple(names[number] for number in order), train, None, test)


def numbered(line: str) -> tuple[int, str]:
    number, content = line.split(maxsplit=1)
    return int(number), content


CUB_200_2011 = DataSet(
    name="CUB-200-2011",
    source="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    read=read,
    classes=200,
    train=5994,
    test=5794,
    paper={
        "plain": {0.15: 45.25, 0.3: 59.68, 0.5: 70.12, 1.0: 78.01},
        "l2-sp": {0.15: 45.08, 0.3: 57.78, 0.5: 69.47, 1.0: 78.44},
        "delta": {0.15: 46.83, 0.3: 60.37, 0.5: 71.38, 1.0: 78.63},
        "bss": {0.15: 47.74, 0.3: 63.38, 0.5: 72.56, 1.0: 78.85},
        "co-tuning-reverse": {0.15: 52.58, 0.3: 66.47, 0.5: 74.64, 1.0: 81.24},
    },
    tllib={
        "plain": {0.15: 51.2, 0.3: 64.6, 0.5: 74.6, 1.0: 81.8},
        "co-tuning-uncalibrated": {0.15: 57.6, 0.3: 70.1, 0.5: 77.3, 1.0: 82.5},
    },
)

if __name__ == "__main__":
    sys.exit(main(CUB_200_2011, __doc__))
