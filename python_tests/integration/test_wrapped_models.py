"""CoTuningModel inside DistributedDataParallel and after ``fully_shard``, in a process group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cotuning_kernels as ck

N_S, N_T = 11, 5


@pytest.fixture(autouse=True)
def _process_group(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Network(nn.Module):
    """Blocks that can be sharded one by one, BatchNorm, and an auxiliary head for training."""

    def __init__(self, num_classes: int = N_S) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(2)])
        self.aux = nn.Linear(6, num_classes)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def train(model: nn.Module, parameters: Any, steps: int = 3) -> None:
    criterion = ck.FusedCoTuningLoss(torch.softmax(torch.linspace(0, 3, N_T * N_S).reshape(N_T, N_S), 1))
    optimizer = torch.optim.SGD(parameters, 0.05)
    x = torch.linspace(-2, 2, 48).reshape(8, 6)
    for _ in range(steps):
        loss = criterion(*model(x), torch.arange(8) % N_T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_ddp_needs_no_search_for_unused_parameters() -> None:
    plain = ck.CoTuningModel.from_classifier(Network().train(), N_T)
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    train(plain, plain.parameters())
    train(wrapped, wrapped.parameters())
    torch.testing.assert_close(dict(wrapped.module.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("blocks_too", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_one_head_of_a_sharded_model(blocks_too: bool) -> None:
    """It is gathered, without FSDP, and equals that of unsharded training; training then continues."""
    plain = ck.CoTuningModel.from_classifier(Network().train(), N_T)
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    if blocks_too:
        for block in model.network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model.network, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        train(plain, plain.parameters())
        train(model, model.parameters())
        x = torch.randn(4, 6)
        for name in ("target_model", "source_model"):
            one_head, expected = getattr(model, name)(), getattr(plain, name)()
            assert list(one_head.state_dict()) == list(expected.state_dict())
            assert {type(p) for p in one_head.parameters()} == {nn.Parameter}
            assert [type(module) for module in one_head.modules()] == [type(module) for module in expected.modules()]
            torch.testing.assert_close(one_head(x), expected(x))
            one_head.train()(x)[0].sum().backward()  # an ordinary module
            copy.deepcopy(one_head)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_frozen_batchnorm_inside(kind: str) -> None:
    model = ck.CoTuningModel.from_classifier(Network(), N_T)
    model.freeze_batchnorm()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    before = [norm.running_mean.clone() for norm in norms]
    if kind == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    wrapped.eval()
    wrapped.train()
    train(wrapped, wrapped.parameters())
    for norm, mean in zip(norms, before, strict=True):
        assert not norm.training
        assert torch.equal(norm.running_mean, mean)
