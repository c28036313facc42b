"""Linear heads in a training step: modules, autocast, compilation, accumulation, tied and frozen heads, memory."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cotuning_kernels as ck
from cotuning_kernels import backends, functional, linear_head, linear_loss, reference
from cotuning_kernels.linear_head import MEMORY_BUDGET
from cotuning_kernels.options import REDUCTIONS, OperationOptions
from cotuning_kernels.sparse_rows import SparseRows
from support import linear_heads_worker as worker

ROWS, WIDTH, N_S, N_T = 40, 12, 90, 6

needs_kernels = pytest.mark.skipif(
    backends.select("cpu") == "reference", reason="the reference, which serves here, computes all logits"
)


class Step(nn.Module):
    """Two heads, a relationship in which half of the classes have supervision, and a batch with ignored rows."""

    def __init__(self, draw: torch.Generator, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        self.source, self.target = (nn.Linear(WIDTH, n, bias=bias, dtype=dtype) for n in (N_S, N_T))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw).to(dtype) / math.sqrt(WIDTH)
        self.relationship = torch.softmax(2 * torch.randn(N_T, N_S, generator=draw), 1)
        self.relationship[::2] = 0
        self.features = torch.randn(ROWS, WIDTH, generator=draw).to(dtype).requires_grad_()
        self.labels = torch.randint(N_T, (ROWS,), generator=draw)
        self.labels[::7] = -100
        self.criterion = ck.FusedLinearCoTuningLoss(self.relationship, memory_budget=7 * N_S * 4)
        self.dense = ck.FusedCoTuningLoss(self.relationship)

    @property
    def heads(self) -> tuple[Any, ...]:
        return self.source.weight, self.source.bias, self.target.weight, self.target.bias

    def fused(self) -> Tensor:
        return self.criterion(self.features, *self.heads, self.labels)

    def unfused(self) -> Tensor:
        return self.dense(self.source(self.features), self.target(self.features), self.labels)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.zero_grad()
        self.features.grad = None
        loss.backward()
        found = {name: x.grad for name, x in self.named_parameters()} | {"features": self.features.grad}
        return {name: x.clone() for name, x in found.items() if x is not None}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Gradients, with a tolerance relative to the largest number of each."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype
        torch.testing.assert_close(ours[name], x, rtol=0, atol=tolerance * float(x.abs().max()), msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_loss_of_logits(bias: bool, draw: torch.Generator) -> None:
    step = Step(draw, bias=bias)
    torch.testing.assert_close(step.fused(), step.unfused())
    assert_alike(step.gradients(step.fused()), step.gradients(step.unfused()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_and_repeated_backward(dtype: torch.dtype, draw: torch.Generator) -> None:
    step = Step(draw, dtype)
    tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    once = step.gradients(step.fused())
    assert_alike(step.gradients(-0.5 * step.fused()), {name: -0.5 * x for name, x in once.items()}, tolerance)
    assert_alike(step.gradients(3 * step.fused()), {name: 3 * x for name, x in once.items()}, tolerance)
    loss = step.fused()
    step.zero_grad()
    inputs = [step.features, *step.parameters()]
    for factor in (3.0, 1.0, 3.0):
        found = torch.autograd.grad(loss, inputs, torch.tensor(factor), retain_graph=True)
        names = ["features", *(name for name, _ in step.named_parameters())]
        assert_alike(dict(zip(names, found, strict=True)), {name: factor * x for name, x in once.items()}, tolerance)
        for x in found:
            x.fill_(7.0)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(step.fused(), step.features, create_graph=True)


def test_without_gradients(draw: torch.Generator) -> None:
    step = Step(draw)
    with torch.no_grad():
        loss = step.fused()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, step.unfused().detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, draw: torch.Generator) -> None:
    """Gradients of float32 parameters; nearer to the truth than autocast's own, which rounds them to half precision."""
    step = Step(draw)
    with torch.autocast("cpu", dtype=dtype):
        loss, dense = step.fused(), step.unfused()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dense, rtol=2e-2, atol=0)
    assert not torch.equal(loss, step.fused())  # the products are in half precision
    ours, theirs, exact = (step.gradients(each) for each in (loss, dense, step.unfused()))
    for name, x in exact.items():
        assert ours[name].dtype == torch.float32
        error, allowed = (float((each[name] - x).abs().max() / x.abs().max()) for each in (ours, theirs))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps, name


@needs_kernels
def test_half_precision_gradients_are_summed_in_float32(draw: torch.Generator) -> None:
    """Chunks of one row each: sums in bfloat16 would lose what the later rows add."""
    step = Step(draw, torch.bfloat16)
    rows = 2000
    step.features = torch.ones(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    step.labels = torch.arange(rows) % N_T
    step.criterion.memory_budget = 1
    found = step.gradients(step.fused())
    wide = copy.deepcopy(step).float()
    wide.features = step.features.detach().float().requires_grad_()
    exact = wide.gradients(wide.unfused())
    for name in ("source.weight", "source.bias", "target.weight"):
        error = (found[name].float() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 2e-2, name


@pytest.mark.parametrize("autocast", [False, True])
def test_compilation_in_one_graph(autocast: bool, draw: torch.Generator) -> None:
    step = Step(draw)
    compiled = torch.compile(lambda: step.fused(), fullgraph=True, backend="aot_eager")
    for trade_off in (2.3, 0.4):  # read when the graph runs
        step.criterion.trade_off = trade_off
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, expected = compiled(), step.fused()
        torch.testing.assert_close(loss, expected)
        assert_alike(step.gradients(loss), step.gradients(expected))


@pytest.mark.parametrize("kind", ["labels", "probabilities", "pair"])
def test_the_operation_obeys_torchs_rules(kind: str, draw: torch.Generator) -> None:
    served_by = backends.select("cpu")
    if served_by == "reference":
        pytest.skip("the operation is for kernels")
    step = Step(draw)
    factor = torch.tensor(0.3, dtype=torch.float64)
    for metrics in (False, True):
        takes_part = step.labels != -100
        if metrics:  # opcheck takes NaN, which stands where a row takes no part, for a difference
            step.labels, takes_part = step.labels.clamp(min=0), torch.ones_like(takes_part)
        target, target_b, mix = step.labels, None, None
        if kind == "pair":
            target_b, mix = step.labels.flip(0), torch.rand(ROWS, generator=draw, dtype=torch.float64)
        elif kind == "probabilities":
            target = torch.softmax(torch.randn(ROWS, N_T, generator=draw), 1)
        one = torch.ones((), dtype=torch.float64)
        options = OperationOptions(None, one, 0.0, -100, REDUCTIONS["sum"], False)
        crow, col, values = (x.clone() for x in SparseRows.of(step.relationship.to_sparse())[:3])  # opcheck: no views
        dense, sparse, hard = (step.relationship, None, None), (values, crow, col), (None, None, None)
        for relationship, head in ((dense, step.source), (sparse, step.source), (hard, step.target)):
            torch.library.opcheck(
                torch.ops.cotuning_kernels.linear_head_loss.default,
                (step.features, head.weight, head.bias, takes_part, factor, target, target_b, mix, *relationship,
                 *options, torch.float32, 999, served_by, True, True, True, metrics),
            )  # fmt: skip


def test_accumulated_gradients_are_those_of_the_whole_batch(draw: torch.Generator) -> None:
    step = Step(draw)
    step.criterion.reduction = step.dense.reduction = "sum"
    whole = step.gradients(step.unfused())
    step.zero_grad()
    for rows in (slice(0, 15), slice(15, ROWS)):
        step.criterion(step.features.detach()[rows], *step.heads, step.labels[rows]).backward()
    whole.pop("features")
    assert_alike({name: x.grad for name, x in step.named_parameters() if x.grad is not None}, whole)


def test_a_tied_embedding_gets_both_gradients(draw: torch.Generator) -> None:
    """The source head's weight is the embedding that makes the features, as in a language model."""
    step = Step(draw)
    words = torch.randint(N_S, (ROWS,), generator=draw)
    found = []
    for fused in (True, False):
        step.zero_grad()
        step.features = F.embedding(words, step.source.weight).tanh()
        (step.fused() if fused else step.unfused()).backward()
        found.append({name: x.grad.clone() for name, x in step.named_parameters()})
    assert_alike(*found)


def test_training_gives_the_same_weights(draw: torch.Generator) -> None:
    step = Step(draw)
    backbone = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh())
    inputs = torch.randn(10, ROWS, 8, generator=draw)
    states = []
    for fused in (True, False):
        model = copy.deepcopy(nn.ModuleList([backbone, step]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for batch in inputs:
            model[1].features = model[0](batch)
            loss = model[1].fused() if fused else model[1].unfused()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states.append({name: x.detach() for name, x in model.named_parameters()})
    assert_alike(*states, tolerance=1e-4)
    moved = (states[0]["1.source.weight"] - step.source.weight).abs().max()
    assert moved > 0.01  # far more than the tolerance


def test_a_pair_of_features(draw: torch.Generator) -> None:
    """Each head reads its own features, which may differ in width and dtype."""
    step = Step(draw)
    wide = torch.randn(ROWS, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(5, N_T, dtype=torch.float64)
    loss = step.criterion((step.features, wide), *step.heads[:2], head.weight, head.bias, step.labels)
    expected = step.dense(step.source(step.features), head(wide), step.labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected)
    inputs = (step.features, wide, head.weight, step.source.weight)
    for x, y in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(x, y)


# ------------------------------------------------------------------------------- rows and heads that cost nothing


@pytest.fixture
def open_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation as an ordinary function, so that dispatch modes see what it does. It computes all gradients."""
    monkeypatch.setattr(linear_loss, "linear_head_loss", linear_head.compute_linear_head)


class Products(TorchDispatchMode):
    """The multiplications in matrix products. (torch's FlopCounterMode does not count those in place.)"""

    multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return result


def multiplications(step: Step) -> int:
    with Products() as counted:
        step.fused()
    return counted.multiplications


@needs_kernels
@pytest.mark.usefixtures("open_operation")
def test_rows_without_supervision_reach_no_product_of_the_source_head(draw: torch.Generator) -> None:
    step = Step(draw)
    valid = step.labels != -100
    supervised = valid & (step.relationship != 0).any(1)[step.labels.clamp(min=0)]
    assert 0 < supervised.sum() < valid.sum() < ROWS
    expected = 3 * WIDTH * (N_S * int(supervised.sum()) + N_T * int(valid.sum()))  # three products a head
    assert multiplications(step) == expected
    step.criterion.trade_off = 0.0
    assert multiplications(step) == 3 * WIDTH * N_T * int(valid.sum())


@needs_kernels
def test_what_unsupervised_rows_hold_does_not_matter(draw: torch.Generator) -> None:
    step = Step(draw)
    clean = step.gradients(step.fused())
    supervised = (step.relationship != 0).any(1)[step.labels.clamp(min=0)] & (step.labels != -100)
    poisoned = step.features.detach().clone()
    poisoned[~supervised] = math.nan
    for_source = poisoned.requires_grad_()
    loss = step.criterion((for_source, step.features), *step.heads, step.labels)
    found = torch.autograd.grad(loss, [for_source, step.source.weight, step.source.bias])
    assert torch.equal(found[1], clean["source.weight"])
    assert torch.equal(found[2], clean["source.bias"])
    assert (found[0][~supervised] == 0).all()


@needs_kernels
@pytest.mark.parametrize("frozen", ["source weights", "features", "source head and features"])
def test_what_is_frozen_costs_no_product(frozen: str, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(draw)
    step.labels = torch.arange(ROWS) % 3 * 2 + 1  # every row is supervised
    every = step.gradients(step.fused())
    if "source" in frozen:
        step.source.requires_grad_(False)
    if "features" in frozen:
        step.features.requires_grad_(False)
    found = step.gradients(step.fused())
    assert found.keys() == {name for name in every if not name.startswith(frozen.split()[0])} - (
        {"features"} if "features" in frozen else set()
    )
    assert all(torch.equal(x, every[name]) for name, x in found.items())
    monkeypatch.setattr(linear_loss, "linear_head_loss", linear_head.compute_linear_head)
    spared = {"source weights": N_S, "features": N_S + N_T, "source head and features": 2 * N_S + N_T}[frozen]
    assert multiplications(step) == WIDTH * ROWS * (3 * (N_S + N_T) - spared)


class LargestTensor(TorchDispatchMode):
    """The largest tensor that an operation makes, in elements, and how often one of some size was made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@needs_kernels
@pytest.mark.usefixtures("open_operation")
@pytest.mark.parametrize("kind", ["labels", "probabilities", "pair"])
def test_no_tensor_is_larger_than_a_chunk(kind: str, draw: torch.Generator) -> None:
    rows, classes = 3000, 500
    features = torch.randn(rows, WIDTH, generator=draw, requires_grad=True)
    heads = [torch.randn(n, WIDTH, generator=draw, requires_grad=True) for n in (classes, N_T)]
    relationship = torch.softmax(torch.randn(N_T, classes, generator=draw), 1)
    labels = torch.randint(N_T, (rows,), generator=draw)
    target: Any = {"labels": labels, "probabilities": F.one_hot(labels).float(), "pair": (labels, labels.flip(0), 0.3)}
    with LargestTensor() as seen:
        functional.linear_co_tuning_loss(
            features, heads[0], None, heads[1], None, target[kind], relationship, memory_budget=100 * classes * 4
        )
    assert seen.largest == 100 * classes
    with LargestTensor() as seen:
        functional.co_tuning_loss(features @ heads[0].t(), features @ heads[1].t(), target[kind], relationship)
    assert seen.largest == rows * classes


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sums_and_gradient_never_exist_side_by_side(scale: float, draw: torch.Generator) -> None:
    """The float32 sums of a bfloat16 weight's gradient are freed block by block while the gradient is made."""
    classes = 4000
    features, *weights = (torch.randn(n, WIDTH, generator=draw).bfloat16().requires_grad_() for n in (9, classes, N_T))
    relationship = torch.softmax(torch.randn(N_T, classes, generator=draw), 1)
    labels = torch.randint(N_T, (9,), generator=draw)

    block = 4 * classes  # bytes of sums
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = functional.linear_co_tuning_loss(
            features, weights[0], None, weights[1], None, labels, relationship, memory_budget=block
        )
        assert isinstance(loss, Tensor)
        with torch.profiler.record_function("backward"):
            (scale * loss).backward()
    events = profile.profiler.kineto_results.events()
    start = next(x.start_ns() for x in events if x.name() == "backward")
    memory = [x for x in events if x.name() == "[memory]"]
    before = sum(x.nbytes() for x in memory if x.start_ns() < start)
    existing = list(itertools.accumulate((x.nbytes() for x in memory if x.start_ns() >= start), initial=before))
    gradient, sums = 2 * classes * WIDTH, 4 * classes * WIDTH
    assert sums <= existing[0] < 1.1 * sums
    assert max(existing) < existing[0] + 1.1 * block
    assert gradient <= existing[-1] < 1.1 * gradient


# ---------------------------------------------------------------------------------------------------------- options


def test_a_row_of_losses_is_refused(draw: torch.Generator) -> None:
    step = Step(draw)
    with pytest.raises(ValueError, match="reduction is 'none', expected 'mean' or 'sum': the gradients of the weights"):
        step.criterion.reduction = "none"
    with pytest.raises(ValueError, match="reduction is 'none'"):
        ck.FusedLinearCoTuningLoss(step.relationship, reduction="none")
    assert step.criterion.reduction == "mean"
    with pytest.raises(ValueError, match="memory_budget is 0, expected at least 1 byte"):
        ck.FusedLinearCoTuningLoss(step.relationship, memory_budget=0)
    with pytest.raises(TypeError, match=r"memory_budget is 1\.5"):
        ck.FusedLinearCoTuningLoss(step.relationship, memory_budget=1.5)  # type: ignore[arg-type]
    assert ck.FusedLinearCoTuningLoss(step.relationship).memory_budget == MEMORY_BUDGET


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("features", lambda x: x[:, :3], ValueError, r"features has shape \(40, 3\) and source_weight \(90, 12\)"),
        ("features", lambda x: x[0], ValueError, r"features has shape \(12,\)"),
        ("features", lambda x: x.long(), TypeError, "features has dtype torch.int64"),
        ("features", lambda x: x.bfloat16(), TypeError, "features are torch.bfloat16 and the source head is torch.fl"),
        ("source_weight", lambda x: x[:7], ValueError, "relationship has 90 columns, but source_logits has 7"),
        ("source_weight", lambda x: x.detach().numpy(), TypeError, "source_weight is a ndarray, expected a Tensor"),
        ("source_bias", lambda x: x[:7], ValueError, r"source_bias has shape \(7,\), expected \(90,\) or None"),
        ("target_weight", lambda x: x[:5], ValueError, "target_bias has shape"),
        ("target", lambda x: x[:5], ValueError, r"target has shape \(5,\), expected \(40,\)"),
        ("target", lambda x: x.masked_fill(x == 3, 9), IndexError, r"target\[\d+\] is 9, expected a class index"),
        ("target", lambda x: x.float(), ValueError, "target holds class probabilities of shape"),
        ("relationship", lambda x: x.t(), ValueError, "is it transposed"),
    ],
)  # fmt: skip
def test_wrong_arguments(name: str, change: Any, error: type[Exception], message: str, draw: torch.Generator) -> None:
    step = Step(draw)
    arguments: dict[str, Any] = {
        "features": step.features, "source_weight": step.source.weight, "source_bias": step.source.bias,
        "target_weight": step.target.weight, "target_bias": step.target.bias, "target": step.labels,
        "relationship": step.relationship,
    }  # fmt: skip
    arguments[name] = change(arguments[name])
    if name == "source_weight":
        arguments["source_bias"] = None
    with pytest.raises(error, match=message):
        functional.linear_co_tuning_loss(**arguments)


def test_the_source_term_alone(draw: torch.Generator) -> None:
    step = Step(draw)
    loss = functional.linear_source_label_loss(step.features, *step.heads[:2], step.labels, step.relationship)
    expected = functional.source_label_loss(step.source(step.features), step.labels, step.relationship)
    torch.testing.assert_close(loss, expected)
    inputs = [step.features, step.source.weight, step.source.bias]
    for x, y in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_counts(draw: torch.Generator) -> None:
    """All rows ignored, and no row at all: NaN, as the loss of logits gives, with gradients of exactly 0."""
    for rows in (ROWS, 0):
        step = Step(draw)
        step.features = step.features.detach()[:rows].requires_grad_()
        step.labels = torch.full((rows,), -100)
        terms = step.criterion(step.features, *step.heads, step.labels, return_terms=True)
        assert all(x.isnan() for x in terms)
        assert all((x == 0).all() for x in step.gradients(terms.loss).values())
    step = Step(draw)
    step.labels = torch.zeros(ROWS, dtype=torch.long)  # a class without supervision
    terms = step.criterion(step.features, *step.heads, step.labels, return_terms=True)
    assert terms.source_term == 0
    expected = reference.co_tuning_loss(
        step.source(step.features), step.target(step.features), step.labels, step.relationship
    )
    torch.testing.assert_close(terms.loss, expected[0])


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("bound_source", [True, False])
def test_a_model_trains_to_the_same_weights(bound_source: bool) -> None:
    whole = slice(None)
    ours, theirs = (worker.train(worker.two_heads(linear, bound_source), whole) for linear in (True, False))
    assert_alike(ours, theirs, tolerance=1e-5)
    before = dict(worker.two_heads(True).named_parameters())
    assert all((x - before[name]).abs().max() > 1e-2 * x.abs().max() for name, x in ours.items())
    other = worker.train(worker.two_heads(True, not bound_source), whole)
    assert (other["network.0.weight"] - ours["network.0.weight"]).abs().max() > 1e-3  # the bound reaches the backbone


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes of the worker found."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("linear")
    path = os.pathsep.join(filter(None, [str(Path(ck.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, worker.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_train_to_the_weights_of_one(of_two_processes: list[dict[str, Any]]) -> None:
    alone = worker.train(worker.two_heads(linear=False), slice(None))
    for each in of_two_processes:
        for found in each["ddp"]:
            assert_alike(found, alone, tolerance=1e-5)


@pytest.mark.parametrize("kind", worker.SHARDED)
def test_sharded_weights_train_to_the_weights_of_one_process(kind: str, of_two_processes: list[dict[str, Any]]) -> None:
    """FSDP2 gathers weights for the forward of their module: the whole model's, or that of heads with their loss."""
    alone = worker.train(worker.two_heads(linear=False, bound_source=False), slice(None), multiplier=1.0)
    for each in of_two_processes:
        assert_alike(each["fsdp"][kind], alone, tolerance=1e-5)


def test_weights_that_are_not_gathered_are_refused(of_two_processes: list[dict[str, Any]]) -> None:
    for each in of_two_processes:
        assert each["refusal"].startswith("the source head's weight is a DTensor, expected an ordinary tensor: ")
        assert "reshard_after_forward=False" in each["refusal"]


def test_a_model_gives_logits_in_evaluation_mode() -> None:
    model = worker.two_heads(linear=True)
    _, _, inputs, _ = worker.problem()
    features = model(inputs[0])
    assert isinstance(features, ck.CoTuningFeatures)
    logits = model.eval()(inputs[0])
    assert isinstance(logits, ck.CoTuningLogits)
    (for_source, for_target), source_weight, source_bias, target_weight, target_bias = features
    torch.testing.assert_close(F.linear(for_source, source_weight, source_bias), logits.source_logits)
    torch.testing.assert_close(F.linear(for_target, target_weight, target_bias), logits.target_logits)
    model.train().linear = False
    assert isinstance(model(inputs[0]), ck.CoTuningLogits)


class Tagger(nn.Module):
    """Logits for each token, in a dictionary; ``softcap`` computes with the logits, as Gemma does."""

    def __init__(self, softcap: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, WIDTH)
        self.head = nn.Linear(WIDTH, 30)
        self.head.weight = self.embedding.weight
        self.softcap = softcap

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        return {"logits": 3 * torch.tanh(logits / 3) if self.softcap else logits}


def test_a_model_of_tokens_with_a_tied_head(draw: torch.Generator) -> None:
    words = {"input_ids": torch.randint(30, (4, 9), generator=draw)}
    labels = torch.randint(N_T, (4, 9), generator=draw)
    relationship = torch.softmax(torch.randn(N_T, 30, generator=draw), 1)
    relationship[0] = 0
    model = ck.CoTuningModel.from_classifier(Tagger(), N_T, example_input=words, linear=True).train()
    loss = ck.FusedLinearCoTuningLoss(relationship)(*model(**words), labels)
    loss.backward()
    ours = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    model.linear = False
    source_logits, target_logits = (x.flatten(0, 1) for x in model(**words))
    expected = ck.FusedCoTuningLoss(relationship)(source_logits, target_logits, labels.flatten())
    torch.testing.assert_close(loss, expected)
    expected.backward()
    assert_alike(ours, {name: x.grad for name, x in model.named_parameters()})


def test_a_classifier_that_computes_with_its_logits_is_refused(draw: torch.Generator) -> None:
    words = {"input_ids": torch.randint(30, (4, 9), generator=draw)}
    ck.CoTuningModel.from_classifier(Tagger(softcap=True), N_T, example_input=words)
    with pytest.raises(ValueError, match="the source logits"):
        ck.CoTuningModel.from_classifier(Tagger(softcap=True), N_T, example_input=words, linear=True)
    convolution = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TypeError, match="linear=True needs two"):
        ck.CoTuningModel.from_classifier(convolution, N_T, linear=True)


def test_a_compiled_step_with_a_model() -> None:
    _, relationship, inputs, labels = worker.problem()
    model = worker.two_heads(linear=True)
    criterion = ck.FusedLinearCoTuningLoss(relationship)
    compiled = torch.compile(lambda x, y: criterion(*model(x), y), fullgraph=True, backend="aot_eager")
    found = []
    for step in (compiled, lambda x, y: criterion(*model(x), y)):
        model.zero_grad()
        step(inputs[0], labels[0]).backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
    assert_alike(*found)
