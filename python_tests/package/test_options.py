"""The options of the loss: one order, checked when they are set, and the same through every entry point."""

from __future__ import annotations

import copy
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cotuning_kernels as ck
from cotuning_kernels import functional, reference
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.options import LossOptions
from support.backends import Backend
from support.paths import ROOT

CHANGES = {
    "label_smoothing": 0.3,
    "ignore_index": 2,
    "reduction": "sum",
    "source_loss": "kl",
    "trade_off": 0.7,
    "weight": torch.tensor([0.5, 2.0, 1.0]),
}


def problem() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    relationship = torch.rand(3, 7, generator=draw).softmax(1)
    logits = torch.randn(5, 7, generator=draw), torch.randn(5, 3, generator=draw)
    return *logits, torch.tensor([0, 1, 2, 1, 0]), relationship


def test_every_layer_names_the_same_options() -> None:
    """The operations' schema has the same order; the functions, the module and the reference have the same names."""
    schema = [argument.name for argument in operation("co_tuning_loss", "auto")._schema.arguments]
    named = [{"source_loss": "kl_divergence"}.get(name, name) for name in LossOptions._fields]
    start = schema.index("weight")
    assert schema[start : start + len(named)] == named
    for function in (functional.co_tuning_loss, ck.FusedCoTuningLoss, reference.co_tuning_loss):
        parameters = inspect.signature(function).parameters
        defaults = {name: parameters[name].default for name in LossOptions._fields}
        assert defaults == LossOptions()._asdict()
    assert set(CHANGES) == set(LossOptions._fields)


def files_that_name(option: str, root: Path) -> set[str]:
    """The files of the product under ``root`` with this word, except for tests."""
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh"}
    found = set()
    for folder in ("cotuning_kernels", "csrc", "build_support"):
        for path in (root / folder).rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.suffix in suffixes and not name.startswith("csrc/tests/"):
                found |= {name} if re.search(rf"\b{option}\b", path.read_text()) else set()
    return found


def test_an_option_is_named_where_it_is_defined_and_where_it_is_computed(tmp_path: Path) -> None:
    """What lies between passes the options on whole. A new option then touches the files that CONTRIBUTING.md lists."""
    section = (
        (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an option of the loss")[2].partition("\n## ")[0]
    )
    listed = re.findall(r"^\| `(\S+)` \|", section, flags=re.MULTILINE)
    assert len(listed) == 8
    assert files_that_name("label_smoothing", ROOT) == set(listed)
    (tmp_path / "csrc" / "ops").mkdir(parents=True)
    (tmp_path / "csrc" / "ops" / "planted.h").write_text("double label_smoothing;")
    assert files_that_name("label_smoothing", tmp_path) == {"csrc/ops/planted.h"}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_that_is_set_is_as_one_that_was_given(name: str) -> None:
    *inputs, relationship = problem()
    given = ck.FusedCoTuningLoss(relationship, **{name: CHANGES[name]})
    assigned = ck.FusedCoTuningLoss(relationship)
    before = assigned(*inputs)
    setattr(assigned, name, CHANGES[name])
    for criterion in (given, assigned, copy.deepcopy(assigned), copy.copy(assigned), assigned.to(torch.float32)):
        assert torch.equal(criterion(*inputs), given(*inputs))
        found = getattr(criterion, name)
        assert torch.equal(found, CHANGES[name]) if name == "weight" else found == CHANGES[name]
    assert not torch.equal(before, given(*inputs))
    by_function = functional.co_tuning_loss(*inputs, relationship, **{name: CHANGES[name]})
    assert torch.equal(by_function, given(*inputs))
    exact = reference.co_tuning_loss(*inputs, relationship, **{name: CHANGES[name]})[0]
    torch.testing.assert_close(by_function, exact)


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("label_smoothing", 1.5, "label_smoothing is 1.5"),
        ("ignore_index", 0.5, "ignore_index is 0.5"),
        ("reduction", "man", "reduction is 'man'"),
        ("source_loss", "mse", "source_loss is 'mse'"),
        ("trade_off", math.nan, "trade_off is nan"),
    ],
)
def test_a_wrong_option_is_refused_when_it_is_set(name: str, wrong: Any, error: str) -> None:
    *inputs, relationship = problem()
    criterion = ck.FusedCoTuningLoss(relationship)
    before = getattr(criterion, name), criterion(*inputs)
    with pytest.raises((TypeError, ValueError), match=error):
        setattr(criterion, name, wrong)
    assert getattr(criterion, name) == before[0]
    assert torch.equal(criterion(*inputs), before[1])


@pytest.mark.parametrize("name", ["label_smoothing", "ignore_index"])
def test_a_tensor_is_no_number(backend: Backend, name: str) -> None:
    *inputs, relationship = problem()
    with pytest.raises(TypeError, match=f"{name} is tensor"):
        functional.co_tuning_loss(*inputs, relationship, backend=backend.argument, **{name: torch.tensor(0)})


def test_a_weight_that_is_swapped_for_one_call_is_used() -> None:
    *inputs, relationship = problem()
    criterion = ck.FusedCoTuningLoss(relationship, weight=torch.ones(3))
    expected = ck.FusedCoTuningLoss(relationship, weight=CHANGES["weight"])(*inputs)
    before = criterion(*inputs)
    assert torch.equal(torch.func.functional_call(criterion, {"weight": CHANGES["weight"]}, tuple(inputs)), expected)
    assert torch.equal(criterion(*inputs), before)
    criterion.load_state_dict({"relationship": relationship, "weight": CHANGES["weight"]}, assign=True)
    assert torch.equal(criterion(*inputs), expected)


def test_a_resumed_warm_up_continues_with_its_trade_off() -> None:
    *inputs, relationship = problem()
    saved, resumed = (torch.nn.ModuleDict({"loss": ck.FusedCoTuningLoss(relationship)}) for _ in range(2))
    saved["loss"].trade_off = 0.4
    resumed.load_state_dict(saved.state_dict())
    assert resumed["loss"].trade_off == 0.4
    assert torch.equal(resumed["loss"](*inputs), saved["loss"](*inputs))
    resumed.load_state_dict({"loss.relationship": relationship})  # buffers alone: the trade-off stays
    assert resumed["loss"].trade_off == 0.4
    with pytest.raises(RuntimeError, match=r"Missing key.*loss\.relationship"):
        resumed.load_state_dict({"loss._extra_state": torch.tensor(1.0)})
