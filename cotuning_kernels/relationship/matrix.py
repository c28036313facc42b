"""Step 1 of Co-Tuning: what does each target class look like to the pretrained source classifier?

The category relationship ``R[t, s] = p(y_source = s | y_target = t)`` is learnt here the direct way (You, Kou, Long and
Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020, section 3.2): the mean of the source classifier's calibrated
predictions over the target images of class ``t``,

    R[t, s] = 1 / |D_t| * sum over x in D_t of softmax(source_logits(x) / temperature)[s]

:class:`RelationshipEstimator` counts, batch by batch; :class:`Relationship` is the result, with class names, pictures
and a file format. :func:`cotuning_kernels.learn_relationship` does all of it for a model and a loader, and
:mod:`cotuning_kernels.relationship.reverse` has the paper's other method.
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

import torch
from torch import Tensor

from cotuning_kernels import backends, plots, reference
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.labelled_logits import check_labelled_logits, positive_number, unusable_row
from cotuning_kernels.relationship import file
from cotuning_kernels.validation import check_ignore_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup

__all__ = ["Relationship", "RelationshipEstimator", "class_names", "settle_empty_classes"]

_METHODS = ("direct", "reverse", "given")
# How far a row may be from summing to 1: what hand-made tables and rounding to half precision bring about.
_ROW_SUM_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_EMPTY_POLICIES = ("unsupervised", "uniform", "error")
# From this many rows a target class on, undoing a bad batch is cheaper than reading the whole batch beforehand.
_UNDO_ROWS_PER_CLASS = 4
# The reference makes float64 copies of what it is given; it is given this many rows at a time.
_REFERENCE_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Relationship:
    """``R[t, s] = p(y_source = s | y_target = t)`` with the names of its classes and how it came about.

    Attributes:
        matrix: ``(N_t, N_s)``, floating. Every row sums to 1, or is all zeros: a target class without source
            supervision, which trains the target head only.
        target_classes, source_classes: names, or ``None``. Two classes may share a name (ImageNet has two "crane").
        method: ``"direct"`` or ``"reverse"`` when it was learnt that way, ``"given"`` for a matrix from elsewhere.
        temperature: the source logits were divided by it before the softmax.
        counts: int64 ``(N_t,)``, the samples behind each row, or ``None``.
        metadata: free text of your own, saved along.

    Raises:
        TypeError, ValueError: a matrix that is not one of conditional probabilities, or fields that do not fit it; the
            message names the first wrong row.
    """

    matrix: Tensor
    target_classes: tuple[str, ...] | None = None
    source_classes: tuple[str, ...] | None = None
    method: str = "given"
    temperature: float = 1.0
    counts: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Tensors made under torch.inference_mode would break the training that this relationship is for.
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
        unsupervised = self.num_target_classes - int(self.supervised.sum())
        return (
            f"Relationship({self.num_target_classes} target classes x {self.num_source_classes} source classes, "
            f"method={self.method!r}, temperature={self.temperature:.4g}, {self.matrix.dtype}, {self.matrix.device}"
            + (f", {unsupervised} without source supervision)" if unsupervised else ")")
        )

    @property
    def num_target_classes(self) -> int:
        return self.matrix.shape[0]

    @property
    def num_source_classes(self) -> int:
        return self.matrix.shape[1]

    @property
    def supervised(self) -> Tensor:
        """``(N_t,)`` bool: the target classes that have source supervision (a row that is not all zeros)."""
        supervised: Tensor = (self.matrix != 0).any(dim=1)
        return supervised

    def top_source_classes(self, target_class: int | str, k: int = 5) -> list[tuple[str | int, float]]:
        """The ``k`` likeliest source classes of a target class, likeliest first, as ``(name or index, probability)``.

        Shorter where fewer have a probability above zero; empty for a class without source supervision.

        Raises:
            IndexError, TypeError, ValueError: no such target class.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        row = self.matrix[self._target_index(target_class)].double()
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
        entropy: Tensor = torch.special.entr(self.matrix.double()).sum(dim=1)
        return entropy

    def to(self, *args: Any, **kwargs: Any) -> Relationship:
        """The same relationship on another device or in another floating dtype, as :meth:`torch.Tensor.to`."""
        matrix: Tensor = self.matrix.to(*args, **kwargs)
        counts = None if self.counts is None else self.counts.to(matrix.device)
        return dataclasses.replace(self, matrix=matrix, counts=counts)

    def without_supervision(self, classes: int | str | Iterable[int | str]) -> Relationship:
        """The same relationship with the rows of these target classes set to zero: they train the target head only.

        For classes that mean "none of the others" and have no counterpart in the source, such as "O" in named entity
        recognition or "background": their mean prediction would teach the source head noise.

        Args:
            classes: one or several, by name or index; or a boolean tensor ``(N_t,)`` that is true for them.

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
        matrix = self.matrix.clone()
        matrix[[self._target_index(c) for c in chosen]] = 0
        return dataclasses.replace(self, matrix=matrix)

    def regrouped(self, rows: Sequence[int | str | None], target_classes: Sequence[str] | None = None) -> Relationship:
        """The same relationship for other target classes, each of which takes a row of this one, or none.

        For classes that share a row, such as the tags "B-PER" and "I-PER" of one kind of entity::

            relationship.regrouped([None, "PER", "PER"], target_classes=["O", "B-PER", "I-PER"])

        Args:
            rows: for each new class the class of this relationship, by name or index, whose row it takes; ``None`` for
                no source supervision (a row of zeros).
            target_classes: names of the new classes.

        Returns:
            A relationship of ``len(rows)`` target classes; ``counts`` are those of the rows taken, 0 for none.

        Raises:
            IndexError, TypeError, ValueError: no such target class, no row at all, or names that do not fit.
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
            matrix=self.matrix[taken].masked_fill(none[:, None], 0),
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
        """A heat map of the source classes that matter: those among the ``top_k`` of some target class.

        Similar target classes stand next to each other, and a source class below the target class that it belongs to
        most, so that shared structure shows as blocks. The last column is the probability of all that is not shown.

        Args:
            path: where to write the picture (.png, .pdf, .svg), or ``None`` to only return it.
            top_k: source classes a target class.
            target_classes: rows to show, by name or index; all by default.
            max_columns: keep at most so many source classes, the likeliest ones.

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
            self.matrix[rows].double().cpu(),
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
        """Write a safetensors file with everything in it. An interrupted save leaves an older file whole.

        Raises:
            OSError: the path cannot be written (a directory, no such directory, disk full, not permitted).
        """
        tensors = {"matrix": self.matrix} | ({} if self.counts is None else {"counts": self.counts})
        record = {
            "target_classes": self.target_classes,
            "source_classes": self.source_classes,
            "method": self.method,
            "temperature": self.temperature,
            "metadata": self.metadata,
        }
        file.write(path, tensors, record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Relationship:
        """Read a file that :meth:`save` wrote; the tensors are on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            RelationshipFileError: a directory, a damaged, truncated or foreign file, or one of a newer version.
        """
        tensors, record = file.read(path)
        try:
            return cls(
                matrix=tensors["matrix"],
                target_classes=record["target_classes"],
                source_classes=record["source_classes"],
                method=record["method"],
                temperature=record["temperature"],
                counts=tensors.get("counts"),
                metadata=record["metadata"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise file.RelationshipFileError(
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
        if index is None or type(target_class) is bool or getattr(target_class, "dtype", None) == torch.bool:
            raise TypeError(
                f"target class {target_class!r:.80}, expected a name or an index (torch.tensor(mask).nonzero())"
            )
        if not 0 <= index < self.num_target_classes:
            raise IndexError(f"target class {index}, expected an index in [0, {self.num_target_classes})")
        return index


def _as_index(value: object) -> int | None:
    """An integer: also NumPy's, or a tensor that holds one. ``None`` for anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


class RelationshipEstimator:
    """Learns a direct relationship from a stream of batches; memory ``N_t * N_s`` whatever the number of samples.

    Example::

        estimator = RelationshipEstimator(num_target_classes, num_source_classes)
        for images, labels in loader:
            estimator.update(source_model(images), labels)
        relationship = estimator.compute(target_classes=names)

    The model should be in eval mode and the loader free of augmentation, as :func:`learn_relationship` sees to.

    Args:
        num_target_classes, num_source_classes: ``N_t`` and ``N_s``.
        temperature: the source logits are divided by it; see :func:`cotuning_kernels.fit_temperature`. Its inverse must
            be finite in float32.
        ignore_index: rows with this label are not counted.
        dtype: of the sums, float32 or float64. Each float32 addition rounds by up to 6e-8 of the sum so far, which
            usually cancels out and at worst grows with the samples of a class: float64 is for classes with more than
            about 100 000 samples (tokens, pixels), at twice the memory.
        device: where the sums are, and the logits must be.
        backend: see :func:`cotuning_kernels.backends.select`.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as above, or the backend asked for is not there.
    """

    def __init__(
        self,
        num_target_classes: int,
        num_source_classes: int,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        for name, value in (("num_target_classes", num_target_classes), ("num_source_classes", num_source_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r:.80}, expected a positive int")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64: the sums need the precision")
        self.num_target_classes = num_target_classes
        self.num_source_classes = num_source_classes
        self.temperature = positive_number("temperature", temperature)
        # The kernels multiply by the inverse in float32: infinity times 0, the largest logit less itself, is NaN.
        if 1 / self.temperature > torch.finfo(torch.float32).max:
            least = 1 / torch.finfo(torch.float32).max
            raise ValueError(
                f"temperature is {self.temperature:.4g}, expected at least {least:.4g}: its inverse is not finite in "
                "float32"
            )
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        # Ordinary tensors, also when an estimator is made under torch.inference_mode: it may be updated outside.
        with torch.inference_mode(False):
            self._sums = torch.zeros(num_target_classes, num_source_classes, dtype=dtype, device=device)
            self._counts = torch.zeros(num_target_classes, dtype=torch.int64, device=device)
        self._backend = backends.select(self._sums.device.type, backend)
        self._all_reduced = False

    def __repr__(self) -> str:
        return (
            f"RelationshipEstimator({self.num_target_classes}, {self.num_source_classes}, "
            f"temperature={self.temperature:.4g}, rows={int(self._counts.sum())}, {self._sums.dtype}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return self._sums.device

    @property
    def sums(self) -> Tensor:
        """A copy of the summed probabilities, ``(N_t, N_s)``."""
        return self._sums.clone()

    @property
    def counts(self) -> Tensor:
        """A copy of the number of rows of each target class, int64 ``(N_t,)``."""
        return self._counts.clone()

    @torch.no_grad()
    def update(self, source_logits: Tensor, labels: Tensor) -> None:
        """Count a batch. A batch that raises is not counted, not even in part.

        Args:
            source_logits: ``(B, N_s)``, float32, bfloat16, float16 or float64, on the estimator's device. A masked
                source class may be -inf.
            labels: target classes, int64 or int32, ``(B,)``, or ``ignore_index``.

        Raises:
            TypeError, ValueError: a wrong type, shape or device, or a row with NaN, +inf or nothing but -inf.
            IndexError: a label out of range; names the row and the value.
            RuntimeError: the estimator holds the sums of all processes already (:meth:`all_reduce`).
        """
        if self._all_reduced:
            raise RuntimeError(
                "this estimator holds the sums of all processes; what one of them adds now the others would not have. "
                "Count everything before all_reduce"
            )
        logits, labels = check_labelled_logits(
            "source_logits", source_logits, labels, self.num_target_classes, self.ignore_index
        )
        if logits.shape[1] != self.num_source_classes:
            raise ValueError(
                f"source_logits has {logits.shape[1]} classes, but the estimator was made for {self.num_source_classes}"
            )
        if logits.device != self.device:
            raise ValueError(
                f"source_logits is on {logits.device}, but the estimator on {self.device}; make it with device=..., so "
                "that the sums are taken where the logits are"
            )
        # A NaN once added cannot be subtracted. Reading a batch before adding it costs nothing while it is in the
        # cache, but as much as the sums themselves when it is not. A large batch is therefore added first and judged
        # by the sums, which it is much larger than.
        if len(labels) < _UNDO_ROWS_PER_CLASS * self.num_target_classes:
            self._raise_if_unusable(logits, labels)
            self._add(logits, labels)
            return
        before = (self._sums.clone(), self._counts.clone()) if self._counts.any() else None
        self._add(logits, labels)
        if not torch.isfinite(self._sums.sum()):
            if before is None:
                self._sums.zero_()
                self._counts.zero_()
            else:
                self._sums.copy_(before[0])
                self._counts.copy_(before[1])
            self._raise_if_unusable(logits, labels)
            raise ValueError("the softmax of finite source_logits is not finite; are they within the range of float32?")

    @torch.no_grad()
    def merge(self, other: RelationshipEstimator) -> None:
        """Add what another estimator has counted, as if its batches had been this one's.

        Raises:
            TypeError, ValueError: not an estimator, or one of other classes or another temperature; or one of the two
                holds the sums of all processes (:meth:`all_reduce`) and the other its own.
        """
        if not isinstance(other, RelationshipEstimator):
            raise TypeError(f"other is a {type(other).__name__}, expected a RelationshipEstimator")
        if other._settings() != self._settings():
            raise ValueError(f"{other} cannot be merged into {self}: classes and temperature must be the same")
        if other._all_reduced != self._all_reduced and self._counts.any():
            raise ValueError(
                "one of the two estimators holds the sums of all processes and the other those of this one alone; "
                "merge them before all_reduce"
            )
        self._all_reduced = other._all_reduced
        self._sums += other._sums.to(self._sums)
        self._counts += other._counts.to(self.device)

    @torch.no_grad()
    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Add up over the processes of ``group``, each of which has seen its share of the data. Once, at the end.

        Without torch.distributed (one process, no launcher) there is nothing to add and nothing happens, so that one
        script serves both.

        Raises:
            RuntimeError: a launcher started several processes, but ``init_process_group`` was not called, where doing
                nothing would silently learn from one share; or the estimator was reduced before.
            ValueError: the processes have estimators of different classes or temperatures.
        """
        if self._all_reduced:
            raise RuntimeError(
                "this estimator already holds the sums of all processes; a second all_reduce would count them again"
            )
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RuntimeError(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised; call "
                    "torch.distributed.init_process_group() before all_reduce"
                )
            return
        # Tensors of different sizes would hang or abort in the sum itself.
        settings: list[Any] = [None] * distributed.get_world_size(group)
        mine = (*self._settings(), str(self._sums.dtype))
        distributed.all_gather_object(settings, mine, group=group)
        if len(set(settings)) > 1:
            raise ValueError(
                f"the processes have different (N_t, N_s, temperature, dtype): {settings}; make them alike"
            )
        distributed.all_reduce(self._sums, group=group)
        distributed.all_reduce(self._counts, group=group)
        self._all_reduced = True

    def compute(
        self,
        *,
        empty: str = "unsupervised",
        target_classes: Sequence[str] | None = None,
        source_classes: Sequence[str] | None = None,
    ) -> Relationship:
        """The relationship from all that was counted; counting may go on afterwards.

        Args:
            empty: what becomes of a target class without a single row. ``"unsupervised"``: a row of zeros (the class
                trains the target head only) and a warning that names it. ``"uniform"``: ``1 / N_s`` everywhere.
                ``"error"``: a ValueError that names it.
            target_classes, source_classes: names to keep with the relationship.

        Raises:
            ValueError: nothing was counted, an empty class under ``empty="error"``, or names that do not fit.
        """
        check_empty_policy(empty)
        names = class_names("target_classes", target_classes, self.num_target_classes)
        if not self._counts.any():
            raise ValueError("nothing was counted yet (every label ignored, or no update); there is no relationship")
        with torch.inference_mode(False), torch.no_grad():
            # The row sums are the counts up to rounding. Dividing by them makes rows that sum to 1 however many
            # float32 additions there were.
            matrix = self._sums / self._sums.sum(dim=1, keepdim=True)
            counts = self._counts.clone()
            matrix = settle_empty_classes(matrix, counts, empty, names)
        return Relationship(
            matrix,
            target_classes=names,
            source_classes=class_names("source_classes", source_classes, self.num_source_classes),
            method="direct",
            temperature=self.temperature,
            counts=counts,
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that was counted, for ``torch.save``, to go on after an interruption."""
        return {
            "sums": self.sums,
            "counts": self.counts,
            "temperature": self.temperature,
            "all_reduced": self._all_reduced,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was counted by a :meth:`state_dict`.

        Raises:
            ValueError: not such a state, one of other classes or another temperature, or a damaged one; the
                estimator is then unchanged.
        """
        expected = {"sums", "counts", "temperature", "all_reduced"}
        if not isinstance(state, Mapping) or set(state) != expected:
            keys = f" with keys {sorted(map(str, state))}" if isinstance(state, Mapping) else ""
            raise ValueError(
                f"state is a {type(state).__name__}{keys}, expected a RelationshipEstimator.state_dict() with keys "
                f"{sorted(expected)}"
            )
        for name, mine in (("sums", self._sums), ("counts", self._counts)):
            theirs = state[name]
            if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
                found = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
                raise ValueError(f"state[{name!r}] is {found}, expected a Tensor of shape {tuple(mine.shape)}")
            if not (torch.isfinite(theirs).all() and (theirs >= 0).all()):
                raise ValueError(f"state[{name!r}] has negative or non-finite values; the state is damaged")
        if state["counts"].dtype != torch.int64:
            raise ValueError(f"state['counts'] is {state['counts'].dtype}, expected torch.int64; the state is damaged")
        if state["temperature"] != self.temperature:
            raise ValueError(
                f"the state was counted at temperature {state['temperature']}, but the estimator has "
                f"{self.temperature}; make it with the same temperature"
            )
        self._sums.copy_(state["sums"])
        self._counts.copy_(state["counts"])
        self._all_reduced = bool(state["all_reduced"])

    def _settings(self) -> tuple[int, int, float]:
        return self.num_target_classes, self.num_source_classes, self.temperature

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        if self._backend != "reference":
            operation("add_class_sums_", self._backend)(
                self._sums, self._counts, logits, labels, 1 / self.temperature, self.ignore_index
            )
            return
        for some_logits, some_labels in zip(logits.split(_REFERENCE_ROWS), labels.split(_REFERENCE_ROWS), strict=True):
            sums, counts = reference.softmax_class_sums(
                some_logits,
                some_labels,
                self.num_target_classes,
                inverse_temperature=1 / self.temperature,
                ignore_index=self.ignore_index,
            )
            self._sums += sums
            self._counts += counts

    def _raise_if_unusable(self, logits: Tensor, labels: Tensor) -> None:
        found = unusable_row(logits, labels, self.ignore_index)
        if found is not None:
            row, reason = found
            raise ValueError(f"source_logits[{row}] has no softmax: {reason}. The batch was not counted")


def check_empty_policy(empty: str) -> None:
    """See :meth:`RelationshipEstimator.compute`."""
    if empty not in _EMPTY_POLICIES:
        raise ValueError(f"empty is {empty!r}, expected one of {', '.join(map(repr, _EMPTY_POLICIES))}")


def settle_empty_classes(matrix: Tensor, counts: Tensor, empty: str, target_classes: Sequence[str] | None) -> Tensor:
    """Write what ``empty`` says into the rows of the classes without a sample, in place, and warn or raise.

    What both ways of learning share; see :meth:`RelationshipEstimator.compute`.
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
    """Without gradient history, and an ordinary tensor where it was made under ``torch.inference_mode``."""
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
    # Row by row, because a temporary of the matrix's size is what this module is careful not to need.
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


def _check_counts(counts: Tensor, num_target_classes: int) -> None:
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.shape != (num_target_classes,):
        found = f"{counts.dtype} {tuple(counts.shape)}" if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts is {found}, expected an int64 Tensor ({num_target_classes},): one a row")
    if (counts < 0).any():
        raise ValueError(f"counts has a negative number of samples: {int(counts.min())}")


def class_names(argument: str, names: Iterable[str] | None, expected: int) -> tuple[str, ...] | None:
    """The names as a tuple.

    Raises:
        TypeError, ValueError: not ``expected`` names; the message speaks of ``argument``.
    """
    if names is None:
        return None
    # A string is a sequence of strings too: one class a letter is never what was meant.
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
