"""The relationship of a model and a loader: both methods of the paper behind one call.

:func:`learn_relationship` runs the pretrained classifier over the data once and hands what it predicts to a *sink*: for
the direct method a :class:`~cotuning_kernels.relationship.RelationshipEstimator`, for the reverse one a list of the
logits, from which :mod:`cotuning_kernels.relationship.reverse` learns. A pass may be interrupted and resumed
(``checkpoint=``), or shared by the processes of torch.distributed (``distributed=True``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import operator
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cotuning_kernels import backends
from cotuning_kernels.atomic_file import write_atomically
from cotuning_kernels.distributed import rank_and_size
from cotuning_kernels.labelled_logits import check_labelled_logits, positive_number, unusable_row
from cotuning_kernels.relationship.matrix import Relationship, RelationshipEstimator, check_empty_policy, class_names
from cotuning_kernels.relationship.reverse import INVERSE_PENALTIES, checked_penalties, learn_reverse_relationship

__all__ = ["CheckpointError", "learn_relationship"]

METHODS = ("direct", "reverse")
_CHECKPOINT_FORMAT = "cotuning_kernels.statistics"


class CheckpointError(ValueError):
    """The statistics on disk are damaged, or belong to another model, other data or other settings."""


def learn_relationship(
    source_model: Callable[..., Any],
    loader: Iterable[Any],
    num_target_classes: int | None = None,
    *,
    method: str = "direct",
    validation_loader: Iterable[Any] | None = None,
    temperature: float = 1.0,
    empty: str = "unsupervised",
    target_classes: Sequence[str] | None = None,
    source_classes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    max_batches: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    distributed: bool = False,
) -> Relationship:
    """Learn ``R[t, s] = p(y_source = s | y_target = t)`` from the target training set.

    The model runs in eval mode without gradients; every submodule's training mode is as before afterwards, also when
    something fails. Use a loader without augmentation: the order of its batches does not matter.

    Args:
        source_model: the pretrained classifier, giving logits ``(B, N_s)``: as a tensor, as ``output.logits`` or
            ``output["logits"]``, or as the first of a tuple. Logits with further dimensions, such as ``(B, T, N_s)``
            for tokens, go with labels ``(B, T)``.
        loader: gives ``(inputs, labels)``; inputs a tensor, or a mapping that the model takes as keyword arguments.
        num_target_classes: ``N_t``; by default the number of names in ``target_classes`` or ``loader.dataset.classes``.
        method: ``"direct"``, the mean prediction of each class, or ``"reverse"``, a regression of the target labels on
            the predictions and Bayes' rule (the paper's section 3.2;
            :func:`cotuning_kernels.learn_reverse_relationship`).
        validation_loader: as ``loader``; data on which the reverse method chooses the regression's penalty and its
            temperature. The direct method has nothing to choose and takes none.
        temperature: of the source classifier, see :func:`cotuning_kernels.fit_temperature`.
        empty: see :meth:`RelationshipEstimator.compute`.
        target_classes, source_classes: names; those of the target from ``loader.dataset.classes`` by default.
        device: where the batches go; by default where the model's parameters are. The model is not moved.
        progress: show a progress bar (if tqdm is installed).
        max_batches: stop after so many batches of a loader.
        ignore_index, backend, dtype: see :class:`RelationshipEstimator`; ``dtype`` is of the direct method.
        inverse_penalties: of the reverse method, see :func:`cotuning_kernels.learn_reverse_relationship`.
        checkpoint: a file that the statistics are saved in on the way, and removed when the relationship is there. If
            it exists, learning goes on where it stands, to the same bits: the batches before are fetched (their labels
            show whether they are the same data), but the model does not see them again. Use a loader that does not
            shuffle.
        checkpoint_every: batches between two saves. A save writes all there is: ``4 N_t N_s`` bytes for the direct
            method, the logits so far for the reverse one.
        distributed: each process of torch.distributed gives its share of the data (see
            :class:`cotuning_kernels.distributed.ShardSampler`), and each gets the relationship of all of it. Without a
            launcher it changes nothing. Each process has its own checkpoint, ``checkpoint`` followed by its rank.

    Raises:
        TypeError: the model or the loader gives something else than described here.
        ValueError: unknown method, another setting that has no sense, empty loader, a validation loader that is missing
            or not wanted, number of classes not known, NaN in the logits (names the batch and the row).
        IndexError: a label out of range.
        CheckpointError: the checkpoint is damaged or belongs to something else.
        OSError: the checkpoint cannot be written.
        RuntimeError: ``distributed=True`` and a launcher started several processes, but ``init_process_group`` was not
            called.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    if not callable(source_model):
        raise TypeError(f"source_model is a {type(source_model).__name__}, expected a torch.nn.Module")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}, expected at least 1, or None for all")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}, expected at least 1")
    if (validation_loader is None) == (method == "reverse"):
        raise ValueError(
            "method='reverse' chooses its penalty and its temperature on data that it was not fitted to: pass "
            "validation_loader"
            if method == "reverse"
            else "validation_loader is given, but method='direct' has nothing to choose on it; leave it out, or put "
            "its data into loader"
        )
    if distributed:
        rank_and_size()  # a launcher without init_process_group: no method may take a share for the whole
    num_target_classes, target_classes = _target_classes(loader, num_target_classes, target_classes)
    place = _device_of(source_model) if device is None else torch.device(device)
    # What is wrong is said before the pass over the data, not after it; and as Python's own numbers a setting is the
    # same when the pass is resumed.
    temperature, ignore_index = positive_number("temperature", temperature), operator.index(ignore_index)
    check_empty_policy(empty)
    checked_penalties(inverse_penalties)
    if place is not None:
        backends.select(place.type, backend)
    settings = (num_target_classes, ignore_index)

    def run(sink: Any, batches: Iterable[Any], what: str) -> None:
        file = None if checkpoint is None else _Checkpoint(checkpoint, what, source_model, sink, checkpoint_every)
        _collect(source_model, batches, sink, what, source_classes, place, progress, max_batches, file)
        if distributed:
            _check_every_process_counted(sink)
            sink.all_reduce()
        sink.check_counted(what)

    if validation_loader is None:
        means = _ClassMeans(*settings, temperature=temperature, dtype=dtype, backend=backend, device=place)
        run(means, loader, "loader")
        relationship = means.compute(empty, target_classes, source_classes)
    else:
        train, validation = _Rows(*settings, temperature=temperature), _Rows(*settings, temperature=temperature)
        run(train, loader, "loader")
        run(validation, validation_loader, "validation_loader")
        relationship = learn_reverse_relationship(
            *train.rows(), *validation.rows(), num_target_classes, temperature=temperature, empty=empty,
            inverse_penalties=inverse_penalties, target_classes=target_classes, source_classes=source_classes,
            backend=backend,
        )  # fmt: skip
        if distributed:
            relationship = _of_first_process(relationship)
    if checkpoint is not None:
        for what in ("loader", "validation_loader"):
            _checkpoint_path(checkpoint, what).unlink(missing_ok=True)
    metadata = relationship.metadata | {"source_model": _type_name(source_model)}
    return dataclasses.replace(relationship, metadata=metadata)


# ------------------------------------------------------------------------------------------------ what a pass gathers


class _Sink(Protocol):
    """Takes logits and labels batch by batch."""

    def update(self, logits: Tensor, labels: Tensor) -> None: ...
    def all_reduce(self) -> None: ...
    def check_counted(self, what: str) -> None: ...
    def settings(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _ClassMeans:
    """The sink of the direct method: an estimator that is made when the number of source classes is known."""

    def __init__(
        self,
        num_target_classes: int,
        ignore_index: int,
        *,
        temperature: float,
        dtype: torch.dtype,
        backend: str,
        device: torch.device | None,
    ) -> None:
        self._num_target_classes = num_target_classes
        self._options: dict[str, Any] = {
            "ignore_index": ignore_index, "temperature": temperature, "dtype": dtype, "backend": backend
        }  # fmt: skip
        self._device = device
        self._estimator: RelationshipEstimator | None = None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        if self._estimator is None:
            self._estimator = self._make(logits.shape[1], logits.device)
        elif self._estimator.device != logits.device:
            # One from a checkpoint: where a function, or a model on several devices, leaves its logits shows only now.
            elsewhere = self._estimator
            self._estimator = self._make(elsewhere.num_source_classes, logits.device)
            self._estimator.load_state_dict(elsewhere.state_dict())
        self._estimator.update(logits, labels)

    def all_reduce(self) -> None:
        if self._estimator is not None:
            self._estimator.all_reduce()

    def check_counted(self, what: str) -> None:
        if self._estimator is None:
            raise ValueError(_NO_BATCH.format(what))

    def settings(self) -> dict[str, Any]:
        return {"num_target_classes": self._num_target_classes} | {k: str(v) for k, v in self._options.items()}

    def state_dict(self) -> dict[str, Any]:
        assert self._estimator is not None  # a checkpoint is written after a batch
        return self._estimator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        estimator = self._make(state["sums"].shape[1], self._device or torch.device("cpu"))
        estimator.load_state_dict(state)
        self._estimator = estimator

    def compute(
        self, empty: str, target_classes: Sequence[str] | None, source_classes: Sequence[str] | None
    ) -> Relationship:
        assert self._estimator is not None  # check_counted
        return self._estimator.compute(empty=empty, target_classes=target_classes, source_classes=source_classes)

    def _make(self, num_source_classes: int, device: torch.device) -> RelationshipEstimator:
        return RelationshipEstimator(self._num_target_classes, num_source_classes, device=device, **self._options)


class _Rows:
    """The sink of the reverse method: the logits and labels of the rows that have one."""

    def __init__(self, num_target_classes: int, ignore_index: int, *, temperature: float) -> None:
        self._num_target_classes, self._ignore_index = num_target_classes, ignore_index
        self._temperature = temperature
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        logits, labels = check_labelled_logits(
            "source_logits", logits, labels, self._num_target_classes, self._ignore_index
        )
        if self._logits and logits.shape[1] != self._logits[0].shape[1]:
            raise ValueError(
                f"source_logits has {logits.shape[1]} classes, but those before had {self._logits[0].shape[1]}"
            )
        found = unusable_row(logits, labels, self._ignore_index)
        if found is not None:
            raise ValueError(f"source_logits[{found[0]}] has no softmax: {found[1]}")
        labelled = labels != self._ignore_index
        self._logits.append(logits[labelled])
        self._labels.append(labels[labelled].long())

    def rows(self) -> tuple[Tensor, Tensor]:
        device = self._logits[-1].device  # what a checkpoint gave is on the CPU
        return torch.cat([x.to(device) for x in self._logits]), torch.cat([x.to(device) for x in self._labels])

    def all_reduce(self) -> None:
        """The rows of all processes, in the order of their ranks."""
        from torch import distributed

        if not _several_processes():
            return
        logits, labels = self.rows()
        everyones: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyones, (logits.cpu(), labels.cpu()))
        self._logits = [theirs.to(logits.device) for theirs, _ in everyones]
        self._labels = [theirs.to(logits.device) for _, theirs in everyones]

    def check_counted(self, what: str) -> None:
        if not self._logits:
            raise ValueError(_NO_BATCH.format(what))

    def settings(self) -> dict[str, Any]:
        # The temperature is applied later, but who changes it should not have to wonder whether it was.
        return {
            "num_target_classes": self._num_target_classes,
            "ignore_index": self._ignore_index,
            "temperature": self._temperature,
        }

    def state_dict(self) -> dict[str, Any]:
        logits, labels = self.rows()
        return {"logits": logits, "labels": labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logits, self._labels = [state["logits"]], [state["labels"]]


_DESCRIPTIONS = {"loader": "learning the relationship", "validation_loader": "reading the validation data"}
_NO_BATCH = "the {} gave no batch; is its dataset empty, or was it an iterator that is used up?"


def _collect(
    source_model: Callable[..., Any],
    loader: Iterable[Any],
    sink: _Sink,
    what: str,
    source_classes: Sequence[str] | None,
    device: torch.device | None,
    progress: bool,
    max_batches: int | None,
    checkpoint: _Checkpoint | None,
) -> None:
    """Run the model over the batches of a loader, and give what it predicts to the sink."""
    # Not inference_mode: what a model caches in its first forward pass (rotary tables, resized position embeddings)
    # would be inference tensors, and the same model could not be trained afterwards.
    with _evaluating(source_model), torch.no_grad():
        for index, batch in enumerate(_batches(loader, max_batches, progress, what)):
            where = f"batch {index} of the {what}"
            inputs, labels = _inputs_and_labels(batch, where)
            if checkpoint is not None and checkpoint.has_counted(index, labels):
                continue
            logits = _logits(_apply(source_model, inputs, device), labels, where)
            if index == 0:
                class_names("source_classes", source_classes, logits.shape[1])
                _warn_of_probabilities(logits)
            try:
                sink.update(logits, labels.flatten())
            except (TypeError, ValueError, IndexError) as error:
                raise type(error)(f"{where}: {error}") from error
            if checkpoint is not None:
                checkpoint.counted(index)
    if checkpoint is not None:
        checkpoint.finish()


class _Checkpoint:
    """What a pass has gathered, on disk, with the number of its batches and a digest of their labels.

    The digest tells a loader that gives the same batches again from one that does not.
    """

    def __init__(
        self, path: str | os.PathLike[str], what: str, source_model: Callable[..., Any], sink: _Sink, every: int
    ) -> None:
        self._path = _checkpoint_path(path, what)
        self._sink, self._every = sink, every
        self._identity = {"model": _digest_of_model(source_model), "settings": sink.settings()}
        self._labels, self._seen = hashlib.sha256(), 0
        self._batches, self._expected_labels = 0, ""
        if self._path.exists():
            self._load()

    def has_counted(self, index: int, labels: Tensor) -> bool:
        """Whether batch ``index`` is in the statistics already; to be asked for every batch, in order."""
        self._labels.update(labels.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._seen = index + 1
        if index + 1 == self._batches and self._labels.hexdigest() != self._expected_labels:
            raise CheckpointError(
                f"{self._path} was written after {self._batches} batches with other labels than the loader gives now: "
                f"does it shuffle, or is it other data? Use shuffle=False, or remove the file to start again"
            )
        return index < self._batches

    def counted(self, index: int) -> None:
        if (index + 1) % self._every == 0:
            self._save()

    def finish(self) -> None:
        """The pass is over: a later one may still be interrupted."""
        if self._seen > self._batches:
            self._save()
        if self._seen < self._batches:
            raise CheckpointError(
                f"{self._path} was written after {self._batches} batches, but the loader has fewer: it is other data. "
                "Remove the file to start again"
            )

    def _save(self) -> None:
        buffer = io.BytesIO()
        content = {
            "format": _CHECKPOINT_FORMAT,
            "identity": self._identity,
            "batches": self._seen,
            "labels": self._labels.hexdigest(),
            "state": self._sink.state_dict(),
        }
        torch.save(content, buffer)
        write_atomically(self._path, buffer.getvalue())
        self._batches = self._seen

    def _load(self) -> None:
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True)
            found = content["format"], content["identity"], content["batches"], content["labels"], content["state"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._path} is not a checkpoint of learn_relationship, or is damaged ({type(error).__name__}: "
                f"{error!s:.200}); remove it to start again"
            ) from error
        format_, identity, self._batches, self._expected_labels, state = found
        if format_ != _CHECKPOINT_FORMAT or identity != self._identity:
            changed = [name for name in self._identity if identity.get(name) != self._identity[name]]
            raise CheckpointError(
                f"{self._path} is of another {' and other '.join(changed) or 'program'}; remove it to start again, or "
                "use the same model and settings as before"
            )
        self._sink.load_state_dict(state)


def _checkpoint_path(path: str | os.PathLike[str], what: str) -> Path:
    """One file a pass, and a process."""
    name = os.fspath(path) + ("" if what == "loader" else f".{what}")
    if _several_processes():
        name += f".{torch.distributed.get_rank()}"
    return Path(name)


def _digest_of_model(model: Callable[..., Any]) -> str:
    """Of the type and the weights: statistics of another model must not be continued."""
    digest = hashlib.sha256(_type_name(model).encode())
    if isinstance(model, nn.Module):
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- several processes


def _several_processes() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _check_every_process_counted(sink: _Sink) -> None:
    """A process without a batch does not know how wide the sums are; the others would wait for it for ever."""
    if not _several_processes():
        return
    from torch import distributed

    try:
        sink.check_counted("")
        mine = True
    except ValueError:
        mine = False
    counted: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(counted, mine)
    if not all(counted):
        idle = [rank for rank, some in enumerate(counted) if not some]
        raise ValueError(f"processes {idle} had no batch; start fewer processes, or use smaller batches")


def _of_first_process(relationship: Relationship) -> Relationship:
    """All processes compute the same from the same rows; on unlike machines a tie may still be broken otherwise."""
    if not _several_processes():
        return relationship
    from torch import distributed

    device = relationship.matrix.device
    held = [relationship.to("cpu")]
    distributed.broadcast_object_list(held)
    return held[0].to(device)


# --------------------------------------------------------------------------------------------- the model and the loader


def _target_classes(
    loader: Iterable[Any], num_target_classes: int | None, names: Sequence[str] | None
) -> tuple[int, tuple[str, ...] | None]:
    """How many target classes there are, and what they are called, from the arguments or from the loader's dataset."""
    if names is None:
        found = _dataset_classes(loader)
        if found is not None and num_target_classes in (None, len(found)):
            names = found
    if num_target_classes is None:
        if names is None:
            raise ValueError(
                "num_target_classes is not given, and loader.dataset has no list of `classes` to count; pass "
                "num_target_classes or target_classes"
            )
        num_target_classes = len(names)
    return num_target_classes, class_names("target_classes", names, num_target_classes)


def _dataset_classes(loader: Iterable[Any]) -> tuple[str, ...] | None:
    dataset = getattr(loader, "dataset", None)
    # torch.utils.data.Subset and its like keep the labels of the dataset that they wrap.
    while dataset is not None and not hasattr(dataset, "classes"):
        dataset = getattr(dataset, "dataset", None)
    classes = getattr(dataset, "classes", None)
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) and classes else None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode; afterwards every submodule is in the mode that it was in, frozen BatchNorm layers included."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _device_of(model: Any) -> torch.device | None:
    if not isinstance(model, nn.Module):
        return None
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def _batches(loader: Iterable[Any], max_batches: int | None, progress: bool, what: str) -> Iterable[Any]:
    batches = itertools.islice(loader, max_batches)
    if not progress:
        return batches
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
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
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, list | tuple | Mapping) else ""
        raise TypeError(
            f"{where} is a {type(batch).__name__}{size}, expected (inputs, labels); for another form write the loop "
            "with RelationshipEstimator.update"
        )
    inputs, labels = batch
    if not isinstance(inputs, Tensor | Mapping) or not isinstance(labels, Tensor):
        raise TypeError(
            f"{where} is ({type(inputs).__name__}, {type(labels).__name__}), expected inputs as a Tensor or a mapping "
            f"of Tensors, and labels as a Tensor of class indices{_ONE_BY_ONE if isinstance(labels, Integral) else ''}"
        )
    if labels.dim() == 0:
        raise TypeError(f"{where} has a single label, expected a Tensor of them{_ONE_BY_ONE}")
    return inputs, labels


_ONE_BY_ONE = "; a dataset gives its examples one by one, pass torch.utils.data.DataLoader(dataset, batch_size=64)"


def _warn_of_probabilities(logits: Tensor) -> None:
    """Their softmax is nearly uniform, and the relationship learnt from it says nothing; nothing else would tell."""
    rows = logits.double()
    if rows.numel() > len(rows) and bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "learn_relationship: the source model's outputs are not negative and sum to 1 in every row, as "
            "probabilities do, and logits are expected; leave out the model's softmax, or pass the logarithm of what "
            "it gives",
            stacklevel=4,
        )


def _apply(model: Callable[..., Any], inputs: Tensor | Mapping[str, Any], device: torch.device | None) -> Any:
    def moved(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) and device is not None else value

    if isinstance(inputs, Tensor):
        return model(moved(inputs))
    return model(**{name: moved(value) for name, value in inputs.items()})


def _logits(output: Any, labels: Tensor, where: str) -> Tensor:
    """``(rows, N_s)``: what the model gave, one row a label."""
    logits = output
    if isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple | list) and output:
        logits = output[0]
    if isinstance(logits, Tensor) and logits.dim() > 2 and logits.shape[:-1] == labels.shape:
        return logits.flatten(0, -2)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"a Tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"{where}: the source model gave {found}{keys}, expected logits (B, N_s) as a Tensor, output.logits, "
            "output['logits'] or the first of a tuple; wrap the model, or write the loop with "
            "RelationshipEstimator.update"
        )
    return logits


def _type_name(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))
