"""The direct method: sums of the source model's predictions, one row a target class.

    R[t, s] = 1 / |D_t| * sum over x in D_t of softmax(source_logits(x) / temperature)[s]

(You, Kou, Long, Wang, NeurIPS 2020, section 3.2), from a stream of batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cotuning_kernels import backends, reference
from cotuning_kernels.backends.operations import operation
from cotuning_kernels.labelled_logits import (
    REFERENCE_ROWS,
    check_labelled_logits,
    first_row_without_softmax,
    positive_number,
)
from cotuning_kernels.processes import rank_and_size
from cotuning_kernels.relationship.matrix import Relationship, check_empty_policy, class_names, fill_empty_classes
from cotuning_kernels.validation import check_ignore_index

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RelationshipEstimator"]

# From this many rows a target class on, undoing a bad batch is cheaper than reading the whole batch beforehand.
_UNDO_ROWS_PER_CLASS = 4


class RelationshipEstimator:
    """Learns a direct relationship from a stream of batches; memory ``N_t * N_s`` whatever the number of samples.

    Example::

        estimator = RelationshipEstimator(num_target_classes)
        for images, labels in loader:
            estimator.update(source_model(images), labels)
        relationship = estimator.compute(target_classes=names)

    Put the model into eval mode and use a loader without augmentation; :func:`learn_relationship` does the former.

    Args:
        num_target_classes: ``N_t``.
        num_source_classes: ``N_s``; ``None`` takes it from the first batch.
        temperature: the source logits are divided by it; see :func:`cotuning_kernels.fit_temperature`. Its inverse must
            be finite in float32.
        ignore_index: rows with this label are not counted.
        dtype: of the sums, float32 or float64. Each float32 addition rounds by up to 6e-8 of the sum so far, which
            usually cancels out and at worst grows with the samples of a class: float64 is for classes with more than
            about 100 000 samples (tokens, pixels), at twice the memory.
        device: of the sums, and so of the logits; ``None`` keeps the sums on the device of the latest batch.
        backend: see :func:`cotuning_kernels.backends.select`.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the requested backend is unavailable; the message says how to install it.
    """

    def __init__(
        self,
        num_target_classes: int,
        num_source_classes: int | None = None,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = "cpu",
        backend: str = "auto",
    ) -> None:
        for name, value in (("num_target_classes", num_target_classes), ("num_source_classes", num_source_classes)):
            if value is None and name == "num_source_classes":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r:.80}, expected a positive int")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64: the sums need the precision")
        self.num_target_classes = num_target_classes
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
            # No columns: N_s is not known yet.
            self._sums = torch.zeros(num_target_classes, num_source_classes or 0, dtype=dtype, device=device or "cpu")
            self._counts = torch.zeros(num_target_classes, dtype=torch.int64, device=device or "cpu")
        self._follows_batches = device is None
        self._backend = backend
        if not self._follows_batches:
            backends.select(self.device.type, backend)  # raises now, not with the first batch
        self._all_reduced = False

    def __repr__(self) -> str:
        return (
            f"RelationshipEstimator({self.num_target_classes}, {self.num_source_classes}, "
            f"temperature={self.temperature:.4g}, rows={int(self._counts.sum())}, {self._sums.dtype}, {self.device})"
        )

    @property
    def num_source_classes(self) -> int | None:
        """``N_s``; ``None`` before the first batch of an estimator that was made without it."""
        return self._sums.shape[1] or None

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
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
        if self.num_source_classes is not None and logits.shape[1] != self.num_source_classes:
            raise ValueError(
                f"source_logits has {logits.shape[1]} classes, but the estimator was made for {self.num_source_classes}"
            )
        if self._follows_batches:
            self._move_to(logits.device)
        if logits.device != self.device:
            raise ValueError(
                f"source_logits is on {logits.device}, but the estimator on {self.device}; make it with device=..., so "
                "that the sums are taken where the logits are"
            )
        self._make_columns(logits.shape[1])
        # A NaN in the sums cannot be subtracted again. Reading a batch before adding it is free while the batch is in
        # the cache, and as dear as adding it when it is not. So a large batch is added first, and then the sums, which
        # are much smaller, are checked.
        if len(labels) < _UNDO_ROWS_PER_CLASS * self.num_target_classes:
            self._raise_without_softmax(logits, labels)
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
            self._raise_without_softmax(logits, labels)
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
        source_classes = {self.num_source_classes, other.num_source_classes} - {None}
        if other._settings() != self._settings() or len(source_classes) > 1:
            raise ValueError(f"{other} cannot be merged into {self}: classes and temperature must be the same")
        if other._all_reduced != self._all_reduced and self._counts.any():
            raise ValueError(
                "one of the two estimators holds the sums of all processes and the other those of this one alone; "
                "merge them before all_reduce"
            )
        if other.num_source_classes is None:
            return  # it has counted nothing
        self._make_columns(other.num_source_classes)
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

        _, processes = rank_and_size(group)
        if not distributed.is_available() or not distributed.is_initialized():
            return
        # Tensors of different sizes would hang or abort in the sum itself.
        settings: list[Any] = [None] * processes
        mine = (self.num_target_classes, self.num_source_classes, self.temperature, str(self._sums.dtype))
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
            matrix = fill_empty_classes(matrix, counts, empty, names)
        return Relationship(
            matrix,
            target_classes=names,
            source_classes=class_names("source_classes", source_classes, self._sums.shape[1]),
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
        columns = self.num_source_classes
        if columns is None and isinstance(state["sums"], Tensor) and state["sums"].dim() == 2:
            columns = state["sums"].shape[1]
        for name, shape in (("sums", (self.num_target_classes, columns)), ("counts", (self.num_target_classes,))):
            theirs = state[name]
            if not isinstance(theirs, Tensor) or theirs.shape != shape:
                found = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
                raise ValueError(f"state[{name!r}] is {found}, expected a Tensor of shape {shape}")
            if not (torch.isfinite(theirs).all() and (theirs >= 0).all()):
                raise ValueError(f"state[{name!r}] has negative or non-finite values; the state is damaged")
        if state["counts"].dtype != torch.int64:
            raise ValueError(f"state['counts'] is {state['counts'].dtype}, expected torch.int64; the state is damaged")
        if state["temperature"] != self.temperature:
            raise ValueError(
                f"the state was counted at temperature {state['temperature']}, but the estimator has "
                f"{self.temperature}; make it with the same temperature"
            )
        if self._follows_batches:
            self._move_to(state["sums"].device)
        self._make_columns(state["sums"].shape[1])
        self._sums.copy_(state["sums"])
        self._counts.copy_(state["counts"])
        self._all_reduced = bool(state["all_reduced"])

    def _settings(self) -> tuple[int, float]:
        return self.num_target_classes, self.temperature

    def _make_columns(self, num_source_classes: int) -> None:
        if self._sums.shape[1] == 0:
            with torch.inference_mode(False):
                self._sums = self._sums.new_zeros(self.num_target_classes, num_source_classes)

    def _move_to(self, device: torch.device) -> None:
        if self.device != device:
            with torch.inference_mode(False):
                self._sums, self._counts = self._sums.to(device), self._counts.to(device)

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        backend = backends.select(self.device.type, self._backend)
        if backend != "reference":
            operation("add_class_sums_", backend)(
                self._sums, self._counts, logits, labels, 1 / self.temperature, self.ignore_index
            )
            return
        for some_logits, some_labels in zip(logits.split(REFERENCE_ROWS), labels.split(REFERENCE_ROWS), strict=True):
            sums, counts = reference.softmax_class_sums(
                some_logits,
                some_labels,
                self.num_target_classes,
                inverse_temperature=1 / self.temperature,
                ignore_index=self.ignore_index,
            )
            self._sums += sums
            self._counts += counts

    def _raise_without_softmax(self, logits: Tensor, labels: Tensor) -> None:
        found = first_row_without_softmax(logits, labels, self.ignore_index)
        if found is not None:
            row, reason = found
            raise ValueError(f"source_logits[{row}] has no softmax: {reason}. The batch was not counted")
