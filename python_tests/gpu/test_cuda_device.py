"""What only a GPU can show: streams, devices, graph capture, autocast, the compiler, several processes, memory.

Without a GPU these tests are skipped with the reason, except those that make sense on the stand-in: the same kernels in
the emulator, on CPU tensors. Where torch is built with CUDA and nvcc is installed, all of them run on simulated devices
(test_simulated_gpu.py). The conformance table has its own row for the device."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import cotuning_kernels as ck
from benchmarks import page
from benchmarks.contestants import OURS, check_relationship, our_backend
from benchmarks.memory import measure_here
from benchmarks.problems import RelationshipProblem, Shape
from benchmarks.timing import DeviceStopwatch, capture, synchronizer
from cotuning_kernels import backends
from cotuning_kernels.distributed import global_mean_loss
from support import emulated_cuda
from support.backends import missing_cuda, run_public
from support.cases import Case
from support.layouts import bits
from support.paths import ROOT
from support.problems import Outcome, Problem
from support.rule import Expectation
from tools.gpu.sanitizer import Refused, first_error

REASON = missing_cuda()
SIMULATED = "COTUNING_SIMULATED_GPU" in os.environ  # set by simulated_gpu.py: nothing that needs a driver works
on_a_gpu = pytest.mark.skipif(REASON is not None, reason=REASON or "")
on_two_devices = pytest.mark.skipif(
    REASON is not None or torch.cuda.device_count() < 2, reason=REASON or "this needs two CUDA devices"
)
on_simulated_devices = pytest.mark.skipif(not SIMULATED, reason="of the simulated devices, see simulated_gpu.py")
runtime = ctypes.CDLL(None)  # this process, with the runtime of simulated devices


@pytest.fixture(params=["stand-in", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The GPU, and the CPU that the emulated kernels serve."""
    if request.param == "cuda":
        if REASON is not None:
            pytest.skip(REASON)
        yield "cuda"
        return
    if reason := emulated_cuda.missing():
        pytest.skip(reason)
    with emulated_cuda.emulated(emulated_cuda.Plan()):
        yield "cpu"


def _problem(
    device: str,
    reduction: str = "mean",
    seed: int = 5,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (64, 40, 1000),
) -> Problem:
    case = Case("device", "", shape, "ignoring", options={"reduction": reduction})
    return case.build(dtype, seed).map(lambda _, x: x.to(device))


def _check(problem: Problem, outcome: Outcome) -> None:
    for name, x in vars(outcome).items():
        setattr(outcome, name, None if x is None else x.detach().cpu())
    Expectation(problem, "both heads").check(outcome)


def _counted() -> tuple[int, int]:
    """Launches of our kernels, and how often the host waited, since the last call."""
    counts = (ctypes.c_uint64 * 2)()
    runtime.simulated_runtime_take_counts(counts)
    return counts[0], counts[1]


# ------------------------------------------------------------------------------------------- streams, devices, waiting


@on_a_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device(reduction: str) -> None:
    problem = _problem("cuda", reduction)
    run_public(problem, "both heads", "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = run_public(problem, "both heads", "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _check(problem, outcome)


@on_a_gpu
def test_waiting_is_noticed() -> None:
    """The mode that the test above uses raises when the host reads."""
    x = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_the_current_stream_is_taken() -> None:
    """The logits are ready only when their stream gets there: a launch on another stream would read stale numbers."""
    problem = _problem("cuda")
    late = problem.map(lambda _, x: torch.zeros_like(x))
    stream = torch.cuda.Stream()
    run_public(late, "both heads", "cuda")  # load and allocate first, so that the next launch does not wait
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        pairs = [(late.source_logits, problem.source_logits), (late.target_logits, problem.target_logits)]
        pairs += [(late.relationship, problem.relationship), (late.upstream, problem.upstream)]
        assert isinstance(late.target, Tensor)
        assert isinstance(problem.target, Tensor)
        for to, given in [*pairs, (late.target, problem.target)]:
            to.copy_(given, non_blocking=True)
        outcome = run_public(late, "both heads", "cuda")
    assert not stream.query(), "the stream was done before it was asked: nothing was shown"
    torch.cuda.synchronize()
    _check(problem, outcome)


@on_a_gpu
def test_two_streams_at_once() -> None:
    """Each launch has its own counter: neither finishes the other's sums."""
    problems = [_problem("cuda", seed=seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    outcomes: list[list[Outcome]] = [[], []]
    for _ in range(50):
        for k, (problem, stream) in enumerate(zip(problems, streams, strict=True)):
            with torch.cuda.stream(stream):
                outcomes[k].append(run_public(problem, "both heads", "cuda"))
    torch.cuda.synchronize()
    for problem, many in zip(problems, outcomes, strict=True):
        for name, x in many[0].tensors().items():
            assert all(torch.equal(bits(x), bits(other.tensors()[name])) for other in many), name
        _check(problem, many[0])


@on_two_devices
def test_two_devices_in_turn() -> None:
    """Each has its own memory, streams and counters, and the current device stays current."""
    for name in ("cuda:0", "cuda:1", "cuda:0"):
        problem = _problem(name, shape=(16, 40, 20_000))  # long enough to need more shared memory than the default
        assert torch.cuda.current_device() == 0
        outcome = run_public(problem, "both heads", "cuda")
        assert torch.cuda.current_device() == 0
        assert outcome.source_grad.device == torch.device(name)
        _check(problem, outcome)


@on_a_gpu
@pytest.mark.parametrize(
    ("dtype", "source_classes", "target_classes"),
    [
        (torch.float32, 5961, 40), (torch.float32, 6140, 40), (torch.bfloat16, 7945, 40), (torch.bfloat16, 8142, 40),
        (torch.float16, 8184, 40), (torch.float64, 2981, 40), (torch.float64, 3070, 40), (torch.bfloat16, 4097, 985),
        (torch.bfloat16, 7944, 1016),
    ],
)  # fmt: skip
def test_rows_around_48_kilobytes(dtype: torch.dtype, source_classes: int, target_classes: int) -> None:
    """A kernel's default limit is 48 KB less its static memory. 8142 is iNaturalist's number of classes."""
    rows = 16 if target_classes == 40 else 600  # with fewer rows, each target row would get a block
    plan = backends.cuda_loss_plan(rows, source_classes, target_classes, source_dtype=dtype, target_dtype=dtype)
    assert (48 << 10) - 1424 < plan["shared_bytes"] <= 48 << 10
    problem = _problem("cuda", dtype=dtype, shape=(rows, target_classes, source_classes))
    _check(problem, run_public(problem, "both heads", "cuda"))


@on_a_gpu
def test_two_host_threads_launch_rows_of_different_lengths() -> None:
    """All threads share a kernel's limit of shared memory: one must not lower the limit that another has set."""
    problems = [_problem("cuda", shape=(4, 40, source_classes)) for source_classes in (7000, 20_000)]
    errors: list[RuntimeError] = []
    together = threading.Barrier(2)

    def launch(problem: Problem) -> None:
        try:
            together.wait()
            for _ in range(20):
                run_public(problem, "both heads", "cuda")
        except RuntimeError as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=launch, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not errors, errors[0]


@on_simulated_devices
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_step_is_a_launch_forward_and_one_backward(reduction: str) -> None:
    """Launches are counted where they are made, and the host waits for none of them."""
    problem = _problem("cuda", reduction)
    problem.options["backend"] = "cuda"
    leaves = [x.requires_grad_() for x in (problem.source_logits, problem.target_logits)]
    _counted()
    loss = ck.functional.co_tuning_loss(*leaves, problem.target, problem.relationship, **problem.options)
    assert isinstance(loss, Tensor)
    assert _counted() == (1, 0)
    torch.autograd.grad(loss, leaves, problem.upstream)
    assert _counted() == (1, 0)
    with torch.no_grad():
        ck.functional.co_tuning_loss(*leaves, problem.target, problem.relationship, **problem.options)
    assert _counted() == (1, 0)


@on_a_gpu
def test_a_step_of_48_rows_costs_the_host_little() -> None:
    """Each result of the operation is an allocation, since results may not share memory; sums over blocks are none.
    The counts are those of docs/cuda.md."""
    problem = _problem("cuda", shape=(48, 200, 1000))
    criterion = ck.FusedCoTuningLoss(problem.relationship).to("cuda")
    leaves = [x.requires_grad_() for x in (problem.source_logits, problem.target_logits)]
    upstream = torch.ones((), device="cuda")

    def counted(call: Callable[[], Any]) -> tuple[Any, int, int]:
        """The call's result, its allocations, and its Python frames in this package."""
        torch.cuda.synchronize()
        before, frames = torch.cuda.memory_stats()["allocation.all.allocated"], [0]

        def count(frame: Any, event: str, _: object) -> None:
            frames[0] += event == "call" and Path(frame.f_code.co_filename).parent.name in (
                "cotuning_kernels",
                "backends",
            )

        sys.setprofile(count)
        try:
            result = call()
        finally:
            sys.setprofile(None)
        return result, torch.cuda.memory_stats()["allocation.all.allocated"] - before, frames[0]

    def calls(call: Callable[[], object]) -> int:
        """Calls of the runtime, torch's included."""
        runtime.simulated_runtime_take_calls()
        call()
        count: int = runtime.simulated_runtime_take_calls()
        return count

    criterion.trade_off = torch.tensor(2.3, dtype=torch.float64, device="cuda")  # a number would be filled in: one more
    for _ in range(2):  # the first step loads and asks
        loss, *forward = counted(lambda: criterion(*leaves, problem.target))
        _, *backward = counted(partial(torch.autograd.grad, loss, leaves, upstream))
        with torch.no_grad():
            _, *without_gradient = counted(lambda: criterion(*leaves, problem.target))
    assert [forward[0], backward[0], without_gradient[0]] == [5, 0, 3]
    if SIMULATED:  # 4 with torch 2.11, beside those of the allocations
        step, memory = calls(partial(criterion, *leaves, problem.target)), calls(lambda: torch.empty(4, device="cuda"))
        assert step - 5 * memory <= 6
    assert forward[1] <= 21  # autograd runs the backward pass in a thread that has no profile


@on_simulated_devices
def test_a_refused_launch_is_an_error_in_the_words_of_cuda() -> None:
    problem = _problem("cuda")
    runtime.simulated_runtime_refuse(2)  # cudaErrorMemoryAllocation
    with pytest.raises(RuntimeError, match="cotuning_kernels: launching a kernel: out of memory"):
        run_public(problem, "both heads", "cuda")
    assert runtime.cudaPeekAtLastError() == 0  # the exception reported it; torch's next call must not
    _check(problem, run_public(problem, "both heads", "cuda"))


@on_simulated_devices
@pytest.mark.parametrize(("error", "words"), [
    (35, "cotuning_kernels: .*; the driver is older than the CUDA toolkit .* update the driver"),
    (222, "cotuning_kernels: .*; the driver is older than the CUDA toolkit .* update the driver"),
    (209, "cotuning_kernels: .*; the kernels were not compiled for this card: reinstall"),
])  # fmt: skip
def test_a_driver_that_is_too_old_is_an_error_with_its_remedy(error: int, words: str) -> None:
    """InsufficientDriver, UnsupportedPtxVersion and NoKernelImageForDevice, as a driver returns them from a launch."""
    problem = _problem("cuda")
    runtime.simulated_runtime_refuse(error)
    with pytest.raises(RuntimeError, match=words):
        run_public(problem, "both heads", "cuda")
    _check(problem, run_public(problem, "both heads", "cuda"))


# ------------------------------------------------------------------------------------------------------ CUDA graphs


def _record(step: Callable[[], Tensor], device: str) -> tuple[Tensor, Callable[[], object]]:
    """Return a step's result, and a function that repeats the step into the same memory: a CUDA graph, or on the CPU
    the step itself."""
    if device == "cpu":
        kept = step().detach()
        return kept, lambda: kept.copy_(step().detach())
    loss, graph = capture(step)
    return loss.detach(), graph.replay


def test_a_graph_captures_a_step_and_replays_it_on_new_numbers(device: str) -> None:
    problem, later = _problem(device), _problem(device, seed=6)
    criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off).to(device)
    truth = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off, backend="reference").to(device)
    source, target = (x.detach().clone().requires_grad_() for x in (problem.source_logits, problem.target_logits))
    assert isinstance(problem.target, Tensor)
    labels = problem.target.clone()

    def step() -> Tensor:
        source.grad = target.grad = None
        loss: Tensor = criterion(source, target, labels)
        (1.5 * loss).backward()
        return loss

    loss, replay = _record(step, device)
    for given in (problem, later, problem, later):
        assert isinstance(given.target, Tensor)
        with torch.no_grad():
            source.copy_(given.source_logits)
            target.copy_(given.target_logits)
            labels.copy_(given.target)
        replay()
        leaves = [x.detach().clone().requires_grad_() for x in (source, target)]
        expected = truth(*leaves, labels)
        (1.5 * expected).backward()
        torch.testing.assert_close(loss, expected.detach())
        for ours, theirs in zip((source, target), leaves, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


# ----------------------------------------------------------------------- promises of torch's allocator (docs/cuda.md)


@on_a_gpu
def test_allocations_start_at_multiples_of_512_bytes() -> None:
    kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (1, 3, 513, 100_001, 2**21 + 1)]
    assert [x.data_ptr() % 512 for x in kept] == [0] * len(kept)


@on_a_gpu
def test_the_backward_pass_runs_on_the_stream_of_the_forward_pass() -> None:
    """So a gradient is scaled on the stream that its memory belongs to, and nothing needs `record_stream`."""
    problem = _problem("cuda")
    problem.options["backend"] = "cuda"
    expected = run_public(problem, "both heads", "cuda")
    leaves = [x.detach().requires_grad_() for x in (problem.source_logits, problem.target_logits)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        loss = ck.functional.co_tuning_loss(*leaves, problem.target, problem.relationship, **problem.options)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, leaves, problem.upstream)
    torch.cuda.synchronize()
    for ours, right in zip(gradients, (expected.source_grad, expected.target_grad), strict=True):
        assert torch.equal(bits(ours), bits(right))


@on_a_gpu
def test_a_graph_has_memory_that_nothing_else_uses() -> None:
    """A replay between another batch's forward and backward pass changes neither, and finds its own memory."""
    captured, other = _problem("cuda"), _problem("cuda", seed=6, shape=(10, 40, 1000))  # other shares of ignored rows
    other.options["backend"] = "cuda"
    outcome, graph = capture(lambda: run_public(captured, "both heads", "cuda"))
    full = [torch.full((size,), float("nan"), device="cuda") for size in (2, 200, 64 * 40, 64 * 1000) for _ in range(8)]
    leaves = [x.detach().requires_grad_() for x in (other.source_logits, other.target_logits)]
    loss = ck.functional.co_tuning_loss(*leaves, other.target, other.relationship, **other.options)
    assert isinstance(loss, Tensor)
    graph.replay()
    gradients = torch.autograd.grad(loss, leaves, other.upstream)
    expected = run_public(other, "both heads", "cuda")
    for ours, right in zip(gradients, (expected.source_grad, expected.target_grad), strict=True):
        assert torch.equal(bits(ours), bits(right))
    assert all(bool(x.isnan().all()) for x in full)
    _check(captured, outcome)


_ODD_AND_SLICED = (
    "import torch, cotuning_kernels as ck\n"
    "labels = torch.arange(5, device='cuda')\n"
    "for n in (37, 1000, 1024, 8142, 30522):\n"
    "    for dtype in (torch.float32, torch.bfloat16):\n"
    "        for first in (0, 1):\n"
    "            z = torch.randn(5, n + first, device='cuda', dtype=dtype)[:, first:].requires_grad_()\n"
    "            r = torch.rand(7, n + first, device='cuda')[:, first:]\n"
    "            ck.functional.source_label_loss(z, labels, r, backend='cuda').backward()\n"
    "torch.cuda.synchronize()\n"
)
"""Rows of odd lengths, and rows that start anywhere in 16 bytes, as slices of a wider matrix do."""


@on_a_gpu
def test_each_tensor_has_its_own_memory_without_the_caching_allocator() -> None:
    """compute-sanitizer gets this program. A simulated device ends it at an access beyond a tensor's last page."""
    finished = subprocess.run(
        [sys.executable, "-c", _ODD_AND_SLICED], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, f"ended with {finished.returncode}: {finished.stderr}"


@on_a_gpu
def test_a_graph_replays_after_a_launch_of_smaller_rows() -> None:
    """The graph's kernel needs the limit of shared memory that was set at its capture."""
    large, small = (_problem("cuda", shape=(4, 40, source_classes)) for source_classes in (20_000, 7000))
    outcome, graph = capture(lambda: run_public(large, "both heads", "cuda"))
    run_public(small, "both heads", "cuda")
    graph.replay()
    torch.cuda.synchronize()
    _check(large, outcome)


# ------------------------------------------------------------------------------------- autocast, compiler, processes


def test_under_autocast(device: str) -> None:
    """Heads that autocast makes bfloat16, both or one, give the same numbers as bfloat16 heads without autocast."""
    for target_dtype in (torch.bfloat16, torch.float32):
        problem = _problem(device, dtype=torch.bfloat16)
        problem.target_logits = problem.target_logits.to(target_dtype)
        plain = run_public(problem, "both heads", "cuda")
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            under = run_public(problem, "both heads", "cuda")
        for name, x in plain.tensors().items():
            assert torch.equal(bits(x), bits(under.tensors()[name])), name
        assert under.loss.dtype == torch.float32
        assert under.source_grad.dtype == torch.bfloat16
        _check(problem, under)


def test_under_a_compiler(device: str) -> None:
    """A whole training step, without a break in the graph."""
    problem = _problem(device)
    criterion = ck.FusedCoTuningLoss(problem.relationship).to(device)
    # Inductor needs a C++ compiler for the CPU and a driver for a GPU; our operations are traced in the same way.
    backend = "aot_eager" if device == "cpu" or SIMULATED else "inductor"
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    results = []
    for call in (criterion, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in (problem.source_logits, problem.target_logits)]
        loss = call(*leaves, problem.target)
        (2.0 * loss).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.compiler.reset()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(10, 37), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.source(x), self.target(x)


def _trained(device: str, rank: int, world: int, *, parallel: bool) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(12, 10, generator=draw).to(device), torch.arange(12).to(device) % 6
    relationship = torch.softmax(torch.randn(6, 37, generator=draw), 1)
    torch.manual_seed(2)
    network = _Network().to(device)
    model = DistributedDataParallel(network) if parallel else network
    criterion = ck.FusedCoTuningLoss(relationship).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        criterion(*model(inputs[rank::world]), labels[rank::world]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def _train_in_parallel(rank: int, world: int, kind: str, store: str) -> None:
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    nccl = kind == "cuda" and dist.is_nccl_available() and not SIMULATED
    dist.init_process_group(
        "nccl" if nccl else "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )  # fmt: skip
    weights, alone = _trained(device, rank, world, parallel=True), _trained(device, 0, 1, parallel=False)
    torch.testing.assert_close(weights, alone, rtol=1e-4, atol=1e-6)
    dist.barrier()
    Path(f"{store}.{rank}").touch()
    os._exit(0)  # gloo's threads may crash as the interpreter ends; all is compared by now


@pytest.mark.parametrize(("kind", "world"), [("cpu", 2), ("cuda", 1), ("cuda", 2)])
def test_distributed_data_parallel(kind: str, world: int, tmp_path: Path) -> None:
    """Processes that share a batch train the same weights as one process. On the CPU, the CPU kernels serve."""
    if kind == "cuda":
        if REASON is not None:
            pytest.skip(REASON)
        if torch.cuda.device_count() < world:
            pytest.skip(f"{torch.cuda.device_count()} CUDA device, and this needs {world}")
    store = str(tmp_path / "store")
    torch.multiprocessing.spawn(_train_in_parallel, args=(world, kind, store), nprocs=world)
    assert all(Path(f"{store}.{rank}").exists() for rank in range(world))


# -------------------------------------------------------------------------------------------------- the whole method


@on_a_gpu
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_the_method_from_pretrained_to_fine_tuned(method: str) -> None:
    """Temperature, relationship, both heads and training agree with the CPU."""
    draw = torch.Generator().manual_seed(3)
    inputs, labels = torch.randn(120, 12, generator=draw), torch.arange(120) % 5
    batches = [(inputs[k::4], labels[k::4]) for k in range(4)]
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(4)
        classifier = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 40)).to(device)
        with torch.no_grad():
            logits = 4 * classifier(inputs.to(device))
        draw.manual_seed(6)
        source_labels = torch.multinomial(torch.softmax(logits.cpu() / 2, 1), 1, generator=draw)[:, 0]
        fit = ck.fit_temperature(logits, source_labels.to(device))
        assert fit.converged
        relationship = ck.learn_relationship(
            classifier, batches, 5, method=method, temperature=1.3, progress=False,
            validation_loader=batches if method == "reverse" else None,
            inverse_penalties=[1.0],  # its optimum is not so flat that rounding moves it
        )  # fmt: skip
        model = ck.CoTuningModel.from_classifier(classifier, num_target_classes=5)
        torch.manual_seed(5)
        model.load_state_dict({name: 0.1 * torch.randn(x.shape) for name, x in model.state_dict().items()})
        criterion = ck.FusedCoTuningLoss(relationship).to(device)
        optimizer = torch.optim.SGD(model.param_groups(lr=0.05), momentum=0.9)
        for x, y in batches:
            optimizer.zero_grad()
            criterion(*model(x.to(device)), y.to(device)).backward()
            optimizer.step()
        error = ck.expected_calibration_error(logits, source_labels.to(device))
        weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
        results.append((fit.temperature, relationship.matrix.cpu(), weights, error))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- more than one device, and what waits


@on_a_gpu
def test_the_loss_over_processes_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits except the sum over processes. Both of the two have the same rows, so the global mean is each's."""
    monkeypatch.setattr("cotuning_kernels.distributed.rank_and_size", lambda group=None: (0, 2))
    monkeypatch.setattr(dist, "all_reduce", lambda counts, group=None: counts.mul_(2))
    problem = _problem("cuda")
    criterion = ck.FusedCoTuningLoss(problem.relationship).to("cuda")
    assert isinstance(problem.target, Tensor)
    labels = problem.target
    probabilities = torch.softmax(problem.target_logits.detach(), 1)
    for target in (labels, (labels, labels.flip(0), 0.3), probabilities):
        logits = problem.source_logits, problem.target_logits
        expected = criterion(*logits, target)
        torch.cuda.set_sync_debug_mode("error")
        try:
            terms = global_mean_loss(criterion, *logits, target)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(terms.loss, expected)


@on_two_devices
def test_replicas_for_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nn.DataParallel makes them, but without NCCL, which simulated devices lack."""

    def copied(tensors: list[Tensor], devices: list[int], _: int) -> list[list[Tensor]]:
        return [[x.to(f"cuda:{k}") for x in tensors] for k in devices]

    monkeypatch.setattr(torch._C, "_broadcast_coalesced", copied)
    problem = _problem("cuda", shape=(16, 40, 100))
    criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=1.7).to("cuda")
    tensors = problem.source_logits, problem.target_logits, problem.target
    expected = criterion(*tensors)
    for k, replica in enumerate(torch.nn.parallel.replicate(criterion, [0, 1])):
        loss = replica(*(x.to(f"cuda:{k}") for x in tensors if isinstance(x, Tensor)))
        torch.testing.assert_close(loss.cpu(), expected.cpu())


@on_two_devices
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_learning_goes_on_where_a_model_on_two_devices_leaves_its_logits(method: str, tmp_path: Path) -> None:
    network = _OnTwoDevices()
    batches = [(torch.randn(6, 10, generator=torch.Generator().manual_seed(k)), torch.arange(6)) for k in range(4)]

    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches[:2]
        raise InterruptedError

    def learn(model: Callable[[Tensor], Tensor], loader: Any, **checkpoint: Any) -> ck.Relationship:
        return ck.learn_relationship(
            model, loader, 6, method=method, progress=False, inverse_penalties=[1.0],
            validation_loader=batches if method == "reverse" else None, **checkpoint,
        )  # fmt: skip

    for model in (network, lambda x: network(x.to("cuda:0"))):
        checkpoint = {"checkpoint": tmp_path / "statistics", "checkpoint_every": 1}
        with pytest.raises(InterruptedError):
            learn(model, interrupted(), **checkpoint)
        resumed, at_once = learn(model, batches, **checkpoint), learn(model, batches)
        assert resumed.matrix.device == at_once.matrix.device == torch.device("cuda:1")
        assert torch.equal(resumed.matrix, at_once.matrix)


class _OnTwoDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 8).to("cuda:0"), nn.Linear(8, 37).to("cuda:1")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x).to("cuda:1"))
        return logits


@on_a_gpu
def test_logits_on_two_devices_are_refused_in_words() -> None:
    logits, labels = torch.randn(12, 10, generator=torch.Generator().manual_seed(7)), torch.arange(12) % 3
    with pytest.raises(ValueError, match="train_logits is on cuda:0, but validation_logits on cpu"):
        ck.learn_reverse_relationship(logits.to("cuda"), labels, logits, labels, 3)


@on_a_gpu
def test_calibration_beside_a_default_device() -> None:
    logits, labels = torch.randn(40, 10, generator=torch.Generator().manual_seed(8)), torch.arange(40) % 10
    expected = ck.expected_calibration_error(logits, labels)
    with torch.device("cuda"):  # as torch.set_default_device does
        for device in ("cpu", "cuda"):
            found = ck.expected_calibration_error(logits.to(device), labels)
            assert found == pytest.approx(expected, abs=1e-6)


@on_a_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_what_is_measured_of_the_relationship_agrees(name: str) -> None:
    if torch.cuda.device_count() <= (torch.device(name).index or 0):
        pytest.skip(f"there is no {name}")
    check_relationship(RelationshipProblem.make(Shape(300, 5, 40), batch=64, device=name))


@on_two_devices
def test_measuring_waits_for_the_device_that_is_measured() -> None:
    measured = torch.zeros(1000, device="cuda:1")
    with torch.cuda.device(1):
        torch.cuda._sleep(100_000_000)  # some 50 ms
    synchronizer("cuda:1")()
    assert torch.cuda.current_stream("cuda:1").query()
    assert measure_here(lambda: measured + 1, "cuda:1").torch >= measured.nbytes


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_step(device: str) -> None:
    """Beyond the logits, a step allocates the two gradients and little else."""
    problem = _problem(device, shape=(64, 40, 20_000))
    run_public(problem, "both heads", "cuda")
    rise = measure_here(lambda: run_public(problem, "both heads", "cuda"), device).torch
    gradients = problem.source_logits.nbytes + problem.target_logits.nbytes
    # The allocator of the GPU gives multiples of 512 bytes, and parts of its large blocks.
    assert gradients <= rise <= 1.1 * gradients + (1 << 16)


# ----------------------------------------------------------------------------------------- programs around the library


@on_a_gpu
def test_a_bad_label_is_a_device_side_assertion() -> None:
    """In its own process, which cannot use the device after an assertion."""
    code = (
        "import torch, cotuning_kernels as ck\n"
        "z = torch.zeros(4, 40, device='cuda', requires_grad=True)\n"
        "labels = torch.tensor([0, 1, 7, 2], device='cuda')\n"
        "ck.functional.source_label_loss(z, labels, torch.ones(7, 40, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.returncode != 0
    assert "device-side assert" in finished.stderr


@on_a_gpu
def test_compute_sanitizer_has_nothing_to_report() -> None:
    """Without the caching allocator, whose blocks are larger than tensors and hide reads beyond them."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not here")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck", "synccheck", "initcheck"):
        # Do not report errors that API calls return: torch looks up symbols that may be missing, and handles that.
        options = ["--tool", check, "--error-exitcode", "9", "--report-api-errors", "no"]
        finished = subprocess.run(
            [sanitizer, *options, sys.executable, "-c", _ODD_AND_SLICED], capture_output=True, text=True, timeout=900,
            env=environment,
        )  # fmt: skip
        words = finished.stdout + finished.stderr
        try:
            error = first_error(words)
        except Refused as refused:
            pytest.skip(f"compute-sanitizer is refused here: {refused}")
        assert error is None, f"{error}\n{words}"
        assert finished.returncode == 0, words


@on_a_gpu
def test_recipes_take_a_classifier_where_its_trainer_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    fashion = pytest.importorskip("recipe_fashion")
    images, labels = torch.randn(12, 8, generator=torch.Generator().manual_seed(9)), torch.arange(12) % 3
    monkeypatch.setattr(fashion, "FashionTask", lambda *_, **__: TensorDataset(images, labels))
    classifier = nn.Linear(8, 3)
    expected = fashion.accuracy(classifier)
    assert fashion.accuracy(classifier.to("cuda")) == expected


@on_a_gpu
@pytest.mark.parametrize("warm", [False, True])
def test_the_device_stopwatch_counts_what_the_device_does_in_a_call_and_nothing_else(warm: bool) -> None:
    stopwatch = DeviceStopwatch("cuda", warm=warm)
    if SIMULATED:  # as much to empty as on a card
        stopwatch._zeroed = torch.zeros(50 << 20, device="cuda")
    small, large = torch.rand(8, device="cuda"), torch.rand(1024, 1024, device="cuda")
    pause = 0.02 if SIMULATED else 0.0003  # less than the stopwatch can keep a real device busy

    def on_the_host() -> None:
        time.sleep(pause)
        small.add_(1)

    def least(call: Callable[[], object]) -> float:
        return min(stopwatch(call) for _ in range(12))

    # Counts neither the host's time nor the emptying of caches, which takes longer on a simulated device.
    assert 0 < least(on_the_host) < pause / 2
    once, three_times = least(lambda: large @ large), least(lambda: large @ large @ large @ large)
    assert 2 < three_times / once < 4.5
    assert stopwatch.ahead
    # A call that waits for the device cannot be queued ahead of it.
    assert stopwatch(lambda: float(small[0])) > 0
    assert not stopwatch.ahead


@on_a_gpu
@pytest.mark.parametrize("warm", [False, True])
def test_a_cold_call_finds_the_caches_emptied_and_a_warm_one_comes_after_itself(warm: bool) -> None:
    stopwatch, order = DeviceStopwatch("cuda", warm=warm), []
    emptied = type("Emptied", (), {"zero_": lambda _: order.append("emptied"), "sum": lambda _: None})()
    stopwatch._zeroed = stopwatch._read = emptied
    for name in ("start", "end"):
        event = getattr(stopwatch, f"_{name}")
        event.record = lambda record=event.record, name=name: (order.append(name), record())
    stopwatch(lambda: order.append("called"))
    assert order == ["called" if warm else "emptied", "start", "called", "end"]


@on_a_gpu
def test_the_page_of_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shape = Shape(13, 7, 93)
    point = page.measure("shapes", shape, "float32", 1, device="cuda", seconds=0.0, compiled=not SIMULATED)
    assert point.host_seconds.keys() == point.seconds.keys() - {page.COPY}
    assert {OURS, "tllib", "F.cross_entropy", "F.kl_div"} <= point.host_seconds.keys()
    assert min(*point.seconds.values(), *point.host_seconds.values(), point.warm_seconds, point.graph_seconds) > 0
    assert point.behind["tllib"] == 1  # its copies from the host make the host wait
    assert point.behind[OURS] < 1
    remembered = page.measure_memory(shape, "float32", device="cuda")
    assert remembered.peaks[OURS] >= remembered.gradient_bytes
    points = [replace(point, sweep=sweep) for sweep in page.sweeps()]
    written = page.write_page(points, [remembered], {}, tmp_path).read_text()
    assert "## The host" in written
    assert f"| {shape} | float32 | 1 | " in written


def test_benchmarks_take_the_gpu_where_there_is_one(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={result}"]
    command += ["-q", "-k", "test_forward_and_backward and cotuning_kernels and 48x200x1000-float32"]
    # pytest-benchmark does not measure under pytest-xdist, which it detects by a worker's environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    served = {entry["extra_info"]["backend"] for entry in json.loads(result.read_text())["benchmarks"]}
    assert served == {our_backend("cuda" if torch.cuda.is_available() else "cpu")}
