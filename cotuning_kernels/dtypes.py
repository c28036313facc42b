"""The dtypes that the kernels take."""

from __future__ import annotations

import torch

__all__ = ["FLOATING", "INDICES", "named"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of logits and of the relationship, in the order of ``ScalarType`` in the C++ sources."""

INDICES = (torch.int64, torch.int32)
"""Of class indices."""


def named(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes as words of an error message."""
    return ", ".join(map(str, dtypes))
