"""The checkpoint of a training run: it restores everything, and damaged files are refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.paths import EXAMPLES


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("training_progress")


def trained(module: ModuleType, path: Path, seed: int, steps: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)
    progress = module.Progress(path, model, optimizer, schedule)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()
        progress.iteration += 1
    return progress


def everything(progress: Any) -> list[Any]:
    """Everything that a training step depends on, as comparable values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    states = [part.state_dict() for part in (progress.model, progress.optimizer, progress.schedule)]
    return plain([progress.iteration, progress.seconds, *states, torch.random.get_rng_state()])


def test_everything_comes_back(module: ModuleType, tmp_path: Path) -> None:
    saved = trained(module, tmp_path / "c", seed=0, steps=3)
    saved.save()
    before = everything(saved)
    loaded = trained(module, tmp_path / "c", seed=1, steps=1)
    assert everything(loaded) != before
    loaded.load()
    assert everything(loaded) == before
    content = (tmp_path / "c").read_bytes()
    loaded.save()
    assert (tmp_path / "c").read_bytes() == content


def test_a_flipped_bit_is_never_resumed(module: ModuleType, tmp_path: Path, draw: torch.Generator) -> None:
    path = tmp_path / "c"
    saved = trained(module, path, seed=0, steps=3)
    saved.save()
    before, content, refused = everything(saved), path.read_bytes(), 0
    offsets = range(0, len(content), 11)
    for offset in offsets:
        flipped = bytearray(content)
        flipped[offset] ^= 1 << int(torch.randint(0, 8, (), generator=draw))
        path.write_bytes(flipped)
        loaded = trained(module, path, seed=1, steps=0)
        try:
            loaded.load()
        except module.UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert everything(loaded) == before
    assert refused >= len(offsets) - 2  # the header is padded with a few spaces


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.clear(),
        lambda state: state.update(iteration=None),
        lambda state: state.update(seconds="soon"),
        lambda state: state.update(model={}),
        lambda state: state.update(model=[1]),
        lambda state: state["model"].update({"0.weight": torch.zeros(3)}),
        lambda state: state.update(optimizer=None),
        lambda state: state.update(optimizer={"state": {}, "param_groups": []}),
        lambda state: state.update(schedule=5),
        lambda state: state.update(random=[]),
        lambda state: state.update(random=[[torch.zeros(3), None]]),
        lambda state: state.update(random=[[None, None]]),
    ],
)
def test_a_crafted_checkpoint_is_refused(change: Any, module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "c"
    trained(module, path, seed=0, steps=3).save()
    tensors, record = module.CHECKPOINT_FILE.read(path)
    state = module.unpacked(record, tensors)
    change(state)
    tensors = {}
    record = module.packed(state, tensors)
    module.CHECKPOINT_FILE.write(path, tensors, record)
    with pytest.raises(module.UserError, match=r"(?s)is damaged, or of another network .* remove it, and"):
        trained(module, path, seed=1, steps=0).load()


@pytest.mark.parametrize("record", [{}, {"items": 5}, {"items": [[1]]}, {"tensor": "none"}, {"items": [[[], 1]]}])
def test_a_record_of_another_form_is_refused(record: Any, module: ModuleType, tmp_path: Path) -> None:
    module.CHECKPOINT_FILE.write(tmp_path / "c", {}, record)
    with pytest.raises(module.UserError, match="is damaged, or of another network"):
        trained(module, tmp_path / "c", seed=1, steps=0).load()


def test_what_a_checkpoint_cannot_hold(module: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"\.a\.1 is a set, which a checkpoint cannot hold"):
        module.packed({"a": [1, {2}]}, {})
