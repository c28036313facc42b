"""The short form of `make torture`, and that each attack finds a fault planted for it."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning_kernels import RelationshipEstimator, atomic_file, tensor_file
from tools import torture

TRIES = {
    torture.killed_saves: 6, torture.killed_passes: 4, torture.failing_disks: 12, torture.hostile_relationships: 200,
    torture.hostile_checkpoints: 60, torture.interruptions: 25, torture.memory_limits: 2,
}  # fmt: skip
Attack = Callable[[random.Random, int, Path], Counter[str]]


def by_name(attack: Attack) -> str:
    return attack.__name__


def test_every_attack_has_a_short_form() -> None:
    assert TRIES.keys() == torture.ATTACKS.keys()


@pytest.mark.parametrize("attack", TRIES, ids=by_name)
def test_nothing_is_found(attack: Attack, seed: int, tmp_path: Path) -> None:
    assert attack(random.Random(seed), TRIES[attack], tmp_path).total() > TRIES[attack] / 2


def test_a_child_ends_if_its_error_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(torture.os, "write", fail)
    try:
        status = torture.status_of(fail)
    except OSError:
        os._exit(7)  # the child has come here
    assert status == 1


def write_in_place(path: Any, *pieces: bytes | memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)


def add_then_fail(self: RelationshipEstimator, logits: Tensor, labels: Tensor) -> Any:
    """Allocates memory after the batch has been added."""
    self._add(self._counted, self._counted, logits, labels)
    torch.ones(60_000_000)  # more than earlier work may have left free in a process
    return self._counted


FAULTS: dict[Attack, tuple[Any, str, Any]] = {
    torture.killed_saves: (atomic_file, "_remove_leftovers", lambda target: None),
    torture.killed_passes: (tensor_file, "write_atomically", write_in_place),
    torture.failing_disks: (tensor_file, "write_atomically", write_in_place),
    torture.hostile_relationships: (tensor_file, "_digest", lambda text, tensors: "constant"),
    torture.hostile_checkpoints: (tensor_file, "_digest", lambda text, tensors: "constant"),
    torture.interruptions: (RelationshipEstimator, "_copy", lambda self, *arguments: self._counted),
    torture.memory_limits: (RelationshipEstimator, "_with_batch", add_then_fail),
}


@pytest.mark.parametrize("attack", FAULTS, ids=by_name)
def test_a_planted_fault_is_found(attack: Attack, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[attack])
    with pytest.raises(torture.WrongError):
        attack(random.Random(seed), (4 if attack is torture.memory_limits else 20) * TRIES[attack], tmp_path)
