"""Counters of finished programs, for a kernel whose last program adds up what all programs have stored.

The counters are 0 before a launch, and its last programs set them back to 0: they outlive the call, and no launch
clears them. Launches of one stream run one after another, so each stream has its own counters. A captured graph may run
beside every stream: it has its own counters, with a node that clears them.

(The handle identifies a stream. CUDA's "per-thread default stream" is one handle for many streams; PyTorch does not use
it.)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

__all__ = ["MOST", "counters", "of_streams"]

MOST = 129
"""The counters of a launch."""

of_streams: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Return the counters for a launch on the current stream of ``device``, which is the current device."""
    if device.type == "cpu":  # interpreted, or only compiled
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(MOST, dtype=torch.int32, device=device)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device.index)
    found = of_streams.get((device, stream))
    # If two threads come here at once, the zeros of one of them are not used.
    return of_streams.setdefault((device, stream), _lasting_zeros(device)) if found is None else found


def _lasting_zeros(device: torch.device) -> Tensor:
    """Zeros from a thread of their own, written before this returns.

    While the calling thread prepares a graph, as torch.compile's "reduce-overhead" does, its allocations come from the
    graph's memory, where nothing may stay.
    """

    def make() -> Tensor:
        if device.type == "cpu":
            return torch.zeros(MOST, dtype=torch.int32)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            zeros = torch.zeros(MOST, dtype=torch.int32, device=device)
        stream.synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
