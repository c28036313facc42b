"""Every backend as the conformance table runs it. Adding a backend is one row in ``BACKENDS``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cotuning_kernels import backends, functional
from support import emulated_cuda
from support.cases import CASES, Case
from support.problems import FORMS, Outcome, Problem


def run_public(problem: Problem, form: str, backend: str) -> Outcome:
    """Through the public functions, as a user would."""
    source = source_leaf = problem.source_logits.detach().requires_grad_()
    target = target_leaf = problem.target_logits.detach().requires_grad_()
    if form == "source head":
        loss = functional.source_label_loss(
            source, problem.target, problem.relationship, backend=backend, **problem.source_options
        )
        return Outcome(loss.detach(), torch.autograd.grad(loss, source, problem.upstream)[0])
    if form == "in place":
        source, target = _produced(source), _produced(target)
    terms = functional.co_tuning_loss(
        source, target, problem.target, problem.relationship, backend=backend, return_terms=True,
        inplace=form == "in place", **problem.options,
    )  # fmt: skip
    assert isinstance(terms, functional.CoTuningTerms)
    source_grad, target_grad = torch.autograd.grad(terms.loss, (source_leaf, target_leaf), problem.upstream)
    return Outcome(terms.loss.detach(), source_grad, target_grad, terms.target_term, terms.source_term)


class _Produced(torch.autograd.Function):
    """A non-leaf tensor in its input's memory: like a Linear's output, but in the layout that the test chooses."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        alias = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return alias.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _produced(leaf: Tensor) -> Tensor:
    return _Produced.apply(leaf)


@dataclass(frozen=True)
class Backend:
    """One row of the table of backends.

    ``argument`` is what users pass as ``backend=``, ``using`` selects a variant of it, ``missing`` says why it cannot
    run here (None where it can), and ``run(problem, form, argument)`` calls it. A slow backend runs part of the table:
    the cases that ``takes(case)`` accepts, and only the first form in dtypes outside ``all_forms``. ``device_code``
    marks kernels for a GPU: a label out of range is an assertion, and only one thread at a time may interpret them.
    """

    name: str
    argument: str
    using: Callable[[], AbstractContextManager[None]] = nullcontext
    missing: Callable[[], str | None] = lambda: None
    device: str = "cpu"
    forms: tuple[str, ...] = FORMS
    run: Callable[[Problem, str, str], Outcome] = run_public
    takes: Callable[[Case], bool] = lambda case: True
    # Loading an element does not depend on where its gradient goes or on another head, so the other forms run in one
    # wide and one narrow dtype.
    all_forms: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    device_code: bool = False


def _cpp(isa: str) -> Backend:
    def missing() -> str | None:
        reason = backends.missing_reason("cpp")
        if reason is None and isa not in backends.cpu_isas():
            reason = f"this processor or this build has no {isa}, only {', '.join(backends.cpu_isas())}"
        return reason

    return Backend(f"cpp-{isa}", "cpp", lambda: backends.use_cpu_isa(isa), missing)


def _triton(name: str, *, loops: bool) -> Backend:
    """The Triton kernels in Triton's interpreter, on CPU tensors.

    A call takes about 20 ms. So every case runs in every dtype of the case, but the other forms only in float32. The
    kernels for long rows, which here begin above 64 columns, run only the cases with such rows. The case of hundreds of
    rows is left out: it tests threads, and the interpreter has none.
    """

    def using() -> AbstractContextManager[None]:
        from support.triton_stand_in import triton_interpreted  # and triton with it

        return triton_interpreted(loops=loops, ordinary=not loops)

    def takes(case: Case) -> bool:
        if case.shape[0] > 100:
            return False
        return not loops or (max(case.shape[1:]) > 64 and math.prod(case.shape) < 200_000)

    return Backend(
        name, "triton", using, lambda: backends.missing_reason("triton"), takes=takes, all_forms=(torch.float32,),
        device_code=True,
    )  # fmt: skip


# The kernels themselves, on a GPU.
TRITON_ON_GPU = Backend(
    "triton", "triton",
    missing=lambda: backends.missing_reason("triton")
    or (None if torch.cuda.is_available() else "no GPU that this torch can use"),
    device="cuda", device_code=True,
)  # fmt: skip


# The reference refuses inplace=True: it has no kernel that could write in place.
REFERENCE = Backend("reference", "reference", forms=("both heads", "source head"))
# Plain labels take the fast path where it exists; this row sends them through the operations as well.
_OPERATIONS = Backend("cpp-operations", "cpp", backends.without_fast_path, lambda: backends.missing_reason("cpp"))


def _emulated_cuda(name: str, plan: emulated_cuda.Plan, least_columns: int = 0) -> Backend:
    """The CUDA kernels on the CPU, launched by ``plan``; every call runs warps and blocks in another order."""
    calls = itertools.count()

    def run(problem: Problem, form: str, argument: str) -> Outcome:
        call = next(calls)
        emulated_cuda.schedule(emulated_cuda.ORDERS[call % len(emulated_cuda.ORDERS)], seed=call)
        return run_public(problem, form, argument)

    return Backend(
        f"emulated-{name}", "cuda", emulated_cuda.using(plan), emulated_cuda.missing, run=run,
        takes=lambda case: max(case.shape[1:]) >= least_columns,
    )  # fmt: skip


def missing_cuda() -> str | None:
    if reason := backends.missing_reason("cuda"):
        return reason
    return None if torch.cuda.is_available() else "no CUDA device that this torch can use"


# The two kinds of AVX-512 differ in how they round to bfloat16. This processor uses one of them; the other runs only
# the table.
_SERVING, _OTHER = ("avx512_bf16", "avx512") if "avx512_bf16" in backends.cpu_isas() else ("avx512", "avx512_bf16")

BACKENDS = (
    REFERENCE,
    _cpp(_SERVING),
    _cpp("avx2"),
    _cpp("portable"),
    _OPERATIONS,
    _triton("triton-rows", loops=False),
)
TABLE_BACKENDS = (
    *BACKENDS,
    _cpp(_OTHER),
    # One warp per row where that is enough, and few blocks, so that each block takes several rows.
    _emulated_cuda("warps", emulated_cuda.Plan(max_blocks=2)),
    _emulated_cuda("blocks", emulated_cuda.Plan(warp_vectors=0, max_blocks=3)),
    _emulated_cuda("unstaged", emulated_cuda.Plan(shared_bytes=0, warp_vectors=16)),
    # Shared memory has room for the logits of about 128 columns but not for all of their target: registers keep the
    # rest. For shorter rows registers keep nothing.
    _emulated_cuda("registers", emulated_cuda.Plan(shared_bytes=4 * 16 * 35, max_blocks=2), least_columns=65),
    # Several blocks do a row of the source head, in batches of at most 12 rows of at least two vectors of 16 bytes.
    _emulated_cuda("split", emulated_cuda.Plan(multiprocessors=24, split_vectors=1, max_blocks=5), least_columns=3),
    _triton("triton-loops", loops=True),
    Backend("cuda", "cuda", missing=missing_cuda, device="cuda"),
    TRITON_ON_GPU,
)
"""The backends that run the table; the other tests run on ``BACKENDS``."""


def sampled_table(run: Callable[[Problem, str, str], Outcome], every: int) -> list[tuple[Case, Backend]]:
    """The table's cases for another way to call the same kernels, ``run``, and the backends that take them.

    One backend runs all cases, the others one in ``every``: their kernels pass the whole table elsewhere.
    """
    whole = next(backend.name for backend in TABLE_BACKENDS if backend.argument == "cpp")
    return [
        (case, replace(backend, run=run))
        for backend in TABLE_BACKENDS
        for i, case in enumerate(CASES)
        if backend.takes(case) and (backend.name == whole or i % every == 0)
    ]
