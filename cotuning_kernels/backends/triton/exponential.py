"""``exp`` as GPUs have it: a power of two, one instruction in float32.

``tl.exp`` multiplies by ``log2(e)`` too, but three more instructions then save results below 2**-126, which no sum
here would notice: beside a largest exponential of 1 they are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exp"]


@triton.jit
def exp(x):
    """``e ** x``; in float32, 0 below 2**-126."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * 1.4426950408889634)
