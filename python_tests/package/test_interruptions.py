"""Ctrl-C at every line of an estimator's methods: an interrupted call changes nothing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning_kernels import RelationshipEstimator
from cotuning_kernels.relationship import estimator as estimator_module

N_T, N_S = 6, 9
State = tuple[bytes, bytes, bool, int | None]


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N_T, (rows,), generator=draw)
    labels[0] = -100
    return torch.randn(rows, N_S, generator=draw), labels


def estimator_with(*batches: tuple[Tensor, Tensor], **options: Any) -> RelationshipEstimator:
    estimator = RelationshipEstimator(N_T, **options)
    for logits, labels in batches:
        estimator.update(logits, labels)
    return estimator


def state_of(estimator: RelationshipEstimator) -> State:
    state = estimator.state_dict()
    return (
        state["sums"].numpy().tobytes(), state["counts"].numpy().tobytes(), state["all_reduced"],
        estimator.num_source_classes,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _grad_mode() -> Iterator[None]:
    """An interruption inside torch's no_grad would leave gradients off for later tests."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


class InterruptionAt:
    """Raises KeyboardInterrupt at the n-th line, call or return within a method of the estimator.

    The method's own return is excluded: Python checks for signals after a call, and the last step calls nothing.
    """

    def __init__(self, place: int, method: str) -> None:
        self.left, self.method, self.inside, self.raised = place, method, False, False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        outermost = frame.f_code.co_name == self.method and frame.f_code.co_filename == estimator_module.__file__
        if outermost and event in ("call", "return"):
            self.inside = event == "call"
        if self.inside and event != "exception" and not self.raised:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self.before)


def interrupted_everywhere(
    make: Callable[[], RelationshipEstimator], method: str, call: Callable[[RelationshipEstimator], None]
) -> int:
    """The number of places. After an interruption at each, the estimator must be unchanged and still work."""
    expected_before, whole = state_of(make()), make()
    call(whole)
    expected_after = state_of(whole)
    assert expected_before != expected_after
    for place in range(5000):
        estimator = make()
        interruption, came_out = InterruptionAt(place, method), False
        try:
            with interruption:
                call(estimator)
        except KeyboardInterrupt:
            came_out = True
        if not came_out:
            assert state_of(estimator) == expected_after
            if not interruption.raised:
                return place
            continue  # Python swallows what is raised in a finalizer, which the collector may run anywhere
        assert state_of(estimator) == expected_before, f"place {place}"
        assert state_of(copy.deepcopy(estimator)) == expected_before
        call(estimator)
        assert state_of(estimator) == expected_after, f"place {place}"
    pytest.fail("it has no end")


BATCHES = {"small": batch(4, 1), "large": batch(40, 2)}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("first", ["fresh", "sized", "counted"])
@pytest.mark.parametrize("size", BATCHES)
def test_an_interrupted_batch_is_not_counted(size: str, first: str, backend: str) -> None:
    def make() -> RelationshipEstimator:
        if first == "fresh":
            return RelationshipEstimator(N_T, backend=backend)
        batches = [batch(10, 3)] if first == "counted" else []
        return estimator_with(*batches, num_source_classes=N_S, backend=backend)

    assert interrupted_everywhere(make, "update", lambda estimator: estimator.update(*BATCHES[size])) > 20


@pytest.mark.parametrize("size", BATCHES)
def test_an_interrupted_batch_of_nan_leaves_no_nan(size: str) -> None:
    logits, labels = batch(*{"small": (4, 1), "large": (40, 2)}[size])
    logits[-1, 3] = torch.nan
    for place in range(60):
        estimator = estimator_with(batch(10, 3))
        before = state_of(estimator)
        with pytest.raises((KeyboardInterrupt, ValueError)), InterruptionAt(place, "update"):
            estimator.update(logits, labels)
        assert state_of(estimator) == before


@pytest.mark.parametrize("first", ["fresh", "counted"])
def test_an_interrupted_merge_adds_nothing(first: str) -> None:
    other = estimator_with(batch(10, 4))

    def make() -> RelationshipEstimator:
        return estimator_with(*[batch(10, 3)] if first == "counted" else [])

    assert interrupted_everywhere(make, "merge", lambda estimator: estimator.merge(other)) > 20


def test_an_interrupted_state_is_not_loaded() -> None:
    state = estimator_with(batch(10, 4)).state_dict()

    def make() -> RelationshipEstimator:
        return estimator_with(batch(10, 3))

    assert interrupted_everywhere(make, "load_state_dict", lambda estimator: estimator.load_state_dict(state)) > 20


def test_an_interrupted_all_reduce_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a second process with the same sums."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(estimator_module, "rank_and_size", lambda group: (0, 2))

    def gather(settings: list[Any], mine: Any, group: None) -> None:
        settings[:] = [mine, mine]

    def double(tensor: Tensor, group: None) -> None:
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "all_reduce", double)

    def make() -> RelationshipEstimator:
        return estimator_with(batch(10, 3))

    assert interrupted_everywhere(make, "all_reduce", lambda estimator: estimator.all_reduce()) > 20


def test_a_second_interruption_while_the_first_is_dealt_with() -> None:
    """Reading the estimator afterwards may be interrupted as well."""
    estimator = estimator_with(batch(10, 3))
    before = state_of(estimator)
    for place in range(40):
        with pytest.raises(KeyboardInterrupt), InterruptionAt(place, "update"):
            estimator.update(*BATCHES["small"])
        with pytest.raises(KeyboardInterrupt), InterruptionAt(place % 2, "counts"):
            _ = estimator.counts
    assert state_of(estimator) == before


def test_another_thread_reads_a_whole_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread reads while a batch is added in place."""
    estimator = estimator_with(batch(10, 3))
    before, seen = state_of(estimator), []
    add = RelationshipEstimator._add

    def add_and_look(self: RelationshipEstimator, *arguments: Any) -> bool:
        added = add(self, *arguments)
        seen.append(state_of(self))
        return added

    monkeypatch.setattr(RelationshipEstimator, "_add", add_and_look)
    estimator.update(*BATCHES["small"])
    assert seen == [before]
    assert state_of(estimator) != before


class CarelessSpare:
    """An attribute that keeps the memory of an interrupted batch, or that is the sums of the last batch."""

    def __init__(self, *, keeps_the_interrupted: bool) -> None:
        self.keeps_the_interrupted = keeps_the_interrupted

    def __get__(self, estimator: RelationshipEstimator, owner: type) -> Any:
        return vars(estimator).get("spare") if self.keeps_the_interrupted else estimator._counted

    def __set__(self, estimator: RelationshipEstimator, value: Any) -> None:
        if value is not None or not self.keeps_the_interrupted:
            vars(estimator)["spare"] = value


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("fault", ["in place", "unknown sums", "one sum for two batches"])
def test_a_careless_estimator_is_found(fault: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "in place":
        monkeypatch.setattr(RelationshipEstimator, "_copy", lambda self, *arguments: self._counted)
    else:
        careless = CarelessSpare(keeps_the_interrupted=fault == "unknown sums")
        monkeypatch.setattr(RelationshipEstimator, "_spare", careless, raising=False)

    def make() -> RelationshipEstimator:
        return estimator_with(batch(10, 3), num_source_classes=N_S)

    with pytest.raises(AssertionError):
        interrupted_everywhere(make, "update", lambda estimator: estimator.update(*BATCHES[size]))
