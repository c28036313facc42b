"""Which torch the package needs, and which one its compiled kernels need."""

from __future__ import annotations

import re

import torch

__all__ = ["require_torch", "too_old_for_kernels"]

_LEAST = (2, 6)
_LEAST_FOR_KERNELS = (2, 10)  # csrc/ops/stable_abi.h


def _is_older_than(least: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return found is not None and (int(found[1]), int(found[2])) < least


def require_torch() -> None:
    """Raise ``ImportError`` where torch is too old for the whole package."""
    if _is_older_than(_LEAST):
        raise ImportError(
            f"cotuning_kernels needs torch 2.6 or newer, and this is torch {torch.__version__}; run "
            "`pip install --upgrade torch`"
        )


def too_old_for_kernels() -> str | None:
    """Why the compiled kernels cannot serve beside this torch, or ``None`` where they can."""
    if not _is_older_than(_LEAST_FOR_KERNELS):
        return None
    return (
        f"the compiled kernels need torch 2.10 or newer, and this is torch {torch.__version__}; run "
        "`pip install --upgrade torch`, then install cotuning_kernels again"
    )
