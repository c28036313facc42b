"""The readers of the paper's data sets, on folders of the same layout with a few generated pictures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from support.paths import EXAMPLES

pytest.importorskip("PIL", reason="Pillow is not installed: pip install '.[demo]'")
from PIL import Image

# The class of each picture, by part, in the order of the lists. The lists are not sorted by class.
TRAIN, TEST = [1, 0, 1, 0, 1, 0, 0], [0, 1, 1]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def picture(path: Path, label: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), ("red", "blue")[label]).save(path)
    return path


def cub(folder: Path) -> None:
    labels = TRAIN + TEST
    names = [f"{label + 1:03d}.Bird/{i}.jpg" for i, label in enumerate(labels)]
    for name, label in zip(names, labels, strict=True):
        picture(folder / "images" / name, label)
    lists = {
        "classes": [f"{i} 00{i}.Bird" for i in (1, 2)],
        "images": [f"{i} {name}" for i, name in enumerate(names, 1)],
        "image_class_labels": [f"{i} {label + 1}" for i, label in enumerate(labels, 1)],
        "train_test_split": [f"{i} {int(i <= len(TRAIN))}" for i in range(1, len(labels) + 1)],
    }
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def cars(folder: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed: pip install scipy")
    (folder / "devkit").mkdir(parents=True)
    # The fields of the published files, in MATLAB's struct array.
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, labels, file in (
        ("train", TRAIN, "devkit/cars_train_annos.mat"), ("test", TEST, "cars_test_annos_withlabels.mat")
    ):  # fmt: skip
        rows = np.zeros((1, len(labels)), dtype=fields)
        for i, label in enumerate(labels):
            picture(folder / f"cars_{part}" / f"{i:05d}.jpg", label)
            rows[0, i] = (1, 2, 20, 18, np.uint8(label + 1), f"{i:05d}.jpg")
        scipy_io.savemat(folder / file, {"annotations": rows})
    names = np.array([["Red Coupe 2012", "Blue SUV 2009"]], dtype=object)
    scipy_io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})


def aircraft(folder: Path) -> None:
    names, number = ["707-320", "DH 82"], 34309
    for part, labels in (("trainval", TRAIN), ("test", TEST)):
        lines = []
        for label in labels:
            picture(folder / f"data/images/{number:07d}.jpg", label)
            lines.append(f"{number:07d} {names[label]}")
            number += 1
        (folder / f"data/images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "data/variants.txt").write_text("\n".join(names) + "\n")


def coco70(folder: Path) -> None:
    for part, labels in (("train", TRAIN), ("dev", [0, 1]), ("test", TEST)):
        lines = []
        for i, label in enumerate(labels):
            picture(folder / part / f"a {i}.jpg", label)
            lines.append(f"{part}/a {i}.jpg {label}" if i else f"a {i}.jpg {label}")
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("wine_glass\nvase\n")


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "paper_cub200": (cub, "CUB_200_2011"),
    "paper_cars": (cars, "STANFORD_CARS"),
    "paper_aircraft": (aircraft, "FGVC_AIRCRAFT"),
    "paper_coco70": (coco70, "COCO_70"),
}


@pytest.fixture(params=MAKERS)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModuleType, Any, Path]:
    """A recipe's module, its data set with the counts of the generated folder, and the folder."""
    make, name = MAKERS[request.param]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    module = importlib.import_module(request.param)
    data_set = getattr(module, name)
    small = replace(
        data_set, classes=2, train=len(TRAIN), test=len(TEST), validation=None if data_set.validation is None else 2
    )
    return module, small, folder


def test_parts_and_labels(recipe: tuple[ModuleType, Any, Path]) -> None:
    module, data_set, folder = recipe
    parts = importlib.import_module("paper_protocol").read_checked(data_set, folder)
    assert (list(parts.train.labels), list(parts.test.labels)) == (TRAIN, TEST)
    assert (parts.validation is None) == (module.__name__ != "paper_coco70")
    assert len(set(parts.classes)) == 2
    for images in (parts.train, parts.test, *([parts.validation] if parts.validation else [])):
        for path, label in zip(images.paths, images.labels, strict=True):
            red, _, blue = Image.open(path).getpixel((5, 5))
            assert (blue > red) == bool(label)


def test_what_is_wrong_is_said(
    recipe: tuple[ModuleType, Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, small, folder = recipe
    protocol = importlib.import_module("paper_protocol")
    published = getattr(module, MAKERS[module.__name__][1])
    arguments = ["--model=none:none", f"--output={tmp_path / 'out'}"]
    assert protocol.main(published, module.__doc__, [str(folder), *arguments]) == 1
    said = capsys.readouterr().err
    assert f"7 training images, published are {published.train}" in said
    assert "--incomplete" in said
    assert protocol.main(published, module.__doc__, [str(tmp_path / "nowhere"), *arguments]) == 1
    said = capsys.readouterr().err
    assert "is missing" in said
    assert published.source in said
    gone = protocol.read_checked(small, folder).test.paths[1]
    gone.unlink()
    with pytest.raises(importlib.import_module("command_line").UserError, match="is missing, and 0 more"):
        protocol.read_checked(small, folder)


DAMAGES = {
    "paper_cub200": [
        ("images.txt", "1 a.jpg\nseven b.jpg\n", "images.txt:2, 'seven b.jpg', is not as it is published"),
        ("image_class_labels.txt", "1 2\n2 1\n", "images.txt:3, "),
        ("image_class_labels.txt", "1 9\n", "images.txt:1, "),
        ("classes.txt", "1 001.Bird\n2\n", "classes.txt:2, '2', "),
    ],
    "paper_cars": [
        ("devkit/cars_train_annos.mat", "no matrix", "cars_train_annos.mat is not as it is published"),
        ("devkit/cars_meta.mat", "", "cars_meta.mat is not as it is published"),
        ("cars_test_annos_withlabels.mat", None, "(ValueError: class 3, expected 1 to 2)"),
    ],
    "paper_aircraft": [
        ("data/images_variant_test.txt", "0034309 MiG-15\n", "test.txt:1, '0034309 MiG-15', is not as it is published"),
        ("data/images_variant_trainval.txt", "0034309\n", "images_variant_trainval.txt:1, "),
        ("data/variants.txt", b"\xff\xfe", "variants.txt is not as it is published (UnicodeDecodeError"),
    ],
    "paper_coco70": [
        ("train.txt", "a.jpg 0\n\nb.jpg 2\n", "train.txt:3, 'b.jpg 2', is not as it is published (ValueError: class 2"),
        ("dev.txt", "a.jpg vase\n", "dev.txt:1, "),
        ("test.txt", "a.jpg -1\n", "test.txt:1, "),
    ],
}  # fmt: skip


def test_malformed_lists_are_named(
    recipe: tuple[ModuleType, Any, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module, data_set, folder = recipe
    protocol = importlib.import_module("paper_protocol")
    for name, content, message in DAMAGES[module.__name__]:
        whole = (folder / name).read_bytes()
        if content is None:  # annotations of a class that does not exist
            scipy_io = importlib.import_module("scipy.io")
            annotations = scipy_io.loadmat(folder / name)["annotations"]
            annotations[0, 1]["class"] = np.uint8(3)
            scipy_io.savemat(folder / name, {"annotations": annotations})
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert (
            protocol.main(data_set, module.__doc__, [str(folder), "--model=a:b", f"--output={tmp_path / 'out'}"]) == 1
        )
        said = capsys.readouterr().err
        assert message in said
        assert said.endswith(": unpack it again.\n")
        (folder / name).write_bytes(whole)


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")
def test_the_protocol_runs_and_compares(
    recipe: tuple[ModuleType, Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, small, folder = recipe
    protocol = importlib.import_module("paper_protocol")
    arguments = [
        str(folder), "--model=support.image_runner:small_classifier", f"--output={tmp_path / 'out'}", "--size=20",
        "--crop=16", "--batch-size=4", "--workers=0", "--iterations=2", "--device=cpu", "--sampling-rates", "0.5", "1",
        "--methods", "plain", "co-tuning-reverse", "co-tuning-uncalibrated",
    ]  # fmt: skip
    assert protocol.main(small, module.__doc__, arguments) == 0
    last = capsys.readouterr().out.split("test accuracy\n")[-1].splitlines()
    assert [line for line in last if "85.65%" in line] == ([last[-1]] if module.__name__ == "paper_coco70" else [])
    expected = {}
    for rate, images in ((50, 4), (100, 7)):  # half of 4 and of 3 images: 2 each
        for method in ("plain", "co-tuning-reverse", "co-tuning-uncalibrated"):
            result = json.loads((tmp_path / f"out/rate-{rate}/{method}.json").read_text())
            assert result["training_images"] == images
            assert (result["validation_accuracy"] is None) == (module.__name__ != "paper_coco70")
            expected[method, rate] = f"{result['test_accuracy_ten_crops']:.1%}"
    rows = [line.split() for line in last]
    for method in ("plain", "co-tuning-reverse", "co-tuning-uncalibrated"):
        assert [method, expected[method, 50], expected[method, 100]] in rows
    for name, published, others in (
        ("paper,", small.paper, "co-tuning-reverse"),
        ("tllib,", small.tllib, "co-tuning-uncalibrated"),
    ):
        expected_rows = [
            [name, "ResNet-50", *(f"{published[method][rate]:.1f}%" for rate in (0.5, 1.0))]
            for method in ("plain", others)
            if published is not None
        ]
        assert [row for row in rows if row[0] == name] == expected_rows
    assert any("Self-Tuning" in line for line in last) == (small.paper is not None)
