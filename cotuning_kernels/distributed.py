"""Several processes: shares of a data set without repetition, and the loss whose gradients average to the global one.

To learn a relationship, call ``learn_relationship(..., distributed=True)`` on a loader with a :class:`ShardSampler`.

For training, DistributedDataParallel averages the gradients of ``P`` processes. If each process takes the mean over its
own rows, that average is the gradient of the global mean only if every process has the same number of rows that count.
``ignore_index``, class weights and target classes without source supervision make these numbers differ, so
:func:`global_mean_loss` divides by the counts of all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cotuning_kernels.functional import CoTuningTerms, matrix_of
from cotuning_kernels.options import LossOptions
from cotuning_kernels.processes import rank_and_size
from cotuning_kernels.sharded_loss import share_of_mean
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import Target

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from cotuning_kernels.loss import FusedCoTuningLoss, FusedLinearCoTuningLoss

__all__ = ["ShardSampler", "global_mean_loss", "rank_and_size"]


class ShardSampler(Sampler[int]):
    """Every ``P``-th sample for each of ``P`` processes, in order, each sample exactly once.

    torch's DistributedSampler repeats some samples to make all shares equally large. Training needs that, but it would
    bias statistics.

    Args:
        dataset: its length is used.
        rank, num_processes: by default those of torch.distributed; one process where it is not initialised.

    Raises:
        RuntimeError: a launcher started several processes, but ``init_process_group`` was not called.
        ValueError: ``rank`` is not one of the processes.
    """

    def __init__(self, dataset: Sized, rank: int | None = None, num_processes: int | None = None) -> None:
        self._length = len(dataset)
        mine, all_of_them = rank_and_size() if rank is None or num_processes is None else (0, 1)
        self.rank = mine if rank is None else rank
        self.num_processes = all_of_them if num_processes is None else num_processes
        if not 0 <= self.rank < self.num_processes:
            raise ValueError(f"rank is {self.rank}, expected one of the {self.num_processes} processes, from 0")

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self._length, self.num_processes))

    def __len__(self) -> int:
        return len(range(self.rank, self._length, self.num_processes))


def global_mean_loss(
    criterion: FusedCoTuningLoss | FusedLinearCoTuningLoss,
    *inputs: Any,
    group: ProcessGroup | None = None,
    **named_inputs: Any,
) -> CoTuningTerms:
    """The loss of this process's rows, so that the *average* over processes is the mean over the rows of all.

    DistributedDataParallel averages the gradients, so a training step is then the same, up to rounding, for any number
    of processes and any distribution of the rows over them. It costs one ``all_reduce`` of three numbers a step, and no
    wait for the device.

    Args:
        criterion: a :class:`cotuning_kernels.FusedCoTuningLoss` or a :class:`cotuning_kernels.FusedLinearCoTuningLoss`,
            with ``reduction="mean"``.
        inputs, named_inputs: this process's rows, as the criterion takes them (``source_logits, target_logits, target``
            or the features, two heads and the target); there may be no rows.
        group: the processes; all by default. Without torch.distributed, the result is that of the criterion.

    Returns:
        :class:`cotuning_kernels.CoTuningTerms`: ``loss`` is this process's part (call ``backward()`` on it), and so are
        the two terms; their averages over processes are the global ones. If no row counts in any process the loss is
        NaN, as with ``F.cross_entropy``.

    Raises:
        TypeError: the criterion takes other inputs.
        ValueError: the criterion has another reduction.
        RuntimeError: a launcher started several processes, but ``init_process_group`` was not called.
    """
    if criterion.reduction != "mean":
        raise ValueError(f"criterion.reduction is {criterion.reduction!r}, expected 'mean'")
    _, processes = rank_and_size(group)
    if processes == 1:
        terms = criterion(*inputs, **named_inputs, return_terms=True)
        assert isinstance(terms, CoTuningTerms)
        return terms
    of_rows, target = criterion.as_rows(*inputs, **named_inputs)

    def compute(target: Target, _: Tensor | SparseRows, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
        return criterion.terms(of_rows, target, options)

    all_reduce = partial(torch.distributed.all_reduce, group=group)
    relationship = matrix_of(criterion.relationship)
    return CoTuningTerms(*share_of_mean(compute, target, relationship, criterion.options, all_reduce, processes))
