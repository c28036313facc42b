"""Capture in a CUDA graph, for the tests that run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def capture(step: Callable[[], Result]) -> tuple[Result, torch.cuda.CUDAGraph]:
    """What the step returned, and the graph that does it again into the same memory.

    The step is run once before, on a stream of its own as PyTorch asks, so that nothing is set up in the capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return result, graph
