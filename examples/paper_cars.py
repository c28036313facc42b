"""The paper's protocol on Stanford Cars: 196 models of cars.

    python examples/paper_cars.py stanford_cars --model torchvision:resnet50

The folder has ``cars_train``, ``cars_test``, and ``devkit`` with ``cars_meta.mat``, ``cars_train_annos.mat`` and
``cars_test_annos_withlabels.mat`` (published separately; it may also be beside ``devkit``). Needs scipy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_line import UserError
from image_classification import ImageList, Parts
from paper_protocol import DataSet, image_list, label_of, main, malformed


def read(folder: Path) -> Parts:
    devkit, test_labels = folder / "devkit", "cars_test_annos_withlabels.mat"
    names = tuple(str(name) for name in load(devkit / "cars_meta.mat", "class_names"))
    beside = folder / test_labels
    return Parts(
        names,
        part(folder / "cars_train", devkit / "cars_train_annos.mat", names),
        None,
        part(folder / "cars_test", beside if beside.exists() else devkit / test_labels, names),
    )


def part(images: Path, annotations: Path, names: Sequence[str]) -> ImageList:
    """Read one part. The files number classes from 1."""
    records = np.atleast_1d(load(annotations, "annotations"))
    try:
        rows = [(images / str(a["fname"]), label_of(int(a["class"]), names, first=1)) for a in records]
    except (ValueError, TypeError, IndexError) as error:
        raise malformed(annotations, error) from None
    return image_list(rows)


def load(path: Path, name: str) -> Any:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("the lists of Stanford Cars are MATLAB files: pip install scipy.") from None
    if not path.exists():
        raise FileNotFoundError(2, "missing", str(path))
    try:
        return loadmat(path, squeeze_me=True)[name]
    except Exception as error:  # a damaged file may raise any error
        raise malformed(path, error) from None


STANFORD_CARS = DataSet(
    name="Stanford Cars",
    source="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    read=read,
    classes=196,
    train=8144,
    test=8041,
    paper={
        "plain": {0.15: 36.77, 0.3: 60.63, 0.5: 75.10, 1.0: 87.20},
        "l2-sp": {0.15: 36.10, 0.3: 60.30, 0.5: 75.48, 1.0: 86.58},
        "delta": {0.15: 39.37, 0.3: 63.28, 0.5: 76.53, 1.0: 86.32},
        "bss": {0.15: 40.57, 0.3: 64.13, 0.5: 76.78, 1.0: 87.63},
        "co-tuning-reverse": {0.15: 46.02, 0.3: 69.09, 0.5: 80.66, 1.0: 89.53},
    },
    tllib={
        "plain": {0.15: 41.1, 0.3: 65.9, 0.5: 78.4, 1.0: 87.8},
        "co-tuning-uncalibrated": {0.15: 49.0, 0.3: 70.6, 0.5: 81.9, 1.0: 89.1},
    },
)

if __name__ == "__main__":
    sys.exit(main(STANFORD_CARS, __doc__))
