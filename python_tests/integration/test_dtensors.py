"""The loss of DTensors over two processes, against one process with all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import cotuning_kernels as ck
from cotuning_kernels import functional

B, N_S, N_T = 7, 11, 5  # two processes cannot share 7 rows equally


def problem(form: str) -> tuple[list[Tensor], Any, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = [torch.randn(B, n, dtype=torch.float64, requires_grad=True) for n in (N_S, N_T)]
    relationship = torch.softmax(torch.randn(N_T, N_S, dtype=torch.float64), 1)
    relationship[0] = 0  # without source supervision
    labels = torch.tensor([0, 1, -100, 2, 4, 0, 0])
    weight = torch.rand(N_T, dtype=torch.float64) + 0.5
    target: Any = labels
    if form == "pair":
        target = (labels, labels.flip(0), torch.rand(B, dtype=torch.float64))
    if form == "probabilities":
        target = torch.softmax(torch.randn(B, N_T, dtype=torch.float64), 1)
    return logits, target, relationship, weight


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check() -> None:
    """Run by each process."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for form in ("labels", "pair", "probabilities"):
        for reduction in ("mean", "sum", "none"):
            for placement in (Replicate(), Shard(0)):
                for backend in ("auto", "reference"):
                    for plain in (False, True)[: 1 + (backend == "auto")]:
                        logits, target, relationship, weight = problem(form)
                        options: dict[str, Any] = {"weight": weight, "reduction": reduction, "return_terms": True}
                        expected = functional.co_tuning_loss(*logits, target, relationship, **options)
                        gradients = torch.autograd.grad(expected.loss.sum(), logits)

                        def spread(x: Any, placement: Any = placement) -> Any:
                            if isinstance(x, tuple):
                                return tuple(map(spread, x))
                            return distribute_tensor(x, mesh, [placement])

                        parts = [spread(x.detach()).requires_grad_() for x in logits]
                        shared = spread(target)
                        if plain:  # this process's rows, and an ordinary relationship
                            local = lambda x: x.to_local()  # noqa: E731
                            shared = tuple(map(local, shared)) if isinstance(shared, tuple) else local(shared)
                        else:
                            relationship = distribute_tensor(relationship, mesh, [Replicate()])
                        found = functional.co_tuning_loss(*parts, shared, relationship, backend=backend, **options)
                        got = torch.autograd.grad(found.loss.sum(), parts)
                        assert all(g.placements == p.placements for g, p in zip(got, parts, strict=True))
                        for a, b in zip([*found, *got], [*expected, *gradients], strict=True):
                            torch.testing.assert_close(whole(a), b.detach())

    logits, target, relationship, _ = problem("labels")
    parts = [distribute_tensor(x, mesh, [Shard(1)]) for x in logits]
    with pytest.raises(ValueError, match=r"source_logits is a DTensor with placements \(Shard.dim=1.,\).*to_local"):
        functional.co_tuning_loss(*parts, target, relationship)
    rows = [distribute_tensor(x, mesh, [Shard(0)]) for x in logits]
    with pytest.raises(ValueError, match=r"target_logits is a DTensor .* expected \(Shard\(dim=0\),\)"):
        functional.co_tuning_loss(rows[0], distribute_tensor(logits[1], mesh, [Replicate()]), target, relationship)
    with pytest.raises(TypeError, match="target_logits is not"):
        functional.co_tuning_loss(rows[0], logits[1], target, relationship)
    criterion = ck.FusedCoTuningLoss(relationship)
    whole(criterion(*rows, distribute_tensor(target, mesh, [Shard(0)])))


@pytest.mark.parametrize("processes", [1, 2])
def test_dtensors(processes: int, tmp_path: Path) -> None:
    environment = os.environ | {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "store")], env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)


if __name__ == "__main__":
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", store=distributed.FileStore(sys.argv[1], size), rank=rank, world_size=size)
    check()
    distributed.destroy_process_group()
