"""What only a GPU can show: graph capture, streams, devices, memory. Skipped, with the reason, where there is none; the
conformance table has a row of its own for the device (test_conformance.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from conformance import Case, Expectation, Outcome, Problem, _missing_cuda, run_public
from torch import Tensor

import cotuning_kernels as ck

REASON = _missing_cuda()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def _problem(device: str, reduction: str = "mean", seed: int = 5) -> Problem:
    case = Case("device", "", (64, 40, 1000), "ignoring", options={"reduction": reduction})
    return case.build(torch.float32, seed).map(lambda _, x: x.to(device))


def _check(problem: Problem, outcome: Outcome) -> None:
    for name, x in vars(outcome).items():
        setattr(outcome, name, None if x is None else x.detach().cpu())
    Expectation(problem, "both heads").check(outcome)


def test_nothing_waits_for_the_device() -> None:
    problem = _problem("cuda")
    run_public(problem, "both heads", "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = run_public(problem, "both heads", "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _check(problem, outcome)


def test_a_graph_captures_a_step_and_replays_it_on_new_numbers() -> None:
    problem, later = _problem("cuda"), _problem("cuda", seed=6)
    criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off).cuda()
    source, target = (x.detach().clone().requires_grad_() for x in (problem.source_logits, problem.target_logits))
    labels = problem.target
    assert isinstance(labels, Tensor)
    labels = labels.clone()

    def step() -> Tensor:
        source.grad = target.grad = None
        loss = criterion(source, target, labels)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for given in (problem, later):
        with torch.no_grad():
            source.copy_(given.source_logits)
            target.copy_(given.target_logits)
            labels.copy_(given.target)
        graph.replay()
        expected = ck.FusedCoTuningLoss(problem.relationship, trade_off=problem.trade_off, backend="reference").cuda()
        leaves = [x.detach().clone().requires_grad_() for x in (source, target)]
        reference_loss = expected(*leaves, labels)
        reference_loss.backward()
        torch.testing.assert_close(loss, reference_loss)
        for ours, theirs in zip((source, target), leaves, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_two_streams_at_once() -> None:
    """Each launch has a counter of its own: neither finishes the other's sums."""
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
        assert all(torch.equal(many[0].loss, other.loss) for other in many)
        assert all(torch.equal(many[0].source_grad, other.source_grad) for other in many)
        _check(problem, many[0])


def test_the_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device, and this needs two")
    problem = _problem("cuda:1")
    outcome = run_public(problem, "both heads", "cuda")
    assert outcome.source_grad.device == torch.device("cuda:1")
    _check(problem, outcome)


def test_under_a_compiler() -> None:
    problem = _problem("cuda")
    criterion = ck.FusedCoTuningLoss(problem.relationship).cuda()
    compiled = torch.compile(criterion, fullgraph=True)
    arguments = (problem.source_logits, problem.target_logits, problem.target)
    torch.testing.assert_close(compiled(*arguments), criterion(*arguments))


def test_memory_of_a_step() -> None:
    """Beyond the logits: the two gradients, and little else."""
    problem = _problem("cuda")
    run_public(problem, "both heads", "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_public(problem, "both heads", "cuda")
    gradients = problem.source_logits.nbytes + problem.target_logits.nbytes
    assert torch.cuda.max_memory_allocated() - before < 2 * gradients + (1 << 20)


def test_a_bad_label_is_a_device_side_assertion() -> None:
    """In a process of its own: after an assertion the device is lost to it."""
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


def test_compute_sanitizer_has_nothing_to_report() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not here")
    code = (
        "import torch, cotuning_kernels as ck\n"
        "for n in (37, 1000, 30522):\n"
        "    z = torch.randn(5, n, device='cuda', requires_grad=True)\n"
        "    r = torch.rand(7, n, device='cuda')\n"
        "    ck.functional.source_label_loss(z, torch.arange(5, device='cuda'), r).backward()\n"
        "torch.cuda.synchronize()\n"
    )
    for check in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert finished.returncode == 0, finished.stdout + finished.stderr
