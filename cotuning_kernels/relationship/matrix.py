"""The category relationship: which source classes the pretrained classifier sees in each target class.

:class:`Relationship` holds ``R[t, s] = p(y_source = s | y_target = t)`` (You, Kou, Long and Wang, "Co-Tuning for
Transfer Learning", NeurIPS 2020, section 3.2) with its class names, pictures and file.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cotuning_kernels import plots
from cotuning_kernels.labelled_logits import positive_integer, positive_number
from cotuning_kernels.relationship.file import RELATIONSHIP_FILE, RelationshipFileError
from cotuning_kernels.sparse_rows import SparseRows, largest_entries, supervised_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Relationship", "check_empty_policy", "class_names", "fill_empty_classes"]

_METHODS = ("direct", "reverse", "given")
# Allowed distance of a row's sum from 1: allows hand-made tables and half-precision rounding.
_ROW_SUM_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_EMPTY_POLICIES = ("unsupervised", "uniform", "error")


@dataclass(frozen=True, eq=False)
class Relationship:
    """``R[t, s] = p(y_source = s | y_target = t)`` with the names of its classes and how it was learnt.

    Attributes:
        matrix: ``(N_t, N_s)``, floating. Every row sums to 1, or is all zeros: a target class without source
            supervision, which trains the target head only. A ``torch.sparse_csr`` matrix holds the entries of rows that
            have few; its rows may sum to less than 1. See :meth:`sparsified`.
        target_classes, source_classes: names, or ``None``. Two classes may share a name (ImageNet has two "crane").
        method: how it was learnt, ``"direct"`` or ``"reverse"``; ``"given"`` for a matrix from elsewhere.
        temperature: the source logits were divided by it before the softmax.
        counts: int64 ``(N_t,)``, the number of samples of each target class, or ``None``.
        metadata: your own text, saved with the relationship.

    Raises:
        TypeError, ValueError: the matrix does not hold conditional probabilities (the message names the first wrong
            row), or other fields do not fit it.
    """

    matrix: Tensor
    target_classes: tuple[str, ...] | None = None
    source_classes: tuple[str, ...] | None = None
    method: str = "given"
    temperature: float = 1.0
    counts: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Training cannot use tensors that were made under torch.inference_mode.
        with torch.inference_mode(False):
            matrix = _ordinary(self.matrix) if isinstance(self.matrix, Tensor) else self.matrix
            counts = _ordinary(self.counts) if isinstance(self.counts, Tensor) else self.counts
        _check_matrix(matrix)
        target_names = class_names("target_classes", self.target_classes, matrix.shape[0])
        source_names = class_names("source_classes", self.source_classes, matrix.shape[1])
        if self.method not in _METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(map(repr, _METHODS))}")
        if counts is not None:
            _check_counts(counts, matrix.shape[0])
        if not isinstance(self.metadata, Mapping) or not all(
            isinstance(text, str) for item in self.metadata.items() for text in item
        ):
            raise TypeError(f"metadata is {self.metadata!r:.80}, expected a dict from str to str; convert with str()")
        values = {
            "matrix": matrix,
            "target_classes": target_names,
            "source_classes": source_names,
            "temperature": positive_number("temperature", self.temperature),
            "counts": counts,
            "metadata": dict(self.metadata),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        unsupervised = 0 if self.matrix.is_meta else self.num_target_classes - int(self.supervised.sum())
        return (
            f"Relationship({self.num_target_classes} target classes x {self.num_source_classes} source classes, "
            f"method={self.method!r}, temperature={self.temperature:.4g}, {self.matrix.dtype}, {self.matrix.device}"
            + (f", {unsupervised} without source supervision" if unsupervised else "")
            + (f", {len(self._rows.values)} entries)" if isinstance(self._rows, SparseRows) else ")")
        )

    @property
    def num_target_classes(self) -> int:
        """``N_t``."""
        return self.matrix.shape[0]

    @property
    def num_source_classes(self) -> int:
        """``N_s``."""
        return self.matrix.shape[1]

    @property
    def supervised(self) -> Tensor:
        """``(N_t,)`` bool: the target classes that have source supervision (a row that is not all zeros)."""
        return supervised_classes(self._rows)

    @property
    def _rows(self) -> Tensor | SparseRows:
        return self.matrix if self.matrix.layout is torch.strided else SparseRows.of(self.matrix)

    def _dense_rows(self, rows: Sequence[int]) -> Tensor:
        matrix = self._rows
        if isinstance(matrix, SparseRows):
            return matrix.take(torch.tensor(rows, device=matrix.device)).to_dense()
        return matrix[list(rows)]

    def top_source_classes(self, target_class: int | str, k: int = 5) -> list[tuple[str | int, float]]:
        """The ``k`` likeliest source classes of a target class, likeliest first, as ``(name or index, probability)``.

        Source classes of probability zero are left out. Empty for a class without source supervision.

        Raises:
            IndexError, TypeError, ValueError: no such target class.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        row = self._dense_rows([self._target_index(target_class)])[0].double()
        top = row.topk(min(k, len(row)))
        return [
            (self.source_classes[s] if self.source_classes else s, p)
            for p, s in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            if p > 0
        ]

    def entropy(self) -> Tensor:
        """``(N_t,)`` float64, in nats: how spread out each row is, from 0 (one source class) to ``log(N_s)``.

        0 for a class without source supervision.
        """
        matrix = self._rows
        if isinstance(matrix, SparseRows):
            return matrix.sum_of_rows(torch.special.entr(matrix.values.double()))
        entropy: Tensor = torch.special.entr(matrix.double()).sum(dim=1)
        return entropy

    def sparsified(
        self, mass: float | None = None, *, top: int | None = None, renormalize: bool = True
    ) -> Relationship:
        r"""The same relationship with only the largest entries of each row, as a ``torch.sparse_csr`` matrix.

        The loss then reads no row of R, and R needs memory for its entries alone: 10 000 rows of 64 entries are 8 MB
        instead of the 5 GB of 10 000 x 128 000 numbers.

        With probability :math:`\delta` cut off a row and renormalised, the source term of a sample changes by at most
        :math:`\delta (\max_j z_j - \min_j z_j)`, the spread of its source logits, and its gradient in the logits by at
        most :math:`2 \delta` in the sum of absolute values. (The rest :math:`q'` is :math:`q / (1 - \delta)`, so
        :math:`q - q'` sums to 0 and to :math:`2 \delta` in absolute values: the log-sum-exp cancels, and
        :math:`\sum_j (q'_j - q_j) z_j` is the difference of two means of logits times :math:`\delta`.) Without
        renormalisation the term becomes smaller, by at most :math:`\delta` times the largest
        :math:`-\log \mathrm{softmax}(z)_j` of the entries cut off.

        Args:
            mass: keep as few entries of a row as hold this share of its sum, in (0, 1]; 0.999 by default, 1 with
                ``top``.
            top: keep at most this many entries of a row.
            renormalize: scale the entries of a row so that it sums to 1 again.

        Returns:
            A relationship of the same dtype and classes. A row of zeros has no entries.

        Raises:
            TypeError, ValueError: ``mass`` or ``top`` has a wrong type or value.
        """
        if mass is None:
            mass = 0.999 if top is None else 1.0
        mass = positive_number("mass", mass)
        if mass > 1:
            raise ValueError(f"mass is {mass}, expected a share in (0, 1]")
        top = None if top is None else positive_integer("top", top)
        rows = largest_entries(self._rows, mass, top, renormalize)
        return dataclasses.replace(self, matrix=rows.as_csr())

    def dense(self) -> Relationship:
        """The same relationship with a dense matrix."""
        return dataclasses.replace(self, matrix=self.matrix.to_dense())

    def to(self, *args: Any, **kwargs: Any) -> Relationship:
        """The same relationship on another device or in another floating dtype, as :meth:`torch.Tensor.to`."""
        rows = self._rows.to(*args, **kwargs)
        matrix = rows.as_csr() if isinstance(rows, SparseRows) else rows
        counts = None if self.counts is None else self.counts.to(matrix.device)
        return dataclasses.replace(self, matrix=matrix, counts=counts)

    def without_supervision(self, classes: int | str | Iterable[int | str]) -> Relationship:
        """The same relationship with the rows of these target classes set to zero: they train the target head only.

        Use it for classes that mean "none of the others" and have no counterpart in the source, such as "O" in named
        entity recognition or "background": their mean prediction would teach the source head noise.

        Args:
            classes: one or several, by name or index; or a boolean mask ``(N_t,)``.

        Raises:
            IndexError, TypeError, ValueError: no such target class.
        """
        if isinstance(classes, Tensor) and classes.dtype == torch.bool:
            if classes.shape != (self.num_target_classes,):
                raise ValueError(
                    f"classes is a mask of shape {tuple(classes.shape)}, expected ({self.num_target_classes},)"
                )
            classes = classes.nonzero().flatten().tolist()
        several = isinstance(classes, Iterable) and not isinstance(classes, str) and _as_index(classes) is None
        chosen: list[Any] = list(classes) if several else [classes]  # type: ignore[arg-type]
        indices = [self._target_index(c) for c in chosen]
        rows = torch.arange(self.num_target_classes, device=self.matrix.device)
        rows[indices] = -1
        return dataclasses.replace(self, matrix=self._taken(rows))

    def _taken(self, rows: Tensor) -> Tensor:
        """The matrix of these rows; one of zeros for a negative index."""
        matrix = self._rows
        if isinstance(matrix, SparseRows):
            return matrix.take(rows).as_csr()
        return matrix[rows].masked_fill(rows[:, None] < 0, 0)

    def regrouped(self, rows: Sequence[int | str | None], target_classes: Sequence[str] | None = None) -> Relationship:
        """A relationship for other target classes, each of which takes a row of this one, or none.

        Use it for classes that share a row, such as the tags "B-PER" and "I-PER" of one kind of entity::

            relationship.regrouped([None, "PER", "PER"], target_classes=["O", "B-PER", "I-PER"])

        Args:
            rows: for each new class, the name or index of the class whose row it takes; ``None`` for no source
                supervision (a row of zeros).
            target_classes: names of the new classes.

        Returns:
            A relationship of ``len(rows)`` target classes; ``counts`` are those of the rows taken, 0 for none.

        Raises:
            IndexError, TypeError, ValueError: no such target class, empty ``rows``, or names that do not fit.
        """
        if len(rows) == 0:
            raise ValueError("rows is empty, expected one entry for each new target class")
        taken = torch.tensor(
            [-1 if row is None else self._target_index(row) for row in rows], device=self.matrix.device
        )
        none = taken < 0
        counts = None if self.counts is None else self.counts[taken].masked_fill(none, 0)
        return dataclasses.replace(
            self,
            matrix=self._taken(taken),
            target_classes=class_names("target_classes", target_classes, len(rows)),
            counts=counts,
        )

    def plot(
        self,
        path: str | Path | None = None,
        *,
        top_k: int = 3,
        target_classes: Iterable[int | str] | None = None,
        max_columns: int = 60,
        title: str | None = None,
    ) -> Figure:
        """A heat map of the source classes that are among the ``top_k`` of some target class.

        Similar target classes are next to each other, and the source classes follow the order of the target classes
        that they belong to most, so that shared structure shows as blocks. The last column is the probability of all
        source classes that are not shown.

        Args:
            path: where to write the picture (.png, .pdf, .svg), or ``None`` to only return it.
            top_k: source classes per target class.
            target_classes: rows to show, by name or index; all by default.
            max_columns: show at most this many source classes, the likeliest ones.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            IndexError, TypeError, ValueError: no such target class.
        """
        if target_classes is None:
            rows = list(range(self.num_target_classes))
        else:
            rows = [self._target_index(c) for c in target_classes]
        if not rows or top_k < 1 or max_columns < 1:
            raise ValueError(f"nothing to plot: {len(rows)} target classes, top_k={top_k}, max_columns={max_columns}")
        figure = plots.relationship_heat_map(
            self._dense_rows(rows).double().cpu(),
            [self._target_name(t) for t in rows],
            [str(s) for s in range(self.num_source_classes)] if self.source_classes is None else self.source_classes,
            top_k=top_k,
            max_columns=max_columns,
            title=title or "What each target class looks like to the source model",
        )
        if path is not None:
            plots.save_figure(figure, path)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the relationship to a safetensors file. An interrupted save leaves an older file unchanged.

        The same relationship gives the same bytes in every process. The new file gets the mode of the old one, and its
        owner where the system allows it.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError, OSError: the path cannot be written (no such
                directory, disk full), or is not a regular file (a device, a pipe, a loop of links). An older file is
                untouched.
            ValueError: names and metadata take more than 16 MiB, which :meth:`load` would refuse.
        """
        matrix = self._rows
        if isinstance(matrix, SparseRows):
            tensors = dict(zip(_SPARSE_TENSORS, matrix[:3], strict=True))
        else:
            tensors = {"matrix": matrix}
        if self.counts is not None:
            tensors["counts"] = self.counts
        record: dict[str, Any] = {
            "target_classes": self.target_classes,
            "source_classes": self.source_classes,
            "method": self.method,
            "temperature": self.temperature,
            "metadata": self.metadata,
        }
        if isinstance(matrix, SparseRows):
            record["num_source_classes"] = matrix.num_columns
        RELATIONSHIP_FILE.write(path, tensors, record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Relationship:
        """Read a file that :meth:`save` wrote; the tensors are on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError, OSError: the file cannot be read.
            RelationshipFileError: a directory, a damaged or truncated file, one of another kind, or of a newer version.
        """
        try:
            tensors, record = RELATIONSHIP_FILE.read(path)
        except RelationshipFileError as error:
            if _is_array_of_numpy(path):
                raise RelationshipFileError(
                    f"{os.fspath(path)} is an array of NumPy; Relationship(torch.from_numpy(numpy.load(path))) makes a "
                    "relationship of it"
                ) from error
            raise
        try:
            return cls(
                matrix=_matrix_of_file(tensors, record),
                target_classes=record["target_classes"],
                source_classes=record["source_classes"],
                method=record["method"],
                temperature=record["temperature"],
                counts=tensors.get("counts"),
                metadata=record["metadata"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RelationshipFileError(
                f"{os.fspath(path)} does not hold a relationship ({type(error).__name__}: {error}); "
                "learn the relationship again, or take the file from a copy"
            ) from error

    def _target_name(self, index: int) -> str:
        return str(index) if self.target_classes is None else self.target_classes[index]

    def _target_index(self, target_class: int | str) -> int:
        if isinstance(target_class, str):
            names = self.target_classes
            if names is None:
                raise ValueError(
                    f"target class {target_class!r} is asked for by name, but this relationship has no names; give the "
                    "index, or set them with dataclasses.replace(relationship, target_classes=[...])"
                )
            matches = [index for index, name in enumerate(names) if name == target_class]
            if len(matches) > 1:
                raise ValueError(f"target class {target_class!r} is ambiguous: classes {matches}; give the index")
            if not matches:
                near = difflib.get_close_matches(target_class, names) or names[:5]
                raise ValueError(
                    f"there is no target class {target_class!r}; did you mean {' or '.join(map(repr, near))}?"
                )
            return matches[0]
        index = _as_index(target_class)
        # (Before NumPy 2, its booleans are indices.)
        boolean = isinstance(target_class, (bool, np.bool_)) or getattr(target_class, "dtype", None) is torch.bool
        if index is None or boolean:
            raise TypeError(
                f"target class {target_class!r:.80}, expected a name or an index (torch.tensor(mask).nonzero())"
            )
        if not 0 <= index < self.num_target_classes:
            raise IndexError(f"target class {index}, expected an index in [0, {self.num_target_classes})")
        return index


# A file of an older version has "matrix" alone; a release that does not know these names reports a missing "matrix".
_SPARSE_TENSORS = ("crow_indices", "col_indices", "values")


def _matrix_of_file(tensors: dict[str, Tensor], record: dict[str, Any]) -> Tensor:
    if "crow_indices" not in tensors:
        return tensors["matrix"]
    crow_indices, col_indices, values = (tensors[name] for name in _SPARSE_TENSORS)
    rows = SparseRows(crow_indices, col_indices, values, record["num_source_classes"])
    if not isinstance(rows.num_columns, int) or any(each.dim() != 1 for each in rows[:3]):
        raise ValueError("its sparse matrix has no valid shape")
    rows.check("matrix")
    return rows.as_csr()


def _as_index(value: object) -> int | None:
    """The integer, NumPy integer or integer tensor as an int; ``None`` for any other value."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_empty_policy(empty: str) -> None:
    """Check the argument ``empty`` of :meth:`RelationshipEstimator.compute`."""
    if empty not in _EMPTY_POLICIES:
        raise ValueError(f"empty is {empty!r}, expected one of {', '.join(map(repr, _EMPTY_POLICIES))}")


def fill_empty_classes(matrix: Tensor, counts: Tensor, empty: str, target_classes: Sequence[str] | None) -> Tensor:
    """Fill the rows of classes without samples as ``empty`` says, in place; warn or raise if it says so.

    Both methods use it; see :meth:`RelationshipEstimator.compute`.
    """
    check_empty_policy(empty)
    names = class_names("target_classes", target_classes, len(counts))
    missing = counts == 0
    if not missing.any():
        return matrix
    indices = missing.nonzero()[:, 0].tolist()
    message = f"no sample of {len(indices)} of {len(missing)} target classes: {_listed(indices, names)}"
    if empty == "error":
        raise ValueError(f"{message}; add data, or choose empty='unsupervised' or 'uniform'")
    matrix[missing] = 1 / matrix.shape[1] if empty == "uniform" else 0
    if empty == "unsupervised":
        warnings.warn(
            f"{message}; they have no source supervision and train the target head only (see the argument `empty`)",
            stacklevel=3,
        )
    return matrix


def _ordinary(tensor: Tensor) -> Tensor:
    """The tensor without gradient history, dense or sparse_csr; a copy if made under ``torch.inference_mode``."""
    if tensor.layout is not torch.strided:
        rows = SparseRows.of(tensor)
        crow_indices, col_indices, values = map(_ordinary, rows[:3])
        return SparseRows(crow_indices, col_indices, values, rows.num_columns).as_csr()
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"matrix is a {type(matrix).__name__}, expected a Tensor (N_t, N_s); torch.from_numpy converts an array"
        )
    if matrix.dtype not in _ROW_SUM_TOLERANCE or matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(
            f"matrix is {matrix.dtype} of shape {tuple(matrix.shape)}, expected (N_t, N_s) probabilities as "
            f"{', '.join(map(str, _ROW_SUM_TOLERANCE))}"
        )
    if matrix.is_meta:  # deferred initialisation: there are no values yet
        return
    if matrix.layout is not torch.strided:
        _check_sparse(SparseRows.of(matrix))
        return
    # Row by row, which needs no temporary of the matrix's size.
    lowest, highest = matrix.amin(dim=1), matrix.amax(dim=1)  # NaN where the row has one
    wrong = ~((lowest >= 0) & torch.isfinite(highest))
    if wrong.any():
        t = int(wrong.nonzero()[0])
        s = int((~((matrix[t] >= 0) & torch.isfinite(matrix[t]))).nonzero()[0])
        raise ValueError(f"matrix[{t}, {s}] is {float(matrix[t, s])}, expected a probability")
    sums = matrix.sum(dim=1)
    wrong = ((sums - 1).abs() > _ROW_SUM_TOLERANCE[matrix.dtype]) & (highest > 0)
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"matrix[{t}] sums to {float(sums[t]):.6g}, expected 1 (or a row of zeros for a class without source "
            "supervision); divide the rows by their sums, and check that rows are target classes, not columns"
        )


def _check_sparse(matrix: SparseRows) -> None:
    matrix.check("matrix")
    rows = matrix.row_of_entries()
    wrong = ~((matrix.values >= 0) & torch.isfinite(matrix.values))
    if wrong.any():
        k = int(wrong.nonzero()[0])
        where = f"matrix[{int(rows[k])}, {int(matrix.col_indices[k])}]"
        raise ValueError(f"{where} is {float(matrix.values[k])}, expected a probability")
    sums = matrix.sum_of_rows(matrix.values.double())
    wrong = sums > 1 + _ROW_SUM_TOLERANCE[matrix.dtype]
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"matrix[{t}] sums to {float(sums[t]):.6g}, expected at most 1; divide the rows by their sums, and check "
            "that rows are target classes, not columns"
        )


def _check_counts(counts: Tensor, num_target_classes: int) -> None:
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.shape != (num_target_classes,):
        found = f"{counts.dtype} {tuple(counts.shape)}" if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts is {found}, expected an int64 Tensor ({num_target_classes},): one a row")
    if not counts.is_meta and (counts < 0).any():
        raise ValueError(f"counts has a negative number of samples: {int(counts.min())}")


def class_names(argument: str, names: Iterable[str] | None, expected: int) -> tuple[str, ...] | None:
    """The names as a tuple.

    Raises:
        TypeError, ValueError: not ``expected`` names; the message names ``argument``.
    """
    if names is None:
        return None
    # A string is a sequence of strings too, but one class per letter is a mistake.
    if isinstance(names, str | set | frozenset) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} is {names!r:.80}, expected a sequence of names in the classes' order, or None")
    names = tuple(names)
    strange = [name for name in names if not isinstance(name, str)]
    if strange:
        raise TypeError(f"{argument} has {strange[0]!r:.80}, expected names as str; convert with map(str, ...)")
    if len(names) != expected:
        raise ValueError(f"{argument} has {len(names)} names, expected {expected}: one a class")
    return names


def _listed(indices: list[int], names: tuple[str, ...] | None, longest: int = 10) -> str:
    shown = [str(index) if names is None else repr(names[index]) for index in indices[:longest]]
    return ", ".join(shown) + (f" and {len(indices) - longest} more" if len(indices) > longest else "")


def _is_array_of_numpy(path: str | os.PathLike[str]) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"
