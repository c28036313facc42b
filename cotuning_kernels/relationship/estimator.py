"""The direct method: sums of the source model's predictions, one row per target class.

    R[t, s] = 1 / |D_t| * sum over x in D_t of softmax(source_logits(x) / temperature)[s]

(You, Kou, Long, Wang, NeurIPS 2020, section 3.2), from a stream of batches.

Any exception, Ctrl-C in the middle of a batch included, leaves an estimator unchanged. Methods never write into the
tensors of ``_counted``; their last step replaces these. The sums after a batch overwrite those before the last batch,
``_spare``. Sums and spare differ in the classes of the last batch only, whose counts differ too, so only these classes
and those of the new batch are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cotuning_kernels import backends, reference
from cotuning_kernels.backends.operations import add_to_class_sums_, operation
from cotuning_kernels.labelled_logits import (
    REFERENCE_ROWS,
    check_labelled_logits,
    first_row_without_softmax,
    positive_integer,
    positive_number,
    warn_of_probabilities,
)
from cotuning_kernels.processes import rank_and_size
from cotuning_kernels.relationship.matrix import Relationship, check_empty_policy, class_names, fill_empty_classes
from cotuning_kernels.validation import check_ignore_index

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RelationshipEstimator", "check_sums_dtype"]


class _Counted(NamedTuple):
    """The sums ``(N_t, N_s)``, without columns while ``N_s`` is unknown, and the int64 counts ``(N_t,)``."""

    sums: Tensor
    counts: Tensor
    all_reduced: bool


def check_sums_dtype(dtype: torch.dtype) -> None:
    """Require a dtype in which the sums of a relationship keep their digits."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64: the sums need the precision")


class RelationshipEstimator:
    """Learns a direct relationship from a stream of batches, in memory ``N_t * N_s`` for any number of samples.

    Example::

        estimator = RelationshipEstimator(num_target_classes)
        for images, labels in loader:
            estimator.update(source_model(images), labels)
        relationship = estimator.compute(target_classes=names)

    Put the model into eval mode (:func:`learn_relationship` does so) and use a loader without augmentation.

    Args:
        num_target_classes: ``N_t``.
        num_source_classes: ``N_s``; ``None`` takes it from the first batch.
        temperature: the source logits are divided by it; see :func:`cotuning_kernels.fit_temperature`. Its inverse must
            be finite in float32.
        ignore_index: rows with this label are not counted.
        dtype: of the sums, float32 or float64. Each float32 addition rounds by up to 6e-8 of the sum so far. These
            errors usually cancel; at worst they grow with the samples of a class. Use float64 for classes with more
            than about 100 000 samples (tokens, pixels); it takes twice the memory.
        device: of the sums, and so of the logits; ``None`` keeps the sums on the device of the latest batch.
        backend: see :func:`cotuning_kernels.backends.select`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
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
        num_target_classes = positive_integer("num_target_classes", num_target_classes)
        if num_source_classes is not None:
            num_source_classes = positive_integer("num_source_classes", num_source_classes)
        check_sums_dtype(dtype)
        self.num_target_classes = num_target_classes
        self.temperature = positive_number("temperature", temperature)
        # The kernels multiply z - max(z), which is 0 at the maximum, by the inverse: infinity times 0 is NaN.
        if 1 / self.temperature > torch.finfo(torch.float32).max:
            least = 1 / torch.finfo(torch.float32).max
            raise ValueError(
                f"temperature is {self.temperature:.4g}, expected at least {least:.4g}: its inverse is not finite in "
                "float32"
            )
        check_ignore_index(ignore_index)
        self.ignore_index = int(ignore_index)
        # Ordinary tensors even under torch.inference_mode: the estimator may be updated outside of it.
        with torch.inference_mode(False):
            sums = torch.zeros(num_target_classes, num_source_classes or 0, dtype=dtype, device=device or "cpu")
            counts = torch.zeros(num_target_classes, dtype=torch.int64, device=device or "cpu")
        self._counted = _Counted(sums, counts, all_reduced=False)
        self._spare: _Counted | None = None
        self._follows_batches = device is None
        self._looked_for_probabilities = False
        self._backend = backend
        backends.check_name(backend)
        if not self._follows_batches:
            backends.select(self.device.type, backend, self.device.index)  # raises now, not with the first batch

    def __repr__(self) -> str:
        sums, counts, _ = self._counted
        return (
            f"RelationshipEstimator({self.num_target_classes}, {self.num_source_classes}, "
            f"temperature={self.temperature:.4g}, rows={int(counts.sum())}, {sums.dtype}, {self.device})"
        )

    @property
    def num_source_classes(self) -> int | None:
        """``N_s``; ``None`` if it was not given and no batch has come yet."""
        return self._counted.sums.shape[1] or None

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self._counted.sums.device

    @property
    def sums(self) -> Tensor:
        """A copy of the summed probabilities, ``(N_t, N_s)``."""
        return self._counted.sums.clone()

    @property
    def counts(self) -> Tensor:
        """A copy of the number of rows of each target class, int64 ``(N_t,)``."""
        return self._counted.counts.clone()

    def update(self, source_logits: Tensor, labels: Tensor) -> None:
        """Count a batch. A batch that raises, or that Ctrl-C interrupts, is not counted, not even in part.

        Args:
            source_logits: ``(B, N_s)``, ``(N_s,)`` or ``(B, N_s, d1, ...)``; float32, bfloat16, float16 or float64, on
                the estimator's device. A masked source class may be -inf. A first batch of probabilities
                causes a warning.
            labels: target classes, int64 or int32, ``(B,)``, ``()`` or ``(B, d1, ...)``, or ``ignore_index``.

        Raises:
            TypeError, ValueError: a wrong type, shape or device, or a row with NaN, +inf or nothing but -inf.
            IndexError: a label out of range; names the row and the value.
            RuntimeError: the estimator already holds the sums of all processes (:meth:`all_reduce`).
        """
        after = self._with_batch(source_logits, labels)  # of detached logits: nothing to record for a gradient
        # The batch counts from here on: Python acts on a signal after a call, and no call follows.
        self._counted, self._spare = after, self._counted

    def _with_batch(self, source_logits: Tensor, labels: Tensor) -> _Counted:
        before = self._counted
        if before.all_reduced:
            raise RuntimeError(
                "this estimator holds the sums of all processes; the others would not have what this one adds now. "
                "Count everything before all_reduce"
            )
        logits, labels = check_labelled_logits(
            "source_logits", source_logits, labels, self.num_target_classes, self.ignore_index,
            kernel_checks_labels=self._by_cpu_kernel(source_logits),
        )  # fmt: skip
        if self.num_source_classes is not None and logits.shape[1] != self.num_source_classes:
            raise ValueError(
                f"source_logits has {logits.shape[1]} classes, but the estimator was made for {self.num_source_classes}"
            )
        if logits.device != self.device and not self._follows_batches:
            raise ValueError(
                f"source_logits is on {logits.device}, but the estimator on {self.device}; make it with device=..., so "
                "that the sums are taken where the logits are"
            )
        if not self._looked_for_probabilities:
            warn_of_probabilities("source_logits", logits, stacklevel=3)
            self._looked_for_probabilities = True
        after, self._spare = self._spare, None  # an interrupted batch leaves unknown sums in it
        if after is None or after.sums.shape[1] != logits.shape[1] or after.sums.device != logits.device:
            after = before = self._copy(logits.shape[1], logits.device)
        if not self._add(before, after, logits, labels):
            self._raise_without_softmax(logits, labels)
            raise ValueError("the softmax of finite source_logits is not finite; are they within the range of float32?")
        return after

    def merge(self, other: RelationshipEstimator) -> None:
        """Add another estimator's sums and counts, as if this one had seen its batches.

        Rounding depends on the order of the additions. Merging 20 000 rows in up to 50 parts in different orders moved
        elements of the relationship by at most 3e-6 of their value in float32, 1e-15 in float64.

        Raises:
            TypeError, ValueError: not an estimator, or one with other classes or another temperature; or only one of
                the two holds the sums of all processes (:meth:`all_reduce`).
        """
        if not isinstance(other, RelationshipEstimator):
            raise TypeError(f"other is a {type(other).__name__}, expected a RelationshipEstimator")
        source_classes = {self.num_source_classes, other.num_source_classes} - {None}
        if other._settings() != self._settings() or len(source_classes) > 1:
            raise ValueError(f"{other} cannot be merged into {self}: classes and temperature must be the same")
        mine, theirs = self._counted, other._counted
        if theirs.all_reduced != mine.all_reduced and mine.counts.any():
            raise ValueError(
                "one of the two estimators holds the sums of all processes and the other those of this one alone; "
                "merge them before all_reduce"
            )
        if other.num_source_classes is None:
            return  # it has counted nothing
        with torch.no_grad():
            after = self._copy(other.num_source_classes, self.device)._replace(all_reduced=theirs.all_reduced)
            after.sums.add_(theirs.sums.to(after.sums))
            after.counts.add_(theirs.counts.to(self.device))
        self._counted, self._spare = after, None

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Add up the sums of the processes of ``group``, each of which has seen its share of the data.

        Call it once, at the end. Without torch.distributed (one process, no launcher) it does nothing, so the same
        script works for one process and for several.

        Raises:
            RuntimeError: a launcher started several processes, but ``init_process_group`` was not called (the result
                would come from one share only); or the estimator was reduced before.
            ValueError: the processes have estimators of different classes or temperatures.
        """
        before = self._counted
        if before.all_reduced:
            raise RuntimeError(
                "this estimator already holds the sums of all processes; a second all_reduce would count them again"
            )
        from torch import distributed

        _, processes = rank_and_size(group)
        if not distributed.is_available() or not distributed.is_initialized():
            return
        # Tensors of different sizes would hang or abort in the sum itself.
        settings: list[Any] = [None] * processes
        mine = (self.num_target_classes, self.num_source_classes, self.temperature, str(before.sums.dtype))
        distributed.all_gather_object(settings, mine, group=group)
        if len(set(settings)) > 1:
            raise ValueError(
                f"the processes have different (N_t, N_s, temperature, dtype): {settings}; make them alike"
            )
        with torch.no_grad():
            after = self._copy(before.sums.shape[1], self.device)._replace(all_reduced=True)
            distributed.all_reduce(after.sums, group=group)
            distributed.all_reduce(after.counts, group=group)
        self._counted, self._spare = after, None

    def compute(
        self,
        *,
        empty: str = "unsupervised",
        target_classes: Sequence[str] | None = None,
        source_classes: Sequence[str] | None = None,
    ) -> Relationship:
        """The relationship from the batches so far; more batches may follow.

        Args:
            empty: the row of a target class without samples. ``"unsupervised"``: a row of zeros (the class trains the
                target head only) and a warning that names it. ``"uniform"``: ``1 / N_s`` everywhere. ``"error"``: a
                ValueError that names it.
            target_classes, source_classes: names to keep with the relationship.

        Raises:
            ValueError: nothing was counted, an empty class under ``empty="error"``, or names that do not fit.
        """
        check_empty_policy(empty)
        names = class_names("target_classes", target_classes, self.num_target_classes)
        self._spare = None  # its memory serves the result
        sums, counts, _ = self._counted
        if not counts.any():
            raise ValueError("nothing was counted yet (every label ignored, or no update); there is no relationship")
        with torch.inference_mode(False), torch.no_grad():
            # The row sums are the counts up to rounding. Dividing by them makes rows sum to 1 after any number of
            # float32 additions.
            matrix = sums / sums.sum(dim=1, keepdim=True)
            counts = counts.clone()
            matrix = fill_empty_classes(matrix, counts, empty, names)
        return Relationship(
            matrix,
            target_classes=names,
            source_classes=class_names("source_classes", source_classes, matrix.shape[1]),
            method="direct",
            temperature=self.temperature,
            counts=counts,
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums and counts, for ``torch.save``, to continue after an interruption."""
        return {
            "sums": self.sums,
            "counts": self.counts,
            "temperature": self.temperature,
            "all_reduced": self._counted.all_reduced,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the counts by those of a :meth:`state_dict`.

        Raises:
            ValueError: not such a state, one with other classes or another temperature, or a damaged one. The estimator
                stays unchanged.
        """
        expected = {"sums", "counts", "temperature", "all_reduced"}
        if not isinstance(state, Mapping) or set(state) != expected:
            keys = f" with keys {sorted(map(str, state))}" if isinstance(state, Mapping) else ""
            raise ValueError(
                f"state is a {type(state).__name__}{keys}, expected a RelationshipEstimator.state_dict() with keys "
                f"{sorted(expected)}"
            )
        shape = (self.num_target_classes, self.num_source_classes or _columns(state["sums"]))
        sums = _checked_state("sums", state["sums"], shape, (torch.float32, torch.float64))
        counts = _checked_state("counts", state["counts"], shape[:1], (torch.int64,))
        if ((sums > 0).any(dim=1) != (counts > 0)).any():
            raise ValueError("state['sums'] and state['counts'] have rows of different classes; the state is damaged")
        if state["temperature"] != self.temperature:
            raise ValueError(
                f"the state was counted at temperature {state['temperature']}, but the estimator has "
                f"{self.temperature}; make it with the same temperature"
            )
        if not isinstance(state["all_reduced"], bool):
            raise ValueError(f"state['all_reduced'] is {state['all_reduced']!r:.80}, expected a bool")
        device = sums.device if self._follows_batches else self.device
        with torch.inference_mode(False), torch.no_grad():
            sums, counts = sums.to(device, self._counted.sums.dtype, copy=True), counts.to(device, copy=True)
        after = _Counted(sums, counts, state["all_reduced"])
        self._counted, self._spare = after, None

    def _settings(self) -> tuple[int, float]:
        return self.num_target_classes, self.temperature

    def _copy(self, num_source_classes: int, device: torch.device) -> _Counted:
        """A copy of the sums and counts, as ordinary tensors even under inference mode; adds missing columns."""
        sums, counts, all_reduced = self._counted
        with torch.inference_mode(False), torch.no_grad():
            if sums.shape[1] == 0:
                sums = sums.new_zeros(self.num_target_classes, num_source_classes, device=device)
            else:
                sums = sums.to(device, copy=True)
            return _Counted(sums, counts.to(device, copy=True), all_reduced)

    def _by_cpu_kernel(self, logits: Any) -> bool:
        return (
            self._backend in ("auto", "cpp")
            and isinstance(logits, Tensor)
            and logits.is_cpu
            and backends.select("cpu", self._backend) == "cpp"
        )

    def _add(self, before: _Counted, after: _Counted, logits: Tensor, labels: Tensor) -> bool:
        """Make ``after`` the sums ``before`` and the batch; False if a row has no softmax.

        Both may be the same tensors. Otherwise ``after`` has other sums than ``before`` only where its count differs.
        """
        if self._by_cpu_kernel(logits):
            first_bad_row = add_to_class_sums_(
                after.sums, after.counts, before.sums, before.counts, logits, labels, 1 / self.temperature,
                self.ignore_index,
            )  # fmt: skip
            return bool(first_bad_row < 0)
        if after is not before:
            stale = (after.counts != before.counts).nonzero().squeeze(1)
            after.sums.index_copy_(0, stale, before.sums.index_select(0, stale))
            after.counts.copy_(before.counts)
        # Read the smaller of the batch and the sums to find a NaN.
        checks_batch = logits.numel() < after.sums.numel()
        if checks_batch and first_row_without_softmax(logits, labels, self.ignore_index) is not None:
            return False
        self._add_in_place(after, logits, labels)
        return checks_batch or bool(torch.isfinite(after.sums.sum()))

    def _add_in_place(self, counted: _Counted, logits: Tensor, labels: Tensor) -> None:
        backend = backends.select(logits.device.type, self._backend, logits.device.index)
        if backend != "reference":
            operation("add_class_sums_", backend)(
                counted.sums, counted.counts, logits, labels, 1 / self.temperature, self.ignore_index
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
            counted.sums.add_(sums)
            counted.counts.add_(counts)

    def _raise_without_softmax(self, logits: Tensor, labels: Tensor) -> None:
        found = first_row_without_softmax(logits, labels, self.ignore_index)
        if found is not None:
            row, reason = found
            raise ValueError(f"source_logits[{row}] has no softmax: {reason}. The batch was not counted")


def _columns(sums: Any) -> int | None:
    return sums.shape[1] if isinstance(sums, Tensor) and sums.dim() == 2 else None


def _checked_state(name: str, value: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"state[{name!r}] is {found}, expected a Tensor of shape {shape}")
    if value.dtype not in dtypes:
        raise ValueError(
            f"state[{name!r}] is {value.dtype}, expected {' or '.join(map(str, dtypes))}; the state is damaged"
        )
    if not (torch.isfinite(value).all() and (value >= 0).all()):
        raise ValueError(f"state[{name!r}] has negative or non-finite values; the state is damaged")
    return value
