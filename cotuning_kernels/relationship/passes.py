"""One pass of the pretrained classifier over a loader, and its checkpoint on disk.

:func:`run` gives the classifier's logits to a *collector*, batch by batch. The direct method's collector is a
:class:`~cotuning_kernels.relationship.RelationshipEstimator`, the reverse one's a :class:`LogitCollector`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cotuning_kernels.calling import call, evaluating, inputs_in, logits_in
from cotuning_kernels.labelled_logits import check_labelled_logits, first_row_without_softmax, warn_of_probabilities
from cotuning_kernels.processes import several_processes
from cotuning_kernels.relationship.matrix import class_names
from cotuning_kernels.shapes import logits_as_rows, shape_of_labels
from cotuning_kernels.tensor_file import TensorFile

__all__ = ["Checkpoint", "CheckpointError", "Collector", "LogitCollector", "checkpoint_path", "run", "type_name"]

_DESCRIPTIONS = {"loader": "learning the relationship", "validation_loader": "reading the validation data"}


class CheckpointError(ValueError):
    """The statistics on disk are damaged, or belong to another model, other data or other settings."""


_CHECKPOINT_FILE = TensorFile(
    format="cotuning_kernels.statistics",
    version=1,
    noun="a checkpoint of learn_relationship",
    if_foreign="remove it to start again",
    if_damaged="remove it to start again",
    error=CheckpointError,
)


class Collector(Protocol):
    """Takes logits and labels batch by batch."""

    def update(self, source_logits: Tensor, labels: Tensor, /) -> None:
        """Take a batch. A batch that raises is not taken, not even in part."""

    def all_reduce(self) -> None:
        """Add the other processes' batches. Called once, at the end."""

    def state_dict(self) -> dict[str, Any]:
        """The state after all batches so far."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Replace the state by a :meth:`state_dict`."""


class LogitCollector:
    """A :class:`Collector` that keeps the logits and labels of the labelled rows, for the reverse method."""

    def __init__(self, num_target_classes: int, ignore_index: int) -> None:
        self._num_target_classes, self._ignore_index = num_target_classes, ignore_index
        self._batches: list[tuple[Tensor, Tensor]] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep the labelled rows of a batch."""
        logits, labels = self._checked(logits, labels)
        if self._batches and logits.shape[1] != self._batches[0][0].shape[1]:
            raise ValueError(
                f"source_logits has {logits.shape[1]} classes, but those before had {self._batches[0][0].shape[1]}"
            )
        if not self._batches:
            warn_of_probabilities("source_logits", logits, stacklevel=2)
        labelled = labels != self._ignore_index
        self._batches.append((logits[labelled], labels[labelled].long()))

    def rows(self) -> tuple[Tensor, Tensor]:
        """All logits ``(rows, N_s)`` and labels ``(rows,)``, on the device of the latest batch."""
        device = self._batches[-1][0].device  # batches from a checkpoint may be on another device
        logits, labels = zip(*self._batches, strict=True)
        return torch.cat([x.to(device) for x in logits]), torch.cat([x.to(device) for x in labels])

    def all_reduce(self) -> None:
        """Gather the rows of all processes, in the order of their ranks."""
        from torch import distributed

        if not several_processes():
            return
        logits, labels = self.rows()
        everyones: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyones, (logits.cpu(), labels.cpu()))
        self._batches = [(theirs[0].to(logits.device), theirs[1].to(logits.device)) for theirs in everyones]

    def state_dict(self) -> dict[str, Any]:
        """The rows, for a checkpoint."""
        logits, labels = self.rows()
        return {"logits": logits, "labels": labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the rows by those of a :meth:`state_dict`.

        Raises:
            TypeError, ValueError, IndexError: the state is another collector's, or damaged.
        """
        if set(state) != {"logits", "labels"}:
            raise ValueError(f"the state has {sorted(state)}, expected ['labels', 'logits']")
        logits, labels = self._checked(state["logits"], state["labels"])
        if labels.dtype != torch.int64 or (labels == self._ignore_index).any():
            raise ValueError(f"the state has labels of {labels.dtype}, or ignored ones; expected the int64 labels kept")
        self._batches = [(logits, labels)]

    def _checked(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = check_labelled_logits(
            "source_logits", logits, labels, self._num_target_classes, self._ignore_index
        )
        found = first_row_without_softmax(logits, labels, self._ignore_index)
        if found is not None:
            raise ValueError(f"source_logits[{found[0]}] has no softmax: {found[1]}")
        return logits, labels


def run(
    source_model: Callable[..., Any],
    loader: Iterable[Any],
    collector: Collector,
    what: str,
    source_classes: Sequence[str] | None,
    device: torch.device | None,
    progress: bool,
    max_batches: int | None,
    checkpoint: Checkpoint | None,
) -> int:
    """Run the model over the batches of a loader and give its logits to the collector.

    Returns:
        The number of batches, including those in the checkpoint.

    Raises:
        TypeError, ValueError, IndexError: from a batch, from the model or from the collector; names the batch.
        CheckpointError: the loader or the model gives other data than before.
    """
    count = 0
    # Not inference_mode: tensors that a model caches in its first forward pass (rotary tables, resized position
    # embeddings) would be inference tensors, and the model could not be trained afterwards.
    with evaluating(source_model), torch.no_grad():
        for index, batch in enumerate(_batches(loader, max_batches, progress, what)):
            where = f"batch {index} of the {what}"
            inputs, labels = _inputs_and_labels(batch, where)
            count = index + 1
            if checkpoint is not None and checkpoint.has_counted(index, labels):
                continue
            logits = _logits(call(source_model, inputs, device), labels, where)
            if index == 0:
                class_names("source_classes", source_classes, logits.shape[1])
            if checkpoint is not None:
                checkpoint.check_columns(logits.shape[1])
            try:
                collector.update(logits, labels.flatten())
            except (TypeError, ValueError, IndexError) as error:
                raise type(error)(f"{where}: {error}") from error
            if checkpoint is not None:
                checkpoint.counted(index)
    if checkpoint is not None:
        checkpoint.finish()
    return count


class Checkpoint:
    """A collector's state on disk, with the number of its batches and a digest of their labels.

    The digest shows whether a loader gives the same batches again.

    Args:
        path: the file of this pass and process (:func:`checkpoint_path`).
        source_model: its type and weights must be those of the checkpoint.
        settings: must be those of the checkpoint.
        collector: gets the state if the file exists.
        every: batches between two saves.
        device: where the state goes; the CPU by default.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model or other settings.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        path: Path,
        source_model: Callable[..., Any],
        settings: dict[str, Any],
        collector: Collector,
        every: int,
        device: torch.device | None,
    ) -> None:
        self._path, self._collector, self._every, self._device = path, collector, every, device
        self._identity = {"model": _digest_of_model(source_model), "settings": settings}
        self._labels, self._seen = hashlib.sha256(), 0
        self._batches, self._expected_labels, self._columns = 0, "", 0
        if self._path.exists():
            self._load()

    def has_counted(self, index: int, labels: Tensor) -> bool:
        """Whether batch ``index`` is already in the state. Call it for every batch, in order."""
        self._labels.update(labels.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._seen = index + 1
        if index + 1 == self._batches and self._labels.hexdigest() != self._expected_labels:
            raise CheckpointError(
                f"{self._path} was written after {self._batches} batches with other labels than the loader gives now: "
                f"does it shuffle, or is it other data? Use shuffle=False, or remove the file to start again"
            )
        return index < self._batches

    def counted(self, index: int) -> None:
        """Save after every ``every``-th batch."""
        if (index + 1) % self._every == 0:
            self._save()

    def finish(self) -> None:
        """Save at the end of the pass: a later pass may still be interrupted."""
        if self._seen > self._batches:
            self._save()
        if self._seen < self._batches:
            raise CheckpointError(
                f"{self._path} was written after {self._batches} batches, but the loader has fewer: it is other data. "
                "Remove the file to start again"
            )

    def check_columns(self, num_source_classes: int) -> None:
        """Raise if the model gives another number of classes than before.

        A plain function has no weights to compare, so only the number of classes can show that it is another one.
        """
        if self._columns not in (0, num_source_classes):
            raise CheckpointError(
                f"{self._path} was written with {self._columns} source classes, but the model gives "
                f"{num_source_classes}: it is another model. Remove the file to start again"
            )

    def _save(self) -> None:
        state = self._collector.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        record = {
            "identity": self._identity,
            "batches": self._seen,
            "labels": self._labels.hexdigest(),
            "state": {name: value for name, value in state.items() if name not in tensors},
        }
        _CHECKPOINT_FILE.write(self._path, tensors, record)
        self._batches = self._seen

    def _load(self) -> None:
        tensors, record = _CHECKPOINT_FILE.read(self._path)
        identity, batches, labels, state = (record.get(name) for name in ("identity", "batches", "labels", "state"))
        if (
            not isinstance(identity, dict)
            or type(batches) is not int
            or batches < 1
            or not isinstance(labels, str)
            or not re.fullmatch("[0-9a-f]{64}", labels)
            or not isinstance(state, dict)
            or state.get("all_reduced", False) is not False
        ):
            raise CheckpointError(
                f"{self._path} is damaged: its record is not that of a pass; {_CHECKPOINT_FILE.if_damaged}"
            )
        if identity != self._identity:
            changed = [name for name in self._identity if identity.get(name) != self._identity[name]]
            raise CheckpointError(
                f"{self._path} is of another {' and other '.join(changed) or 'program'}; remove it to start again, or "
                "use the same model and settings as before"
            )
        device = self._device or torch.device("cpu")
        try:
            self._collector.load_state_dict(state | {name: tensor.to(device) for name, tensor in tensors.items()})
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self._path} is damaged: {error}; {_CHECKPOINT_FILE.if_damaged}") from error
        self._batches, self._expected_labels = batches, labels
        self._columns = next(tensor.shape[1] for tensor in tensors.values() if tensor.dim() == 2)


def checkpoint_path(path: str | os.PathLike[str], what: str) -> Path:
    """The file of one pass and one process."""
    name = os.fspath(path) + ("" if what == "loader" else f".{what}")
    if several_processes():
        name += f".{torch.distributed.get_rank()}"
    return Path(name)


def _digest_of_model(model: Callable[..., Any]) -> str:
    """Digest of the model's type and weights, so that a checkpoint is not resumed with another model."""
    digest = hashlib.sha256(type_name(model).encode())
    if isinstance(model, nn.Module):
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _batches(loader: Iterable[Any], max_batches: int | None, progress: bool, what: str) -> Iterable[Any]:
    batches = itertools.islice(loader, max_batches)
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    try:
        total: int | None = len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable dataset has no length
        total = None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    bar: Iterable[Any] = tqdm(batches, total=total, desc=_DESCRIPTIONS[what], unit="batch")
    return bar


def _inputs_and_labels(batch: Any, where: str) -> tuple[Any, Tensor]:
    """From ``(inputs, labels)``, ``(inputs, labels, index, ...)``, or a mapping that holds the labels as ``labels``."""
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs, labels = inputs_in(batch), batch["labels"]
    elif isinstance(batch, list | tuple) and len(batch) >= 2:
        inputs, labels = batch[:2]
    else:
        size = f" of {len(batch)}" if isinstance(batch, list | tuple | Mapping) else ""
        raise TypeError(
            f"{where} is a {type(batch).__name__}{size}, expected (inputs, labels) or a mapping with 'labels' in it; "
            "for another form write the loop with RelationshipEstimator.update"
        )
    if not isinstance(inputs, Tensor | Mapping) or not isinstance(labels, Tensor):
        raise TypeError(
            f"{where} is ({type(inputs).__name__}, {type(labels).__name__}), expected inputs as a Tensor or a mapping "
            f"of Tensors, and labels as a Tensor of class indices{_ONE_BY_ONE if isinstance(labels, Integral) else ''}"
        )
    if labels.dim() == 0:
        raise TypeError(f"{where} has a single label, expected a Tensor of them{_ONE_BY_ONE}")
    return inputs, labels


_ONE_BY_ONE = "; a dataset gives its examples one by one, pass torch.utils.data.DataLoader(dataset, batch_size=64)"


def _logits(output: Any, labels: Tensor, where: str) -> Tensor:
    """The model's logits, ``(B, ..., N_s)`` or ``(B, N_s, d1, ...)``, as ``(rows, N_s)``: one row per label."""
    logits = logits_in(output)
    if isinstance(logits, Tensor) and logits.dim() > 2:
        last, second = logits.shape[:-1] == labels.shape, shape_of_labels(logits) == labels.shape
        if last and second:
            raise TypeError(
                f"{where}: the source model gave logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(labels.shape)}, so the classes may be dimension 1 or the last; let the model flatten them to "
                "(rows, N_s), and the loader its labels"
            )
        if last:
            return logits.flatten(0, -2)
        if second:
            return logits_as_rows(logits)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"a Tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"{where}: the source model gave {found}{keys}, expected logits (B, N_s) as a Tensor, output.logits, "
            "output['logits'] or the first of a tuple; wrap the model, or write the loop with "
            "RelationshipEstimator.update"
        )
    return logits


def type_name(model: Any) -> str:
    """The model's name in a checkpoint and in a relationship's metadata."""
    return str(getattr(model, "__name__", type(model).__name__))
