"""The backends: which one serves a call, and why another one does not.

* ``cpp``: the C++ extension, for the CPU. Its fast path serves the ordinary call of the loss without torch's
  dispatcher (:mod:`cotuning_kernels.backends.cpp`).
* ``cuda``: kernels for NVIDIA's cards, compiled where nvcc is (:mod:`cotuning_kernels.backends.cuda`).
* ``triton``: kernels for NVIDIA and AMD GPUs, without a toolkit (:mod:`cotuning_kernels.backends.triton`).
* ``reference``: plain PyTorch, on every device (:mod:`cotuning_kernels.reference`).
"""

from __future__ import annotations

from cotuning_kernels.backends import dense_rows as dense_rows  # serves where a backend has no kernel
from cotuning_kernels.backends import triton_version as triton_version  # enters Triton
from cotuning_kernels.backends.cpp import cpu_isa, cpu_isas, extension, use_cpu_isa, without_fast_path
from cotuning_kernels.backends.cuda import cuda_build, cuda_loss_plan
from cotuning_kernels.backends.registry import REGISTRY
from cotuning_kernels.backends.torch_version import require_torch

__all__ = [
    "available",
    "check_name",
    "cpu_isa",
    "cpu_isas",
    "cuda_build",
    "cuda_loss_plan",
    "extension",
    "missing_reason",
    "select",
    "use_cpu_isa",
    "without_fast_path",
]

require_torch()

available = REGISTRY.available
check_name = REGISTRY.check_name
missing_reason = REGISTRY.missing_reason
select = REGISTRY.select
