"""The paper's protocol on Stanford Cars: 196 models of cars.

    python examples/paper_cars.py stanford_cars --model torchvision:resnet50

The folder has ``cars_train``, ``cars_test``, and ``devkit`` with ``cars_meta.mat``, ``cars_train_annos.mat`` and
``cars_test_annos_withlabels.mat`` (which is published apart, and may also lie beside ``devkit``). Needs scipy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from command_line import UserError
from image_classification import ImageList, Parts
from paper_protocol import DataSet, image_list, main


def read(folder: Path) -> Parts:
    devkit, test_labels = folder / "devkit", "cars_test_annos_withlabels.mat"
    names = tuple(str(name) for name in load(devkit / "cars_meta.mat", "class_names"))
    beside = folder / test_labels
    return Parts(
        names,
        part(folder / "cars_train", devkit / "cars_train_annos.mat"),
        None,
        part(folder / "cars_test", beside if beside.exists() else devkit / test_labels),
    )


def part(images: Path, annotations: Path) -> ImageList:
    """Classes are numbered from 1 in the files."""
    return image_list([(images / str(a.fname), int(a["class"]) - 1) for a in records(annotations)])


def records(path: Path) -> Any:
    import numpy as np

    return np.atleast_1d(load(path, "annotations")).view(np.recarray)


def load(path: Path, name: str) -> Any:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("the lists of Stanford Cars are MATLAB files: pip install scipy.") from None
    if not path.exists():
        raise FileNotFoundError(2, "missing", str(path))
    return loadmat(path, squeeze_me=True)[name]


STANFORD_CARS = DataSet(
    name="Stanford Cars",
    source="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    read=read,
    classes=196,
    train=8144,
    test=8041,
    tllib={
        "plain": {0.15: 41.1, 0.3: 65.9, 0.5: 78.4, 1.0: 87.8},
        "co-tuning-uncalibrated": {0.15: 49.0, 0.3: 70.6, 0.5: 81.9, 1.0: 89.1},
    },
)

if __name__ == "__main__":
    sys.exit(main(STANFORD_CARS, __doc__))
