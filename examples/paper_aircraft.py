"""The paper's protocol on FGVC Aircraft: 100 variants of aircraft.

    python examples/paper_aircraft.py fgvc-aircraft-2013b --model torchvision:resnet50

The folder has ``data`` with ``variants.txt``, ``images``, and ``images_variant_trainval.txt`` and
``images_variant_test.txt`` (an image's number, then the name of its variant). Trained is on ``trainval``, as is usual.
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
    tllib={
        "plain": {0.15: 41.6, 0.3: 57.8, 0.5: 68.7, 1.0: 80.2},
        "co-tuning-uncalibrated": {0.15: 45.9, 0.3: 61.2, 0.5: 71.3, 1.0: 82.2},
    },
)

if __name__ == "__main__":
    sys.exit(main(FGVC_AIRCRAFT, __doc__))
