"""``exp`` as a power of two, which is one instruction of a GPU in float32.

``tl.exp`` multiplies by ``log2(e)`` too, but spends three more instructions on results below 2**-126. No sum here would
notice those beside its largest exponential, which is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exp"]


@triton.jit
def exp(x):
    """``e ** x``; 0 in float32 where the result is below 2**-126."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * 1.4426950408889634)
