"""The options of the loss: made once, checked once, and passed on whole.

Users write words and numbers (:class:`LossOptions`); the operations take numbers and tensors
(:class:`OperationOptions`). Everything between a public signature and a kernel passes either tuple on whole.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotuning_kernels.dtypes import FLOATING
from cotuning_kernels.validation import check_device, check_ignore_index

__all__ = [
    "KL_DIVERGENCE",
    "REDUCTIONS",
    "SCHEMA",
    "LossOptions",
    "OperationOptions",
    "check_options",
    "check_trade_off",
]

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
KL_DIVERGENCE = {"cross_entropy": False, "kl": True}

# The fields of OperationOptions in the operations' schema. LossInputs::visit_options (csrc/kernels/loss_problem.h) has
# the same order. The trade-off is a float64 tensor of shape (), so that it can change between steps without a new trace
# of torch.compile and without a new capture of a graph.
SCHEMA = "Tensor? weight, Tensor trade_off, float label_smoothing, int ignore_index, int reduction, bool kl_divergence"


class LossOptions(NamedTuple):
    """What :func:`cotuning_kernels.functional.co_tuning_loss` computes; see there.

    The order is that of :class:`OperationOptions`.
    """

    weight: Tensor | None = None
    trade_off: float | Tensor = 2.3
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    source_loss: str = "cross_entropy"

    def in_operations(self, device: torch.device) -> tuple[Any, ...]:
        """The fields of :class:`OperationOptions`, for logits on ``device``.

        Checks only what an operation would wrongly accept.
        """
        weight, trade_off, label_smoothing, ignore_index, reduction, source_loss = self
        if isinstance(label_smoothing, Tensor) or isinstance(ignore_index, Tensor):
            raise TypeError("label_smoothing and ignore_index must be numbers")  # operations take a tensor's value
        if weight is not None and weight.requires_grad:
            raise ValueError("weight must not require grad")
        if not isinstance(trade_off, Tensor):
            check_trade_off(trade_off, device)
            trade_off = torch.full((), trade_off * 1.0, dtype=torch.float64, device=device)
        elif trade_off.requires_grad:
            raise ValueError("trade_off must not require grad")
        elif trade_off.dtype is not torch.float64:
            check_trade_off(trade_off, device)
            trade_off = trade_off.to(torch.float64)
        return weight, trade_off, label_smoothing, ignore_index, REDUCTIONS[reduction], KL_DIVERGENCE[source_loss]


class OperationOptions(NamedTuple):
    """The options as the operations take them, in the order of :data:`SCHEMA`."""

    weight: Tensor | None
    trade_off: Tensor
    label_smoothing: float
    ignore_index: int
    reduction: int
    kl_divergence: bool

    def check(self, num_target_classes: int, device: torch.device) -> None:
        """Check what would make a kernel read outside a tensor or compute something else, for a direct caller.

        Raises:
            RuntimeError: an option has a wrong dtype, shape, device or value.
        """
        weight, trade_off, label_smoothing, _, reduction, _ = self
        if not 0 <= reduction <= 2:
            raise RuntimeError("reduction must be 0, 1 or 2")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError("label_smoothing must be in [0, 1]")
        fits = weight is None or (
            weight.dtype in FLOATING and weight.shape == (num_target_classes,) and weight.device == device
        )
        if not fits:
            raise RuntimeError(f"weight must be floating of shape ({num_target_classes},) on {device}")
        if trade_off.dtype != torch.float64 or trade_off.dim() != 0 or trade_off.device != device:
            raise RuntimeError(f"trade_off must be a float64 number on {device}")


def check_options(options: LossOptions, num_target_classes: int, device: torch.device) -> None:
    """Check every option, for logits on ``device``.

    Raises:
        TypeError, ValueError: an option has a wrong type, dtype, shape, device or value.
    """
    weight, trade_off, label_smoothing, ignore_index, reduction, source_loss = options
    if weight is not None:
        _check_weight(weight, num_target_classes, device)
    if not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing is {label_smoothing!r:.80}, expected a number in [0, 1]")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1]")
    check_ignore_index(ignore_index)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not isinstance(source_loss, str) or source_loss not in KL_DIVERGENCE:
        raise ValueError(f"source_loss is {source_loss!r}, expected 'cross_entropy' or 'kl'")
    check_trade_off(trade_off, device)


def check_trade_off(trade_off: float | Tensor, device: torch.device) -> None:
    """Require a finite number, or a floating tensor of shape ``()`` on ``device``, whose value is not read.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(trade_off, Tensor):
        if trade_off.dim() != 0 or not trade_off.is_floating_point():
            raise ValueError(
                f"trade_off is {trade_off.dtype} of shape {tuple(trade_off.shape)}, expected a number or a floating "
                "tensor of shape ()"
            )
        if trade_off.requires_grad:
            raise ValueError("trade_off requires grad, but the loss is not differentiated in it; pass .detach()")
        check_device("trade_off", trade_off, device)
    elif not isinstance(trade_off, numbers.Real):
        raise TypeError(
            f"trade_off is a {type(trade_off).__name__}, expected a number or a floating tensor of shape ()"
        )
    elif isinstance(trade_off, int) and abs(trade_off) > sys.float_info.max:
        raise ValueError("trade_off is an int beyond float64, expected a finite number")
    elif not -math.inf < trade_off < math.inf:  # math.isfinite would end the trace of a symbolic number
        raise ValueError(f"trade_off is {trade_off}, expected a finite number")


def _check_weight(weight: Tensor, num_target_classes: int, device: torch.device) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"weight is {weight!r:.80}, expected a floating Tensor of shape ({num_target_classes},) or None"
        )
    if weight.dim() != 1 or weight.shape[0] != num_target_classes:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({num_target_classes},): one number a target class"
        )
    if weight.requires_grad:
        raise ValueError("weight requires grad, but the loss is not differentiated in it; pass weight.detach()")
    check_device("weight", weight, device)
