"""What each process of the test with DistributedDataParallel in test_linear_heads.py runs.

``torchrun --nproc-per-node 2 linear_heads_worker.py FOLDER`` writes ``FOLDER/RANK.pt``: the weights after training on a
share of each batch, by whether DDP looks for unused parameters.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import cotuning_kernels as ck

ROWS, INPUTS, WIDTH, N_S, N_T, STEPS = 24, 7, 12, 90, 6, 5


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A classifier, a relationship, and inputs and labels by step; each half of a batch has the same labels."""
    torch.manual_seed(5)
    classifier = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, N_S))
    relationship = torch.softmax(2 * torch.randn(N_T, N_S), 1)
    relationship[::2] = 0
    labels = torch.randint(N_T, (STEPS, ROWS // 2))
    labels[:, 0] = -100
    return classifier, relationship, torch.randn(STEPS, ROWS, INPUTS), torch.cat([labels, labels], 1)


def train(model: ck.CoTuningModel, rows: slice, find_unused: bool | None = None) -> dict[str, Tensor]:
    """The weights after training on these rows of each batch, under DDP where ``find_unused`` is a bool."""
    _, relationship, inputs, labels = problem()
    criterion = (ck.FusedLinearCoTuningLoss if model.linear else ck.FusedCoTuningLoss)(relationship, 20.0)
    wrapped = model if find_unused is None else DistributedDataParallel(model, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(model.param_groups(0.05), momentum=0.9)
    for x, y in zip(inputs, labels, strict=True):
        loss = criterion(*wrapped(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def two_heads(linear: bool, bound_source: bool = True) -> ck.CoTuningModel:
    """The problem's classifier with a second head, in training mode."""
    classifier, *_ = problem()
    return ck.CoTuningModel.from_classifier(classifier, N_T, linear=linear, bound_source=bound_source).train()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    model = two_heads(linear=True)
    torch.save([train(copy.deepcopy(model), half, find_unused) for find_unused in (False, True)], folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # as in distributed_worker.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
