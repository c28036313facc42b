"""How many PyTorch kernels each formulation launches in a training step of the loss: the numbers of docs/cuda.md.

    python -m tools.machine_code.launches

It needs no GPU: torch.profiler counts the operations on the CPU, and a GPU gets the same ones. An ATen operation counts
once, with all that it calls, if it does arithmetic or moves data. It does not count if it only calls others, makes a
view or allocates memory. (tllib's work in NumPy, and its copy from host to device, are not counted.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.baselines import cross_entropy_loss, kl_div_loss, log_softmax_loss, tllib_loss

__all__ = ["FORMULATIONS", "operations", "step"]

_RELATIONSHIP = torch.softmax(torch.randn(200, 1000, generator=torch.Generator().manual_seed(1)), 1)

FORMULATIONS: dict[str, tuple[Callable[..., torch.Tensor], Any]] = {
    "tllib": (tllib_loss, _RELATIONSHIP.numpy()),  # it keeps the relationship on the host
    "log_softmax": (log_softmax_loss, _RELATIONSHIP),
    "F.cross_entropy": (cross_entropy_loss, _RELATIONSHIP),
    "F.kl_div": (kl_div_loss, _RELATIONSHIP),
}
"""The loss by name (``baselines.py``), and the relationship in its form."""


def operations(call: Callable[[], Any]) -> list[str]:
    """The operations that compute, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    outermost = [event for event in profile.events() if event.cpu_parent is None]
    return [name for event in outermost for name in _computing(event)]


def _computing(event: FunctionEvent) -> list[str]:
    kind = _kind(event.name)
    if kind == "computes":
        return [event.name]
    return [] if kind == "nothing" else [name for child in event.cpu_children for name in _computing(child)]


@functools.cache
def _kind(event: str) -> str:
    """``"calls"`` others (as does an autograd node, which is no operation), does ``"nothing"``, or ``"computes"``."""
    namespace, _, name = event.partition("::")
    if namespace == "cotuning_kernels":
        return "computes"
    if namespace != "aten" or not hasattr(torch.ops.aten, name):
        return "calls"
    packet = getattr(torch.ops.aten, name)
    overloads = [
        getattr(packet, overload)
        for overload in packet.overloads()
        if not re.search("out|name", overload.lower()) and torch._C._dispatch_has_kernel(_full_name(name, overload))
    ]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if all(overload.has_kernel_for_dispatch_key(composite) for overload in overloads):
        return "calls"
    returned = [value.alias_info for value in overloads[0]._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return "nothing" if is_view or name.startswith(("empty", "new_empty", "resize")) else "computes"


def _full_name(name: str, overload: str) -> str:
    return f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}"


def step(loss: Callable[..., torch.Tensor], relationship: Any) -> list[list[str]]:
    """Operations of the forward pass and of the backward pass, of 48 rows of 200 and 1000 classes."""
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.randn(48, n, generator=draw).requires_grad_() for n in (1000, 200))
    labels = torch.randint(0, 200, (48,), generator=draw)
    computed: list[torch.Tensor] = []
    forward = operations(lambda: computed.append(loss(source, target, labels, relationship, 2.3)))
    # Pass the gradient of the loss, 1: creating it must not count as a kernel of a formulation.
    one = torch.ones(())
    return [forward, operations(lambda: computed[0].backward(one))]


def main() -> None:
    for name, formulation in FORMULATIONS.items():
        forward, backward = step(*formulation)
        print(f"{name}: {len(forward)} + {len(backward)} = {len(forward) + len(backward)}")
        print(f"  forward: {', '.join(forward)}\n  backward: {', '.join(backward)}")


if __name__ == "__main__":
    main()
