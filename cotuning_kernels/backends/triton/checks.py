"""Checks that keep an operation from reading or writing outside a tensor.

The Python layer above explains wrong arguments, but checks them only after an operation has refused (a small batch
takes about as long as checking its arguments). So every wrong argument must be refused here, too.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cotuning_kernels.dtypes import FLOATING
from cotuning_kernels.options import OperationOptions
from cotuning_kernels.targets import OperandTarget, SparseOperandTarget

__all__ = [
    "check_labels",
    "check_loss",
    "check_matrix",
    "check_target",
    "check_writable",
    "classes_of",
    "computes_bfloat16",
    "require",
]


def require(condition: bool, expected: str) -> None:
    """Raise RuntimeError with what was expected, unless ``condition`` holds."""
    if not condition:
        raise RuntimeError(expected)


def check_matrix(name: str, x: Tensor, device: torch.device) -> None:
    """Require a floating matrix with dense columns on ``device``."""
    require(
        x.dim() == 2 and x.dtype in FLOATING and x.device == device and (x.stride(1) == 1 or x.shape[1] <= 1),
        f"{name} must be a floating matrix with dense columns on {device}",
    )
    require(
        x.dtype != torch.bfloat16 or computes_bfloat16(device),
        f"{name} is bfloat16, which Triton compiles for compute capability 8.0 and later, and {device} is older; use "
        'float16 or float32, or backend="reference"',
    )
    require(0 < x.shape[1] < 2**31, f"{name} must have at least one column, and fewer than 2**31")


@cache
def computes_bfloat16(device: torch.device) -> bool:
    """Return whether Triton compiles arithmetic on bfloat16 for ``device``."""
    on_cpu = device.type == "cpu"  # interpreted, or only compiled
    return on_cpu or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def check_writable(name: str, x: Tensor) -> None:
    """Require rows that do not overlap: each must hold a gradient of its own."""
    require(x.shape[0] <= 1 or x.stride(0) >= x.shape[1], f"{name} has rows that overlap")


def check_labels(name: str, labels: Tensor, batch: int, device: torch.device) -> None:
    """Require class indices, one a row, on ``device``. Their values are not read."""
    require(
        labels.dtype in (torch.int64, torch.int32) and labels.shape == (batch,) and labels.device == device,
        f"{name} must be int64 or int32 of shape ({batch},) on {device}",
    )


def check_target(target: Tensor, target_b: Tensor | None, mix: Tensor | None, batch: int, device: torch.device) -> None:
    """Require one of the three forms of a target (see ``backends/operations.py``)."""
    probabilities = target.is_floating_point()
    require(
        (mix is not None) == (probabilities or target_b is not None) and not (probabilities and target_b is not None),
        "mix goes with target_b, or with probabilities",
    )
    if probabilities:
        check_matrix("target", target, device)
        require(target.shape[0] == batch, f"target must have {batch} rows")
    else:
        check_labels("target", target, batch, device)
        if target_b is not None:
            check_labels("target_b", target_b, batch, device)
            require(target_b.dtype == target.dtype, "target_b must have target's dtype")
    if mix is not None:
        shapes = ((batch,),) if probabilities else ((batch,), (1,))
        require(
            mix.dtype == torch.float64 and mix.device == device and mix.shape in shapes,
            f"mix must be float64 on {device}, of shape {' or '.join(map(str, shapes))}",
        )


def check_loss(
    source_logits: Tensor,
    target_logits: Tensor | None,
    operand: OperandTarget | SparseOperandTarget,
    options: OperationOptions,
) -> None:
    """Require arguments of ``co_tuning_loss`` or ``sparse_co_tuning_loss`` that fit together."""
    target, target_b, mix, *_ = operand
    device = source_logits.device
    check_matrix("source_logits", source_logits, device)
    batch = source_logits.shape[0]
    require(batch < 2**31 - 2**12, "source_logits has too many rows")  # programs count rows in 32 bits
    check_target(target, target_b, mix, batch, device)
    if isinstance(operand, SparseOperandTarget):
        _check_sparse(operand, device)
    else:
        relationship, probabilities = operand.relationship, target.is_floating_point()
        check_matrix("relationship", relationship, device)
        require(relationship.shape[1] == source_logits.shape[1], "relationship must have one column a source class")
        require(
            not probabilities or relationship.shape[0] == batch,
            "with probabilities, relationship must have one row a row of the batch",
        )
    classes = classes_of(operand)
    if target_logits is not None:
        check_matrix("target_logits", target_logits, device)
        require(target_logits.shape == (batch, classes), f"target_logits must have shape ({batch}, {classes})")
    options.check(classes, device)


def _check_sparse(operand: SparseOperandTarget, device: torch.device) -> None:
    """Require class indices, and rows of R whose tensors fit together. Their values are not read."""
    target, target_b, _, crow, col, values = operand
    require(
        not target.is_floating_point() and target_b is None, "a sparse relationship goes with class indices, no pair"
    )
    require(
        crow.dtype in (torch.int64, torch.int32) and col.dtype == crow.dtype and values.dtype in FLOATING
        and crow.dim() == col.dim() == 1 and len(crow) > 0 and col.shape == values.shape
        and all(x.is_contiguous() and x.device == device for x in (crow, col, values)),
        f"crow_indices, col_indices and values must be those of a sparse_csr matrix on {device}",
    )  # fmt: skip


def classes_of(operand: OperandTarget | SparseOperandTarget) -> int:
    """Return the number of target classes."""
    if isinstance(operand, SparseOperandTarget):
        return operand.crow_indices.shape[0] - 1
    return operand.target.shape[1] if operand.target.is_floating_point() else operand.relationship.shape[0]
