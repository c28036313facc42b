"""Learning the relationship: the estimator, the model-and-loader function, and the result."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from cotuning_kernels import backends, plots, reference
from cotuning_kernels.relationship import Relationship, RelationshipEstimator
from cotuning_kernels.relationship import estimator as estimator_module
from cotuning_kernels.relationship.learn import learn_relationship
from support.backends import Backend
from support.scripts import run_script

N_T, N_S = 5, 37
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_batch(draw: torch.Generator, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits with masked classes, labels with ignored rows."""
    logits = 4 * torch.randn(rows, N_S, generator=draw, dtype=torch.float64)
    logits = logits.masked_fill(torch.rand(rows, N_S, generator=draw) < 0.1, -math.inf)
    logits[:, 0] = 1.0  # never mask a whole row
    labels = torch.randint(0, N_T, (rows,), generator=draw)
    labels[torch.rand(rows, generator=draw) < 0.1] = -100
    return logits.to(dtype), labels


def estimator_of(*batches: tuple[Tensor, Tensor], **options: Any) -> RelationshipEstimator:
    estimator = RelationshipEstimator(N_T, N_S, **options)
    for logits, labels in batches:
        estimator.update(logits, labels)
    return estimator


def check_against_reference(
    estimator: RelationshipEstimator, logits: Tensor, labels: Tensor, tolerance: float, temperature: float = 1.0
) -> None:
    """Sums and counts equal those of the float64 reference; each sum has a relative tolerance."""
    sums, counts = reference.softmax_class_sums(logits.double(), labels, N_T, inverse_temperature=1 / temperature)
    torch.testing.assert_close(estimator.sums.double(), sums, rtol=tolerance, atol=1e-30)
    assert torch.equal(estimator.counts, counts)


def state_of(estimator: RelationshipEstimator) -> tuple[bytes, bytes]:
    """The state's bytes, to compare bit for bit."""
    return estimator.sums.numpy().tobytes(), estimator.counts.numpy().tobytes()


# -------------------------------------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.37, 5.0])
def test_sums_are_those_of_the_reference(
    backend: Backend, dtype: torch.dtype, temperature: float, draw: torch.Generator
) -> None:
    logits, labels = random_batch(draw, 200, dtype)
    estimator = estimator_of((logits, labels), temperature=temperature, backend=backend.argument)
    check_against_reference(estimator, logits, labels, 1e-5, temperature)


def test_float64_sums_have_float64_precision(backend: Backend, draw: torch.Generator) -> None:
    logits, labels = random_batch(draw, 300, torch.float64)
    estimator = estimator_of((logits, labels), dtype=torch.float64, backend=backend.argument)
    assert estimator.sums.dtype == torch.float64
    check_against_reference(estimator, logits, labels, 1e-12)
    with pytest.raises(AssertionError):  # float32 would fail
        check_against_reference(estimator_of((logits, labels), backend=backend.argument), logits, labels, 1e-12)


@pytest.mark.parametrize(
    "broken",
    [
        lambda logits, labels: estimator_of((logits, labels), temperature=1 / 1.7),
        lambda logits, labels: estimator_of((logits, labels)),
        lambda logits, labels: estimator_of((logits, labels.clamp(min=0)), temperature=1.7),
        lambda logits, labels: estimator_of((logits[:-1], labels[:-1]), temperature=1.7),
        lambda logits, labels: estimator_of((logits.roll(1, 0), labels), temperature=1.7),
    ],
    ids=["multiplies by the temperature", "forgets it", "counts ignored rows", "loses a row", "takes another row"],
)
def test_the_check_against_the_reference_catches_a_wrong_estimator(
    broken: Callable[[Tensor, Tensor], RelationshipEstimator], draw: torch.Generator
) -> None:
    logits, _ = random_batch(draw, 60)
    labels = torch.arange(60) % N_T
    labels[0] = -100
    check_against_reference(estimator_of((logits, labels), temperature=1.7), logits, labels, 1e-5, 1.7)
    wrong = broken(logits, labels)
    with pytest.raises(AssertionError):
        check_against_reference(wrong, logits, labels, 1e-5, 1.7)


@pytest.mark.parametrize("layout", ["transposed", "strided rows", "strided columns", "expanded", "one column"])
def test_any_layout_of_the_logits(backend: Backend, layout: str, draw: torch.Generator) -> None:
    rows, columns = 24, 1 if layout == "one column" else 9
    dense = torch.randn(rows, columns, generator=draw)
    labels = torch.randint(0, 3, (rows,), generator=draw, dtype=torch.int32)
    if layout == "transposed":
        logits = dense.t().contiguous().t()
    elif layout == "strided rows":
        logits = torch.randn(rows, 3 * columns, generator=draw)[:, columns : 2 * columns].copy_(dense)
    elif layout == "strided columns":
        logits = torch.randn(rows, 2 * columns, generator=draw)[:, ::2].copy_(dense)
    elif layout == "expanded":
        logits = dense[:1].expand(rows, columns)
    else:
        logits = dense[:, 0].repeat(2, 1).t()[:, :1]
    estimator = RelationshipEstimator(3, columns, backend=backend.argument)
    estimator.update(logits, labels)
    sums, counts = reference.softmax_class_sums(logits.double(), labels, 3)
    torch.testing.assert_close(estimator.sums.double(), sums, rtol=1e-5, atol=1e-12)
    assert torch.equal(estimator.counts, counts)


batches = st.lists(st.integers(0, 40), min_size=1, max_size=6)
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=40)
@given(sizes=batches, seed=seeds, spread=st.floats(0.01, 200))
def test_any_split_into_batches_gives_the_same_relationship(sizes: list[int], seed: int, spread: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, labels = random_batch(draw, sum(sizes) + 1)
    logits, labels[0] = logits * spread, 0
    whole = estimator_of((logits, labels))
    parts = estimator_of(*zip(logits.split([*sizes, 1]), labels.split([*sizes, 1]), strict=True))
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-5, atol=1e-30)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 60), seed=seeds)
def test_the_order_of_rows_does_not_matter(rows: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, labels = random_batch(draw, rows)
    order = torch.randperm(rows, generator=draw)
    one, other = estimator_of((logits, labels)), estimator_of((logits[order], labels[order]))
    assert torch.equal(one.counts, other.counts)
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-5, atol=1e-30)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 60), seed=seeds, spread=st.floats(1e-3, 1e4), temperature=st.floats(0.01, 100),
    dtype=st.sampled_from(DTYPES), empty=st.sampled_from(["unsupervised", "uniform"]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:no sample of")
def test_rows_sum_to_one_or_have_no_supervision(
    rows: int, seed: int, spread: float, temperature: float, dtype: torch.dtype, empty: str
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, labels = random_batch(draw, rows)
    logits, labels[0] = (logits * spread).clamp(-6e4, 6e4).to(dtype), 0
    result = estimator_of((logits, labels), temperature=temperature).compute(empty=empty)
    sums = result.matrix.double().sum(1)
    expected = torch.ones(N_T) if empty == "uniform" else (result.counts > 0).double()
    torch.testing.assert_close(sums, expected.double(), rtol=0, atol=1e-6)
    assert bool((result.matrix >= 0).all())
    assert torch.equal(result.supervised, expected > 0)


def test_merging_is_as_if_all_batches_had_been_one_estimators(draw: torch.Generator) -> None:
    first, second = random_batch(draw, 50), random_batch(draw, 31)
    one, other, both = estimator_of(first), estimator_of(second), estimator_of(first, second)
    reversed_merge = estimator_of(second)
    reversed_merge.merge(one)
    one.merge(other)
    assert state_of(one) == state_of(reversed_merge)  # adding two numbers commutes exactly
    torch.testing.assert_close(one.sums, both.sums, rtol=1e-6, atol=1e-30)
    assert torch.equal(one.counts, both.counts)
    into_double = estimator_of(first, dtype=torch.float64)
    into_double.merge(other)
    assert into_double.sums.dtype == torch.float64
    torch.testing.assert_close(into_double.sums.float(), both.sums, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (RelationshipEstimator(N_T, N_S, temperature=2.0), ValueError),
        (RelationshipEstimator(N_T, N_S + 1), ValueError),
        (RelationshipEstimator(N_T + 1, N_S), ValueError),
        ({"sums": torch.ones(N_T, N_S)}, TypeError),
    ],
    ids=["temperature", "source classes", "target classes", "type"],
)
def test_merging_what_does_not_fit_is_refused(other: Any, error: type[Exception], draw: torch.Generator) -> None:
    estimator = estimator_of(random_batch(draw, 10))
    before = state_of(estimator)
    with pytest.raises(error, match=r"other is a dict|temperature must be the same"):
        estimator.merge(other)
    assert state_of(estimator) == before


@pytest.mark.parametrize("large", [False, True], ids=["small batch", "large batch"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "counted before"])
@pytest.mark.parametrize("fault", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_is_named_and_leaves_the_state_as_it_was(
    backend: Backend, dtype: torch.dtype, fault: str, fresh: bool, large: bool, draw: torch.Generator
) -> None:
    estimator = estimator_of(*[] if fresh else [random_batch(draw, 9, dtype)], backend=backend.argument)
    before = state_of(estimator)
    rows = 4 * N_T + 3 if large else N_T - 1
    logits, labels = random_batch(draw, rows, dtype)
    labels[:] = torch.arange(rows) % N_T
    bad = int(torch.randint(1, rows, (), generator=draw))
    column = int(torch.randint(0, N_S, (), generator=draw))
    if fault == "all -inf":
        logits[bad] = -math.inf
    else:
        logits[bad, column] = float(fault)
    ignored = logits.clone()
    with pytest.raises(ValueError, match=rf"source_logits\[{bad}\] has no softmax"):
        estimator.update(logits, labels)
    assert state_of(estimator) == before

    labels[bad] = -100  # the same row, now ignored
    estimator.update(ignored, labels)
    assert bool(torch.isfinite(estimator.sums).all())
    assert int(estimator.counts.sum()) == (0 if fresh else int(state_counts(before).sum())) + rows - 1


def state_counts(state: tuple[bytes, bytes]) -> Tensor:
    return torch.frombuffer(bytearray(state[1]), dtype=torch.int64)


@pytest.mark.parametrize("check", ["of the kernel", "of the batch", "of the sums"])
def test_the_test_of_bad_rows_can_fail(check: str, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, NaN reaches the sums."""
    by_kernel, large = check == "of the kernel", check == "of the sums"
    if by_kernel and (reason := backends.missing_reason("cpp")):
        pytest.skip(reason)
    estimator = estimator_of(random_batch(draw, 9), backend="cpp" if by_kernel else "reference")
    before = state_of(estimator)
    logits, labels = random_batch(draw, 100 if large else N_T - 1)
    logits[3, 3], labels[3] = math.nan, 1
    if by_kernel:
        add = estimator_module.add_to_class_sums_
        monkeypatch.setattr(estimator_module, "add_to_class_sums_", lambda *arguments: min(add(*arguments), -1))
    elif large:
        monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
    else:
        monkeypatch.setattr(estimator_module, "first_row_without_softmax", lambda *arguments: None)
    estimator.update(logits, labels)
    assert state_of(estimator) != before
    assert bool(estimator.sums[1].isnan().all())


def test_masked_classes_and_overflowing_sums_are_not_bad_rows(draw: torch.Generator) -> None:
    logits = torch.full((4, N_S), 6e4, dtype=torch.float16)  # their sum overflows float16
    logits[1, 5:] = -math.inf
    labels = torch.tensor([0, 1, 1, 4])
    check_against_reference(estimator_of((logits, labels)), logits, labels, 1e-5)


@pytest.mark.parametrize("value", [-1, N_T, 2**40, -101])
def test_a_label_out_of_range_names_row_and_value(backend: Backend, value: int, draw: torch.Generator) -> None:
    estimator = estimator_of(random_batch(draw, 9), backend=backend.argument)
    before = state_of(estimator)
    logits, labels = random_batch(draw, 12)
    labels[7] = value
    with pytest.raises(IndexError, match=rf"labels\[7\] is {value}, expected a class index in \[0, {N_T}\)"):
        estimator.update(logits, labels)
    assert state_of(estimator) == before


def test_another_ignore_index_even_one_that_is_a_class(draw: torch.Generator) -> None:
    logits, _ = random_batch(draw, 10)
    labels = torch.arange(10) % N_T
    estimator = estimator_of((logits, labels), ignore_index=2)
    assert estimator.counts.tolist() == [2, 2, 0, 2, 2]
    with pytest.raises(IndexError, match=r"labels\[0\] is -100"):
        estimator.update(logits, torch.full((10,), -100))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[1.0] * N_S], torch.tensor([0]), TypeError, "source_logits is a list"),
        (torch.ones(N_S), torch.tensor([0]), ValueError, r"labels has shape \(1,\), expected \(\)"),
        (torch.ones(2, 3, N_S), torch.zeros(2, 3).long(), ValueError, r"source_logits.flatten\(0, -2\)"),
        (torch.ones(2, N_S).int(), torch.tensor([0, 1]), TypeError, "dtype torch.int32"),
        (torch.ones(2, N_S + 1), torch.tensor([0, 1]), ValueError, f"has {N_S + 1} classes.*made for {N_S}"),
        (torch.ones(2, 0), torch.tensor([0, 1]), ValueError, r"\(2, 0\)"),
        (torch.ones(2, N_S), [0, 1], TypeError, "labels is a list"),
        (torch.ones(2, N_S), torch.tensor([0.0, 1.0]), TypeError, r"labels.long\(\)"),
        (torch.ones(2, N_S), torch.tensor([True, False]), TypeError, r"labels.long\(\)"),
        (torch.ones(2, N_S), torch.tensor([0]), ValueError, r"labels has shape \(1,\), expected \(2,\)"),
        (torch.ones(2, N_S), torch.zeros(2, 1).long(), ValueError, r"labels has shape \(2, 1\)"),
        (torch.ones(2, N_S, device="meta"), torch.tensor([0, 1]), ValueError, "source_logits is on meta"),
    ],
)
def test_bad_batches(logits: Any, labels: Any, error: type[Exception], message: str) -> None:
    estimator = RelationshipEstimator(N_T, N_S)
    with pytest.raises(error, match=message):
        estimator.update(logits, labels)
    assert not estimator.counts.any()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, "num_target_classes is 0"),
        ((3, -1), {}, ValueError, "num_source_classes is -1"),
        ((3.0, 3), {}, ValueError, "num_target_classes is 3.0"),
        ((True, 2), {}, ValueError, "num_target_classes is True, expected a positive int"),
        ((3, 3), {"temperature": 1e-39}, ValueError, "temperature is 1e-39, expected at least 2.939e-39: its inverse"),
        ((3, 3), {"temperature": 5e-324}, ValueError, "its inverse is not finite"),
        ((3, 3), {"temperature": 10**400}, ValueError, "temperature is 1000.*, expected a positive finite number"),
        ((3, 3), {"temperature": 10**5000}, ValueError, "temperature is an int too long to be shown, expected"),
        ((3, 3), {"temperature": 0}, ValueError, "temperature is 0"),
        ((3, 3), {"temperature": math.nan}, ValueError, "temperature is nan"),
        ((3, 3), {"temperature": "warm"}, ValueError, "temperature is 'warm'"),
        ((3, 3), {"dtype": torch.float16}, TypeError, "dtype is torch.float16"),
        ((3, 3), {"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RelationshipEstimator(*arguments, **options)


def test_the_lowest_temperature_gives_no_nan(backend: Backend) -> None:
    estimator = RelationshipEstimator(1, 3, temperature=2.94e-39, backend=backend.argument)
    estimator.update(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
    assert estimator.sums.tolist() == [[1.0, 0.0, 0.0]]


def test_an_empty_batch_counts_nothing(backend: Backend) -> None:
    estimator = RelationshipEstimator(N_T, N_S, backend=backend.argument)
    estimator.update(torch.empty(0, N_S), torch.empty(0, dtype=torch.int64))
    assert not estimator.counts.any()
    assert not estimator.sums.any()


class LargestResult(TorchDispatchMode):
    """Records the most elements in any new tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("rows", [N_T, 4000], ids=["checked before", "undone after"])
def test_no_temporary_of_the_size_of_the_logits(rows: int, draw: torch.Generator) -> None:
    if "cpp" not in backends.available("cpu"):
        pytest.skip(f"needs the C++ kernel: {backends.missing_reason('cpp')}")
    columns = 3000
    logits = torch.randn(rows, columns, generator=draw)
    labels = torch.randint(0, N_T, (rows,), generator=draw)
    largest = {}
    for name in ("cpp", "reference"):
        estimator = RelationshipEstimator(N_T, columns, backend=name)
        estimator.update(logits, labels)
        with LargestResult() as mode:
            estimator.update(logits, labels)
        largest[name] = mode.largest
    assert largest["cpp"] <= N_T * columns  # the copy of the sums that the undo needs
    assert largest["reference"] >= logits.numel()  # this test does detect such a temporary


def test_logits_that_require_grad_leave_no_graph(draw: torch.Generator) -> None:
    logits, labels = random_batch(draw, 20)
    estimator = estimator_of((logits.requires_grad_(), labels))
    assert not estimator.sums.requires_grad
    assert not estimator.compute(empty="uniform").matrix.requires_grad


def test_inference_mode_leaves_ordinary_tensors(draw: torch.Generator) -> None:
    logits, labels = random_batch(draw, 40)
    with torch.inference_mode():
        estimator = RelationshipEstimator(N_T, N_S)
        estimator.update(logits.clone(), labels.clone())
        inside = estimator.compute(empty="uniform")
        given = Relationship(torch.softmax(torch.randn(2, 3), 1))
    estimator.update(logits, labels)
    for matrix in (inside.matrix, given.matrix, estimator.compute(empty="uniform").matrix):
        assert not matrix.is_inference()
        (matrix * torch.ones(1, requires_grad=True)).sum().backward()  # fails for an inference tensor
    with torch.inference_mode():
        spoiled = torch.softmax(torch.randn(2, 3), 1)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        (spoiled * torch.ones(1, requires_grad=True)).sum().backward()


def test_learning_goes_on_after_an_interruption(draw: torch.Generator) -> None:
    first, second = random_batch(draw, 30), random_batch(draw, 30)
    estimator = estimator_of(first, temperature=1.3)
    saved = estimator.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    estimator.update(*second)
    assert saved["counts"].sum() < estimator.counts.sum()  # the saved state does not change
    file.seek(0)
    resumed = RelationshipEstimator(N_T, N_S, temperature=1.3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.update(*second)
    assert state_of(resumed) == state_of(estimator)


def test_an_estimator_takes_the_number_of_source_classes_from_its_first_batch(draw: torch.Generator) -> None:
    first, second = random_batch(draw, 40), random_batch(draw, 9)
    expected = estimator_of(first, second)
    for device in ("cpu", None):
        sized = RelationshipEstimator(N_T, device=device)
        assert sized.num_source_classes is None
        with pytest.raises(ValueError, match="nothing was counted"):
            sized.compute()
        sized.merge(RelationshipEstimator(N_T))  # an empty estimator
        sized.update(*first)
        assert sized.num_source_classes == N_S
        with pytest.raises(ValueError, match=f"has {N_S - 1} classes, but the estimator was made for {N_S}"):
            sized.update(second[0][:, 1:], second[1])
        sized.update(*second)
        assert state_of(sized) == state_of(expected)
        merged, loaded = RelationshipEstimator(N_T, device=device), RelationshipEstimator(N_T, device=device)
        merged.merge(sized)
        loaded.load_state_dict(sized.state_dict())
        assert state_of(merged) == state_of(loaded) == state_of(expected)
        assert torch.equal(loaded.compute().matrix, expected.compute().matrix)
    with pytest.raises(ValueError, match="cannot be merged"):
        RelationshipEstimator(N_T + 1).merge(expected)
    with pytest.raises(ValueError, match=r"state\['sums'\] is \(6, 37\), expected a Tensor of shape \(5, 37\)"):
        RelationshipEstimator(N_T).load_state_dict(RelationshipEstimator(N_T + 1, N_S).state_dict())


def test_an_estimator_without_a_device_follows_the_batches(draw: torch.Generator) -> None:
    logits, labels = random_batch(draw, 4)
    estimator = RelationshipEstimator(N_T, device=None, backend="reference")
    estimator.update(logits, labels)
    estimator._counted = estimator._copy(
        N_S, torch.device("meta")
    )  # stands in for a state that a checkpoint left on another device
    assert estimator.device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):
        estimator.update(logits, labels)
    with pytest.raises(ValueError, match="source_logits is on cpu, but the estimator on meta"):
        RelationshipEstimator(N_T, N_S, device="meta", backend="reference").update(logits, labels)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_the_order_of_merges_moves_little(dtype: torch.dtype, tolerance: float, draw: torch.Generator) -> None:
    parts = []
    for _ in range(20):
        parts.append(RelationshipEstimator(N_T, N_S, dtype=dtype))
        parts[-1].update(*random_batch(draw, 200))
    matrices = []
    for _ in range(10):
        merged = RelationshipEstimator(N_T, N_S, dtype=dtype)
        for index in torch.randperm(20, generator=draw).tolist():
            merged.merge(parts[index])
        matrices.append(merged.compute().matrix)
    stacked = torch.stack(matrices)
    assert 0 < float(((stacked.amax(0) - stacked.amin(0)) / stacked.amax(0)).max()) < tolerance


def test_sums_of_all_processes_are_not_merged_with_those_of_one(draw: torch.Generator) -> None:
    """A second all_reduce would silently count them again."""
    mine, reduced = estimator_of(random_batch(draw, 10)), estimator_of(random_batch(draw, 10))
    reduced._counted = reduced._counted._replace(all_reduced=True)  # as after all_reduce
    before = state_of(mine)
    with pytest.raises(ValueError, match="merge them before all_reduce"):
        mine.merge(reduced)
    assert state_of(mine) == before
    fresh = RelationshipEstimator(N_T, N_S)
    fresh.merge(reduced)
    assert state_of(fresh) == state_of(reduced)
    with pytest.raises(RuntimeError, match="already holds the sums of all processes"):
        fresh.all_reduce()
    with pytest.raises(RuntimeError, match=r"not have what this one adds now\. Count everything before all_reduce"):
        fresh.update(*random_batch(draw, 10))
    assert state_of(fresh) == state_of(reduced)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("counts"), "with keys"),
        (lambda s: s.update(extra=1), "with keys"),
        (lambda s: s.update(sums=torch.ones(N_T, N_S + 1)), r"state\['sums'\] is \(5, 38\)"),
        (lambda s: s.update(sums=[1.0]), r"state\['sums'\] is list"),
        (lambda s: s["sums"].fill_(math.nan), "damaged"),
        (lambda s: s["counts"].fill_(-1), "damaged"),
        (lambda s: s.update(counts=s["counts"] * 0.5), r"state\['counts'\] is torch\.float32"),
        (lambda s: s.update(temperature=2.0), "temperature 2.0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, draw: torch.Generator
) -> None:
    estimator = estimator_of(random_batch(draw, 10))
    before, state = state_of(estimator), estimator_of(random_batch(draw, 20)).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        estimator.load_state_dict(state)
    assert state_of(estimator) == before
    with pytest.raises(ValueError, match="state is a list"):
        estimator.load_state_dict([1])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- classes without data


def with_classes_missing() -> RelationshipEstimator:
    return estimator_of((torch.randn(6, N_S), torch.tensor([0, 0, 2, 2, 2, 4])))


def test_unsupervised_is_the_default_and_warns_by_name() -> None:
    names = ["cat", "dog", "emu", "fox", "gnu"]
    with pytest.warns(UserWarning, match=r"no sample of 2 of 5 target classes: 'dog', 'fox'"):
        result = with_classes_missing().compute(target_classes=names)
    assert result.supervised.tolist() == [True, False, True, False, True]
    assert result.counts is not None
    assert result.counts.tolist() == [2, 0, 3, 0, 1]
    with pytest.warns(UserWarning, match=r"target classes: 1, 3;"):
        with_classes_missing().compute()


def test_uniform_and_error(recwarn: pytest.WarningsRecorder) -> None:
    matrix = with_classes_missing().compute(empty="uniform").matrix
    assert torch.equal(matrix[[1, 3]], torch.full((2, N_S), 1 / N_S))
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"target classes: 1, 3; add data"):
        with_classes_missing().compute(empty="error")
    with pytest.raises(ValueError, match="empty is 'zero', expected one of 'unsupervised'"):
        with_classes_missing().compute(empty="zero")


def test_many_missing_classes_are_listed_in_short() -> None:
    estimator = RelationshipEstimator(100, 4)
    estimator.update(torch.randn(1, 4), torch.tensor([0]))
    with pytest.warns(UserWarning, match=r"99 of 100 target classes: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 89 more;"):
        estimator.compute()


@pytest.mark.parametrize("empty", ["unsupervised", "uniform", "error"])
def test_nothing_counted_is_an_error(empty: str) -> None:
    with pytest.raises(ValueError, match="nothing was counted"):
        estimator_of((torch.randn(3, N_S), torch.full((3,), -100))).compute(empty=empty)


# ---------------------------------------------------------------------------------------------------- several processes

_TWO_PROCESSES = """
import json, os, sys, torch
from torch import distributed
from cotuning_kernels.relationship import RelationshipEstimator
torch.set_num_threads(1)
folder = sys.argv[1]
parent = os.getpid()
children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        logits, labels = torch.load(f"{folder}/data.pt")
        report = {}
        estimator = RelationshipEstimator(5, 37)
        estimator.update(logits[rank::2], labels[rank::2])
        estimator.all_reduce()
        torch.save((estimator.sums, estimator.counts), f"{folder}/{rank}.pt")
        try:
            estimator.all_reduce()
        except RuntimeError as error:
            report["twice"] = str(error)
        try:
            RelationshipEstimator(5 + rank, 37).all_reduce()
        except ValueError as error:
            report["different"] = str(error)
        json.dump(report, open(f"{folder}/{rank}.json", "w"))
        distributed.destroy_process_group()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_learn_what_one_would(tmp_path: Path, draw: torch.Generator) -> None:
    logits, labels = random_batch(draw, 101)
    torch.save((logits, labels), tmp_path / "data.pt")
    done = run_script(_TWO_PROCESSES, str(tmp_path))
    assert done.returncode == 0, done.stderr
    one = estimator_of((logits, labels))
    half = estimator_of((logits[::2], labels[::2]))
    for rank in range(2):
        sums, counts = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(sums, one.sums, rtol=1e-5, atol=1e-30)
        assert torch.equal(counts, one.counts)
        assert not torch.equal(counts, half.counts)  # the result without the sum
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "already holds the sums of all processes" in report["twice"]
        assert "(5, 37, 1.0, 'torch.float32'), (6, 37, 1.0, 'torch.float32')" in report["different"]


def test_without_torch_distributed(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = estimator_of(random_batch(draw, 20))
    before = state_of(estimator)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    estimator.all_reduce()
    assert state_of(estimator) == before
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 4.*init_process_group"):
        estimator.all_reduce()


# --------------------------------------------------------------------------------------------------- learn_relationship


class Images(Dataset[tuple[Tensor, int]]):
    """Three classes of feature vectors, with names."""

    classes = ("ant", "bee", "cow")

    def __init__(self, rows: int, draw: torch.Generator) -> None:
        self.features = torch.randn(rows, 6, generator=draw)
        self.labels = torch.randint(0, 3, (rows,), generator=draw)
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.fetched += 1
        return self.features[index], int(self.labels[index])


def source_model() -> nn.Sequential:
    """Has BatchNorm and dropout, which behave differently in training mode, and some frozen submodules."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 11))
    model[1].running_mean.normal_()
    model.train()
    model[1].eval()
    return model


def expected_matrix(model: nn.Module, data: Images, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        p = torch.softmax(model.eval()(data.features).double() / temperature, 1)
    return torch.stack([p[data.labels == t].mean(0) for t in range(3)])


def test_learning_from_a_model_and_a_loader(backend: Backend, draw: torch.Generator) -> None:
    data, model = Images(70, draw), source_model()
    modes = [module.training for module in model.modules()]
    source_names = [f"s{i}" for i in range(11)]
    result = learn_relationship(
        model, DataLoader(data, batch_size=16, shuffle=True), temperature=1.6, source_classes=source_names,
        progress=False, backend=backend.argument,
    )  # fmt: skip
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(result.matrix.double(), expected_matrix(model, data, 1.6), rtol=1e-5, atol=1e-9)
    assert result.target_classes == ("ant", "bee", "cow")
    assert result.source_classes == tuple(source_names)
    assert (result.method, result.temperature, result.metadata) == ("direct", 1.6, {"source_model": "Sequential"})
    assert result.counts is not None
    assert result.counts.tolist() == data.labels.bincount(minlength=3).tolist()


def test_the_test_of_learning_sees_a_model_left_in_training_mode(
    draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = Images(70, draw), source_model()
    monkeypatch.setattr(nn.Module, "eval", lambda self: self)
    wrong = learn_relationship(model, DataLoader(data, batch_size=16), progress=False)
    monkeypatch.undo()
    assert not torch.allclose(wrong.matrix.double(), expected_matrix(model, data), rtol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "loss": None},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: (logits, "hidden states"),
        lambda logits: [logits],
    ],
    ids=["dict", "attribute", "tuple", "list"],
)
def test_what_a_model_may_give(wrap: Callable[[Tensor], Any], draw: torch.Generator) -> None:
    data, model = Images(30, draw), source_model().eval()
    loader = DataLoader(data, batch_size=8)
    result = learn_relationship(lambda x: wrap(model(x)), loader, progress=False)
    torch.testing.assert_close(result.matrix.double(), expected_matrix(model, data), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: {"features": x}, r"batch 0 of the loader: the source model gave dict with keys \['features'\]"),
        (lambda x: x[:, :, None], r"gave a Tensor of shape \(8, 6, 1\)"),
        (lambda x: None, "gave NoneType"),
        (lambda x: (), "gave tuple"),
        (lambda x: x.numpy(), "gave ndarray"),
    ],
)
def test_what_a_model_may_not_give(output: Callable[[Tensor], Any], message: str, draw: torch.Generator) -> None:
    with pytest.raises(TypeError, match=message):
        learn_relationship(output, DataLoader(Images(30, draw), batch_size=8), progress=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(4, 6), "batch 1 of the loader is a Tensor, expected"),
        ((torch.ones(4, 6),), "is a tuple of 1"),
        ((torch.ones(4, 6), "paths", torch.zeros(4).long()), r"is \(Tensor, str\)"),
        ({"pixels": torch.ones(4, 6)}, "is a dict of 1"),
        (("paths", torch.zeros(4).long()), r"is \(str, Tensor\)"),
        ((torch.ones(4, 6), [0, 1, 2, 0]), r"is \(Tensor, list\)"),
        ((torch.ones(6), 2), r"is \(Tensor, int\).* one by one, pass torch.utils.data.DataLoader"),
        ((torch.ones(6), torch.tensor(2)), "has a single label, .* one by one, pass torch.utils.data.DataLoader"),
        ((torch.ones(4, 6), torch.zeros(4)), "batch 1 of the loader: labels has dtype torch.float32"),
        ((torch.ones(4, 6), torch.zeros(3).long()), "batch 1 of the loader: labels has shape"),
        ((torch.ones(4, 6), torch.tensor([0, 3, 0, 0])), r"batch 1 of the loader: labels\[1\] is 3"),
        ((torch.full((4, 6), math.nan), torch.zeros(4).long()), r"batch 1 of the loader: source_logits\[0\] has no"),
    ],
)
def test_what_a_loader_may_not_give(batch: Any, message: str) -> None:
    model = source_model()
    modes = [module.training for module in model.modules()]
    good = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        learn_relationship(model, [good, batch], 3, progress=False)
    assert [module.training for module in model.modules()] == modes


def test_a_classifier_that_ends_in_a_softmax(draw: torch.Generator) -> None:
    """The softmax of probabilities is nearly uniform, so the relationship would not look wrong."""
    data, model = Images(30, draw), source_model().eval()
    loader = DataLoader(data, batch_size=8)
    with pytest.warns(UserWarning, match="probabilities do, and logits are expected; leave out the model's softmax"):
        learn_relationship(nn.Sequential(model, nn.Softmax(1)), loader, progress=False)
    # Log-probabilities are logits. Values outside [0, 1], sums other than 1, and a single class may be logits.
    change = torch.zeros(11)
    change[:2] = torch.tensor([1.0, -1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_relationship(nn.Sequential(model, nn.LogSoftmax(1)), loader, progress=False)
        learn_relationship(lambda x: model(x).softmax(1) + 0.1, loader, progress=False)
        learn_relationship(lambda x: model(x).softmax(1) + change, loader, progress=False)
        learn_relationship(lambda x: x.new_ones(len(x), 1), loader, progress=False)


def test_logits_of_tokens(draw: torch.Generator) -> None:
    """Each token has a label; a loader's batch is ``(B, T)``, the logits ``(B, T, N_s)``."""
    model = nn.Linear(8, 11)
    tokens = torch.randn(6, 4, 8, generator=draw)
    labels = torch.randint(-1, N_T, (6, 4), generator=draw)
    labels[labels < 0] = -100
    found = learn_relationship(model, [(tokens[:2], labels[:2]), (tokens[2:], labels[2:])], N_T, progress=False)
    expected = learn_relationship(model, [(tokens.flatten(0, 1), labels.flatten())], N_T, progress=False)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-5, atol=1e-8)
    with pytest.raises(TypeError, match="batch 0 of the loader: the source model gave a Tensor of shape"):
        learn_relationship(model, [(tokens, labels[:, :3])], N_T, progress=False)


def test_inputs_that_are_keyword_arguments(draw: torch.Generator) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 11)

        def forward(self, *, tokens: Tensor, scale: float) -> dict[str, Tensor]:
            return {"logits": scale * self.head(tokens)}

    data, model = Images(20, draw), Model()
    loader = [({"tokens": data.features, "scale": 2.0}, data.labels)]
    result = learn_relationship(model, loader, 3, progress=False)
    expected = expected_matrix(model.head, data, 0.5)
    torch.testing.assert_close(result.matrix.double(), expected, rtol=1e-5, atol=1e-9)


def test_the_number_of_classes_and_their_names(draw: torch.Generator) -> None:
    data, model = Images(60, draw), source_model()
    subset = DataLoader(Subset(data, list(range(50))), batch_size=50)
    assert learn_relationship(model, subset, progress=False).target_classes == Images.classes
    loader = DataLoader(data, batch_size=60)
    own = learn_relationship(model, loader, target_classes=["a", "b", "c"], progress=False)
    assert own.target_classes == ("a", "b", "c")
    with pytest.warns(UserWarning, match="no sample of 1 of 4 target classes: 3"):
        more = learn_relationship(model, loader, 4, progress=False)
    assert more.target_classes is None  # three names do not fit four classes
    unnamed = DataLoader(TensorDataset(data.features, data.labels), batch_size=60)
    with pytest.raises(ValueError, match="pass num_target_classes or target_classes"):
        learn_relationship(model, unnamed, progress=False)
    with pytest.raises(ValueError, match="target_classes has 2 names, expected 3"):
        learn_relationship(model, loader, 3, target_classes=["a", "b"], progress=False)
    with pytest.raises(ValueError, match=r"num_target_classes is a list, .*; pass names as target_classes"):
        learn_relationship(model, loader, ["a", "b", "c"], progress=False)  # type: ignore[arg-type]
    before = data.fetched
    with pytest.raises(ValueError, match="source_classes has 3 names, expected 11"):
        learn_relationship(model, DataLoader(data, batch_size=5), source_classes=list("abc"), progress=False)
    assert data.fetched == before + 5  # found at the first batch, not after an hour


def test_max_batches_fetches_no_more(draw: torch.Generator) -> None:
    data = Images(100, draw)
    data.labels[:] = torch.arange(100) % 3
    result = learn_relationship(source_model(), DataLoader(data, batch_size=10), max_batches=2, progress=False)
    assert result.counts is not None
    assert (int(result.counts.sum()), data.fetched) == (20, 20)
    with pytest.raises(ValueError, match="max_batches is 0"):
        learn_relationship(source_model(), DataLoader(data), max_batches=0)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """A dataset without a length."""

    classes = ("ant", "bee", "cow")

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.ones(6), 0), (torch.zeros(6), 1), (-torch.ones(6), 2)])


def test_the_progress_bar(
    draw: torch.Generator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Images(40, draw)
    learn_relationship(source_model(), DataLoader(data, batch_size=10))
    shown = capsys.readouterr().err
    assert "learning the relationship: 100%" in shown
    assert "4/4" in shown
    learn_relationship(source_model(), DataLoader(Stream(), batch_size=1))
    assert "3batch" in capsys.readouterr().err
    learn_relationship(source_model(), DataLoader(data, batch_size=10), progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    learn_relationship(source_model(), DataLoader(data, batch_size=10))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("loader", [[], iter(())], ids=["list", "used up"])
def test_an_empty_loader(loader: Any) -> None:
    with pytest.raises(ValueError, match="the loader gave no batch"):
        learn_relationship(source_model(), loader, 3, progress=False)


def test_methods_and_models_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="method is 'telepathy', expected one of 'direct'"):
        learn_relationship(source_model(), [], 3, method="telepathy")
    with pytest.raises(TypeError, match="source_model is a str"):
        learn_relationship("resnet50", [], 3)  # type: ignore[arg-type]


class CachesATable(nn.Module):
    """Keeps a table that its first forward pass makes, like models with rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, 6)
        return self.head(x * self.table)


def test_a_model_that_caches_can_be_trained_afterwards(draw: torch.Generator) -> None:
    data, model = Images(20, draw), CachesATable()
    learn_relationship(model, DataLoader(data, batch_size=20), progress=False)
    features = data.features.clone().requires_grad_()
    model(features).sum().backward()
    assert features.grad is not None

    spoiled = CachesATable()
    with torch.inference_mode():  # shows that this test can fail
        spoiled(data.features)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        spoiled(data.features.clone().requires_grad_()).sum().backward()


# ----------------------------------------------------------------------------------------------------------- the result


def named() -> Relationship:
    matrix = torch.tensor([[0.7, 0.1, 0.2, 0.0], [0.0, 0.5, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0], [0.25] * 4])
    return Relationship(
        matrix, ["cat", "dog", "O", "emu"], ["lynx", "wolf", "crane", "crane"], counts=torch.ones(4).long()
    )


def test_top_source_classes() -> None:
    result = named()
    assert [name for name, _ in result.top_source_classes("cat", 2)] == ["lynx", "crane"]
    assert result.top_source_classes(0) == [
        ("lynx", pytest.approx(0.7)), ("crane", pytest.approx(0.2)), ("wolf", pytest.approx(0.1))
    ]  # fmt: skip
    assert result.top_source_classes("O") == []
    assert len(result.top_source_classes("emu", 99)) == 4
    assert Relationship(result.matrix).top_source_classes(1, 1) == [(1, 0.5)]
    with pytest.raises(ValueError, match="no target class 'ca'; did you mean 'cat'"):
        result.top_source_classes("ca")
    with pytest.raises(ValueError, match="no names"):
        Relationship(result.matrix).top_source_classes("cat")
    with pytest.raises(IndexError, match=r"target class 4, expected an index in \[0, 4\)"):
        result.top_source_classes(4)
    with pytest.raises(IndexError, match="target class -1"):
        result.top_source_classes(-1)
    with pytest.raises(TypeError, match=r"target class 1\.7, expected a name or an index"):
        result.top_source_classes(1.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k is 0"):
        result.top_source_classes(0, 0)
    with pytest.raises(ValueError, match=r"'x' is ambiguous: classes \[0, 1\]"):
        Relationship(torch.eye(2), ["x", "x"]).top_source_classes("x")


def test_entropy_in_nats() -> None:
    expected = [-(0.7 * math.log(0.7) + 0.1 * math.log(0.1) + 0.2 * math.log(0.2)), 1.5 * math.log(2), 0.0, math.log(4)]
    assert named().entropy().tolist() == pytest.approx(expected, rel=1e-6)


def test_to_another_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        moved = named().to(dtype)
        assert moved.matrix.dtype == dtype
        assert moved.target_classes == ("cat", "dog", "O", "emu")
    assert named().to("cpu", torch.float64).matrix.dtype == torch.float64
    with pytest.raises(ValueError, match=r"torch\.int64"):
        named().to(torch.int64)


@pytest.mark.parametrize("classes", [2000, 30522])
def test_half_precision_of_a_wide_relationship_is_still_one(classes: int, draw: torch.Generator) -> None:
    wide = Relationship(torch.softmax(3 * torch.randn(4, classes, generator=draw), 1))
    for dtype in (torch.bfloat16, torch.float16):
        assert bool(wide.to(dtype).supervised.all())


def test_without_supervision() -> None:
    result = named()
    for classes in ("O", ["O"], 2, [2], {"O"}, np.int64(2), torch.tensor(2), torch.tensor([2]), np.array([2])):
        assert torch.equal(result.without_supervision(classes).matrix, result.matrix)
    changed = result.without_supervision(["cat", 3])
    assert changed.supervised.tolist() == [False, True, False, False]
    assert result.supervised.tolist() == [True, True, False, True]  # the original is unchanged
    assert changed.source_classes == result.source_classes
    with pytest.raises(ValueError, match="no target class 'B-PER'"):
        result.without_supervision("B-PER")
    for classes in (1.9, [1.9], None, True, [True, False, False, False], np.array([True, False, False, False])):
        with pytest.raises(TypeError, match="expected a name or an index"):
            result.without_supervision(classes)  # type: ignore[arg-type]
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(result.without_supervision(mask).matrix, changed.matrix)
    with pytest.raises(ValueError, match=r"classes is a mask of shape \(3,\), expected \(4,\)"):
        result.without_supervision(mask[:3])


def test_regrouped(draw: torch.Generator) -> None:
    matrix = torch.rand(3, 4, generator=draw).softmax(1)
    kinds = Relationship(matrix, ("PER", "LOC", "ORG"), counts=torch.tensor([5, 6, 7]), method="direct")
    tags = kinds.regrouped([None, "LOC", "LOC", 0], ["O", "B-LOC", "I-LOC", "PER"])
    assert torch.equal(tags.matrix, torch.stack([torch.zeros(4), matrix[1], matrix[1], matrix[0]]))
    assert tags.target_classes == ("O", "B-LOC", "I-LOC", "PER")
    assert tags.counts is not None
    assert tags.counts.tolist() == [0, 6, 6, 5]
    assert tags.method == "direct"
    assert kinds.regrouped([2]).target_classes is None
    with pytest.raises(ValueError, match="there is no target class 'LOK'; did you mean 'LOC'"):
        kinds.regrouped(["LOK"])
    with pytest.raises(IndexError, match="target class 3"):
        kinds.regrouped([3])
    with pytest.raises(ValueError, match="rows is empty"):
        kinds.regrouped([])
    with pytest.raises(ValueError, match="target_classes has 1 names, expected 2"):
        kinds.regrouped([0, None], ["one"])


def test_it_is_frozen_and_says_what_it_is() -> None:
    result = named()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.temperature = 2.0  # type: ignore[misc]
    assert repr(result) == (
        "Relationship(4 target classes x 4 source classes, method='given', temperature=1, torch.float32, cpu, "
        "1 without source supervision)"
    )
    assert (result.num_target_classes, result.num_source_classes) == (4, 4)


good = torch.full((2, 4), 0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"matrix": good.numpy()}, TypeError, "matrix is a ndarray.*torch.from_numpy"),
        ({"matrix": good[0]}, ValueError, r"shape \(4,\), expected \(N_t, N_s\)"),
        ({"matrix": good.long()}, ValueError, "torch.int64"),
        ({"matrix": torch.ones(0, 4)}, ValueError, r"\(0, 4\)"),
        ({"matrix": torch.tensor([[0.5, 0.5], [math.nan, 1.0]])}, ValueError, r"matrix\[1, 0\] is nan"),
        ({"matrix": torch.tensor([[0.5, 0.5], [math.inf, 1.0]])}, ValueError, r"matrix\[1, 0\] is inf"),
        ({"matrix": torch.tensor([[0.5, 0.5], [1.25, -0.25]])}, ValueError, r"matrix\[1, 1\] is -0.25"),
        ({"matrix": torch.tensor([[0.5, 0.5], [0.5, 0.49]])}, ValueError, r"matrix\[1\] sums to 0.99, expected 1"),
        ({"matrix": torch.eye(3)[:, :2] * 2}, ValueError, r"matrix\[0\] sums to 2"),
        ({"matrix": good, "target_classes": ["a"]}, ValueError, "target_classes has 1 names, expected 2"),
        ({"matrix": good, "source_classes": "abcd"}, TypeError, "source_classes is 'abcd', expected a sequence"),
        ({"matrix": good, "source_classes": 4}, TypeError, "source_classes is 4"),
        ({"matrix": good, "target_classes": [1, 2]}, TypeError, r"target_classes has 1.*map\(str"),
        ({"matrix": good, "method": "osmosis"}, ValueError, "method is 'osmosis'"),
        ({"matrix": good, "temperature": -1}, ValueError, "temperature is -1"),
        ({"matrix": good, "counts": torch.ones(3).long()}, ValueError, r"counts is torch.int64 \(3,\)"),
        ({"matrix": good, "counts": torch.ones(2)}, ValueError, "counts is torch.float32"),
        ({"matrix": good, "counts": [1, 2]}, ValueError, "counts is list"),
        ({"matrix": good, "counts": torch.tensor([1, -2])}, ValueError, "negative number of samples: -2"),
        ({"matrix": good, "metadata": {"epoch": 3}}, TypeError, "metadata is {'epoch': 3}"),
        ({"matrix": good, "metadata": [("a", "b")]}, TypeError, "metadata is"),
    ],
)
def test_what_is_not_a_relationship(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Relationship(**arguments)


# ---------------------------------------------------------------------------------------------------------- the picture


def blocks(draw: torch.Generator) -> tuple[Tensor, list[int]]:
    """Twelve rows of three kinds in random order; rows of a kind share their source classes."""
    kind = (torch.arange(12) % 3)[torch.randperm(12, generator=draw)]
    logits = torch.rand(12, 30, generator=draw)
    for row in range(12):
        logits[row, 10 * kind[row] : 10 * kind[row] + 4] += 4
    return torch.softmax(logits.double(), 1), kind.tolist()


def neighbours_of_one_kind(order: list[int], kind: list[int]) -> int:
    return sum(kind[a] == kind[b] for a, b in itertools.pairwise(order))


def test_similar_classes_stand_next_to_each_other(draw: torch.Generator) -> None:
    matrix, kind = blocks(draw)
    order = plots.similarity_order(matrix)
    assert sorted(order) == list(range(12))
    assert neighbours_of_one_kind(order, kind) == 9  # the maximum
    assert neighbours_of_one_kind(list(range(12)), [0, 1, 2] * 4) == 0  # an order that ignores similarity
    assert order[0] == 0
    matrix[4] = 0
    assert plots.similarity_order(matrix)[-1] == 4  # without supervision: last


@pytest.mark.parametrize("unsupervised", [0, 1, 12])
def test_the_columns_are_the_top_of_some_row(unsupervised: int, draw: torch.Generator, tmp_path: Path) -> None:
    matrix, _ = blocks(draw)
    matrix[:unsupervised] = 0
    result = Relationship(matrix, source_classes=[f"s{i}" for i in range(30)])
    figure = result.plot(tmp_path / "map.png", top_k=2)
    shown = {label.get_text() for label in figure.axes[0].get_xticklabels()}
    top = {str(name) for t in range(12) for name, _ in result.top_source_classes(t, 2)}
    assert shown == (top or {"s0", "s1"})
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert ("no source supervision" in texts) == (unsupervised > 0)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_rest_of_the_probability_is_shown() -> None:
    figure = named().plot(target_classes=["dog", "cat"], top_k=1)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["dog", "cat"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["wolf", "lynx"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["50", "10", "70"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["50%", "20%"]


def test_plots_of_unusual_sizes_and_names(tmp_path: Path, draw: torch.Generator) -> None:
    names = [r"$\frac{a}", "$", "a very long name of a class, with, commas, in it", "ünï"]
    Relationship(torch.eye(4), names, names).plot(tmp_path / "names.png")
    # A surrogate as os.listdir returns it for a Latin-1 folder, and another surrogate.
    names = [os.fsdecode(b"caf\xe9"), "\ud800"]
    figure = Relationship(torch.eye(2), names, names).plot(tmp_path / "names.png")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["caf\ufffd", "\ufffd"]
    Relationship(torch.ones(1, 1)).plot(tmp_path / "one.svg")
    wide = Relationship(torch.softmax(5 * torch.randn(90, 400, generator=draw), 1))
    figure = wide.plot(tmp_path / "wide.png", max_columns=25, title="Wide")
    assert len(figure.axes[0].get_xticklabels()) == 25
    for arguments in ({"target_classes": []}, {"top_k": 0}, {"max_columns": 0}):
        with pytest.raises(ValueError, match="nothing to plot"):
            wide.plot(**arguments)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'cotuning-kernels\[plot\]'"):
        named().plot()
