"""The relationship of a model and a loader: both methods of the paper behind one call.

:func:`learn_relationship` runs the pretrained classifier over the data once. The direct method adds up the predictions
of each batch (:mod:`cotuning_kernels.relationship.estimator`), the reverse one keeps the logits and learns at the end
(:mod:`cotuning_kernels.relationship.reverse`). A pass may be interrupted and resumed (``checkpoint=``), or shared by
the processes of torch.distributed (``distributed=True``).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset

from cotuning_kernels import backends
from cotuning_kernels.atomic_file import check_writable, remove
from cotuning_kernels.labelled_logits import positive_integer, positive_number
from cotuning_kernels.processes import rank_and_size, several_processes
from cotuning_kernels.relationship import passes
from cotuning_kernels.relationship.estimator import RelationshipEstimator, check_sums_dtype
from cotuning_kernels.relationship.matrix import Relationship, check_empty_policy, class_names
from cotuning_kernels.relationship.passes import CheckpointError
from cotuning_kernels.relationship.reverse import INVERSE_PENALTIES, checked_penalties, learn_reverse_relationship
from cotuning_kernels.validation import check_ignore_index

__all__ = ["CheckpointError", "learn_relationship"]

METHODS = ("direct", "reverse")


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

    The model runs in eval mode without gradients. Afterwards every submodule has its old training mode back, even after
    an error. Use a loader without augmentation; the order of its batches does not matter.

    Args:
        source_model: the pretrained classifier, giving logits ``(B, N_s)``: as a tensor, as ``output.logits`` or
            ``output["logits"]``, or as the first of a tuple. Logits with further dimensions, such as ``(B, T, N_s)``
            for tokens, go with labels ``(B, T)``.
        loader: gives ``(inputs, labels)``, where further members are ignored and the inputs are a tensor, or a mapping
            that the model takes as keyword arguments. Or it gives such mappings with ``"labels"`` in them.
        num_target_classes: ``N_t``; by default the number of names in ``target_classes`` or ``loader.dataset.classes``.
        method: ``"direct"``, the mean prediction of each class, or ``"reverse"``, a regression of the target labels on
            the predictions and Bayes' rule (the paper's section 3.2;
            :func:`cotuning_kernels.learn_reverse_relationship`).
        validation_loader: as ``loader``; the reverse method chooses the regression's penalty and temperature on this
            data. The direct method takes none.
        temperature: of the source classifier, see :func:`cotuning_kernels.fit_temperature`.
        empty: see :meth:`cotuning_kernels.RelationshipEstimator.compute`.
        target_classes, source_classes: names; the target's default is ``loader.dataset.classes``.
        device: where the batches are moved; by default the device of the model's parameters. The model is not moved.
        progress: show a progress bar (if tqdm is installed).
        max_batches: stop after this many batches of a loader.
        ignore_index, backend, dtype: see :class:`RelationshipEstimator`; ``dtype`` is for the direct method.
        inverse_penalties: for the reverse method, see :func:`cotuning_kernels.learn_reverse_relationship`.
        checkpoint: a file for the statistics so far; it is removed when the relationship is learnt. If it exists,
            learning resumes there and gives the same bits: earlier batches are fetched (their labels show whether the
            data are the same), but the model does not see them again. Use a loader that does not shuffle.
        checkpoint_every: batches between two saves. A save writes the whole state: ``4 N_t N_s`` bytes for the direct
            method, the logits so far for the reverse one.
        distributed: each process of torch.distributed reads its share of the data (see
            :class:`cotuning_kernels.distributed.ShardSampler`), and each gets the relationship of all the data. Without
            a launcher it changes nothing. Each process has its own checkpoint: ``checkpoint`` followed by its rank.

    Raises:
        TypeError: the model or the loader gives another type than described here.
        ValueError: unknown method, another setting with a wrong value, empty loader, a validation loader that is
            missing or not needed, unknown number of classes, NaN in the logits (names the batch and the row).
        IndexError: a label out of range.
        CheckpointError: the checkpoint is damaged or belongs to another model, other data or other settings.
        PermissionError, OSError: the checkpoint cannot be read or written, or is not a regular file. Whether it can be
            written is checked before the first batch.
        RuntimeError: ``distributed=True`` and a launcher started several processes, but ``init_process_group`` was not
            called.
    """
    _check_method(method, validation_loader)
    if not callable(source_model):
        raise TypeError(f"source_model is a {type(source_model).__name__}, expected a torch.nn.Module")
    if max_batches is not None:
        max_batches = positive_integer("max_batches", max_batches)
    checkpoint_every = positive_integer("checkpoint_every", checkpoint_every)
    if distributed:
        rank_and_size()  # raises under a launcher without init_process_group: a share is not all data
    num_target_classes, target_classes = target_classes_of(loader, num_target_classes, target_classes)
    place = device_of(source_model) if device is None else torch.device(device)
    # Check every setting before the pass over the data, and convert numbers to Python's own: these compare equal to
    # those of a checkpoint.
    check_ignore_index(ignore_index)
    temperature, ignore_index = positive_number("temperature", temperature), operator.index(ignore_index)
    check_empty_policy(empty)
    check_sums_dtype(dtype)
    checked_penalties(inverse_penalties)
    backends.check_name(backend)
    if place is not None:
        backends.select(place.type, backend, place.index)
    # A checkpoint's statistics depend on these settings.
    settings: dict[str, Any] = {
        "num_target_classes": num_target_classes, "ignore_index": ignore_index, "temperature": temperature,
    }  # fmt: skip

    def run(collector: Any, batches: Iterable[Any], what: str) -> None:
        file = None
        if checkpoint is not None:
            path = passes.checkpoint_path(checkpoint, what)
            file = passes.Checkpoint(path, source_model, settings, collector, checkpoint_every, place)
        count = passes.run(
            source_model, batches, collector, what, source_classes, place, progress, max_batches, file
        )  # fmt: skip
        if distributed:
            _check_every_process_counted(count)
            collector.all_reduce()
        if count == 0:
            raise ValueError(f"the {what} gave no batch; is its dataset empty, or was it an iterator that is used up?")

    if checkpoint is not None:  # fail before a pass that could not be saved
        for what in ("loader",) if validation_loader is None else ("loader", "validation_loader"):
            check_writable(passes.checkpoint_path(checkpoint, what))
    if validation_loader is None:
        settings |= {"dtype": str(dtype), "backend": backend}
        estimator = RelationshipEstimator(
            num_target_classes, temperature=temperature, ignore_index=ignore_index, dtype=dtype, device=None,
            backend=backend,
        )  # fmt: skip
        run(estimator, loader, "loader")
        relationship = estimator.compute(empty=empty, target_classes=target_classes, source_classes=source_classes)
    else:
        train = passes.LogitCollector(num_target_classes, ignore_index)
        validation = passes.LogitCollector(num_target_classes, ignore_index)
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
            remove(passes.checkpoint_path(checkpoint, what))
    metadata = relationship.metadata | {"source_model": passes.type_name(source_model)}
    return dataclasses.replace(relationship, metadata=metadata)


def _check_method(method: str, validation_loader: Iterable[Any] | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    if method == "reverse" and validation_loader is None:
        raise ValueError(
            "method='reverse' chooses its penalty and its temperature on data that it was not fitted to: pass "
            "validation_loader"
        )
    if method == "direct" and validation_loader is not None:
        raise ValueError(
            "validation_loader is given, but method='direct' has nothing to choose on it; leave it out, or put "
            "its data into loader"
        )


def _check_every_process_counted(batches: int) -> None:
    """A process without a batch does not know ``N_s``; the others would wait for its sums forever."""
    if not several_processes():
        return
    from torch import distributed

    counted: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(counted, batches)
    if not all(counted):
        idle = [rank for rank, some in enumerate(counted) if not some]
        raise ValueError(f"processes {idle} had no batch; start fewer processes, or use smaller batches")


def _of_first_process(relationship: Relationship) -> Relationship:
    """All processes compute the same from the same rows, but different machines may round a tie differently."""
    if not several_processes():
        return relationship
    from torch import distributed

    device = relationship.matrix.device
    held = [relationship.to("cpu")]
    distributed.broadcast_object_list(held)
    return held[0].to(device)


def target_classes_of(
    loader: Iterable[Any], num_target_classes: int | None, names: Sequence[str] | None
) -> tuple[int, tuple[str, ...] | None]:
    """``N_t`` and the names of the target classes, from the arguments or from the loader's dataset."""
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
    if isinstance(num_target_classes, (list, tuple)):
        raise ValueError(
            f"num_target_classes is a {type(num_target_classes).__name__}, expected a positive int; pass names as "
            "target_classes"
        )
    num_target_classes = positive_integer("num_target_classes", num_target_classes)
    return num_target_classes, class_names("target_classes", names, num_target_classes)


def _dataset_classes(loader: Iterable[Any]) -> tuple[str, ...] | None:
    classes = _classes_of(getattr(loader, "dataset", None))
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) and classes else None


def _classes_of(dataset: Any) -> Any:
    """``dataset.classes``, also inside ``Subset`` and similar wrappers, or a ``ConcatDataset`` whose parts agree."""
    while dataset is not None and not hasattr(dataset, "classes"):
        if isinstance(dataset, ConcatDataset):
            first, *others = map(_classes_of, dataset.datasets)
            return first if all(each == first for each in others) else None
        dataset = getattr(dataset, "dataset", None)
    return getattr(dataset, "classes", None)


def device_of(model: Any) -> torch.device | None:
    if not isinstance(model, nn.Module):
        return None
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device
