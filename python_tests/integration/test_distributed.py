"""One, two and four processes learn the same relationships, and train to the same losses and weights."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cotuning_kernels as ck
from cotuning_kernels import distributed as ck_distributed
from cotuning_kernels import sharded_loss
from cotuning_kernels.distributed import ShardSampler, global_mean_loss
from support import distributed_worker as worker
from support.backends import Backend

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

Result = dict[str, Any]


def run(folder: Path, processes: int) -> list[Result]:
    package = Path(ck.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), worker.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """The results of each process, by the number of processes."""
    folder = tmp_path_factory.mktemp("distributed")
    relationship = torch.rand(worker.N_T, worker.N_S, generator=torch.Generator().manual_seed(4))
    relationship /= relationship.sum(dim=1, keepdim=True)
    relationship[2] = 0
    torch.save(relationship, folder / "relationship.pt")
    found = {processes: run(folder, processes) for processes in (1, 2, 4)}
    assert not list(folder.glob("statistics*"))  # every process has removed its checkpoint
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_the_same_relationship(results: dict[int, list[Result]], processes: int, method: str) -> None:
    expected = results[1][0][method]
    for found in (result[method] for result in results[processes]):
        # float32 additions come in another order. In the reverse method L-BFGS then ends at another point within
        # its tolerance.
        tolerance = 1e-6 if method == "direct" else 1e-3
        torch.testing.assert_close(found["matrix"], expected["matrix"], rtol=0, atol=tolerance)
        assert torch.equal(found["counts"], expected["counts"])
        assert found["metadata"]["source_model"] == "Sequential"
        assert torch.equal(found["matrix"], results[processes][0][method]["matrix"])  # the same bits in every process


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("training", ["plain", "weighted", "linear", "linear, weighted"])
def test_the_same_losses_and_weights(results: dict[int, list[Result]], processes: int, training: str) -> None:
    """With linear heads they are those of logits."""
    expected = results[1][0][{"linear": "plain", "linear, weighted": "weighted"}.get(training, training)]
    for found in (result[training] for result in results[processes]):
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
        for name, weights in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weights, rtol=0, atol=1e-5)


def test_one_process_is_the_plain_criterion(results: dict[int, list[Result]]) -> None:
    """The expected losses equal those of F.cross_entropy on whole batches."""
    relationship = torch.rand(worker.N_T, worker.N_S, generator=torch.Generator().manual_seed(4))
    relationship /= relationship.sum(dim=1, keepdim=True)
    relationship[2] = 0
    model = worker.two_heads()
    inputs, labels = worker.data(worker.STEPS * worker.BATCH, seed=11).tensors
    source_logits, target_logits = model(inputs[: worker.BATCH])
    labels = labels[: worker.BATCH]
    counted = (labels >= 0) & (labels != 2)
    target_term = F.cross_entropy(target_logits, labels)
    source_term = F.cross_entropy(source_logits[counted], relationship[labels[counted]])
    expected = torch.stack([target_term + 1.7 * source_term, target_term, source_term]).double()
    torch.testing.assert_close(results[1][0]["plain"]["losses"][0], expected.detach(), rtol=1e-5, atol=0)


def test_means_of_the_processes_own_rows_would_differ(results: dict[int, list[Result]]) -> None:
    """The tolerance above separates the global mean from DDP's average of local means."""
    relationship = torch.rand(worker.N_T, worker.N_S, generator=torch.Generator().manual_seed(4))
    relationship /= relationship.sum(dim=1, keepdim=True)
    relationship[2] = 0
    criterion = ck.FusedCoTuningLoss(relationship, 1.7)
    model = worker.two_heads()
    inputs, labels = worker.data(worker.STEPS * worker.BATCH, seed=11).tensors
    local = torch.stack([
        criterion(*model(inputs[rows]), labels[rows]) for rows in (worker.rows_of_process(rank, 4) for rank in range(4))
    ])  # fmt: skip
    assert abs(local.mean() / results[1][0]["plain"]["losses"][0, 0] - 1) > 1e-3


def test_a_process_without_a_batch_is_named(results: dict[int, list[Result]]) -> None:
    assert results[2][0]["idle"] == "processes [1] had no batch; start fewer processes, or use smaller batches"
    assert {result["idle"] for result in results[4]} == {
        "processes [1, 2, 3] had no batch; start fewer processes, or use smaller batches"
    }


@pytest.mark.parametrize("length", [0, 1, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_have_each_sample_once(length: int, processes: int) -> None:
    samplers = [ShardSampler(range(length), rank, processes) for rank in range(processes)]
    assert sorted(itertools.chain(*samplers)) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rank is 3, expected one of the 3 processes"):
        ShardSampler(range(5), 3, 3)
    criterion = ck.FusedCoTuningLoss(torch.eye(3), reduction="sum")
    with pytest.raises(ValueError, match=r"criterion\.reduction is 'sum', expected 'mean'"):
        global_mean_loss(criterion, torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2, but torch\.distributed is not initialised"):
        ShardSampler(range(5))


@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_a_share_is_not_taken_for_the_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher set WORLD_SIZE, but init_process_group was not called."""
    batches = [worker.data(20, seed=1)[:]]
    options = {"validation_loader": batches} if method == "reverse" else {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2, but torch\.distributed is not initialised"):
        ck.learn_relationship(
            worker.source_model(), batches, worker.N_T, method=method, distributed=True, progress=False, **options
        )


def targets(draw: torch.Generator) -> dict[str, Any]:
    labels, labels_b = (torch.randint(0, 4, (9,), generator=draw) for _ in range(2))
    labels[3] = labels_b[3] = labels[5] = -100
    return {
        "labels": labels,
        "int32 labels": labels.int(),
        "probabilities": torch.rand(9, 4, generator=draw).softmax(1),
        "pair": (labels, labels_b, 0.3),
        "pair with a share a row": (labels, labels_b, torch.rand(9, generator=draw)),
    }


@pytest.mark.parametrize("form", ["labels", "int32 labels", "probabilities", "pair", "pair with a share a row"])
@pytest.mark.parametrize("weighted", [False, True])
def test_counts_are_what_the_means_divide_by(form: str, weighted: bool, draw: torch.Generator) -> None:
    """The criterion divides sums by counts in float64."""
    relationship = torch.rand(4, 6, generator=draw, dtype=torch.float64)
    relationship[1] = 0
    weight = torch.rand(4, generator=draw, dtype=torch.float64) + 0.5 if weighted else None
    source_logits, target_logits = (torch.randn(9, n, generator=draw, dtype=torch.float64) for n in (6, 4))
    target = targets(draw)[form]

    def terms(reduction: str) -> Tensor:
        criterion = ck.FusedCoTuningLoss(relationship, weight=weight, reduction=reduction)
        return torch.stack(criterion(source_logits, target_logits, target, return_terms=True)[1:])

    criterion = ck.FusedCoTuningLoss(relationship, weight=weight)
    *found, rows = sharded_loss._counts(target, criterion.relationship, criterion.weight, criterion.ignore_index)
    torch.testing.assert_close(torch.stack(found), terms("sum") / terms("mean"), rtol=1e-12, atol=0)
    # Row 3 of the labels is ignored, and row 5 of the first labels of a pair.
    expected = {"labels": 7.0, "int32 labels": 7.0, "probabilities": 9.0, "pair": 7.7}
    if form in expected:
        assert float(rows) == pytest.approx(expected[form])


def _with_another_process_that_has_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a second process that adds nothing to the sums."""
    monkeypatch.setattr(ck_distributed, "rank_and_size", lambda group=None: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, group=None: None)


@pytest.mark.parametrize("case", ["no weight", "all ignored", "no probabilities", "nothing supervised"])
def test_means_over_nothing_are_those_of_the_criterion(
    case: str, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    relationship = torch.rand(3, 6, generator=draw)
    weight = torch.tensor([1.0, 0.0, 1.0]) if case == "no weight" else None
    target: Tensor = torch.full((5,), -100 if case == "all ignored" else 1)
    if case == "no probabilities":
        target = torch.zeros(5, 3)
    if case == "nothing supervised":
        relationship[1] = 0
    criterion = ck.FusedCoTuningLoss(relationship, weight=weight)
    source, logits = (torch.randn(5, n, generator=draw, requires_grad=True) for n in (6, 3))
    expected = criterion(source, logits, target, return_terms=True)
    theirs = torch.autograd.grad(expected.loss, (source, logits))
    _with_another_process_that_has_no_rows(monkeypatch)
    found = global_mean_loss(criterion, source, logits, target)
    ours = torch.autograd.grad(found.loss, (source, logits))
    for value, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        # Twice, since DDP halves it by averaging over the two processes.
        torch.testing.assert_close(value.detach(), 2 * other.detach(), equal_nan=True)


@pytest.mark.parametrize("form", ["labels", "probabilities", "pair with a share a row"])
def test_linear_heads_of_tokens(form: str, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features ``(3, 3, D)`` and their labels ``(3, 3)`` have the global mean of their rows."""
    relationship, target = torch.rand(4, 6, generator=draw), targets(draw)[form]
    relationship[1] = 0
    features, old, new = (torch.randn(n, 5, generator=draw, requires_grad=True) for n in (9, 6, 4))
    expected = ck.FusedCoTuningLoss(relationship)(features @ old.t(), features @ new.t(), target, return_terms=True)
    _with_another_process_that_has_no_rows(monkeypatch)
    tokens = tuple(x.unflatten(0, (3, 3)) for x in (target if isinstance(target, tuple) else (target,)))
    criterion = ck.FusedLinearCoTuningLoss(relationship)
    found = global_mean_loss(
        criterion, features.view(3, 3, 5), old, None, new, None, target=tokens if len(tokens) > 1 else tokens[0]
    )
    gradients = (torch.autograd.grad(each.loss, (features, old, new)) for each in (found, expected))
    for value, other in zip((*found, *next(gradients)), (*expected, *next(gradients)), strict=True):
        torch.testing.assert_close(value.detach(), 2 * other.detach())
    with pytest.raises(ValueError, match=r"target has shape \(9,.*, expected class indices \(3, 3\)"):
        global_mean_loss(criterion, features.view(3, 3, 5), old, None, new, None, target)
    with pytest.raises(TypeError, match="missing 3 required positional arguments"):
        global_mean_loss(criterion, features, old, target)


def test_a_label_out_of_range_is_named_as_by_the_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_another_process_that_has_no_rows(monkeypatch)
    criterion = ck.FusedCoTuningLoss(torch.eye(3), weight=torch.ones(3))
    with pytest.raises(IndexError, match=r"target\[1\] is 99"):
        global_mean_loss(criterion, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 99]))


def test_small_class_weights_cost_half_precision_no_digits(
    backend: Backend, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum is later divided by the total weight; before, it must not be stored as small as the weights."""
    weight = (torch.rand(10, generator=draw) + 0.5) * 1e-6
    relationship = torch.rand(10, 20, generator=draw).softmax(1)
    source, logits = (torch.randn(64, n, generator=draw).half().requires_grad_() for n in (20, 10))
    labels = torch.randint(0, 10, (64,), generator=draw)
    criterion = ck.FusedCoTuningLoss(relationship, weight=weight, backend=backend.argument)
    _with_another_process_that_has_no_rows(monkeypatch)
    (found,) = torch.autograd.grad(global_mean_loss(criterion, source, logits, labels).loss * 1024, logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(2 * 1024 * F.cross_entropy(exact, labels, weight.double()), exact)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-3


def test_without_a_launcher_it_is_the_criterion(draw: torch.Generator) -> None:
    criterion = ck.FusedCoTuningLoss(torch.eye(3))
    logits = torch.randn(4, 3, generator=draw, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    model = nn.Identity()
    ours = global_mean_loss(criterion, model(logits), model(logits), labels)
    assert torch.equal(ours.loss, criterion(logits, logits, labels))
