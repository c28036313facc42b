"""torch's operations for the simulated devices: the CPU's operations, run in the order of the stream.

torch's own CUDA kernels do not run there (tools/cuda_emulator/runtime/runtime.cpp), but the tests need more of torch
than our kernels: a linear layer, a sum of gradients. The memory of a simulated device is memory of this process, so the
CPU's operation works on it in place. It goes onto the current stream as a host function, which keeps its order there
and is captured with the rest. All operations are registered for the CUDA dispatch key, below autograd and autocast.

``import torch`` itself calls ``install``, through the entry point that simulated_gpu.py writes. So every process that a
test starts has the operations too.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["install"]

# Operations that allocate, that make views, or that wait for a number: torch's code for them has no kernels.
_NATIVE = {"empty", "empty_strided", "resize_", "set_", "is_set_to", "record_stream", "_local_scalar_dense"}
# Indices may lie on the CPU: torch copies them to the device.
_TAKE_INDICES_FROM_ANYWHERE = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_kept: list[Any] = []  # the runtime or a captured graph may call these at any time: never freed


class _View:
    """A tensor as a launch knows it: an address and how to read it. It does not keep the memory alive."""

    def __init__(self, x: Tensor) -> None:
        self.start = x.data_ptr()
        self.shape, self.strides, self.dtype = tuple(x.shape), x.stride(), x.dtype

    def on_host(self) -> Tensor:
        """The same memory as a tensor on the CPU."""
        if 0 in self.shape:
            return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        memory = (ctypes.c_char * ((last + 1) * self.dtype.itemsize)).from_address(self.start)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.strides)


def _on_stream(device: torch.device, work: Callable[[], object]) -> None:
    """Run ``work`` in the order of the device's current stream; under capture, with every replay."""
    to_do = [work]

    def call(_: int | None) -> None:
        try:
            with torch.no_grad():
                to_do[0]()
        except BaseException as error:  # no caller can catch it: print it
            print(f"simulated {device}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if not captured:
            to_do.clear()

    function = _HOST_FUNCTION(call)
    _kept.append(function)
    with torch.cuda.device(device):  # the default stream of every device has the same handle
        captured = torch.cuda.is_current_stream_capturing()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if status := ctypes.CDLL(None).cudaLaunchHostFunc(stream, function, None):
            raise RuntimeError(f"a simulated {device} refused a host function: CUDA error {status}")


# ------------------------------------------------------------------------ arguments, for each place where they are used


def _viewed(x: Any) -> Any:
    """The argument as it is kept until the stream reaches it. A number on the CPU is read now."""
    return (_View(x) if x.is_cuda else x.clone()) if isinstance(x, Tensor) else x


def _on_host(x: Any) -> Any:
    if isinstance(x, _View):
        return x.on_host()
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _copied_to_host(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else _on_host(x)


def _meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _tensors(given: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]


def _check_one_device(op: torch._ops.OpOverload, device: torch.device, given: Any) -> None:
    """torch's kernels take a number from the CPU; for any other tensor there they raise this error."""
    for x in _tensors(given):
        if x.device != device and not (x.is_cpu and x.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {device} and "
                f"{x.device}! (in {op})"
            )


class _Operation:
    """One of torch's operations, for tensors on a simulated device."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        arguments = op._schema.arguments
        self.op, self.name = op, op._overloadpacket.__name__
        self.names = [a.name for a in arguments]
        self.written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.of_tensors = [k for k, a in enumerate(arguments) if isinstance(a.type, torch.TensorType)]

    def call(self, change: Callable[[Any], Any], given: Any) -> Any:
        """The operation with its arguments changed by ``change``."""
        args, kwargs = pytree.tree_map(change, given, is_leaf=lambda x: isinstance(x, _View))
        # `x % 6` calls the overload for two tensors with a number in place of the second.
        number = any(k < len(args) and isinstance(args[k], (int, float, complex)) for k in self.of_tensors)
        return (self.op.overloadpacket if number else self.op)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        on_device = [x for x in _tensors((args, kwargs)) if x.is_cuda]
        device = on_device[0].device if on_device else torch.device("cuda", torch.cuda.current_device())
        if self.name not in _TAKE_INDICES_FROM_ANYWHERE:
            _check_one_device(self.op, device, (args, kwargs))
        return (self._write if self.written else self._make)(device, (args, kwargs))

    def _write(self, device: torch.device, given: Any) -> Any:
        by_name = dict(zip(self.names, given[0], strict=False)) | given[1]
        results = [by_name[name] for name in self.written]
        if any(x.numel() == 0 for x in _tensors(results)):
            self._resize(given, results)
        kept = pytree.tree_map(_viewed, given)
        _on_stream(device, lambda: self.call(_on_host, kept))
        if not self.op._schema.returns:
            return None
        return results[0] if len(self.op._schema.returns) == 1 else tuple(results)

    def _resize(self, given: Any, results: list[Any]) -> None:
        """An empty ``out`` gets the shape of the result, as in any operation of torch."""
        args, kwargs = pytree.tree_map(_meta, given)
        self.op(*args, **kwargs)
        by_name = dict(zip(self.names, args, strict=False)) | kwargs
        for x, name in zip(results, self.written, strict=True):
            if isinstance(x, Tensor) and x.shape != by_name[name].shape:
                x.resize_(by_name[name].shape)

    def _make(self, device: torch.device, given: Any) -> Any:
        try:
            shapes = self.call(_meta, given)
        except (NotImplementedError, RuntimeError):  # its size depends on the data: the host waits
            made = self.call(_copied_to_host, given)
            return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, made)

        def empty(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        out = pytree.tree_map(empty, shapes)
        kept, places = pytree.tree_map(_viewed, given), [_View(x) for x in _tensors(out)]

        def work() -> None:
            for place, x in zip(places, _tensors(self.call(_on_host, kept)), strict=True):
                place.on_host().copy_(x)

        _on_stream(device, work)
        return out


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten::copy_`` between any two devices, with CUDA's rules for host memory."""
    if self.is_cuda and source.is_cuda and self.device != source.device:  # not peers: through the host
        return self.copy_(source.cpu())
    device = self.device if self.is_cuda else source.device

    def waits(x: Tensor) -> bool:
        return not x.is_cuda and not (non_blocking and x.is_pinned())

    # Host memory that is not page-locked may change as soon as the call returns.
    kept = source.clone() if waits(source) else source
    to, given = _View(self), _View(kept)
    held = None if kept.is_cuda else kept
    _on_stream(device, lambda: (to.on_host().copy_(given.on_host()), held))
    # A copy waits unless it is non-blocking, also from the host to the device.
    if waits(self) or not (non_blocking or (self.is_cuda and source.is_cuda)):
        torch.cuda.current_stream(device).synchronize()
    return self


def _is_view(schema: torch.FunctionSchema) -> bool:
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    return any(r.alias_info is not None for r in schema.returns) and not writes


def install() -> None:
    """Install every operation that makes or changes numbers and for which torch has a CUDA kernel."""
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    with_kernels = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = [name.removeprefix("aten::") for name in with_kernels if name.startswith("aten::")]
    for name in sorted([*names, "copy_"]):  # copy_ is one for all devices
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if packet in _NATIVE or _is_view(op._schema):
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            library.impl(name, _copy_ if name == "copy_" else _Operation(op), "CUDA", allow_override=True)
