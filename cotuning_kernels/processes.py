"""Which process of torch.distributed this is, and how many there are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["rank_and_size", "several_processes"]


def rank_and_size(group: ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank and the number of processes; ``(0, 1)`` without a launcher.

    Raises:
        RuntimeError: a launcher started several processes, but ``init_process_group`` was not called.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(group), distributed.get_world_size(group)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() first"
        )
    return 0, 1


def several_processes() -> bool:
    """Whether torch.distributed is initialised with more than one process."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
