"""What every entry point that takes logits for statistics has in common: it warns of softmax outputs, and it checks its
settings before the first batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cotuning_kernels as ck
from cotuning_kernels import calibration

_CLASSES, _ROWS = 5, 60
_PENALTIES = (1.0,)


class _Data:
    """A loader and a model that count what was asked of them."""

    def __init__(self, draw: torch.Generator, softmax: bool = False) -> None:
        self.batches = 0
        self.logits = 2 * torch.randn(_ROWS, 11, generator=draw)
        if softmax:
            self.logits = torch.softmax(self.logits, 1)
        self.labels = torch.arange(_ROWS) % _CLASSES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for logits, labels in zip(self.logits.split(6), self.labels.split(6), strict=True):
            self.batches += 1
            yield logits, labels

    def __len__(self) -> int:
        return _ROWS // 6


def _direct(data: _Data, **settings: Any) -> object:
    settings = {"num_target_classes": _CLASSES} | settings
    return ck.learn_relationship(nn.Identity(), data, progress=False, **settings)


def _reverse(data: _Data, **settings: Any) -> object:
    settings = {"inverse_penalties": _PENALTIES} | settings
    return _direct(data, method="reverse", validation_loader=data, **settings)


def _reverse_of_logits(data: _Data, **settings: Any) -> object:
    settings = {"num_target_classes": _CLASSES, "inverse_penalties": _PENALTIES} | settings
    return ck.learn_reverse_relationship(data.logits, data.labels, data.logits, data.labels, **settings)


def _estimator(data: _Data, **settings: Any) -> object:
    estimator = ck.RelationshipEstimator(**({"num_target_classes": _CLASSES} | settings))
    for logits, labels in data:
        estimator.update(logits, labels)
    return estimator


def _scores(data: _Data, **settings: Any) -> object:
    settings = {"num_target_classes": _CLASSES} | settings
    return ck.transferability(nn.Identity(), data, progress=False, **settings)


def _of_logits(function: Callable[..., object]) -> Callable[..., object]:
    return lambda data, **settings: function(data.logits, data.labels, **settings)


ENTRIES: dict[str, Callable[..., object]] = {
    "learn_relationship, direct": _direct,
    "learn_relationship, reverse": _reverse,
    "learn_reverse_relationship": _reverse_of_logits,
    "RelationshipEstimator": _estimator,
    "transferability": _scores,
    "fit_temperature": _of_logits(ck.fit_temperature),
    "expected_calibration_error": _of_logits(ck.expected_calibration_error),
    "reliability": _of_logits(calibration.reliability),
}
_FUNCTIONS = {
    "learn_relationship, direct": ck.learn_relationship,
    "learn_relationship, reverse": ck.learn_relationship,
    "RelationshipEstimator": ck.RelationshipEstimator,
    "reliability": calibration.reliability,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_softmax_outputs_given_as_logits_are_warned_of(entry: str, draw: torch.Generator) -> None:
    with pytest.warns(UserWarning, match="the rows sum to 1, as those of probabilities do, and logits are expected"):
        ENTRIES[entry](_Data(draw, softmax=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ENTRIES[entry](_Data(draw))
    assert not [each for each in caught if "sum to 1" in str(each.message)]


def test_no_entry_point_is_missing_here() -> None:
    """Whatever looks for probabilities, or collects the logits of a pass, is in the table."""
    package = Path(inspect.getfile(ck)).parent
    callers = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "warn_of_probabilities(" in file.read_text() and file.name != "labelled_logits.py"
    }
    assert callers == {
        "calibration.py", "relationship/estimator.py", "relationship/passes.py", "relationship/reverse.py"
    }  # fmt: skip
    takes_logits = {name for name in ck.__all__ if name.islower() and _takes_statistics(getattr(ck, name))}
    assert takes_logits == {each.split(",")[0] for each in ENTRIES} - {"RelationshipEstimator", "reliability"}


def _takes_statistics(value: Any) -> bool:
    names = inspect.signature(value).parameters if callable(value) else ()
    return "source_model" in names or any(name.endswith("logits") for name in names)


_NO_COUNTS = (5.0, 0, -1, True, "5", None)
_WRONG: dict[str, tuple[Any, ...]] = {
    "num_target_classes": _NO_COUNTS[:-1],
    "num_source_classes": _NO_COUNTS[:-1],
    "temperature": (0.0, -1.0, float("nan"), float("inf"), "warm", None, 10**400),
    "ignore_index": (1.5, "none", None, 2**70),
    "empty": ("zero", None),
    "dtype": (torch.float16, torch.int64, "float32", None),
    "backend": ("gpu", None),
    "method": ("both", None),
    "device": ("nowhere",),
    "max_batches": (0, -1, 2.5, "all"),
    "checkpoint_every": (0, -1, 2.5, None),
    "inverse_penalties": ((), (0.0,), (float("nan"),), "C", 1.0),
    "tolerance": (0.0, -1e-3, float("nan"), "small", None),
    "max_iterations": _NO_COUNTS,
    "bins": _NO_COUNTS,
    "top": _NO_COUNTS,
    "head": ("no.such.head",),
    "target_classes": (("a", "b"), 3),
}
_COUNTS = {
    "num_target_classes": _CLASSES, "num_source_classes": 11, "ignore_index": -1, "max_batches": 3,
    "checkpoint_every": 2, "max_iterations": 40, "bins": 9, "top": 3,
}  # fmt: skip
"""Settings that are integers, with a value that every entry point takes."""


def _settings(entry: str) -> set[str]:
    function = _FUNCTIONS.get(entry) or getattr(ck, entry)
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("entry", "name"), [(entry, name) for entry in ENTRIES for name in _WRONG if name in _settings(entry)]
)
def test_a_wrong_setting_is_refused_before_the_first_batch(
    entry: str, name: str, draw: torch.Generator, tmp_path: Path
) -> None:
    for value in _WRONG[name]:
        data = _Data(draw)
        extra = {"checkpoint": tmp_path / "checkpoint"} if name == "checkpoint_every" else {}
        with pytest.raises((TypeError, ValueError, RuntimeError), match=name if name != "head" else "no.such.head"):
            ENTRIES[entry](data, **{name: value}, **extra)
        assert data.batches == 0, f"{name}={value!r} was refused after {data.batches} batches"


@pytest.mark.parametrize("integer", [np.int64, np.int32])
@pytest.mark.parametrize("entry", ENTRIES)
def test_integers_of_other_libraries_are_integers(
    entry: str, integer: Callable[[int], Any], draw: torch.Generator, tmp_path: Path
) -> None:
    for name in _settings(entry) & _COUNTS.keys():
        data = _Data(draw)
        extra = {"checkpoint": tmp_path / "checkpoint"} if name == "checkpoint_every" else {}
        plain = ENTRIES[entry](data, **{name: _COUNTS[name]}, **extra)
        given = ENTRIES[entry](data, **{name: integer(_COUNTS[name])}, **extra)
        assert repr(given) == repr(plain), name


def test_the_number_of_classes_of_a_model_is_checked_alike() -> None:
    network = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 11))
    model = ck.CoTuningModel.from_classifier(network, np.int64(_CLASSES), example_input=torch.zeros(2, 8))  # type: ignore[arg-type]
    assert model(torch.zeros(3, 8)).target_logits.shape == (3, _CLASSES)
    for wrong in _NO_COUNTS:
        with pytest.raises((TypeError, ValueError), match="num_target_classes"):
            ck.CoTuningModel.from_classifier(network, wrong)  # type: ignore[arg-type]
