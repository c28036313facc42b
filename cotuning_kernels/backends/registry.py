"""Which backend serves a device, and why another one does not.

The registry knows no backend by itself. Each loader (``cpp``, ``cuda``, ``triton_version``) enters its backend here
when it is imported: the type of device that it serves, or the reason why it is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["REGISTRY", "Registry"]

_NAMES = ("auto", "cpp", "cuda", "triton", "reference")


class Registry:
    """The backends that serve each type of device, and the reasons why others are missing.

    Attributes:
        fast_path_loss: serves the ordinary call of the loss on the CPU or returns ``NotImplemented``; ``None`` where
            the fast path is missing.
    """

    def __init__(self) -> None:
        """Create a registry without backends: the reference serves everything."""
        self.fast_path_loss: Callable[..., Any] | None = None
        self._serving: dict[str, list[str]] = {}
        self._missing: dict[str, str] = {}
        self._checks: dict[str, Callable[[], Mapping[int, str]]] = {}
        self._unfit: dict[tuple[str, int | None], str] = {}
        self._gpus_are_checked = False

    def add(self, backend: str, device_type: str, check: Callable[[], Mapping[int, str]] | None = None) -> None:
        """Let ``backend`` serve ``device_type``, after the backends that were added before it.

        ``check`` runs once, before the first tensor on a GPU is served. It returns the GPUs that the backend cannot
        serve, by index, with the reasons.
        """
        self._serving.setdefault(device_type, []).append(backend)
        if check is not None:
            self._checks[backend] = check

    def add_missing(self, backend: str, reason: str) -> None:
        """Record why ``backend`` is missing."""
        self._missing[backend] = reason

    def select(self, device_type: str, backend: str = "auto", index: int | None = None) -> str:
        """Return the name of the backend that serves tensors on ``device_type``.

        ``"auto"`` takes the fastest kernels that serve the device, and the reference where none do. ``index`` is that
        of the device: a backend may serve one GPU and not another.

        Raises:
            ValueError: ``backend`` is not the name of a backend.
            RuntimeError: ``backend`` is missing or does not serve this device; the message says how to get it.
        """
        if device_type == "cuda" and not self._gpus_are_checked and not torch.compiler.is_compiling():
            self._check_gpus()
        kernels = self._serving.get(device_type, ())
        if self._unfit and device_type == "cuda":
            kernels = [name for name in kernels if (name, index) not in self._unfit]
        if backend == "auto":
            return kernels[0] if kernels else "reference"
        if backend == "reference" or backend in kernels:
            return backend
        self.check_name(backend)
        reason = self._unfit.get((backend, index)) if device_type == "cuda" else None
        reason = reason or self._missing.get(backend, f"it does not serve tensors on {device_type!r}")
        raise RuntimeError(f"backend {backend!r} cannot be used: {reason}")

    def check_name(self, backend: str) -> None:
        """Require the name of a backend, or ``"auto"``: all that can be said before the device is known."""
        if backend not in _NAMES:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, _NAMES))}")

    def available(self, device_type: str) -> list[str]:
        """Return every backend that serves ``device_type``, fastest first; the last one is always the reference."""
        return [*self._serving.get(device_type, ()), "reference"]

    def missing_reason(self, backend: str) -> str | None:
        """Return why ``backend`` (or ``"fast_path"``) is missing, or ``None`` where it is not."""
        return self._missing.get(backend)

    @contextmanager
    def override(
        self, *, serving: Mapping[str, Sequence[str]] | None = None, missing: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Replace backends within a ``with`` block, in the whole process. For tests.

        The checks of GPUs run again in the block. The fast path belongs to ``cpp``: it is switched off where ``cpp``
        does not serve the CPU first.

        Args:
            serving: for some types of device, the backends that serve them, fastest first.
            missing: backends (or ``"fast_path"``) that serve nothing in the block, with the reason.
        """
        before = vars(self).copy()
        missing = missing or {}
        chosen = {**self._serving, **(serving or {})}
        self._serving = {device: [name for name in names if name not in missing] for device, names in chosen.items()}
        self._missing = {**self._missing, **missing}
        self._checks, self._unfit = self._checks.copy(), {}
        self._gpus_are_checked = False
        if "fast_path" in missing or self.available("cpu")[0] != "cpp":
            self.fast_path_loss = None
        try:
            yield
        finally:
            vars(self).update(before)

    def _check_gpus(self) -> None:
        """Find the GPUs on which a backend would raise at every call, so that others serve there instead."""
        self._gpus_are_checked = True
        if not torch.cuda.is_available():
            return
        serving = self._serving.get("cuda", [])
        for backend, check in self._checks.items():
            reasons = check() if backend in serving else {}
            if not reasons:
                continue
            reason = next(iter(reasons.values()))
            if len(reasons) == torch.cuda.device_count():
                serving.remove(backend)
                self._missing[backend] = reason
            else:
                self._unfit |= {(backend, index): reason for index, reason in reasons.items()}
                reason = f"on device {', '.join(map(str, reasons))}: {reason}"
            warnings.warn(f"cotuning_kernels runs without backend {backend!r}: {reason}", RuntimeWarning, 3)


REGISTRY = Registry()
