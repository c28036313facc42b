"""Relationships with few entries a row: a ``torch.sparse_csr`` matrix as the three tensors that the operations take.

An entry that is missing counts as 0: it adds nothing to the loss, whatever its logit is. A row without entries is a
target class without source supervision.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SparseRows", "largest_entries", "supervised_classes"]


class SparseRows(NamedTuple):
    """A matrix ``(N_t, N_s)`` in compressed rows.

    Row ``t`` has the entries ``k`` from ``crow_indices[t]`` to ``crow_indices[t + 1]``: ``values[k]`` in column
    ``col_indices[k]``. Columns ascend within a row. Indices are int64 or int32, both of one dtype.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    num_columns: int

    @classmethod
    def of(cls, matrix: Tensor) -> SparseRows:
        """The tensors of a sparse matrix of any layout, those of a ``sparse_csr`` one without a copy."""
        if matrix.layout is not torch.sparse_csr:
            with _without_beta_warning():
                matrix = (matrix.coalesce() if matrix.layout is torch.sparse_coo else matrix).to_sparse_csr()
        return cls(matrix.crow_indices(), matrix.col_indices(), matrix.values(), matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """``(N_t, N_s)``."""
        return self.crow_indices.shape[0] - 1, self.num_columns

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.values.dtype

    def as_csr(self) -> Tensor:
        """The same memory as a ``torch.sparse_csr`` tensor."""
        with _without_beta_warning():
            return torch.sparse_csr_tensor(
                self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=False
            )

    def check(self, name: str) -> None:
        """Read all indices and require a valid matrix: offsets and columns in range, columns that ascend in each row.

        Raises:
            ValueError: an index is wrong.
        """
        if self.values.is_meta:  # deferred initialisation: there are no values yet
            return
        try:
            with _without_beta_warning():
                torch.sparse_csr_tensor(
                    self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=True
                )
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{name} is no valid sparse_csr matrix: {str(error).splitlines()[0]}; "
                "torch.sparse_coo_tensor(...).coalesce().to_sparse_csr() sorts the columns and adds duplicates"
            ) from error

    def detach(self) -> SparseRows:
        """The same rows without gradient history."""
        return self._replace(values=self.values.detach())

    def to(self, *args: Any, **kwargs: Any) -> SparseRows:
        """The same rows on another device, or with values of another floating dtype, as :meth:`torch.Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        crow_indices, col_indices = (each.to(values.device) for each in self[:2])
        return SparseRows(crow_indices, col_indices, values, self.num_columns)

    def row_of_entries(self) -> Tensor:
        """``(entries,)`` int64: the row of each entry."""
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(self.crow_indices.diff().long(), output_size=self.values.shape[0])

    def sum_of_rows(self, entries: Tensor) -> Tensor:
        """The sums over each row of a number an entry, ``(N_t,)`` in the dtype of ``entries``."""
        return entries.new_zeros(self.shape[0]).index_add_(0, self.row_of_entries(), entries)

    def to_dense(self) -> Tensor:
        """The matrix with zeros for the missing entries."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put_((self.row_of_entries(), self.col_indices.long()), self.values)

    def take(self, rows: Tensor) -> SparseRows:
        """The rows of these indices; a negative index gives a row without entries. Waits for the device."""
        rows = rows.long()
        start, counts = self.crow_indices[:-1].long(), self.crow_indices.diff().long()
        if self.shape[0] == 0:
            raise IndexError("there is no row to take")
        counts = torch.where(rows < 0, 0, counts[rows.clamp(min=0)])
        ends = counts.cumsum(0)
        # Entry k of the result is entry k + shift of this matrix, with one shift a row.
        shift = (start[rows.clamp(min=0)] - (ends - counts)).repeat_interleave(counts)
        entries = torch.arange(shift.shape[0], device=self.device) + shift
        crow = torch.cat([ends.new_zeros(1), ends]).to(self.crow_indices.dtype)
        return SparseRows(crow, self.col_indices[entries], self.values[entries], self.num_columns)

    def multiplied_by(self, matrix: Tensor) -> Tensor:
        """``matrix @ self`` in the dtype of ``matrix``, ``(B, N_s)``."""
        rows, columns = self.row_of_entries(), self.col_indices.long()
        values = self.values.to(matrix.dtype)[:, None]
        product = matrix.new_zeros((self.num_columns, matrix.shape[0]))
        transposed = matrix.t().contiguous()
        # As many entries at a time as the product has columns: no temporary is larger than the product.
        for k in range(0, values.shape[0], self.num_columns):
            part = slice(k, k + self.num_columns)
            product.index_add_(0, columns[part], transposed[rows[part]] * values[part])
        return product.t().contiguous()


def supervised_classes(relationship: Tensor | SparseRows) -> Tensor:
    """``(N_t,)`` bool: the rows that have an entry other than 0."""
    if isinstance(relationship, SparseRows):
        return relationship.sum_of_rows((relationship.values != 0).to(torch.int64)) > 0
    supervised: Tensor = (relationship != 0).any(dim=1)
    return supervised


def largest_entries(matrix: Tensor | SparseRows, mass: float, top: int | None, renormalize: bool) -> SparseRows:
    """The largest entries of each row of a matrix: as few as hold ``mass`` of the row's sum, at most ``top``.

    With ``renormalize`` the sum of each row stays what it was.
    """
    kept_columns, kept_values, counts = [], [], []
    for t in range(matrix.shape[0]):  # one dense, sorted row at a time: no temporary of the matrix's size
        if isinstance(matrix, SparseRows):
            exact = matrix.take(torch.tensor([t], device=matrix.device)).to_dense()[0].double()
        else:
            exact = matrix[t].double()
        ordered, columns = exact.sort(descending=True, stable=True)
        sums = ordered.cumsum(0)
        # Entries of 0 are never needed. Rounding may leave the last sum below the mass asked for: then all are kept.
        needed = min(int((sums < mass * sums[-1]).sum()) + 1, int((ordered > 0).sum()))
        needed = needed if top is None else min(needed, top)
        columns = columns[:needed].sort().values
        values = exact[columns]
        if renormalize and needed:
            values = values * (sums[-1] / values.sum())
        kept_columns.append(columns)
        kept_values.append(values.to(matrix.dtype))
        counts.append(needed)
    crow = torch.tensor([0, *counts], device=matrix.device).cumsum(0)
    return SparseRows(crow, torch.cat(kept_columns), torch.cat(kept_values), matrix.shape[1])


class _without_beta_warning(warnings.catch_warnings):
    """torch warns once a process that compressed layouts are young."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
