"""A batch that the threads share, for tests of processes and threads."""

from __future__ import annotations

import torch
from torch import Tensor

from cotuning_kernels import functional
from support.cases import Case


def losses(seed: int, batch: int = 301) -> Tensor:
    """Loss and gradients of a batch large enough to be shared between threads, as one vector."""
    problem = Case("elsewhere", "", (batch, 9, 401), "pair").build(torch.float32, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    loss = functional.co_tuning_loss(source, target, problem.target, problem.relationship)
    assert isinstance(loss, Tensor)
    return torch.cat([loss.detach()[None], *(x.flatten() for x in torch.autograd.grad(loss, (source, target)))])
