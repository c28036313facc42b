"""Relationships with few entries a row: made, changed, saved, checked; and what the entries cut off change."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cotuning_kernels as ck
from cotuning_kernels import functional
from cotuning_kernels.relationship.file import RelationshipFileError
from cotuning_kernels.sparse_rows import SparseRows


def relationship(draw: torch.Generator, rows: int = 6, columns: int = 50, **fields: Any) -> ck.Relationship:
    matrix = (3 * torch.randn(rows, columns, generator=draw)).softmax(1)
    matrix[2] = 0
    return ck.Relationship(matrix, **fields)


def test_it_keeps_the_fewest_entries_that_hold_the_mass(draw: torch.Generator) -> None:
    dense = relationship(draw)
    sparse = dense.sparsified(0.9)
    assert sparse.matrix.layout is torch.sparse_csr
    assert sparse.supervised.tolist() == dense.supervised.tolist() == [True, True, False, True, True, True]
    for t, (row, kept) in enumerate(zip(dense.matrix, sparse.matrix.to_dense(), strict=True)):
        count = int((kept > 0).sum())
        largest = row.sort(descending=True).values
        if t == 2:
            assert count == 0
            continue
        assert largest[:count].sum() >= 0.9 > largest[: count - 1].sum()
        assert kept[kept > 0].min() > 0
        assert torch.equal(kept > 0, row >= largest[count - 1])
        torch.testing.assert_close(kept.sum(), torch.ones(()))
        torch.testing.assert_close(kept / row.masked_fill(kept == 0, 1), kept.sign() / largest[:count].sum())


def test_arguments_of_sparsified(draw: torch.Generator) -> None:
    dense = relationship(draw)
    counts = (dense.sparsified(top=4).matrix.to_dense() > 0).sum(1)
    assert counts.tolist() == [4, 4, 0, 4, 4, 4]
    both = dense.sparsified(0.9, top=2, renormalize=False).matrix.to_dense()
    assert (both > 0).sum(1).max() == 2
    assert torch.equal(both, dense.matrix.where(both > 0, 0.0))
    torch.testing.assert_close(dense.sparsified(1.0).matrix.to_dense(), dense.matrix)
    torch.testing.assert_close(dense.sparsified(0.99).sparsified(0.9).matrix.to_dense() > 0,
                               dense.sparsified(0.9 * 0.99).matrix.to_dense() > 0)  # fmt: skip
    half = dense.to(torch.bfloat16).sparsified()
    assert half.matrix.dtype == torch.bfloat16
    for wrong in ({"mass": 0.0}, {"mass": 1.5}, {"mass": "all"}, {"top": 0}, {"top": 1.5}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            dense.sparsified(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_loss_changes_by_no_more_than_the_documented_bound(renormalize: bool, draw: torch.Generator) -> None:
    dense = relationship(draw, 9, 300)
    logits = 4 * torch.randn(64, 300, generator=draw, dtype=torch.float64)
    target = torch.randint(9, (64,), generator=draw)
    for mass in (0.5, 0.9, 0.999):
        sparse = dense.sparsified(mass, renormalize=renormalize)
        cut = dense.matrix.double().masked_fill(sparse.matrix.to_dense() > 0, 0)
        delta = cut.sum(1)[target]
        results = []
        for each in (dense, sparse):
            z = logits.clone().requires_grad_()
            loss = functional.source_label_loss(z, target, each, reduction="none")
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), z)))
        change, gradient = results[0][0] - results[1][0], (results[0][1] - results[1][1]).abs().sum(1)
        if renormalize:
            bound = delta * (logits.amax(1) - logits.amin(1))
        else:
            least = torch.where(cut[target] > 0, logits, math.inf).amin(1)
            bound = delta * (logits.logsumexp(1) - least).where(delta > 0, 0)
            assert (change >= -1e-6).all()
        assert (change.abs() <= bound + 1e-6).all()
        assert (gradient <= 2 * delta + 1e-6).all()
        assert change.abs().max() > 1e-7  # not the same relationship


def test_it_answers_as_the_dense_one(draw: torch.Generator) -> None:
    names = tuple("abcdef")
    sparse = relationship(draw, target_classes=names, counts=torch.arange(6)).sparsified(0.9)
    dense = sparse.dense()
    assert dense.matrix.layout is torch.strided
    assert sparse.top_source_classes("b", 9) == dense.top_source_classes("b", 9)
    torch.testing.assert_close(sparse.entropy(), dense.entropy())
    assert torch.equal(sparse.without_supervision(["a", 4]).matrix.to_dense(),
                       dense.without_supervision(["a", 4]).matrix)  # fmt: skip
    rows = ["c", None, "f", "f", 0]
    assert torch.equal(sparse.regrouped(rows).matrix.to_dense(), dense.regrouped(rows).matrix)
    assert torch.equal(sparse.to(torch.float64).matrix.to_dense(), dense.to(torch.float64).matrix)
    entries = len(sparse.matrix.values())
    assert repr(sparse).endswith(f"1 without source supervision, {entries} entries)")
    with torch.inference_mode():
        made = ck.Relationship(dense.matrix.to_sparse_csr())
    assert not made.matrix.values().is_inference()


@pytest.mark.parametrize("layout", ["coo", "csc", "uncoalesced"])
def test_other_layouts_become_rows(layout: str, draw: torch.Generator) -> None:
    dense = relationship(draw).sparsified(0.9).dense().matrix
    if layout == "csc":
        given = dense.to_sparse_csc()
    else:
        given = dense.to_sparse_coo()
        if layout == "uncoalesced":
            halves = given.values() / 2
            twice = torch.cat([given.indices(), given.indices()], 1), torch.cat([halves, halves])
            given = torch.sparse_coo_tensor(*twice, dense.shape, check_invariants=True)
    assert torch.equal(ck.FusedCoTuningLoss(given).relationship.to_dense(), dense)
    assert torch.equal(ck.Relationship(given).matrix.to_dense(), dense)


def test_saving_and_loading(tmp_path: Path, draw: torch.Generator) -> None:
    path = tmp_path / "sparse.safetensors"
    sparse = relationship(draw, target_classes=tuple("abcdef")).sparsified()
    sparse.save(path)
    loaded = ck.Relationship.load(path)
    assert loaded.matrix.layout is torch.sparse_csr
    assert torch.equal(loaded.matrix.to_dense(), sparse.matrix.to_dense())
    assert loaded.target_classes == sparse.target_classes
    assert loaded.matrix.shape == sparse.matrix.shape


def test_a_file_with_wrong_indices_is_refused(tmp_path: Path, draw: torch.Generator) -> None:
    path = tmp_path / "sparse.safetensors"
    sparse = relationship(draw).sparsified()
    sparse.matrix.col_indices()[0] = 2**40
    sparse.save(path)
    with pytest.raises(RelationshipFileError, match="no valid sparse_csr matrix"):
        ck.Relationship.load(path)


def test_the_module_keeps_it_in_buffers(draw: torch.Generator) -> None:
    sparse = relationship(draw).sparsified(0.9)
    criterion = ck.FusedCoTuningLoss(sparse, trade_off=1.7)
    assert set(criterion.state_dict()) == {
        "relationship_crow_indices", "relationship_col_indices", "relationship_values", "_extra_state"
    }  # fmt: skip
    logits = torch.randn(5, 50, generator=draw), torch.randn(5, 6, generator=draw)
    target = torch.tensor([0, 1, 2, 5, -100])
    expected = ck.FusedCoTuningLoss(sparse.dense(), trade_off=1.7)(*logits, target)
    for each in (criterion, copy.deepcopy(criterion), copy.copy(criterion)):
        torch.testing.assert_close(each(*logits, target), expected)
    other = ck.FusedCoTuningLoss(replace(sparse, matrix=sparse.matrix * 0.5))
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other(*logits, target), expected)
    half = copy.deepcopy(criterion).half()
    assert half.relationship.dtype == torch.float16
    torch.testing.assert_close(half(*logits, target), expected, rtol=1e-3, atol=1e-3)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*logits, target), expected)


def test_making_one_warns_of_nothing(draw: torch.Generator) -> None:
    """torch warns that compressed layouts are young: our users did not choose them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.FusedCoTuningLoss(relationship(draw).sparsified())


# ---------------------------------------------------------------------------------------------------------- bad input


def _csr(crow: list[int], columns: list[int], values: list[float] | Tensor, shape: tuple[int, int] = (2, 5)) -> Tensor:
    values = torch.as_tensor(values)
    return SparseRows(torch.tensor(crow), torch.tensor(columns), values, shape[1]).as_csr()


BAD = {
    "a column beyond the last": _csr([0, 2, 3], [1, 5, 0], [0.5, 0.5, 1.0]),
    "a negative column": _csr([0, 2, 3], [-1, 3, 0], [0.5, 0.5, 1.0]),
    "columns that descend": _csr([0, 2, 3], [3, 1, 0], [0.5, 0.5, 1.0]),
    "a column twice": _csr([0, 2, 3], [1, 1, 0], [0.5, 0.5, 1.0]),
    "offsets that descend": _csr([0, 3, 2], [1, 3, 0], [0.5, 0.5, 1.0]),
    "offsets beyond the entries": _csr([0, 2, 9], [1, 3, 0], [0.5, 0.5, 1.0]),
    "offsets that start late": _csr([1, 2, 3], [1, 3, 0], [0.5, 0.5, 1.0]),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_indices_are_refused(what: str) -> None:
    for make in (ck.FusedCoTuningLoss, ck.FusedLinearCoTuningLoss, ck.Relationship):
        with pytest.raises(ValueError, match=r"no valid sparse_csr matrix: .*sorts the columns"):
            make(BAD[what])


def test_wrong_values_are_refused() -> None:
    for value in (-0.5, math.nan, math.inf):
        for make, name in ((ck.FusedCoTuningLoss, "relationship"), (ck.Relationship, "matrix")):
            with pytest.raises(ValueError, match=rf"{name}\[1, 4\] is {value}, expected a probability"):
                make(_csr([0, 1, 3], [1, 0, 4], [1.0, 0.5, value]))
    with pytest.raises(ValueError, match=r"matrix\[1\] sums to 2, expected at most 1"):
        ck.Relationship(_csr([0, 1, 3], [1, 0, 4], [1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"relationship is torch\.int64"):
        ck.FusedCoTuningLoss(_csr([0, 1, 3], [1, 0, 4], torch.ones(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="relationship has 5 columns, but source_logits has 7 classes"):
        functional.source_label_loss(torch.zeros(2, 7), torch.tensor([0, 1]), _csr([0, 1, 2], [1, 0], [1.0, 1.0]))
    with pytest.raises(ValueError, match="relationship requires grad"):
        functional.source_label_loss(
            torch.zeros(2, 5), torch.tensor([0, 1]), _csr([0, 1, 2], [1, 0], torch.ones(2, requires_grad=True))
        )
