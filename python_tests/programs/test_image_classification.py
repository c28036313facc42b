"""The image runner on small generated pictures: it learns, resumes to the same bits, and explains errors."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

import cotuning_kernels as ck
from support.image_runner import StoppedError, arguments, brightness, small_classifier
from support.paths import EXAMPLES, TESTS

pytest.importorskip("PIL", reason="Pillow is not installed: pip install '.[demo]'")
from PIL import Image

CLASSES = ("blue", "green", "red", "striped")


def picture(name: str, random: np.random.Generator) -> Image.Image:
    """A noisy colour, or stripes of all of them."""
    pixels = random.integers(0, 90, (24, 30, 3))
    if name == "striped":
        pixels[::4] += 150
    else:
        pixels[..., ("red", "green", "blue").index(name)] += 150
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    for part, number in (("train", 10), ("val", 4), ("test", 6)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                picture(name, random).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("image_classification")


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")
def test_all_methods_side_by_side(runner: ModuleType, data: Path, tmp_path: Path) -> None:
    assert runner.main(arguments(data, tmp_path, "--iterations=60")) == 0
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["method"] for row in rows] == list(runner.METHODS)
    for row in rows:
        result = json.loads((tmp_path / f"{row['method']}.json").read_text())
        assert result["test_accuracy_ten_crops"] == float(row["test_accuracy_ten_crops"])
        # A colour separates the four classes; the probe has only random features.
        assert result["test_accuracy_ten_crops"] >= (0.4 if row["method"] == "linear-probe" else 0.7)
    found = {path.name: ck.Relationship.load(path) for path in tmp_path.glob("relationship-*")}
    assert {name: (r.method, r.temperature) for name, r in found.items()} == {
        "relationship-co-tuning.safetensors": ("direct", 1.2),
        "relationship-co-tuning-reverse.safetensors": ("reverse", 1.2),
        "relationship-co-tuning-uncalibrated.safetensors": ("direct", 1.0),
        "relationship-lp-co-tuning.safetensors": ("direct", 1.2),
    }
    before = (tmp_path / "plain.json").stat().st_mtime_ns
    assert runner.main(arguments(data, tmp_path, "--iterations=60", "--methods", "plain")) == 0
    assert (tmp_path / "plain.json").stat().st_mtime_ns == before  # not trained again


def test_without_a_temperature_two_methods_are_one(
    runner: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--temperature=1", "--iterations=1", "--methods", "co-tuning", "co-tuning-uncalibrated")
    assert runner.main(arguments(data, tmp_path, *more)) == 0
    assert "--temperature is 1: co-tuning is co-tuning-uncalibrated, which is run once" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["method"] for row in rows] == ["co-tuning-uncalibrated"]
    assert not (tmp_path / "co-tuning.json").exists()


def test_methods_change_what_they_should(runner: ModuleType, data: Path, tmp_path: Path) -> None:
    assert runner.main(arguments(data, tmp_path, "--l2-sp=30", "--methods", "plain", "linear-probe", "l2-sp")) == 0
    pretrained = small_classifier().state_dict()
    weights = {path.name.split(".")[0]: torch.load(path) for path in tmp_path.glob("*.weights.pt")}
    distance = {
        method: sum((state[name] - pretrained[name]).norm().item() for name in ("0.weight", "0.bias", "1.weight"))
        for method, state in weights.items()
    }
    assert distance["linear-probe"] == 0
    assert 0 < distance["l2-sp"] < distance["plain"] / 2
    assert torch.equal(weights["linear-probe"]["1.running_mean"], pretrained["1.running_mean"])


@pytest.mark.parametrize("method", ["lp-ft", "lp-co-tuning"])
def test_fine_tuning_begins_with_the_best_head_on_the_pretrained_features(
    runner: ModuleType, data: Path, tmp_path: Path, method: str
) -> None:
    """With a rate of 0 the head stays the probe's, where the gradient of the probe's own loss vanishes."""
    more = ("--lr=0", "--iterations=1", "--probe-decay=0.3", "--freeze-batchnorm", "--methods", method)
    assert runner.main(arguments(data, tmp_path, *more)) == 0
    network = small_classifier()
    network[-1] = head = torch.nn.Linear(72, len(CLASSES))
    network.load_state_dict(torch.load(tmp_path / f"{method}.weights.pt"))
    for name, tensor in small_classifier()[:-1].state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    pixels = runner.Pixels(20, 16, *runner.IMAGENET)
    images, labels = zip(*runner.StillImages(runner.read_folder(data).train, pixels), strict=True)
    loss = torch.nn.functional.cross_entropy(network.eval()(torch.stack(images)), torch.tensor(labels))
    gradients = torch.autograd.grad(loss + 0.15 * head.weight.square().sum(), [head.weight, head.bias])
    assert head.weight.norm() > 0.01
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)
    model = ck.CoTuningModel.from_classifier(small_classifier(), len(CLASSES))
    assert {group["lr"] for group in runner.optimizer_of(method, model, 0.01).param_groups} == {0.01}


def test_rates_and_schedule_are_those_of_the_paper(
    runner: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD with Nesterov momentum, the new head at ten times the rate, all rates divided by ten after two thirds."""
    settings: dict[str, dict[str, dict[str, object]]] = {}
    rates: dict[str, list[dict[str, float]]] = {}
    optimizer_of = runner.optimizer_of

    def watched(method: str, model: ck.CoTuningModel, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.SGD = optimizer_of(method, model, lr)
        settings[method] = {group["name"]: dict(group) for group in optimizer.param_groups}
        rates[method] = []
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: rates[method].append({g["name"]: g["lr"] for g in optimizer.param_groups})
        )
        return optimizer

    monkeypatch.setattr(runner, "optimizer_of", watched)
    methods = ["plain", "l2-sp", "co-tuning"]
    assert runner.main(arguments(data, tmp_path, "--lr=0.001", "--methods", *methods)) == 0
    assert list(settings) == methods
    for method in methods:
        assert "target_head" in settings[method]
        assert len(settings[method]) > 1
        for name, group in settings[method].items():
            assert group["nesterov"]
            assert group["momentum"] == 0.9
            assert group["weight_decay"] == (0 if method == "l2-sp" and name != "target_head" else 5e-4)
            expected = [1e-2 if name == "target_head" else 1e-3] * 8
            expected += [rate / 10 for rate in expected[:4]]
            assert [step[name] for step in rates[method]] == pytest.approx(expected)


def test_the_head_can_be_named(runner: ModuleType, data: Path, tmp_path: Path) -> None:
    more = ("--model=support.image_runner:two_ends", "--head=two", "--methods", "co-tuning")
    assert runner.main(arguments(data, tmp_path, *more)) == 0
    weights = torch.load(tmp_path / "co-tuning.weights.pt")
    assert {name: tuple(w.shape) for name, w in weights.items() if "two" in name} == {
        "two.weight": (4, 7), "two.bias": (4,)
    }  # fmt: skip


@pytest.mark.parametrize("method", ["plain", "l2-sp", "co-tuning"])
@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_resuming_gives_the_same_bits(
    runner: ModuleType, data: Path, tmp_path: Path, method: str, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--checkpoint-every=2", "--methods", method)
    assert runner.main(arguments(data, tmp_path / "whole", *more)) == 0
    steps = 0
    step = torch.optim.SGD.step

    def stopping(*args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        if steps > stop_after:
            raise StoppedError
        return step(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", stopping)
        with pytest.raises(StoppedError):
            runner.main(arguments(data, tmp_path / "resumed", *more))
    assert runner.main(arguments(data, tmp_path / "resumed", *more)) == 0
    whole, resumed = (torch.load(tmp_path / name / f"{method}.weights.pt") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list((tmp_path / "resumed").glob("*.checkpoint.safetensors"))


def test_the_comparison_of_bits_can_fail(
    runner: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runner.main(arguments(data, tmp_path / "whole", "--methods", "plain")) == 0
    seeds = iter([0])
    original = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: original(next(seeds, 5)))  # other dropout
    assert runner.main(arguments(data, tmp_path / "other", "--methods", "plain")) == 0
    whole, other = (torch.load(tmp_path / name / "plain.weights.pt") for name in ("whole", "other"))
    assert not torch.equal(whole["6.weight"], other["6.weight"])


def test_killed_while_it_saves(data: Path, runner: ModuleType, tmp_path: Path) -> None:
    """A checkpoint after every iteration: most of the time is spent writing one when the kill comes."""
    output = tmp_path / "killed"
    package = Path(ck.__file__).parent.parent
    path = os.pathsep.join([str(package), str(TESTS), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    more = ("--methods", "plain", "--checkpoint-every=1", "--iterations=400")
    command = [sys.executable, str(EXAMPLES / "image_classification.py"), *arguments(data, output, *more)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 600  # far above what a busy machine needs
    while not (output / "plain.checkpoint.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    progress = importlib.import_module("training_progress")
    tensors, record = progress.CHECKPOINT_FILE.read(output / "plain.checkpoint.safetensors")
    state = progress.unpacked(record, tensors)
    assert 1 <= state["iteration"] <= 400


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_are_one(runner: ModuleType, data: Path, tmp_path: Path) -> None:
    worker = importlib.import_module("support.image_runner_worker")
    package = Path(ck.__file__).parent.parent
    path = os.pathsep.join([str(package), str(TESTS), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, worker.__file__, str(data), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one = tmp_path / "one"
    assert runner.main(arguments(data, one, worker.NO_NOISE, "--methods", *worker.METHODS)) == 0
    for method in worker.METHODS:
        weights, expected = (
            torch.load(folder / f"{method}.weights.pt") for folder in (tmp_path / "without_noise", one)
        )
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)
        result = json.loads((tmp_path / f"without_noise/{method}.json").read_text())
        assert result["processes"] == 2
    # Two methods differ by much more.
    assert (expected["4.weight"] - torch.load(one / "plain.weights.pt")["4.weight"]).abs().max() > 1e-4
    assert done.stdout.count("4 classes, 40 training images") == 4  # only the first process prints
    # Resumed in both processes, each with its own random numbers.
    whole, resumed = (torch.load(tmp_path / name / "co-tuning.weights.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert done.stderr.count("is of other settings (seed was 0, is 1)") == 2


def test_processes_on_the_cpu_talk_over_the_cpu(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a GPU, for which torch would otherwise choose the backend."""
    asked: list[str | None] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runner, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *, backend, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with runner.process_group(argparse.Namespace(batch_size=4, device="cpu")):
        assert asked == ["gloo"]


def test_what_several_processes_cannot_share(
    runner: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert runner.main(arguments(data, tmp_path)) == 1
    assert "--batch-size 8 cannot be shared by 3 processes: give a multiple" in capsys.readouterr().err


def test_ten_crops_and_the_parts(runner: ModuleType, data: Path) -> None:
    image = Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint32).reshape(20, 20, 3).astype(np.uint8))
    pixels = runner.Pixels(20, 16, (0.5, 0.4, 0.3), (0.25, 0.5, 0.2))
    ten = runner.crops(image, pixels, True)
    whole = runner.as_tensor(image, pixels)
    assert whole[1, 3, 5].item() == pytest.approx((image.getpixel((5, 3))[1] / 255 - 0.4) / 0.5)
    assert ten.shape == (10, 3, 16, 16)
    assert torch.equal(ten[0], whole[:, 2:18, 2:18])
    assert torch.equal(ten[4], whole[:, 4:, 4:])
    assert torch.equal(ten[5:], ten[:5].flip(3))
    assert torch.equal(runner.crops(image, pixels, False), ten[:1])
    parts = runner.read_folder(data)
    small, large = (runner.sample(parts, rate, None, 7) for rate in (0.3, 0.5))
    assert [small.train.labels.count(t) for t in range(4)] == [3] * 4
    assert set(small.train.paths) <= set(large.train.paths)
    assert runner.sample(parts, 0.3, None, 8).train != small.train
    assert runner.sample(parts, 1.0, 3, 7).train == small.train
    assert runner.sample(parts, 0.3, 1000, 7).train == small.train
    assert len(small.test) == 24


def test_batches_are_those_of_an_uninterrupted_run(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(runner.Batches(10, 4, 0, 0, 10))
    assert list(runner.Batches(10, 4, 0, 6, 10)) == whole[6:]
    images = [image for batch in whole for image, _ in batch]
    assert sorted(images[:10]) == sorted(images[10:20]) == list(range(10))
    assert images[:10] != images[10:20]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(runner, "rank_and_size", lambda rank=rank: (rank, 2))
        shares.append(list(runner.Batches(10, 4, 0, 0, 10)))
    assert all(len(share) == 2 for batches in shares for share in batches)
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=no_such_package:f"], "the model no_such_package:f cannot be made"),
        (["--model=support.image_runner:none"], "cannot be made (AttributeError"),
        (["--output=plain", "--seed=1"], "is of other settings (seed was 0, is 1): give another --output"),
        (["--model=support.image_runner:two_ends"], "is ambiguous; name it with --head, one of: 'one' (Linear"),
        (["--model=support.image_runner:two_ends", "--head=three"], "--head 'three' names no module of TwoEnds"),
        (
            ["--model=support.image_runner:two_ends", "--head=one"],
            "or this is not its head (RuntimeError: mat1 and mat2 shapes",
        ),
        (["--model=support.image_runner:of_one_size"], "cannot be run on images of --crop 16 with a second head"),
        (["--crop=21"], "--crop 21 is cut out of images of --size 20: give a smaller crop"),
    ],
)
def test_what_is_wrong_is_said(
    runner: ModuleType, data: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert runner.main(arguments(data, Path("plain"), "--methods", "plain", "--iterations=1")) == 0
    assert runner.main(arguments(data, Path("other"), "--methods", "plain", "--iterations=1", *more)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_names_its_installation(
    runner: ModuleType, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = importlib.import_module("command_line").UserError
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [mock.Mock(find_spec=lambda *_: None)])  # no other module can be found
    with pytest.raises(error, match=rf": pip install {library}\.$"):
        runner.make_classifier(f"{library}:resnet18", None)


def test_damaged_and_missing_images(
    runner: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(arguments(tmp_path, tmp_path / "out")) == 1
    assert "has no folders train and test" in capsys.readouterr().err
    for part in ("train", "test"):
        (tmp_path / part / "red").mkdir(parents=True)
    for name in "ab":  # without a folder val every fifth is held out: here the first
        (tmp_path / f"train/red/{name}.png").write_bytes(b"not an image")
    assert runner.main(arguments(tmp_path, tmp_path / "out2")) == 1
    assert f"{tmp_path / 'test'} has no image in its sub-folders" in capsys.readouterr().err
    (tmp_path / "test/blue").mkdir()
    assert runner.main(arguments(tmp_path, tmp_path / "out3")) == 1
    assert "has a class blue that train has not" in capsys.readouterr().err
    (tmp_path / "test/blue").rmdir()
    picture("red", np.random.default_rng(1)).save(tmp_path / "test/red/good.png")
    assert runner.main(arguments(tmp_path, tmp_path / "out4", "--methods", "plain")) == 1
    assert "cannot be read as an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--images-per-class=-3", "--images-per-class=0", "--checkpoint-every=0", "--seed=-1", "--batch-size=0",
     "--iterations=0", "--temperature=0", "--temperature=nan", "--lr=inf", "--trade-off=-1", "--workers=-1",
     "--batchnorm-momentum=1.5", "--size=x", "--sampling-rate=0", "--device=gpu", "--device=meta"],
)  # fmt: skip
def test_numbers_without_a_sense_are_refused(
    runner: ModuleType, data: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        runner.main(arguments(data, tmp_path / "out", option))
    assert f"argument {option.split('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_sentence(
    runner: ModuleType, data: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    image = folder / "train/red/3.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    assert runner.main(arguments(folder, tmp_path / "out", "--methods", "plain", f"--workers={workers}")) == 1
    said = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert re.fullmatch(
        rf"image_classification: {image} cannot be read as an image \(.*\): remove or replace it.", said
    )


def test_enormous_images_are_refused(
    runner: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert runner.main(arguments(data, tmp_path / "out", "--methods", "plain")) == 1
    assert "could be decompression bomb DOS attack" in capsys.readouterr().err


def test_kinds_of_grey(runner: ModuleType, tmp_path: Path) -> None:
    """The same picture in 8 and in 16 bits a pixel."""
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    Image.fromarray(grey).save(tmp_path / "8.png")
    expected = np.asarray(runner.load(tmp_path / "8.png", 4))
    assert (expected == grey[..., None]).all()
    for name in ("16.png", "16.tif", "16.pgm"):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
        assert (np.asarray(runner.load(tmp_path / name, 4)) == expected).all()
    for kind in (np.int32, np.float32):
        Image.fromarray(grey.astype(kind)).save(tmp_path / "32.tif")
        with pytest.raises(runner.UserError, match="32 bits, of unknown range"):
            runner.load(tmp_path / "32.tif", 4)


DAMAGES = {
    "settings.json": "give another --output, or remove this one with its results",
    "plain.json": "remove it, and the same command trains this method again",
    "co-tuning.checkpoint.safetensors": "remove it, and the same command trains this method from the beginning",
    "relationship-co-tuning.safetensors": "remove it, and the same command learns it again",
    "statistics-co-tuning.safetensors": "remove it to start again",
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_damaged_files_are_named_with_the_mend(
    runner: ModuleType, data: Path, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    method = "plain" if name == "plain.json" else "co-tuning"
    run = arguments(data, tmp_path, "--iterations=2", "--checkpoint-every=1", "--methods", method)
    # Where to stop: before the relationship is saved, which removes the statistics; before the method ends, which
    # removes the checkpoint.
    stopped = (ck.RelationshipEstimator, "compute") if name.startswith("statistics") else (runner, "accuracy")
    with monkeypatch.context() as patched, contextlib.suppress(StoppedError):
        if method == "co-tuning":
            patched.setattr(*stopped, stop)
        runner.main(run)
    file = tmp_path / name
    content = file.read_bytes()
    other = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, other)
    file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "other": other.getvalue()}[damage])
    if name.endswith(".json") and damage == "other":
        file.write_text("[1]")
    capsys.readouterr()
    assert runner.main(run) == 1
    said = capsys.readouterr().err
    assert str(file) in said
    assert DAMAGES[name] in said


def stop(*args: object, **kwargs: object) -> None:
    raise StoppedError


def test_no_class_is_held_out_whole(
    runner: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            shutil.copy(data / part / name / "0.png", tmp_path / part / name)
    assert runner.main(arguments(tmp_path, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "every fifth training image is held out to validate, and the class blue has no other" in said
    assert "(a folder val)" in said


def test_other_images_do_not_join_the_results(
    runner: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    run = arguments(folder, tmp_path / "out", "--iterations=1", "--methods", "plain")
    assert runner.main(run) == 0
    (folder / "train/red/0.png").rename(folder / "train/red/new.png")
    assert runner.main(run) == 1
    assert "images was 40 to train, 16 to validate, 24 to test, names " in capsys.readouterr().err
    (folder / "train/red/new.png").rename(folder / "train/red/0.png")
    assert runner.main(run) == 0
    shutil.copy(folder / "test/red/0.png", folder / "test/blue/more.png")
    assert runner.main(run) == 1
    assert "is 40 to train, 16 to validate, 25 to test, names " in capsys.readouterr().err


def test_what_killed_writes_left_is_removed(runner: ModuleType, data: Path, tmp_path: Path) -> None:
    leftovers = [
        tmp_path / f"out/.{name}.0123456789abcdef.tmp"
        for name in ("plain.checkpoint.safetensors", "plain.weights.pt", "plain.json", "results.csv")
    ]
    leftovers[0].parent.mkdir()
    for path in leftovers:
        path.write_bytes(b"half a file")
    others = [tmp_path / ".plain.checkpoint.safetensors.0123456789abcdef.tmp", tmp_path / "out/notes.tmp"]
    for path in others:
        path.write_bytes(b"somebody else's")
    assert runner.main(arguments(data, tmp_path / "out", "--iterations=1", "--methods", "plain")) == 0
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize(
    ("name", "normalisation"),
    [
        ("timm:mobilenetv3_small_050", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("timm:vit_tiny_patch16_224", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
        ("torchvision:squeezenet1_1", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ],
)
def test_models_of_timm_and_torchvision(
    runner: ModuleType, data: Path, tmp_path: Path, name: str, normalisation: tuple[tuple[float, ...], ...]
) -> None:
    """With random weights: the published ones would be downloaded."""
    source, entry = name.split(":")
    module = pytest.importorskip(source, reason=f"{source} is not installed: pip install {source}")
    model = module.create_model(entry) if source == "timm" else module.models.get_model(entry)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    made, found = runner.make_classifier(name, tmp_path / "weights.pt")
    assert found == normalisation
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    if "vit" not in name:  # ViT needs 224 x 224 images: slow
        more = (f"--model={name}", f"--weights={tmp_path / 'weights.pt'}", "--size=72", "--crop=64", "--iterations=2")
        assert runner.main(arguments(data, tmp_path / "out", *more, "--methods", "co-tuning-uncalibrated")) == 0
        settings = json.loads((tmp_path / "out/settings.json").read_text())
        assert settings["pixels"] == str(runner.Pixels(72, 64, *normalisation))


@pytest.mark.parametrize("more", [(), ("--mean", "0.1", "0.2", "0.3", "--deviation", "2", "4", "5")])
def test_images_are_normalised_as_asked(
    runner: ModuleType, data: Path, tmp_path: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        runner, "objective_of",
        lambda method, model, *rest, **more: lambda images, labels, i: seen.append(images) or model(images)[1].sum(),
    )  # fmt: skip
    assert runner.main(arguments(data, tmp_path, "--methods", "plain", "--iterations=1", *more)) == 0
    mean, deviation = ((0.1, 0.2, 0.3), (2.0, 4.0, 5.0)) if more else runner.IMAGENET
    back = seen[0] * torch.tensor(deviation)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert back.min() >= -1e-6
    assert back.max() <= 1 + 1e-6
    bytes_again = back * 255
    torch.testing.assert_close(bytes_again, bytes_again.round(), atol=1e-3, rtol=0)


def test_the_temperature_of_the_source(
    runner: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equals the library's on logits computed here; another number of classes is an error."""
    program = importlib.import_module("source_temperature")
    more = ["--model=support.image_runner:brightness", "--size=20", "--crop=16", "--workers=0", "--device=cpu"]
    assert program.main([str(data / "test"), *more, "--batch-size=5", "--images-per-class=4"]) == 0
    said = re.search(r"^16 images, .*% right: --temperature ([0-9.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert said is not None
    pixels = runner.Pixels(20, 16, *runner.IMAGENET)
    images = [
        runner.crops(runner.load(data / "test" / name / f"{i}.png", 20), pixels, False)
        for name in CLASSES
        for i in range(4)
    ]
    logits, labels = brightness()(torch.cat(images)), torch.arange(4).repeat_interleave(4)
    expected = ck.fit_temperature(logits.detach(), labels).temperature
    assert float(said[1]) == pytest.approx(expected, abs=1e-4)
    assert expected < 0.95 or expected > 1.05
    (tmp_path / "only").mkdir()
    shutil.copytree(data / "test/red", tmp_path / "only/red")
    assert program.main([str(tmp_path / "only"), *more]) == 1
    assert "has 1 sub-folders, support.image_runner:brightness has 4 classes" in capsys.readouterr().err


def test_tensorboard_has_the_losses(runner: ModuleType, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("--methods", "plain", "co-tuning", f"--tensorboard={tmp_path / 'board'}")
    assert runner.main(arguments(data, tmp_path / "out", *more)) == 0
    for method in ("plain", "co-tuning"):
        events = EventAccumulator(str(tmp_path / "board" / method)).Reload()
        losses = events.Scalars("loss")
        assert [event.step for event in losses] == list(range(1, 13))
        assert all(0 < event.value < 20 for event in losses)


def test_without_tensorboard_it_is_said(
    runner: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert runner.main(arguments(data, tmp_path / "out", "--methods", "plain", f"--tensorboard={tmp_path}")) == 1
    assert "pip install tensorboard" in capsys.readouterr().err
