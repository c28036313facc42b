"""The paper's protocol on CUB-200-2011: 200 kinds of birds.

    python examples/paper_cub200.py CUB_200_2011 --model torchvision:resnet50

The folder has ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt`` and ``images``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from image_classification import Parts
from paper_protocol import DataSet, image_list, lines_of, main


def read(folder: Path) -> Parts:
    def table(name: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in lines_of(folder / name))

    names, labels = table("classes.txt"), table("image_class_labels.txt")
    order = {number: label for label, number in enumerate(sorted(names, key=int))}
    in_training = table("train_test_split.txt")
    images = [(number, folder / "images" / path) for number, path in table("images.txt").items()]
    train, test = (
        image_list([(path, order[labels[number]]) for number, path in images if in_training[number] == flag])
        for flag in "10"
    )
    return Parts(tuple(names[number] for number in order), train, None, test)


CUB_200_2011 = DataSet(
    name="CUB-200-2011",
    source="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    read=read,
    classes=200,
    train=5994,
    test=5794,
    tllib={
        "plain": {0.15: 51.2, 0.3: 64.6, 0.5: 74.6, 1.0: 81.8},
        "co-tuning-uncalibrated": {0.15: 57.6, 0.3: 70.1, 0.5: 77.3, 1.0: 82.5},
    },
)

if __name__ == "__main__":
    sys.exit(main(CUB_200_2011, __doc__))
