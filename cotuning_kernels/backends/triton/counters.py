"""Counters of programs that are done, for a kernel whose last program adds up what all have stored.

They are 0 before a launch, and its last programs set them back, so that no launch is needed to clear them: memory that
outlives the call. Launches of one stream run one after another, so that each stream has counters of its own. What is
captured in a graph may run beside all else: it has counters that belong to the graph, with a node that clears them.

(Streams are told apart by their handles. CUDA's "per-thread default stream" is one handle for many streams; PyTorch
does not use it.)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

__all__ = ["MOST", "counters", "of_streams"]

MOST = 129
"""How many there are for a launch."""

of_streams: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """For a launch on the current stream of ``device``, which is the current device."""
    if device.type == "cpu":  # interpreted, or only compiled
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(MOST, dtype=torch.int32, device=device)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device.index)
    found = of_streams.get((device, stream))
    # Of two threads that come here at once, one has made zeros for nothing.
    return of_streams.setdefault((device, stream), _lasting_zeros(device)) if found is None else found


def _lasting_zeros(device: torch.device) -> Tensor:
    """Made in a thread of their own: where this one makes ready for a graph, as in torch.compile's "reduce-overhead",
    its memory comes from the graph's, where nothing may stay. Whoever gets them finds them 0."""

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
