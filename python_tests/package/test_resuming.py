"""Relationship learning that was interrupted goes on where its statistics on disk stand, to the same bits."""

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
from cotuning_kernels import learn_relationship
from cotuning_kernels.relationship.learn import CheckpointError

N_T, N_S = 4, 12
Batches = list[tuple[Tensor, Tensor]]


class StoppedError(Exception):
    """Stands for whatever ends a process."""


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
    """NumPy's too, which a checkpoint could not be read with."""
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
    assert list(tmp_path.iterdir()) == []  # nothing is left over to be taken for new statistics


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


def test_damaged_statistics_are_refused(batches: Batches, interrupted: Path) -> None:
    content = interrupted.read_bytes()
    for damaged in (b"", b"not a file of torch", content[: len(content) // 2]):
        interrupted.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is not a checkpoint of learn_relationship, or is damaged"):
            learn(Counting(), batches, "direct", checkpoint=interrupted)
    torch.save({"weights": torch.zeros(3)}, interrupted)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        learn(Counting(), batches, "direct", checkpoint=interrupted)
    torch.save(nn.Linear(2, 2), interrupted)  # an object whose loading would run code
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        learn(Counting(), batches, "direct", checkpoint=interrupted)


def test_options_of_a_checkpoint(batches: Batches, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        learn(Counting(), batches, "direct", checkpoint=tmp_path / "x", checkpoint_every=0)
    with pytest.raises(FileNotFoundError, match="does not exist, so x cannot be saved there"):
        learn(Counting(), batches, "direct", checkpoint=tmp_path / "no folder" / "x", checkpoint_every=1)


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
    """Two kills, a save after every batch; the result is that of a process that lived."""
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
