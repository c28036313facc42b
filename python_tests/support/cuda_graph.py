"""Capture in a CUDA graph, for the tests that run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def capture(step: Callable[[], Result]) -> tuple[Result, torch.cuda.CUDAGraph]:
    """Return the step's result, and the graph that computes it again into the same memory.

    The step first runs once on a side stream, as PyTorch requires, so that the capture contains no setup.
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
