"""What each process of test_distributed.py runs: learn both relationships from a share of the data, train with DDP.

``torchrun --nproc-per-node P distributed_worker.py FOLDER`` writes ``FOLDER/P-RANK.pt``; without a launcher it is one
process that does the same.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cotuning_kernels as ck
from cotuning_kernels.distributed import ShardSampler, global_mean_loss

N_T, N_S, FEATURES, STEPS, BATCH = 5, 23, 8, 6, 24


def data(rows: int, seed: int) -> TensorDataset:
    """Inputs and labels; some labels are ignored, and some classes are rare."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, FEATURES, generator=random)
    labels = (inputs[:, :3].sum(1) * 1.3).round().long().clamp(-2, 2) + 2
    labels[torch.rand(rows, generator=random) < 0.2] = -100
    return TensorDataset(inputs, labels)


def source_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, N_S))


def two_heads(linear: bool = False) -> ck.CoTuningModel:
    torch.manual_seed(4)
    return ck.CoTuningModel.from_classifier(source_model(), N_T, linear=linear).train()


def shares(dataset: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=7, sampler=ShardSampler(dataset))  # type: ignore[arg-type]


def rows_of_process(rank: int, processes: int) -> list[int]:
    """Unequal shares of a batch: the first process has more than the others."""
    first = BATCH // processes + (processes > 1) * 3
    if rank == 0:
        return list(range(first))
    return list(range(first, BATCH))[rank - 1 :: processes - 1]


def train(
    relationship: Tensor, share_rows: list[int], model: ck.CoTuningModel, options: dict[str, Any]
) -> dict[str, Any]:
    """``STEPS`` steps with gradients averaged over the processes; the losses are the global means."""
    criterion = (ck.FusedLinearCoTuningLoss if model.linear else ck.FusedCoTuningLoss)(relationship, 1.7, **options)
    wrapped = DistributedDataParallel(model) if distributed.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    inputs, labels = data(STEPS * BATCH, seed=11).tensors
    losses = []
    for step in range(STEPS):
        rows = [step * BATCH + row for row in share_rows]
        terms = global_mean_loss(criterion, *wrapped(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        values = torch.stack([x.detach().double() for x in terms])
        if distributed.is_initialized():
            distributed.all_reduce(values)
            values /= distributed.get_world_size()
        losses.append(values)
    return {"losses": torch.stack(losses), "weights": copy.deepcopy(model.state_dict())}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    launched = "RANK" in os.environ
    if launched:
        distributed.init_process_group("gloo")
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if launched else (0, 1)
    classifier = source_model()
    result: dict[str, Any] = {}
    common: dict[str, Any] = {"temperature": 1.3, "progress": False, "distributed": True}
    training_data, validation_data = data(101, seed=1), data(50, seed=2)
    direct = ck.learn_relationship(
        classifier, shares(training_data), N_T, checkpoint=folder / f"statistics-{processes}", **common
    )
    reverse = ck.learn_relationship(
        classifier,
        shares(training_data),
        N_T,
        method="reverse",
        validation_loader=shares(validation_data),
        inverse_penalties=(0.1, 1, 10, 100),
        **common,
    )
    for name, relationship in (("direct", direct), ("reverse", reverse)):
        result[name] = {"matrix": relationship.matrix, "counts": relationship.counts, "metadata": relationship.metadata}
    # A class without source supervision: the two means divide by different counts.
    relationship = torch.load(folder / "relationship.pt")
    weighted = {"weight": torch.tensor([1.0, 2, 0.5, 1, 3])}
    for name, options in (("plain", {}), ("weighted", weighted), ("linear", {}), ("linear, weighted", weighted)):
        model = two_heads(linear="linear" in name)
        result[name] = train(relationship, rows_of_process(rank, processes), model, options)
    # Only one process has a batch: no process may wait for ever.
    if processes > 1:
        try:
            alone: Any = shares(training_data) if rank == 0 else []
            ck.learn_relationship(classifier, alone, N_T, **common)
        except ValueError as error:
            result["idle"] = str(error)
    torch.save(result, folder / f"{processes}-{rank}.pt")
    if launched:
        distributed.barrier()
        distributed.destroy_process_group()
        # Sometimes gloo's threads crash as the interpreter ends (torch 2.13: "terminate called without an active
        # exception"); the results are already written.
        os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
