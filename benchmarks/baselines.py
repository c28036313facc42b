"""The formulations that cotuning_kernels is compared with, rewritten after reading their authors' code.

Each docstring names the original. People run these formulations today. The rewrites leave out printing and logging,
which a benchmark should not charge for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "authors_temperature",
    "compiled",
    "compiler_missing",
    "cross_entropy_loss",
    "kl_div_loss",
    "log_softmax_loss",
    "tllib_loss",
    "tllib_relationship",
]

TorchLoss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def tllib_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    relationship: npt.NDArray[np.float32],
    trade_off: float,
) -> Tensor:
    """The step of tllib (Transfer-Learning-Library, ``tllib.regularization.co_tuning`` and its example's loop).

    The relationship is a NumPy array on the host. Each step indexes it with the batch's labels, which copies ``B`` rows
    of ``N_s``, and moves them to the device as float32 (on the CPU this moves nothing). The source term is a product
    with ``log_softmax``, a sum and a mean. The authors' repository does the same. Neither handles mixed precision:
    low-precision logits go into ``log_softmax`` unconverted.
    """
    device = source_logits.device
    translated = torch.from_numpy(relationship[labels]).to(device).float()
    target_term = F.cross_entropy(target_logits, labels.to(device))
    source_term = (-translated * F.log_softmax(source_logits, dim=-1)).sum(dim=-1).mean()
    return target_term + trade_off * source_term


def log_softmax_loss(
    source_logits: Tensor, target_logits: Tensor, labels: Tensor, relationship: Tensor, trade_off: float
) -> Tensor:
    """tllib's formula with the relationship on the device, as a reader of the paper would write it in PyTorch."""
    labels = labels.to(source_logits.device)
    source_term = (-relationship[labels] * F.log_softmax(source_logits, dim=-1)).sum(dim=-1).mean()
    return F.cross_entropy(target_logits, labels) + trade_off * source_term


def cross_entropy_loss(
    source_logits: Tensor, target_logits: Tensor, labels: Tensor, relationship: Tensor, trade_off: float
) -> Tensor:
    """PyTorch's own soft-label loss: ``F.cross_entropy`` with class probabilities as the target (torch >= 1.10)."""
    labels = labels.to(source_logits.device)
    source_term = F.cross_entropy(source_logits, relationship[labels])
    return F.cross_entropy(target_logits, labels) + trade_off * source_term


def kl_div_loss(
    source_logits: Tensor, target_logits: Tensor, labels: Tensor, relationship: Tensor, trade_off: float
) -> Tensor:
    """``F.kl_div``, as knowledge distillation is usually written.

    Its gradient equals that of the cross entropy. The loss is smaller by the entropy of the relationship's rows, and
    equals that of cotuning_kernels with ``source_loss="kl"``.
    """
    labels = labels.to(source_logits.device)
    source_term = F.kl_div(F.log_softmax(source_logits, dim=-1), relationship[labels], reduction="batchmean")
    return F.cross_entropy(target_logits, labels) + trade_off * source_term


def compiled(loss: TorchLoss) -> TorchLoss:
    """``loss`` under ``torch.compile``, specialised to one shape, which is fastest. The first calls compile."""
    return torch.compile(loss, fullgraph=True, dynamic=False)


def compiler_missing() -> str | None:
    """Return why ``torch.compile`` cannot run on this machine's CPU, or ``None``."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and {compiler!r} is not installed (Debian: apt install g++)"
    return None


def tllib_relationship(logits: Iterable[Tensor], labels: Iterable[Tensor]) -> npt.NDArray[np.float32]:
    """tllib's direct relationship: keep the softmax of every image on the host, then average class by class.

    The authors' repository does the same with a slower softmax in NumPy.

    Returns:
        ``(N_t, N_s)``, where ``N_t`` is the largest label plus one.
    """
    probabilities = np.concatenate([F.softmax(batch, dim=1).cpu().numpy() for batch in logits])
    label_array = np.concatenate([batch.numpy() for batch in labels])
    num_classes = int(label_array.max()) + 1
    return np.concatenate([probabilities[label_array == t].mean(axis=0, keepdims=True) for t in range(num_classes)])


def authors_temperature(logits: Tensor, labels: Tensor) -> float:
    """The authors' calibration (thuml/CoTuning): L-BFGS on one factor of the logits, each step a forward and backward.

    PyTorch's optimiser runs with its defaults (rate 1, at most 20 iterations a step, no line search) and starts at the
    factor 1. There are up to 20 steps; the loop ends after the first step that has not used up its iterations. The
    optimiser counts iterations over all steps, so in effect the loop ends after the first step or after the twentieth.
    The progress line that the authors print at every step is left out.

    Returns:
        The temperature, 1 / factor.
    """
    scale = torch.ones(1, 1, device=logits.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([scale])

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(logits * scale, labels)
        loss.backward()
        return loss

    for _ in range(20):
        optimiser.step(closure)
        if optimiser.state[scale]["n_iter"] < optimiser.param_groups[0]["max_iter"]:
            break
    return 1.0 / scale.item()
