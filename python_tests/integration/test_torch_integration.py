"""The loss inside torch: opcheck, compile, export, autocast, workers, fork, threads, DDP, nn.Module, memory."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cotuning_kernels as ck
from cotuning_kernels import backends, functional
from cotuning_kernels.options import KL_DIVERGENCE, REDUCTIONS
from cotuning_kernels.targets import operand_target
from support.backends import BACKENDS, Backend
from support.cases import Case
from support.layouts import bits
from support.problems import Problem, compute_dtype
from support.threaded_losses import losses

_KINDS = ("labels", "ignoring", "pair", "pair, float share", "probabilities")


@pytest.fixture
def kernels() -> None:
    """Skip, with the reason, if no backend registers the operations."""
    reason = backends.missing_reason("cpp")
    if reason is not None:
        pytest.skip(f"cpp: {reason}")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _problem(kind: str, dtype: torch.dtype, seed: int, batch: int = 5, **options: Any) -> Problem:
    return Case("integration", "", (batch, 6, 37), kind, "unsupervised", "random", options=options).build(dtype, seed)


# ------------------------------------------------------------------------------------------------------------ opcheck


def _op_arguments(problem: Problem) -> tuple[Any, ...]:
    """The arguments of the operation ``co_tuning_loss``."""
    operand = operand_target(problem.target, problem.relationship, compute_dtype(problem.source_logits))
    trade_off = torch.tensor(problem.trade_off, dtype=torch.float64)
    return (
        problem.source_logits, problem.target_logits, *operand, problem.weight, trade_off, problem.label_smoothing,
        problem.ignore_index, REDUCTIONS[problem.reduction], KL_DIVERGENCE[problem.source_loss],
    )  # fmt: skip


@pytest.mark.usefixtures("kernels")
# Dtype, target form and reduction change the outputs independently, so pairs are enough.
@pytest.mark.parametrize(
    ("kind", "reduction", "dtype"),
    [
        ("labels", "mean", torch.float32),
        ("labels", "none", torch.bfloat16),
        ("pair", "none", torch.float64),
        ("pair, float share", "mean", torch.bfloat16),
        ("probabilities", "sum", torch.float16),
        ("probabilities", "none", torch.float32),
    ],
)
def test_opcheck_of_the_loss(kind: str, reduction: str, dtype: torch.dtype, seed: int) -> None:
    """Schema (mutations, aliases), shapes and dtypes without data, and tracing with symbolic shapes."""
    arguments = _op_arguments(_problem(kind, dtype, seed, reduction=reduction, source_loss="kl"))
    alone = (arguments[0], None, *arguments[2:6], None, *arguments[7:])
    ops = torch.ops.cotuning_kernels
    for wanted in ((True, True), (False, True), (True, False), (False, False)):
        torch.library.opcheck(ops.co_tuning_loss.default, (*arguments, *wanted))
    torch.library.opcheck(ops.co_tuning_loss.default, (*alone, True, False))
    torch.library.opcheck(ops.co_tuning_loss_.default, _cloned(arguments))
    torch.library.opcheck(ops.co_tuning_loss_.default, _cloned(alone))


def _cloned(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.usefixtures("kernels")
def test_opcheck_of_the_other_operations(draw: torch.Generator) -> None:
    ops = torch.ops.cotuning_kernels
    logits, labels = torch.randn(5, 37, generator=draw), torch.randint(6, (5,), generator=draw)
    relationship = torch.softmax(torch.randn(6, 37, generator=draw), 1)
    share = torch.rand(5, generator=draw, dtype=torch.float64)
    for upstream in (torch.tensor(0.3), torch.randn(5, generator=draw)):
        torch.library.opcheck(ops.scale_gradients_.default, (logits.clone(), logits.clone(), torch.rand(2), upstream))
    torch.library.opcheck(
        ops.scale_gradients_.default, (logits.clone(), torch.empty(0, 0), torch.rand(2), torch.tensor(0.3))
    )
    torch.library.opcheck(ops.translate_labels.default, (labels, None, None, relationship, -100))
    torch.library.opcheck(ops.translate_labels.default, (labels, labels.flip(0), share, relationship.bfloat16(), -100))
    sums, counts = torch.zeros(6, 37, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    torch.library.opcheck(ops.add_class_sums_.default, (sums, counts, logits, labels, 0.7, -100))
    torch.library.opcheck(ops.temperature_terms.default, (logits, labels, 0.7, -100))


@dataclass(frozen=True)
class _Registration:
    """The registration of an operation like ours: adds rows in place and returns their number."""

    schema: str = "(Tensor(a!) sums, Tensor rows) -> Tensor"
    fake: Callable[[Tensor, Tensor], Tensor] | None = lambda sums, rows: rows.new_empty((), dtype=torch.int64)
    kernel: Callable[[Tensor, Tensor], Tensor] = lambda sums, rows: torch.tensor(len(sums.add_(rows.sum(0))))


@pytest.mark.parametrize(
    ("what", "registration"),
    [
        (None, _Registration()),
        ("sums is not defined as mutable but was mutated", _Registration("(Tensor sums, Tensor rows) -> Tensor")),
        (
            "sums is not defined to alias output but was aliasing",
            _Registration("(Tensor sums, Tensor rows) -> Tensor", kernel=lambda sums, rows: sums.detach()),
        ),
        ("Shapes .* are not equal", _Registration(fake=lambda sums, rows: rows.new_empty((1,), dtype=torch.int64))),
        ("Dtypes .* are not equal", _Registration(fake=lambda sums, rows: rows.new_empty(()))),
        ("test_faketensor failed", _Registration(fake=None)),
    ],
)
def test_opcheck_finds_a_wrong_registration(what: str | None, registration: _Registration) -> None:
    library = torch.library.Library("cotuning_planted", "DEF")
    try:
        library.define("add_rows" + registration.schema)
        library.impl("add_rows", registration.kernel, "CPU")
        if registration.fake is not None:
            torch.library.register_fake("cotuning_planted::add_rows", registration.fake, lib=library)
        operation = torch.ops.cotuning_planted.add_rows.default
        arguments = torch.zeros(3), torch.ones(5, 3)
        if what is None:
            torch.library.opcheck(operation, arguments)
            return
        with pytest.raises(Exception, match=what):
            torch.library.opcheck(operation, arguments)
    finally:
        library._destroy()


# ------------------------------------------------------------------------------------------------- compile and export


def _step(criterion: ck.FusedCoTuningLoss) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def step(source: Tensor, target: Tensor, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
        terms = criterion(source * 1.5, target, labels, return_terms=True)
        return terms.loss * 0.7, terms.target_term, terms.source_term

    return step


def _run_step(step: Callable[..., Any], problem: Problem) -> list[Tensor]:
    source = problem.source_logits.detach().requires_grad_()
    target = problem.target_logits.detach().requires_grad_()
    loss, target_term, source_term = step(source, target, problem.target)
    return [loss.detach(), target_term, source_term, *torch.autograd.grad(loss, (source, target), problem.upstream)]


@pytest.mark.parametrize(
    "backend",
    # Tracing sees the operation, not its backend: one row stands for all rows of cpp.
    [backend for backend in BACKENDS if backend.argument != "cpp" or backend.name == "cpp-portable"],
    ids=lambda backend: backend.name,
    indirect=True,
)
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph_gives_the_same_numbers(backend: Backend, kind: str, reduction: str, seed: int) -> None:
    """Forward and backward, traced by AOTAutograd. Kernels give the same bits: they are the same operations."""
    problem = _problem(kind, torch.float32, seed, reduction=reduction)
    options = {key: value for key, value in problem.options.items() if key != "trade_off"}
    criterion = ck.FusedCoTuningLoss(problem.relationship, backend=backend.argument, **options)
    step = _step(criterion)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(_run_step(compiled, problem), _run_step(step, problem), strict=True):
        if backend.argument == "reference":
            assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(bits(ours), bits(expected))


@pytest.mark.usefixtures("kernels")
def test_inductor_compiles_a_training_step(seed: int) -> None:
    """The default compiler: two linear heads, the loss and its gradients, against the same step uncompiled."""
    problem = _problem("pair", torch.float32, seed)
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(8, 37), nn.Linear(8, 6)])
    criterion = ck.FusedCoTuningLoss(problem.relationship)
    features = torch.randn(5, 8)

    def step(features: Tensor, target: Any) -> Tensor:
        return criterion(model[0](features).relu(), model[1](features), target)  # type: ignore[no-any-return]

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        model.zero_grad()
        loss = run(features, problem.target)
        torch.autograd.backward(loss)
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 5
    for expected, ours in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels")
def test_a_compiled_step_sees_a_new_trade_off_without_being_compiled_anew(seed: int) -> None:
    """A warm-up changes the trade-off every step."""
    problem = _problem("labels", torch.float32, seed)
    criterion = ck.FusedCoTuningLoss(problem.relationship)
    step = _step(criterion)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for trade_off in (0.0, 0.1, 0.5, 1.0, 2.3, 2.3, 4.0):
        criterion.trade_off = trade_off
        for ours, expected in zip(_run_step(compiled, problem), _run_step(step, problem), strict=True):
            assert torch.equal(bits(ours), bits(expected))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_function_takes_any_trade_off(seed: int) -> None:
    """A changing float becomes a symbol, for which ``math.isfinite`` fails."""
    problem = _problem("labels", torch.float32, seed)

    def loss(trade_off: float) -> Tensor:
        result = functional.co_tuning_loss(
            problem.source_logits, problem.target_logits, problem.target, problem.relationship, trade_off=trade_off
        )
        assert isinstance(result, Tensor)
        return result

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for trade_off in (0.3, 0.4, 2.5):
        assert torch.equal(compiled(trade_off), loss(trade_off))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["labels", "pair", "probabilities"])
def test_one_compiled_step_serves_every_batch_size(kind: str, seed: int) -> None:
    """The last batch of an epoch is smaller. At most one more compilation, which makes the size symbolic."""
    problems = [_problem(kind, torch.float32, seed, batch=batch) for batch in (8, 5, 7, 3, 16)]
    criterion = ck.FusedCoTuningLoss(problems[0].relationship)
    step = _step(criterion)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for problem in problems:
        for ours, expected in zip(_run_step(compiled, problem), _run_step(step, problem), strict=True):
            assert torch.equal(bits(ours), bits(expected))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.usefixtures("kernels")
def test_compile_in_place(seed: int) -> None:
    """Functionalisation sees that the logits are mutated: same numbers, whether or not memory is saved."""
    problem = _problem("labels", torch.float32, seed)
    criterion = ck.FusedCoTuningLoss(problem.relationship, inplace=True)

    def step(source: Tensor, target: Tensor, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
        terms = criterion(source * 1.5, target * 1.0, labels, return_terms=True)
        return terms.loss, terms.target_term, terms.source_term

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(_run_step(compiled, problem), _run_step(step, problem), strict=True):
        assert torch.equal(bits(ours), bits(expected))


@pytest.mark.usefixtures("kernels")
def test_a_wrong_argument_is_named_while_compiling(seed: int) -> None:
    problem = _problem("labels", torch.float32, seed)
    criterion = ck.FusedCoTuningLoss(problem.relationship)
    compiled = torch.compile(_step(criterion), fullgraph=True, backend="aot_eager")
    assert isinstance(problem.target, Tensor)
    with pytest.raises(Exception, match=r"(?s)target has shape \(3,\), expected \(5,\)"):
        compiled(problem.source_logits, problem.target_logits, problem.target[:3])


class _Evaluation(nn.Module):
    """The exported end of a network: heads and loss."""

    def __init__(self, relationship: Tensor) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(8, 37), nn.Linear(8, 6)
        self.criterion = ck.FusedCoTuningLoss(relationship)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.source(features), self.target(features), labels)
        return loss


def test_export(backend: Backend, seed: int) -> None:
    """Exported with a symbolic batch, saved, loaded, run on another batch size."""
    torch.manual_seed(seed)
    problem = _problem("labels", torch.float32, seed, batch=8)
    module = _Evaluation(problem.relationship).eval()
    module.criterion.backend = backend.argument
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(8, 8), problem.target), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    features, labels = torch.randn(13, 8), torch.arange(13) % 6
    assert torch.allclose(loaded(features, labels), module(features, labels), rtol=1e-6)
    # It can be trained: with an upstream gradient other than 1, and twice with the same result.
    loss, scale = loaded(features, labels), 1.0 + torch.rand(())
    for _ in range(2):
        loaded.zero_grad()
        (scale * loss).backward(retain_graph=True)
        module.zero_grad()
        (scale * module(features, labels)).backward()
        for name, parameter in module.named_parameters():
            given = loaded.get_parameter(name).grad
            assert given is not None, name
            assert torch.allclose(given, parameter.grad, rtol=1e-5, atol=1e-7), name
    if backend.argument != "reference":
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loaded(features, labels), loaded.get_parameter("source.weight"), create_graph=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_operation_has_a_derivative_of_its_own(reduction: str, dtype: torch.dtype, seed: int) -> None:
    """A direct call has the Function's gradient, bit by bit; an error where no gradient was stored."""
    problem = _problem("pair", dtype, seed, reduction=reduction).map(lambda _, x: x.clone())
    heads = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    call = torch.ops.cotuning_kernels.co_tuning_loss
    arguments = _op_arguments(problem)

    def gradients(loss: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, heads, problem.upstream, **options)

    loss, terms, factors, *stored = call(*arguments, True, True)
    assert not any(x.requires_grad for x in (terms, factors, *stored))
    expected = gradients(
        functional.co_tuning_loss(*heads, problem.target, problem.relationship, **problem.options, backend="cpp")
    )
    for _ in range(2):  # backward does not change the stored gradients
        for given, right in zip(gradients(loss, retain_graph=True), expected, strict=True):
            assert torch.equal(bits(given), bits(right))
    with pytest.raises(RuntimeError, match="create_graph"):
        gradients(loss, create_graph=True)
    for stored_for in ((False, True), (True, False)):
        with pytest.raises(RuntimeError, match="source_gradient=False" if stored_for[1] else "target_gradient=False"):
            gradients(call(*arguments, *stored_for)[0])


def test_vmap_has_a_gradient(backend: Backend, seed: int) -> None:
    """Every problem gets the same results as alone; other transforms raise (test_fast_path, test_gradcheck)."""
    problems = [_problem("labels", torch.float32, seed + k) for k in range(3)]
    first = problems[0]

    def loss_of(source: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = functional.co_tuning_loss(
            source, target, first.target, first.relationship, backend=backend.argument
        )
        return loss

    stacked = [torch.stack([getattr(each, head) for each in problems]) for head in ("source_logits", "target_logits")]
    together = [x.clone().requires_grad_() for x in stacked]
    alone = [x.clone().requires_grad_() for x in stacked]
    weights = torch.rand(3)
    (weights * torch.func.vmap(loss_of)(*together)).sum().backward()
    sum(weight * loss_of(*each) for weight, *each in zip(weights, *alone, strict=True)).backward()
    for a, b in zip(together, alone, strict=True):
        assert a.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-8)
    # All problems share one head, which also requires a gradient.
    shared = stacked[1][0].clone().requires_grad_()
    torch.func.vmap(lambda source: loss_of(source, shared))(stacked[0]).sum().backward()
    assert shared.grad is not None
    expected = torch.autograd.grad(sum(loss_of(source, shared) for source in stacked[0]), shared)[0]
    assert torch.allclose(shared.grad, expected, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------ autocast and half precision


def test_autocast_changes_nothing(backend: Backend, seed: int) -> None:
    """The loss stays in float32 under autocast, even where a matrix product translates probabilities."""
    for kind in _KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            problem = _problem(kind, dtype, seed)
            plain = backend.run(problem, "both heads", backend.argument)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under = backend.run(problem, "both heads", backend.argument)
                translated = functional.translate_labels(problem.target, problem.relationship, backend=backend.argument)
            for name, x in plain.tensors().items():
                assert torch.equal(bits(x), bits(under.tensors()[name])), (kind, dtype, name)
            expected = functional.translate_labels(problem.target, problem.relationship, backend=backend.argument)
            assert torch.equal(translated, expected)


def test_a_training_step_under_autocast(backend: Backend, seed: int) -> None:
    """Linear heads give bfloat16 logits; parameters get float32 gradients, as good as F.cross_entropy's."""
    problem = _problem("labels", torch.float32, seed)
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(8, 37), nn.Linear(8, 6)])
    features = torch.randn(5, 8)

    def gradients(loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            source, target = model[0](features), model[1](features)
            assert source.dtype == torch.bfloat16
            loss = loss_of(source, target)
        assert loss.dtype == torch.float32
        torch.autograd.backward(loss)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert isinstance(problem.target, Tensor)
    labels, translated = problem.target, problem.relationship[problem.target]
    criterion = ck.FusedCoTuningLoss(problem.relationship, backend=backend.argument)

    def today(source: Tensor, target: Tensor) -> Tensor:
        supervised = (translated != 0).any(1)
        rows = nn.functional.cross_entropy(source, translated, reduction="none")
        return nn.functional.cross_entropy(target, labels) + 2.3 * rows[supervised].mean()

    for ours, expected in zip(gradients(lambda s, t: criterion(s, t, labels)), gradients(today), strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, expected, rtol=0.02, atol=float(expected.abs().max()) * 0.01)


def test_gradient_scaling_keeps_small_half_gradients(backend: Backend, seed: int) -> None:
    """float16 under a GradScaler: 65536 times the gradient of a mean over many rows, unscaled afterwards."""
    problem = _problem("labels", torch.float16, seed, batch=400)
    scale = torch.tensor(65536.0)
    problem.upstream = scale
    scaled = backend.run(problem, "both heads", backend.argument)
    exact = backend.run(problem.double(), "both heads", backend.argument)
    for name in ("source gradient", "target gradient"):
        ours, expected = scaled.tensors()[name].double() / 65536, exact.tensors()[name] / 65536
        assert ours.isfinite().all()
        # A row's gradient, of the order of 1, is stored before it is scaled: elements below the smallest half are lost.
        assert ((ours - expected).abs() <= 0.002 * expected.abs() + 2.3 * 6e-8 / 100).all()
        # Without the scale, elements this small would be rounded away.
        assert (ours[expected.abs() > 1e-6] != 0).all()


# ------------------------------------------------------------------------------------------------ processes, threads


class _LossOfSample(torch.utils.data.Dataset[Tensor]):
    """Scores its samples, so the loss runs inside a DataLoader's worker."""

    def __init__(self, criterion: ck.FusedCoTuningLoss) -> None:
        self.criterion = criterion

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        logits = torch.randn(3, 43, generator=torch.Generator().manual_seed(index))
        loss: Tensor = self.criterion(logits[:, :37], logits[:, 37:], torch.tensor([0, 1, 2]))
        return loss


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_in_the_workers_of_a_data_loader(start: str, workers: int, seed: int) -> None:
    """The parent has used its threads before, which makes ``fork`` hang in many libraries."""
    torch.set_num_threads(2)
    losses(seed)
    problem = _problem("labels", torch.float32, seed)
    dataset = _LossOfSample(ck.FusedCoTuningLoss(problem.relationship, trade_off=0.7))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=workers, multiprocessing_context=start, timeout=120
    )
    in_workers = torch.cat(list(loader))
    assert torch.equal(in_workers, torch.stack([dataset[i] for i in range(len(dataset))]))


def _run_script(script: str, *arguments: str, timeout: int = 120) -> str:
    """Run a separate program, so that its hang or crash is a failure here. Returns its output."""
    path = os.pathsep.join(x for x in sys.path if x)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fork_after_threads_were_used(seed: int) -> None:
    """The child computes the same bits on one thread and exits; the parent continues."""
    script = """
        import os, signal, sys
        import torch
        from support.threaded_losses import losses
        torch.set_num_threads(2)
        before = losses(int(sys.argv[1]))
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hang ends in a signal, and the parent sees it
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(losses(int(sys.argv[1])), before) else 3)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"child ended with {status}"
        assert torch.equal(losses(int(sys.argv[1])), before)
        print("same")
    """
    assert _run_script(script, str(seed)).strip() == "same"


def test_several_python_threads_at_once(backend: Backend, seed: int) -> None:
    """Four threads, each with its own data, run forward and backward several times: the same bits as in sequence."""
    if backend.device_code:
        pytest.skip(f"{backend.name}: the interpreter has one state for the process")
    torch.set_num_threads(2)
    problems = [Case(f"thread {k}", "", (301, 9, 401), kind).build(torch.float32, seed)
                for k, kind in enumerate(("labels", "pair", "probabilities", "ignoring"))]  # fmt: skip
    expected = [backend.run(problem, "both heads", backend.argument) for problem in problems]
    failures: list[str] = []
    barrier = threading.Barrier(len(problems))

    def work(k: int) -> None:
        try:
            barrier.wait(timeout=60)
            for _ in range(8):
                outcome = backend.run(problems[k], "both heads", backend.argument)
                for name, x in outcome.tensors().items():
                    y = expected[k].tensors()[name]
                    same = (
                        torch.allclose(x, y, rtol=1e-5, atol=1e-7)
                        if backend.argument == "reference"
                        else torch.equal(x, y)
                    )
                    if not same:
                        failures.append(f"thread {k}: {name}")
        except Exception as error:
            failures.append(f"thread {k}: {error!r}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


_DDP = """
    import os
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import cotuning_kernels as ck

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.source, self.target = nn.Linear(10, 8), nn.Linear(8, 37), nn.Linear(8, 6)

        def forward(self, x):
            features = self.body(x).relu()
            return self.source(features), self.target(features)

    def train(rank, world, seed):
        draw = torch.Generator().manual_seed(seed)
        inputs, labels = torch.randn(12, 10, generator=draw), torch.randint(6, (12,), generator=draw)
        relationship = torch.softmax(torch.randn(6, 37, generator=draw), 1)
        torch.manual_seed(seed)
        network = Network()
        model = DistributedDataParallel(network) if world > 1 else network
        criterion = ck.FusedCoTuningLoss(relationship)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            criterion.trade_off = 0.5 * step
            optimizer.zero_grad()
            criterion(*model(inputs[rank::world]), labels[rank::world]).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    def worker(rank, world, seed, store):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        weights = train(rank, world, seed)
        if rank == 0:
            single = train(0, 1, seed)
            assert torch.allclose(weights, single, rtol=1e-4, atol=1e-6), (weights - single).abs().max()
        dist.barrier()
        dist.destroy_process_group()
        # gloo's threads do not always survive the end of the interpreter (torch 2.13, without any code of ours: 7 of 40
        # runs end with "terminate called without an active exception"). Everything has been compared by now.
        os._exit(0)
"""


def test_distributed_data_parallel_equals_one_process(seed: int, tmp_path: Path) -> None:
    """Two processes with half the batch each train the same weights as one with the whole batch (gloo)."""
    program = tmp_path / "ddp.py"
    main = """
    if __name__ == "__main__":
        torch.multiprocessing.spawn(worker, args=(2, int(sys.argv[1]), sys.argv[2]), nprocs=2)
        print("equal")
    """
    program.write_text(textwrap.dedent(_DDP) + textwrap.dedent(main))
    done = subprocess.run(
        [sys.executable, str(program), str(seed), str(tmp_path / "store")], capture_output=True, text=True, timeout=180,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"


# ----------------------------------------------------------------------------------------------------------- nn.Module


def _criterion(seed: int, **options: Any) -> tuple[ck.FusedCoTuningLoss, Problem]:
    problem = _problem("labels", torch.float32, seed)
    return ck.FusedCoTuningLoss(problem.relationship, weight=problem.weight, **options), problem


def _loss_of(criterion: nn.Module, problem: Problem) -> Tensor:
    loss: Tensor = criterion(problem.source_logits, problem.target_logits, problem.target)
    return loss


def test_deepcopy_and_pickle_keep_everything(seed: int) -> None:
    criterion, problem = _criterion(seed, trade_off=0.9, label_smoothing=0.1, ignore_index=-7, source_loss="kl")
    criterion.trade_off = 1.7
    expected = _loss_of(criterion, problem)
    for other in (copy.deepcopy(criterion), copy.copy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(_loss_of(other, problem), expected)
        other.trade_off = 0.0
        assert not torch.equal(_loss_of(other, problem), expected)
        assert criterion.trade_off == 1.7
        assert torch.equal(_loss_of(criterion, problem), expected)


def test_state_dict_holds_relationship_weight_and_trade_off(seed: int) -> None:
    criterion, problem = _criterion(seed)
    state = criterion.state_dict()
    assert set(state) == {"relationship", "weight", "_extra_state"}
    assert float(state["_extra_state"]) == criterion.trade_off
    assert problem.weight is not None
    other = ck.FusedCoTuningLoss(torch.full_like(problem.relationship, 0.5), weight=torch.ones_like(problem.weight))
    assert not torch.equal(_loss_of(other, problem), _loss_of(criterion, problem))
    other.load_state_dict(state)
    assert torch.equal(_loss_of(other, problem), _loss_of(criterion, problem))


def test_a_resumed_warm_up_keeps_its_trade_off(seed: int) -> None:
    criterion, problem = _criterion(seed)
    criterion.trade_off = 0.3
    for dtype in (torch.float64, torch.float16):
        state = copy.deepcopy(criterion).to(dtype).state_dict()
        criterion.trade_off = 0.3  # the saved state does not change
        other = ck.FusedCoTuningLoss(problem.relationship, weight=problem.weight)
        compiled = torch.compile(other, backend="eager")
        _loss_of(compiled, problem)
        torch.nn.ModuleDict({"inner": other}).load_state_dict({f"inner.{name}": x for name, x in state.items()})
        assert other.trade_off == 0.3
        if dtype == torch.float64:
            for each in (other, compiled):
                torch.testing.assert_close(_loss_of(each, problem), _loss_of(criterion, problem))
    # A state dict of an earlier version has no trade-off, and loading it keeps the current one.
    del state["_extra_state"]
    other.trade_off = 1.7
    other.load_state_dict(state)
    assert other.trade_off == 1.7
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        other.load_state_dict(state | {"other": torch.zeros(())})


def test_tracing_by_jit_is_refused_with_a_way_out(seed: int) -> None:
    criterion, problem = _criterion(seed)
    logits = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()

    def trace(backend: str) -> Any:
        criterion.backend = backend
        return torch.jit.trace(lambda *x: criterion(*x, problem.target), logits, check_trace=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's warnings
        with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record .* torch.export or torch.compile"):
            trace("auto")
        torch.testing.assert_close(trace("reference")(*logits), _loss_of(criterion, problem))


@pytest.mark.parametrize("option", ["label_smoothing", "ignore_index"])
def test_tensors_for_numbers_are_refused_by_every_backend(backend: Backend, option: str, seed: int) -> None:
    problem = _problem("labels", torch.float64, seed)
    for inplace in (False, True) if backend.argument != "reference" else (False,):
        with pytest.raises(TypeError, match=f"{option} is tensor"):
            functional.co_tuning_loss(
                problem.source_logits, problem.target_logits, problem.target, problem.relationship,
                backend=backend.argument, inplace=inplace, **{option: torch.tensor(0)},
            )  # fmt: skip


def test_the_module_keeps_a_copy_of_what_it_was_given(seed: int) -> None:
    criterion, problem = _criterion(seed)
    expected = _loss_of(criterion, problem)
    problem.relationship.fill_(1.0)
    assert problem.weight is not None
    problem.weight.fill_(0.0)
    assert torch.equal(_loss_of(criterion, problem), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_another_dtype(dtype: torch.dtype, seed: int) -> None:
    """The relationship is converted; the trade-off keeps its exact value and may still be changed."""
    criterion, problem = _criterion(seed, trade_off=2.3)
    moved = copy.deepcopy(criterion).to(dtype)
    assert moved.relationship.dtype == dtype
    assert moved.trade_off == 2.3
    assert problem.weight is not None
    for trade_off in (2.3, 0.7):
        moved.trade_off = trade_off
        expected = functional.co_tuning_loss(
            problem.source_logits, problem.target_logits, problem.target, problem.relationship.to(dtype),
            weight=problem.weight.to(dtype), trade_off=trade_off,
        )  # fmt: skip
        assert isinstance(expected, Tensor)
        assert torch.equal(_loss_of(moved, problem), expected)


def test_to_the_meta_device_and_back_to_empty(seed: int) -> None:
    """Large-model tools build a module on meta, without data, and allocate its memory later."""
    criterion, problem = _criterion(seed)
    state = criterion.state_dict()
    moved = copy.deepcopy(criterion).to("meta").to_empty(device="cpu")
    moved.load_state_dict(state)
    assert torch.equal(_loss_of(moved, problem), _loss_of(criterion, problem))


def test_the_trade_off_may_change_between_forward_and_backward(backend: Backend, seed: int) -> None:
    """Gradient accumulation across a warm-up step: each loss keeps its trade-off."""
    problem = _problem("labels", torch.float64, seed)
    criterion = ck.FusedCoTuningLoss(problem.relationship, trade_off=2.0, backend=backend.argument)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    expected = torch.autograd.grad(criterion(source, target, problem.target), source)[0]
    loss = criterion(source, target, problem.target)
    criterion.trade_off = 9.0
    (gradient,) = torch.autograd.grad(loss, source)
    assert torch.equal(gradient, expected)


def test_activation_checkpointing(backend: Backend, seed: int) -> None:
    """Forward runs twice, the second time inside backward."""
    problem = _problem("pair", torch.float64, seed)
    source, target = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()

    def loss_of(s: Tensor, t: Tensor) -> Tensor:
        loss = functional.co_tuning_loss(
            s.sin(), t, problem.target, problem.relationship, backend=backend.argument, **problem.options
        )
        assert isinstance(loss, Tensor)
        return loss

    expected = torch.autograd.grad(loss_of(source, target), (source, target), problem.upstream)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(loss_of, source, target, use_reentrant=reentrant)
        source.grad = target.grad = None
        loss.backward(problem.upstream)
        assert source.grad is not None
        assert target.grad is not None
        assert torch.equal(source.grad, expected[0])
        assert torch.equal(target.grad, expected[1])


def test_a_relationship_object_stands_for_its_matrix(backend: Backend, seed: int) -> None:
    """In every function and in the module."""
    problem = _problem("pair", torch.float32, seed)
    relationship = ck.Relationship(problem.relationship)
    calls: list[Callable[[Any], Any]] = [
        lambda r: functional.co_tuning_loss(
            problem.source_logits, problem.target_logits, problem.target, r, backend=backend.argument
        ),
        lambda r: functional.source_label_loss(problem.source_logits, problem.target, r, backend=backend.argument),
        lambda r: functional.translate_labels(problem.target, r, backend=backend.argument),
        lambda r: _loss_of(ck.FusedCoTuningLoss(r, backend=backend.argument), problem),
    ]
    for call in calls:
        assert torch.equal(call(relationship), call(problem.relationship))


def test_tensors_made_in_inference_mode(backend: Backend, seed: int) -> None:
    """Relationship, labels and mixing shares often come from an evaluation loop; training with them must work."""
    problem = _problem("pair", torch.float32, seed)
    expected = backend.run(problem, "both heads", backend.argument)
    logits = ("source_logits", "target_logits", "upstream")
    with torch.inference_mode():
        made = problem.map(lambda name, x: x if name in logits else x.clone())
        criterion = ck.FusedCoTuningLoss(made.relationship, weight=made.weight, backend=backend.argument)
    for name, x in backend.run(made, "both heads", backend.argument).tensors().items():
        assert torch.equal(bits(x), bits(expected.tensors()[name])), name
    source = problem.source_logits.requires_grad_()
    loss = criterion(source, problem.target_logits, made.target)
    assert torch.equal(loss.detach(), expected.loss)
    criterion.trade_off = 0.5
    torch.autograd.backward(criterion(source, problem.target_logits, made.target))
    assert source.grad is not None


# -------------------------------------------------------------------------------------------------------------- memory


def _huge_pages_wanted(tensor: Tensor) -> bool:
    """Whether the system has been asked for huge pages in the middle of a tensor (``hg`` in /proc/self/smaps)."""
    middle, here = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if addresses := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(address, 16) for address in addresses.groups())
            here = begin <= middle < end
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is in no mapping of this process")


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no huge pages"
)
@pytest.mark.skipif("MALLOC_MMAP_MAX_" in os.environ, reason="MALLOC_MMAP_MAX_ keeps memory from being new")
def test_new_memory_of_large_results_gets_huge_pages(draw: torch.Generator) -> None:
    """From 32 MB on glibc maps new memory in every step; in small pages its faults cost several times the loss."""
    batch, classes = 8500, 1000
    logits = [torch.randn(batch, classes, generator=draw).requires_grad_() for _ in range(2)]
    labels = torch.randint(classes, (batch,), generator=draw)
    relationship = torch.rand(classes, classes, generator=draw).softmax(1)
    assert not _huge_pages_wanted(torch.empty(batch, classes))
    functional.co_tuning_loss(*logits, labels, relationship).backward()
    for large in (logits[0].grad, logits[1].grad, functional.translate_labels(labels, relationship)):
        assert large is not None
        assert large.nbytes > 2**25
        assert _huge_pages_wanted(large)
