"""The paper's protocol on FGVC Aircraft: 100 variants of aircraft.

    python examples/paper_aircraft.py fgvc-aircraft-2013b --model torchvision:resnet50

The folder has ``data`` with ``variants.txt``, ``images``, and ``images_variant_trainval.txt`` and
``images_variant_test.txt`` (an image's number, then the name of its variant). Training uses ``trainval``, as is usual.
"""

from __future__ import annotations

import sys
from pathlib import Path

from image_classification import Parts
from paper_protocol import DataSet, image_list, main, rows_of


def read(folder: Path) -> Parts:
    data = folder / "data"
    names = tuple(rows_of(data / "variants.txt", str))
    label = {name: i for i, name in enumerate(names)}

    def image(line: str) -> tuple[Path, int]:
        number, variant = line.split(maxsplit=1)
        return data / "images" / f"{number}.jpg", label[variant]

    train, test = (image_list(rows_of(data / f"images_variant_{part}.txt", image)) for part in ("trainval", "test"))
    return Parts(names, train, None, test)


FGVC_AIRCRAFT = DataSet(
    name="FGVC Aircraft",
    source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    read=read,
    classes=100,
    train=6667,
    test=3333,
    paper={
        "plain": {0.15: 39.57, 0.3: 57.46, 0.5: 67.93, 1.0: 81.13},
        "l2-sp": {0.15: 39.27, 0.3: 57.12, 0.5: 67.46, 1.0: 80.98},
        "delta": {0.15: 42.16, 0.3: 58.60, 0.5: 68.51, 1.0: 80.44},
        "bss": {0.15: 40.41, 0.3: 59.23, 0.5: 69.19, 1.0: 81.48},
        "co-tuning-reverse": {0.15: 44.09, 0.3: 61.65, 0.5: 72.73, 1.0: 83.87},
    },
    tllib={
        "plain": {0.15: 41.6, 0.3: 57.8, 0.5: 68.7, 1.0: 80.2},
        "co-tuning-uncalibrated": {0.15: 45.9, 0.3: 61.2, 0.5: 71.3, 1.0: 82.2},
    },
)

if __name__ == "__main__":
    sys.exit(main(FGVC_AIRCRAFT, __doc__))
