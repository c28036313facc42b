"""Interrupted relationship learning resumes from its statistics on disk, to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cotuning_kernels
from cotuning_kernels import learn_relationship, tensor_file
from cotuning_kernels.relationship import RelationshipFileError, passes
from cotuning_kernels.relationship.passes import CheckpointError

N_T, N_S = 4, 12
Batches = list[tuple[Tensor, Tensor]]


class StoppedError(Exception):
    """Stands in for anything that ends a process."""


class Counting(nn.Module):
    """A classifier that counts its calls, and stops at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(8, N_S, generator=generator))
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == self.stop_at:
            raise StoppedError
        self.calls += 1
        return x @ self.weight


@pytest.fixture
def batches(draw: torch.Generator) -> Batches:
    return [(torch.randn(7, 8, generator=draw), torch.randint(0, N_T, (7,), generator=draw)) for _ in range(11)]


def learn(model: nn.Module, batches: Any, method: str, **options: Any) -> cotuning_kernels.Relationship:
    more = {"validation_loader": batches[:3]} if method == "reverse" else {}
    return learn_relationship(model, batches, N_T, method=method, progress=False, **more, **options)


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_settings_are_the_same_numbers_whatever_their_type(method: str, batches: Batches, tmp_path: Path) -> None:
    """NumPy numbers are converted: a checkpoint with them could not be read."""
    file = tmp_path / "statistics.pt"
    with pytest.raises(StoppedError):
        learn(Counting(5), batches, method, checkpoint=file, checkpoint_every=3, temperature=np.float64(2.0),
              ignore_index=np.int64(-1))  # fmt: skip
    again = Counting()
    learn(again, batches, method, checkpoint=file, temperature=2, ignore_index=-1)
    assert again.calls == len(batches) - 3 + (3 if method == "reverse" else 0)


@pytest.mark.parametrize("method", ["direct", "reverse"])
@pytest.mark.parametrize(
    "wrong", [{"empty": "zero"}, {"temperature": -1}, {"inverse_penalties": []}, {"inverse_penalties": [1, 1e40]},
              {"backend": "nope"}],
)  # fmt: skip
def test_wrong_settings_are_refused_before_the_pass(method: str, wrong: dict[str, Any], batches: Batches) -> None:
    model = Counting()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        learn(model, batches, method, **wrong)
    assert model.calls == 0


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")
@pytest.mark.parametrize("method", ["direct", "reverse"])
@pytest.mark.parametrize("stop_at", [0, 1, 4, 5, 10, 12])
def test_the_same_bits_as_without_an_interruption(method: str, stop_at: int, batches: Batches, tmp_path: Path) -> None:
    if method == "direct" and stop_at == 12:
        pytest.skip("the direct method has no 13th batch: no validation data")
    file = tmp_path / "statistics.pt"
    whole = learn(Counting(), batches, method)
    with pytest.raises(StoppedError):
        learn(Counting(stop_at), batches, method, checkpoint=file, checkpoint_every=3)
    again = Counting()
    resumed = learn(again, batches, method, checkpoint=file, checkpoint_every=3)
    assert torch.equal(resumed.matrix, whole.matrix)
    assert resumed.counts is not None
    assert whole.counts is not None
    assert torch.equal(resumed.counts, whole.counts)
    total = len(batches) + (3 if method == "reverse" else 0)
    saved = {0: 0, 1: 0, 4: 3, 5: 3, 10: 9, 12: 11}[stop_at]
    assert again.calls == total - saved
    assert list(tmp_path.iterdir()) == []  # no leftover that could pass for new statistics


def test_a_checkpoint_that_is_whole_costs_no_forward_pass(batches: Batches, tmp_path: Path) -> None:
    """Interrupted after the last save, for instance while the validation data are read."""
    file = tmp_path / "statistics.pt"
    with pytest.raises(StoppedError):
        learn(Counting(11), batches, "reverse", checkpoint=file, checkpoint_every=100)
    again = Counting()
    learn(again, batches, "reverse", checkpoint=file)
    assert again.calls == 3


@pytest.fixture
def interrupted(batches: Batches, tmp_path: Path) -> Path:
    file = tmp_path / "statistics.pt"
    with pytest.raises(StoppedError):
        learn(Counting(7), batches, "direct", checkpoint=file, checkpoint_every=3)
    return file


def other_labels(batches: Batches) -> Batches:
    return [(x, (y + 1) % N_T) for x, y in batches]


def other_model() -> Counting:
    model = Counting()
    model.weight.data[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("model", "change", "options", "message"),
    [
        (Counting, other_labels, {}, "after 6 batches with other labels than the loader gives now: does it shuffle"),
        (Counting, lambda batches: batches[::-1], {}, "other labels"),
        (Counting, lambda batches: batches[:4], {}, "after 6 batches, but the loader has fewer"),
        (other_model, list, {}, "is of another model; remove it"),
        (Counting, list, {"temperature": 2.0}, "is of another settings"),
    ],
    ids=["labels", "order", "fewer", "model", "settings"],
)
def test_statistics_of_something_else_are_refused(
    model: Callable[[], nn.Module],
    change: Callable[[Batches], Batches],
    options: dict[str, Any],
    message: str,
    batches: Batches,
    interrupted: Path,
) -> None:
    before = interrupted.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        learn(model(), change(batches), "direct", checkpoint=interrupted, checkpoint_every=3, **options)
    assert interrupted.read_bytes() == before


@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_damaged_statistics_are_refused(method: str, batches: Batches, interrupted: Path) -> None:
    content = interrupted.read_bytes()
    for damaged in (b"", b"not a file of torch", content[: len(content) // 2]):
        interrupted.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"not a safetensors file.*; remove it to start again"):
            learn(Counting(), batches, method, checkpoint=interrupted)
    torch.save({"weights": torch.zeros(3)}, interrupted)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        learn(Counting(), batches, method, checkpoint=interrupted)
    torch.save(nn.Linear(2, 2), interrupted)  # an object whose loading would run code
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        learn(Counting(), batches, method, checkpoint=interrupted)
    cotuning_kernels.Relationship(torch.eye(2)).save(interrupted)
    with pytest.raises(CheckpointError, match="but not a checkpoint of learn_relationship"):
        learn(Counting(), batches, method, checkpoint=interrupted)
    interrupted.write_bytes(content)
    with pytest.raises(RelationshipFileError, match="but not a relationship"):
        cotuning_kernels.Relationship.load(interrupted)


def interrupted_at(path: Path, method: str, batches: Batches) -> bytes:
    with pytest.raises(StoppedError):
        learn(Counting(6), batches[:7], method, checkpoint=path, checkpoint_every=6)
    return path.read_bytes()


def resumed(path: Path, content: bytes, method: str, batches: Batches) -> Tensor:
    path.write_bytes(content)
    return learn(Counting(), batches[:7], method, checkpoint=path).matrix


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_a_flipped_bit_is_never_resumed(method: str, batches: Batches, tmp_path: Path, draw: torch.Generator) -> None:
    path = tmp_path / "statistics.pt"
    content = interrupted_at(path, method, batches)
    right = resumed(path, content, method, batches)
    refused = 0
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << int(torch.randint(0, 8, (), generator=draw))
        try:
            assert torch.equal(resumed(path, bytes(flipped), method, batches), right)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused >= len(content) - 16  # the header is padded with a few spaces


def test_without_the_checksum_a_flipped_bit_would_be_resumed(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plants the fault that the test above must catch."""
    monkeypatch.setattr(tensor_file, "_digest", lambda text, tensors: "constant")
    path = tmp_path / "statistics.pt"
    content = bytearray(interrupted_at(path, "direct", batches))
    right = resumed(path, bytes(content), "direct", batches)
    content[-1] ^= 1  # an exponent bit of the last sum
    assert not torch.equal(resumed(path, bytes(content), "direct", batches), right)


def tensors_of(method: str, **change: Any) -> dict[str, Any]:
    if method == "direct":
        counts = torch.tensor([1, 0, 2, 3])
        return {"sums": counts[:, None] * torch.full((N_T, N_S), 1 / N_S), "counts": counts} | change
    return {"logits": torch.zeros(6, N_S), "labels": torch.arange(6) % N_T} | change


STATE: dict[str, Any] = {"temperature": 1.0, "all_reduced": False}
CRAFTED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no record": ("direct", {}, {"identity": None, "batches": None, "labels": None, "state": None}, "is damaged"),
    "identity None": ("direct", {}, {"identity": None}, "its record is not that of a pass"),
    "identity list": ("direct", {}, {"identity": [1]}, "its record is not that of a pass"),
    "identity empty": ("direct", {}, {"identity": {}}, "is of another model and other settings"),
    "batches None": ("direct", {}, {"batches": None}, "its record is not that of a pass"),
    "batches -1": ("direct", {}, {"batches": -1}, "its record is not that of a pass"),
    "batches 0": ("direct", {}, {"batches": 0}, "its record is not that of a pass"),
    "batches True": ("direct", {}, {"batches": True}, "its record is not that of a pass"),
    "batches 6.0": ("direct", {}, {"batches": 6.0}, "its record is not that of a pass"),
    "batches fewer": ("direct", {}, {"batches": 5}, "after 5 batches with other labels"),
    "batches more": ("direct", {}, {"batches": 12}, "after 12 batches, but the loader has fewer"),
    "labels None": ("direct", {}, {"labels": None}, "its record is not that of a pass"),
    "labels short": ("direct", {}, {"labels": "abc"}, "its record is not that of a pass"),
    "labels of other data": ("direct", {}, {"labels": "0" * 64}, "after 6 batches with other labels"),
    "state None": ("direct", {}, {"state": None}, "its record is not that of a pass"),
    "state {}": ("direct", {}, {"state": {}}, "is damaged: state is a dict with keys"),
    "state with more": ("direct", {}, {"state": STATE | {"more": 1}}, "is damaged: state is a dict with keys"),
    "temperature": ("direct", {}, {"state": STATE | {"temperature": 2.0}}, "is damaged: the state was counted at"),
    "temperature None": ("direct", {}, {"state": STATE | {"temperature": None}}, "is damaged: the state was counted"),
    "all_reduced": ("direct", {}, {"state": STATE | {"all_reduced": True}}, "its record is not that of a pass"),
    "all_reduced 0": ("direct", {}, {"state": STATE | {"all_reduced": 0}}, "its record is not that of a pass"),
    "sums in the record": ("direct", {"sums": None}, {"state": STATE | {"sums": "x"}}, "state.'sums'. is str"),
    "no sums": ("direct", {"sums": None}, {}, "is damaged: state is a dict with keys"),
    "sums 1-d": ("direct", {"sums": torch.zeros(3)}, {}, r"is damaged: state\['sums'\] is \(3,\)"),
    "sums 0-d": ("direct", {"sums": torch.zeros(())}, {}, r"is damaged: state\['sums'\] is \(\)"),
    "sums empty": ("direct", {"sums": torch.zeros(N_T, 0)}, {}, "is damaged: state.'sums'. and state.'counts'."),
    "sums of other classes": ("direct", {"sums": torch.ones(N_T + 1, N_S)}, {}, "is damaged: state.'sums'. is"),
    "sums too wide": ("direct", {"sums": tensors_of("direct")["counts"][:, None] * torch.ones(N_T, N_S + 2)}, {},
                      "was written with 14 source classes, but the model gives 12"),
    "sums int": ("direct", {"sums": torch.ones(N_T, N_S).int()}, {}, "is damaged: state.'sums'. is torch.int32"),
    "sums complex": ("direct", {"sums": torch.ones(N_T, N_S) * 1j}, {}, "is damaged: state.'sums'. is torch.complex64"),
    "sums NaN": ("direct", {"sums": torch.full((N_T, N_S), torch.nan)}, {}, "negative or non-finite"),
    "sums inf": ("direct", {"sums": torch.full((N_T, N_S), torch.inf)}, {}, "negative or non-finite"),
    "sums negative": ("direct", {"sums": torch.full((N_T, N_S), -1.0)}, {}, "negative or non-finite"),
    "sums of no row": ("direct", {"sums": torch.ones(N_T, N_S)}, {}, "rows of different classes"),
    "counts float": ("direct", {"counts": torch.ones(N_T)}, {}, "is damaged: state.'counts'. is torch.float32"),
    "counts negative": ("direct", {"counts": torch.tensor([1, -1, 1, 1])}, {}, "negative or non-finite"),
    "counts 2-d": ("direct", {"counts": torch.ones(N_T, 1).long()}, {}, "is damaged: state.'counts'. is"),
    "counts of no sums": ("direct", {"counts": torch.ones(N_T).long()}, {}, "rows of different classes"),
    "one tensor more": ("direct", {"more": torch.zeros(1)}, {}, "is damaged: state is a dict with keys"),
    "of the other method": ("direct", tensors_of("reverse", sums=None, counts=None), {"state": {}}, "is damaged"),
    "reverse: no logits": ("reverse", {"logits": None}, {}, "is damaged: the state has .'labels'."),
    "reverse: a state": ("reverse", {}, {"state": STATE}, "is damaged"),
    "reverse: logits int": ("reverse", {"logits": torch.zeros(6, N_S).int()}, {}, "damaged: source_logits has dtype"),
    "reverse: logits 1-d": ("reverse", {"logits": torch.zeros(6)}, {}, "is damaged: source_logits has shape"),
    "reverse: logits empty": ("reverse", {"logits": torch.zeros(6, 0)}, {}, "is damaged: source_logits has shape"),
    "reverse: logits NaN": ("reverse", {"logits": torch.full((6, N_S), torch.nan)}, {}, "is damaged: .* no softmax"),
    "reverse: logits too wide": ("reverse", {"logits": torch.zeros(6, N_S + 1)}, {}, "written with 13 source classes"),
    "reverse: fewer labels": ("reverse", {"labels": torch.arange(3)}, {}, "is damaged: labels has shape"),
    "reverse: labels float": ("reverse", {"labels": torch.zeros(6)}, {}, "is damaged: labels has dtype"),
    "reverse: labels int32": ("reverse", {"labels": torch.zeros(6).int()}, {}, "is damaged: the state has labels of"),
    "reverse: a label too large": ("reverse", {"labels": torch.full((6,), N_T)}, {}, r"is damaged: labels\[0\] is 4"),
    "reverse: a label ignored": ("reverse", {"labels": torch.full((6,), -100)}, {}, "is damaged: the state has labels"),
}  # fmt: skip


def craft(path: Path, method: str, tensors: dict[str, Any], change: dict[str, Any], batches: Batches) -> None:
    """Write a checkpoint with a correct digest and wrong content."""
    interrupted_at(path, method, batches)
    _, record = passes._CHECKPOINT_FILE.read(path)
    content = {name: tensor for name, tensor in (tensors_of(method) | tensors).items() if tensor is not None}
    with patch.dict(tensor_file._DTYPES, {torch.complex64: "C64"}):
        passes._CHECKPOINT_FILE.write(path, content, record | change)


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_checkpoint_is_refused(case: str, batches: Batches, tmp_path: Path) -> None:
    method, tensors, change, message = CRAFTED[case]
    path = tmp_path / "statistics.pt"
    craft(path, method, tensors, change, batches)
    with pytest.raises(CheckpointError, match=message) as caught:
        learn(Counting(), batches, method, checkpoint=path)
    assert str(path) in str(caught.value)
    assert "emove" in str(caught.value)


@pytest.mark.filterwarnings("ignore:the regression has no best temperature")
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_crafted_checkpoints_are_refused_for_what_was_changed(method: str, batches: Batches, tmp_path: Path) -> None:
    craft(tmp_path / "statistics.pt", method, {}, {}, batches)
    again = Counting()
    learn(again, batches, method, checkpoint=tmp_path / "statistics.pt")
    assert again.calls == len(batches) - 6 + (3 if method == "reverse" else 0)


def test_a_function_that_gives_other_classes_than_before(batches: Batches, tmp_path: Path) -> None:
    """A function has no weights to compare with the checkpoint's."""
    classes = N_S

    def model(x: Tensor) -> Tensor:
        return torch.ones(len(x), classes)

    path = tmp_path / "statistics.pt"

    def stopping() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches[:6]
        raise StoppedError

    with pytest.raises(StoppedError):
        learn_relationship(model, stopping(), N_T, checkpoint=path, checkpoint_every=3, progress=False)
    classes = N_S + 1
    with pytest.raises(CheckpointError, match="with 12 source classes, but the model gives 13: it is another model"):
        learn_relationship(model, batches, N_T, checkpoint=path, progress=False)


def test_options_of_a_checkpoint(batches: Batches, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        learn(Counting(), batches, "direct", checkpoint=tmp_path / "x", checkpoint_every=0)


@pytest.mark.parametrize(
    ("method", "what"), [("direct", "loader"), ("reverse", "loader"), ("reverse", "validation_loader")]
)
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("folder", FileNotFoundError, "does not exist, so x.* cannot be saved there"),
        ("directory", IsADirectoryError, "is a directory"),
        ("pipe", OSError, "is not a regular file"),
        ("loop", OSError, "symbolic links"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_found_before_the_pass(
    method: str, what: str, wrong: str, error: type[OSError], message: str, batches: Batches, tmp_path: Path
) -> None:
    path = tmp_path / ("missing/x" if wrong == "folder" else "x")
    file = passes.checkpoint_path(path, what)
    if wrong == "directory":
        file.mkdir()
    elif wrong == "pipe":
        os.mkfifo(file)
    elif wrong == "loop":
        file.symlink_to(file.name)
    model, before = Counting(), sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        learn(model, batches, method, checkpoint=path)
    assert model.calls == 0
    assert sorted(tmp_path.iterdir()) == before


def test_what_killed_saves_left_goes_with_the_checkpoint(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / ".x.0123456789abcdef.tmp").write_bytes(b"half")
    learn(Counting(), batches, "direct", checkpoint=tmp_path / "x", checkpoint_every=100)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys, torch
from cotuning_kernels import learn_relationship
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(1)
weight = torch.randn(8, 300, generator=generator)
def batch():
    return torch.randn(16, 8, generator=generator), torch.randint(0, 50, (16,), generator=generator)
batches = [batch() for _ in range(100)]
def model(x):
    print("batch", flush=True)
    return x @ weight
found = learn_relationship(model, batches, 50, progress=False, checkpoint=sys.argv[1], checkpoint_every=1)
torch.save(found.matrix, sys.argv[2])
"""


def run_to_be_killed(*arguments: str) -> subprocess.Popen[str]:
    package = Path(cotuning_kernels.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, *arguments],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return iter(process.stdout)


def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Two kills, a save after every batch; the result is that of an uninterrupted process."""
    delays = torch.rand(2, generator=torch.Generator().manual_seed(seed)) * 0.01
    for delay in delays.tolist():
        process = run_to_be_killed(str(tmp_path / "statistics.pt"), str(tmp_path / "never.pt"))
        for count, _ in enumerate(lines(process)):
            if count == 20:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "never.pt").exists()
    resumed = run_to_be_killed(str(tmp_path / "statistics.pt"), str(tmp_path / "resumed.pt"))
    calls = sum(1 for _ in lines(resumed))
    assert resumed.wait() == 0
    assert calls <= 100 - 2 * 20
    scope: dict[str, Any] = {}
    argv = ["", str(tmp_path / "fresh.pt"), str(tmp_path / "whole.pt")]
    with patch.object(sys, "argv", argv):
        exec(_KILLED, scope)
    assert torch.equal(torch.load(tmp_path / "resumed.pt"), torch.load(tmp_path / "whole.pt"))
