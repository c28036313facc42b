"""What each process of the tests with two processes in test_linear_heads.py runs.

``torchrun --nproc-per-node 2 linear_heads_worker.py FOLDER`` writes ``FOLDER/RANK.pt``: the weights after training on a
share of each batch, by how the model is distributed, and what the criterion says of a weight that is not gathered.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cotuning_kernels as ck

ROWS, INPUTS, WIDTH, N_S, N_T, STEPS = 24, 7, 12, 90, 6, 5
SHARDED = ("whole model", "network too", "loss inside")


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A classifier, a relationship, and inputs and labels by step; each half of a batch has the same labels."""
    torch.manual_seed(5)
    classifier = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, N_S))
    relationship = torch.softmax(2 * torch.randn(N_T, N_S), 1)
    relationship[::2] = 0
    labels = torch.randint(N_T, (STEPS, ROWS // 2))
    labels[:, 0] = -100
    return classifier, relationship, torch.randn(STEPS, ROWS, INPUTS), torch.cat([labels, labels], 1)


def train(
    model: ck.CoTuningModel, rows: slice, find_unused: bool | None = None, multiplier: float = 10.0
) -> dict[str, Tensor]:
    """The weights after training on these rows of each batch, under DDP where ``find_unused`` is a bool."""
    _, relationship, inputs, labels = problem()
    criterion = (ck.FusedLinearCoTuningLoss if model.linear else ck.FusedCoTuningLoss)(relationship, 20.0)
    wrapped = model if find_unused is None else DistributedDataParallel(model, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(model.param_groups(0.05, new_head_multiplier=multiplier), momentum=0.9)
    for x, y in zip(inputs, labels, strict=True):
        loss = criterion(*wrapped(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


class HeadsAndLoss(nn.Module):
    """Two heads and their loss in one module: FSDP2 gathers the weights for its ``forward``."""

    def __init__(self, model: ck.CoTuningModel, criterion: ck.FusedLinearCoTuningLoss) -> None:
        super().__init__()
        self.source_head, self.target_head, self.criterion = model.source_head, model.target_head, criterion

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        old, new = self.source_head, self.target_head
        loss = self.criterion(features, old.weight, old.bias, new.weight, new.bias, labels)
        assert isinstance(loss, Tensor)
        return loss


def whole_tensor(sharded: Tensor) -> Tensor:
    assert isinstance(sharded, DTensor)
    return sharded.full_tensor().detach()


def train_sharded(kind: str, rows: slice) -> dict[str, Tensor]:
    """The whole weights after training under FSDP2; ``"loss inside"``: a backbone, and the heads with their loss."""
    _, relationship, inputs, labels = problem()
    model = two_heads(linear=True, bound_source=False)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    if kind == "loss inside":
        criterion = ck.FusedLinearCoTuningLoss(relationship, 20.0)
        assert isinstance(model.network, nn.Sequential)
        backbone, heads = model.network[:2], HeadsAndLoss(model, criterion)
        fully_shard(backbone, mesh=mesh)
        fully_shard(heads, mesh=mesh)
        whole = nn.ModuleList([backbone, heads])
        optimizer = torch.optim.SGD(whole.parameters(), 0.05, momentum=0.9)
        for x, y in zip(inputs, labels, strict=True):
            loss = heads(backbone(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        names = [name for name, _ in model.named_parameters()]
        return {name: whole_tensor(x) for name, x in zip(names, whole.parameters(), strict=True)}
    if kind == "network too":
        fully_shard(model.network, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return {name: whole_tensor(x) for name, x in train(model, rows, multiplier=1.0).items()}


def refusal() -> str:
    """What the criterion says of heads that FSDP2 has freed when the network's ``forward`` ended."""
    _, relationship, inputs, labels = problem()
    model = two_heads(linear=True)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model.network, mesh=mesh)
    fully_shard(model, mesh=mesh)
    try:
        ck.FusedLinearCoTuningLoss(relationship)(*model(inputs[0]), labels[0])
    except ValueError as error:
        return str(error)
    return ""


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
    found = {
        "ddp": [train(copy.deepcopy(model), half, find_unused) for find_unused in (False, True)],
        "fsdp": {kind: train_sharded(kind, half) for kind in SHARDED},
        "refusal": refusal(),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # as in distributed_worker.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
