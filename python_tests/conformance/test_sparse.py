"""Sparse relationships: the conformance table on every backend, what ``sparsified`` cuts off, and bad indices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cotuning_kernels.sparse_rows import SparseRows
from support.backends import Backend, run_public, sampled_table
from support.cases import Case
from support.problems import FORMS, Outcome, Problem
from support.rule import Expectation, verify


def sparse(relationship: Tensor, index: torch.dtype = torch.int64) -> Tensor:
    """The matrix in compressed rows; entries of 0 are left out."""
    rows = SparseRows.of(relationship.to_sparse_csr())
    return rows._replace(crow_indices=rows.crow_indices.to(index), col_indices=rows.col_indices.to(index)).as_csr()


def run_sparse(problem: Problem, form: str, backend: str) -> Outcome:
    """The same call with the same relationship in compressed rows."""
    return run_public(replace(problem, relationship=sparse(problem.relationship)), form, backend)


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(case, backend, id=f"{case.name}-{backend.name}") for case, backend in sampled_table(run_sparse, 8)],
    indirect=["backend"],
)
def test_table(case: Case, backend: Backend, seed: int) -> None:
    for dtype in case.dtypes:
        problem = case.build(dtype, seed)
        for form in FORMS if dtype in backend.all_forms else FORMS[:1]:
            if form in backend.forms:
                verify(backend, problem, form, expectation=Expectation(problem, form))
