"""The dtypes that the kernels take."""

from __future__ import annotations

import torch

__all__ = ["FLOATING", "INDICES", "named"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Logits and relationships have one of these, in the order of ``ScalarType`` in the C++ sources."""

INDICES = (torch.int64, torch.int32)
"""Class indices have one of these."""


def named(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes as text for an error message."""
    return ", ".join(map(str, dtypes))
