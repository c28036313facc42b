"""The benchmarks are honest: contestants agree, a wrong one is caught, and the clock is read correctly."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks import (
    baselines,
    cold,
    contestants,
    language_head,
    limits,
    linear,
    memory,
    page,
    ratios,
    reverse_relationship,
)
from benchmarks.contestants import LOSS_CONTESTANTS, OURS, DisagreementError, ExpectedLoss, LossContestant
from benchmarks.problems import (
    DTYPES,
    CalibrationProblem,
    LossProblem,
    RelationshipProblem,
    Shape,
    parse_shape,
)
from benchmarks.timing import Timing, host_stopwatch, interleave
from cotuning_kernels import backends
from support.paths import ROOT

_SMALL = Shape(13, 7, 93)
_EAGER = [contestant for contestant in LOSS_CONTESTANTS if not contestant.compiles]
_COMPILED = [contestant for contestant in LOSS_CONTESTANTS if contestant.compiles]


def _name(contestant: LossContestant) -> str:
    return contestant.name.replace(" ", "_")


# The contestants


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("contestant", _EAGER, ids=_name)
def test_contestants_agree(contestant: LossContestant, dtype: torch.dtype, seed: int) -> None:
    for shape in (_SMALL, Shape(1, 2, 3000), Shape(300, 11, 128)):
        problem = LossProblem.make(shape, dtype, seed=seed)
        step = contestants.prepare([contestant], problem)[contestant.name]
        contestants.check_loss(contestant, step, ExpectedLoss(problem))


def test_compiled_contestants_agree_and_are_compiled_once_a_shape(seed: int) -> None:
    reason = baselines.compiler_missing()
    if reason:
        pytest.skip(reason)
    problem = LossProblem.make(_SMALL, torch.float32, seed=seed)
    steps = contestants.prepare(_COMPILED, problem)
    expected = ExpectedLoss(problem)
    for contestant in _COMPILED:
        contestants.check_loss(contestant, steps[contestant.name], expected)
    # Timed steps must not compile again.
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in steps.values():
            contestants.forward_and_backward(step)()


def test_expected_loss_is_that_of_float64_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    problem = LossProblem.make(_SMALL, torch.float32, seed=seed)
    whole = ExpectedLoss(problem)
    monkeypatch.setattr(contestants, "_row_chunks", lambda rows, columns: (slice(row, row + 1) for row in range(rows)))
    by_row = ExpectedLoss(problem)
    assert by_row.losses == pytest.approx(whole.losses, rel=1e-13)
    torch.testing.assert_close(by_row.source_grad, whole.source_grad, rtol=1e-13, atol=0)
    source, target = (x.detach().double() for x in (problem.source_logits, problem.target_logits))
    cross_entropy = F.cross_entropy(source, problem.relationship.double()[problem.labels])
    loss = F.cross_entropy(target, problem.labels) + problem.trade_off * cross_entropy
    assert whole.losses["cross_entropy"] == pytest.approx(loss.item(), rel=1e-13)


def _scaled_source_term(factor: float) -> Callable[[LossProblem], Tensor]:
    return lambda problem: baselines.cross_entropy_loss(
        problem.source_logits, problem.target_logits, problem.labels, problem.relationship, factor * problem.trade_off
    )


def _right(problem: LossProblem) -> Tensor:
    return _scaled_source_term(1.0)(problem)


def _right_gradient_wrong_loss(problem: LossProblem) -> Tensor:
    loss = _right(problem)
    return loss + 3e-5 * loss.detach()


def _right_loss_scaled_gradient(factor: float) -> Callable[[LossProblem], Tensor]:
    def loss_of(problem: LossProblem) -> Tensor:
        loss = _right(problem)
        return factor * loss - (factor - 1) * loss.detach()

    return loss_of


def _neighbouring_row(problem: LossProblem) -> Tensor:
    relationship = problem.relationship.roll(1, dims=0)
    return baselines.cross_entropy_loss(
        problem.source_logits, problem.target_logits, problem.labels, relationship, problem.trade_off
    )


def _detached_target_head(problem: LossProblem) -> Tensor:
    return baselines.cross_entropy_loss(
        problem.source_logits, problem.target_logits.detach(), problem.labels, problem.relationship, problem.trade_off
    )


def _overwrites_the_logits(problem: LossProblem) -> Tensor:
    loss = _right(problem)
    problem.source_logits.data.copy_(problem.source_logits.detach())
    torch.autograd.graph.increment_version(problem.source_logits)
    return loss


_WRONG_LOSSES = {
    "sum instead of mean": lambda problem: _right(problem) * len(problem.labels),
    "trade-off off by 1e-4": _scaled_source_term(1.0001),
    "loss off by 3e-5": _right_gradient_wrong_loss,
    "gradient off by 1e-4": _right_loss_scaled_gradient(1.0001),
    "everything is NaN": _right_loss_scaled_gradient(float("nan")),
    "row of another class": _neighbouring_row,
    "no gradient for the target head": _detached_target_head,
    "writes over the logits": _overwrites_the_logits,
}


@pytest.mark.parametrize("fault", _WRONG_LOSSES)
def test_check_catches_a_wrong_contestant(fault: str, seed: int) -> None:
    problem = LossProblem.make(_SMALL, torch.float32, seed=seed)
    expected = ExpectedLoss(problem)
    contestants.check_loss(
        LossContestant("right", lambda _: lambda: _right(problem)), lambda: _right(problem), expected
    )
    wrong = LossContestant(fault, lambda _: lambda: _WRONG_LOSSES[fault](problem))
    with pytest.raises(DisagreementError, match=fault):
        contestants.check_loss(wrong, wrong.prepare(problem), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head", ["source", "target"])
@pytest.mark.parametrize("planted", [0.0, float("nan")])
def test_check_catches_one_wrong_element(dtype: torch.dtype, head: str, planted: float, seed: int) -> None:
    problem = LossProblem.make(_SMALL, dtype, seed=seed)
    expected = ExpectedLoss(problem)
    logits = problem.source_logits if head == "source" else problem.target_logits
    gradient = expected.source_grad if head == "source" else expected.target_grad
    row, column = divmod(int(gradient.abs().argmax()), gradient.shape[1])

    def plant(leaf: Tensor) -> None:
        assert leaf.grad is not None
        leaf.grad[row, column] = planted

    hook = logits.register_post_accumulate_grad_hook(plant)
    wrong = LossContestant("wrong", lambda _: lambda: _right(problem))
    with pytest.raises(DisagreementError, match=rf"wrong: the gradient of {head}_logits\[{row}, {column}\]"):
        contestants.check_loss(wrong, wrong.prepare(problem), expected)
    hook.remove()
    contestants.check_loss(wrong, wrong.prepare(problem), expected)


def test_check_catches_a_contestant_that_is_wrong_the_second_time(seed: int) -> None:
    problem = LossProblem.make(_SMALL, torch.float32, seed=seed)
    factors = iter([1.0, 1.01])
    wrong = LossContestant("tired", lambda _: lambda: _scaled_source_term(next(factors))(problem))
    with pytest.raises(DisagreementError, match="tired"):
        contestants.check_loss(wrong, wrong.prepare(problem), ExpectedLoss(problem))


def test_bfloat16_check_catches_a_gradient_that_is_off_by_a_twentieth(seed: int) -> None:
    problem = LossProblem.make(Shape(64, 7, 500), torch.bfloat16, seed=seed)

    def exaggerate(leaf: Tensor) -> None:
        assert leaf.grad is not None
        leaf.grad *= 1.05

    hook = problem.source_logits.register_post_accumulate_grad_hook(exaggerate)
    wrong = LossContestant("rough", lambda _: lambda: _right(problem))
    with pytest.raises(DisagreementError, match="rough: the gradient of source_logits"):
        contestants.check_loss(wrong, wrong.prepare(problem), ExpectedLoss(problem))
    hook.remove()
    contestants.check_loss(wrong, wrong.prepare(problem), ExpectedLoss(problem))


def test_kl_is_held_against_kl(seed: int) -> None:
    problem = LossProblem.make(_SMALL, torch.float32, seed=seed)
    kl_div = next(contestant for contestant in LOSS_CONTESTANTS if contestant.source_loss == "kl")
    as_cross_entropy = LossContestant("mislabelled", kl_div.prepare)
    with pytest.raises(DisagreementError, match="mislabelled: the loss"):
        contestants.check_loss(as_cross_entropy, as_cross_entropy.prepare(problem), ExpectedLoss(problem))


def test_tllib_gathers_on_the_host(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    problem = LossProblem.make(_SMALL, torch.float32, seed=seed)
    gathered = []
    from_numpy = torch.from_numpy

    def recording(array: np.ndarray) -> Tensor:
        gathered.append(array)
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", recording)
    tllib = next(contestant for contestant in LOSS_CONTESTANTS if contestant.name == "tllib")
    tllib.prepare(problem)()
    np.testing.assert_array_equal(gathered[0], problem.relationship.numpy()[problem.labels.numpy()])


def test_relationship_contestants_agree_and_a_wrong_one_is_caught(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    problem = RelationshipProblem.make(Shape(103, 7, 61), batch=20, seed=seed)
    contestants.check_relationship(problem)
    truncated = RelationshipProblem(problem.logits[:-1], problem.labels[:-1], problem.target_classes)
    forgets = {"forgets the last batch": lambda _: contestants._tllib_relationship(truncated)}
    monkeypatch.setattr(contestants, "RELATIONSHIP_CONTESTANTS", forgets)
    with pytest.raises(DisagreementError, match="forgets the last batch"):
        contestants.check_relationship(problem)


@pytest.mark.parametrize("temperature", [0.6, 1.13, 1.6])
def test_exact_temperature_has_the_least_nll(temperature: float, seed: int) -> None:
    problem = CalibrationProblem.make(400, 50, temperature, seed=seed)

    def nll(t: float) -> float:
        return float(F.cross_entropy(problem.logits.double() / t, problem.labels))

    best = minimize_scalar(nll, bounds=(0.1, 10.0), method="bounded", options={"xatol": 1e-9}).x
    assert contestants.exact_temperature(problem) == pytest.approx(best, rel=1e-6)


def test_temperature_contestants_agree_and_a_wrong_one_is_caught(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    problem = CalibrationProblem.make(600, 80, 1.3, seed=seed)
    errors = contestants.check_temperature(problem)
    assert errors.keys() == contestants.TEMPERATURE_CONTESTANTS.keys()
    exact = contestants.exact_temperature(problem)
    monkeypatch.setitem(contestants.TEMPERATURE_CONTESTANTS, OURS, lambda _: exact * (1 + 2e-5))
    with pytest.raises(DisagreementError, match=f"{OURS}: the temperature is off by 2.0e-05"):
        contestants.check_temperature(problem)


def test_who_cannot_take_part_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(contestants, "our_backend", lambda _: "reference")
    reasons = {contestant.name: contestants.unavailable(contestant, "cpu") for contestant in LOSS_CONTESTANTS}
    assert all("apt install g++" in str(reasons[contestant.name]) for contestant in _COMPILED)
    assert reasons[OURS]
    assert reasons["tllib"] is None


# The clock


class _Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def test_interleave_takes_turns_and_times_only_the_calls() -> None:
    clock = _Clock()
    calls = {"a": clock.call("a", 2.0), "b": clock.call("b", 3.0), "c": clock.call("c", 5.0)}
    times = interleave(
        calls, seconds=0.0, before_each=clock.call("-", 100.0), warmup=1, min_rounds=3,
        stopwatch=host_stopwatch(clock),
    )  # fmt: skip
    assert "".join(clock.log) == "-a-b-c" * 4
    assert times == {"a": Timing((2.0,) * 3), "b": Timing((3.0,) * 3), "c": Timing((5.0,) * 3)}


def test_interleave_repeats_a_call_as_often_as_the_fastest_fits_in_a_turn() -> None:
    clock = _Clock()
    calls = {"a": clock.call("a", 2.0), "b": clock.call("b", 5.0)}
    times = interleave(calls, seconds=0.0, turn=6.0, warmup=1, min_rounds=2, stopwatch=host_stopwatch(clock))
    assert "".join(clock.log) == "ab" + "aaabbb" * 2
    assert times == {"a": Timing((2.0, 2.0)), "b": Timing((5.0, 5.0))}


def test_interleave_charges_queued_work_to_the_call_that_queued_it() -> None:
    clock = _Clock()
    queued: list[float] = []

    def synchronize() -> None:
        clock.now += sum(queued)
        queued.clear()

    calls = {"queues": lambda: queued.append(7.0), "works": clock.call("works", 1.0)}
    for after, queueing in ((synchronize, 7.0), (lambda: None, 0.0)):  # the whole call, then only its hand-over
        stopwatch = host_stopwatch(clock, before=synchronize, after=after)
        times = interleave(
            calls, seconds=0.0, before_each=lambda: queued.append(50.0), min_rounds=1, stopwatch=stopwatch
        )
        assert times == {"queues": Timing((queueing,)), "works": Timing((1.0,))}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 4), (100.0, 20), (1e9, 30)])
def test_interleave_runs_as_many_rounds_as_it_was_given_time_for(seconds: float, rounds: int) -> None:
    clock = _Clock()
    calls = {"a": clock.call("a", 2.0), "b": clock.call("b", 3.0)}
    times = interleave(calls, seconds=seconds, warmup=2, min_rounds=4, max_rounds=30, stopwatch=host_stopwatch(clock))
    assert len(times["a"].seconds) == len(times["b"].seconds) == rounds


def test_interleave_leaves_out_rounds_in_which_the_host_was_behind() -> None:
    """A call that always makes the host wait keeps all of its rounds."""

    class Watch:
        ahead = True
        calls = 0

        def __call__(self, call: Callable[[], object]) -> float:
            self.calls += 1
            self.ahead = bool(call()) and self.calls % 4 != 0  # every second round of the first call
            return 1.0 if self.ahead else 100.0

    calls = {"waits": lambda: False, "runs ahead": lambda: True}
    times = interleave(calls, seconds=0.0, warmup=0, min_rounds=4, stopwatch=Watch())
    assert times == {"waits": Timing((100.0,) * 4, behind=1.0), "runs ahead": Timing((1.0,) * 2, behind=0.5)}


def test_ratio_does_not_move_with_the_machine() -> None:
    clock = _Clock()
    speed = iter([1.0] * 2 + [1.0, 1.0, 9.0, 9.0, 4.0, 4.0, 1.0, 1.0, 7.0, 7.0])

    def run(seconds: float) -> None:
        clock.now += seconds * next(speed)

    calls = {"a": lambda: run(2.0), "b": lambda: run(3.0)}
    times = interleave(calls, seconds=0.0, warmup=1, min_rounds=5, stopwatch=host_stopwatch(clock))
    assert times["a"].median == 8.0
    assert times["b"].ratio_to(times["a"]) == 1.5
    assert times["b"].ratio_quartiles(times["a"]) == (1.5, 1.5)


def test_interleave_leaves_the_garbage_collector_as_it_was() -> None:
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, seconds=0.0, min_rounds=1)
    assert not any(seen)
    assert gc.isenabled()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"a": fail}, seconds=0.0)
    assert gc.isenabled()


def test_median_and_quartiles() -> None:
    timing = Timing((5.0, 1.0, 100.0, 3.0, 2.0))
    assert timing.median == 3.0
    assert timing.ratio_quartiles(Timing((1.0,) * 5)) == (2.0, 5.0)
    ones = Timing((1.0, 1.0, 2.0, 1.0, 0.5))
    assert timing.ratio_to(ones) == 3.0
    assert timing.ratio_quartiles(ones) == (3.0, 5.0)
    assert Timing((4.0,)).ratio_quartiles(Timing((1.0,))) == (4.0, 4.0)


# Memory


def test_memory_sees_what_a_call_keeps_and_what_it_frees() -> None:
    megabytes = 2**20

    def keep_one_and_free_one() -> Tensor:
        kept = torch.ones(64 * megabytes, dtype=torch.uint8)
        freed = torch.ones(48 * megabytes, dtype=torch.uint8)
        del freed
        return kept

    peak = memory.measure_here(keep_one_and_free_one)
    assert peak.torch == 112 * megabytes
    if peak.resident is not None:
        assert peak.resident == pytest.approx(112 * megabytes, abs=4 * megabytes)


def test_resident_memory_sees_numpy_and_torch_memory_does_not() -> None:
    size = 64 * 2**20
    peak = memory.measure_here(lambda: np.ones(size, dtype=np.uint8))
    assert peak.torch == 0
    if peak.resident is not None:
        assert peak.resident == pytest.approx(size, abs=size // 16)


def test_memory_of_a_contestant_in_its_own_process() -> None:
    shape = Shape(4096, 3, 1000)
    gradients = shape.batch * (shape.source_classes + shape.target_classes) * 4
    peak = memory.measure_loss("tllib", shape, "float32")
    # The log-probabilities and their product with the target are alive together with a gradient.
    assert peak.torch > 2 * gradients
    if peak.resident is not None:
        # Torch's memory, and the gathered rows of the relationship that NumPy holds.
        assert peak.resident > peak.torch


def test_memory_says_why_a_child_failed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)benchmarks memory loss nobody .* failed:.*StopIteration"):
        memory.measure_loss("nobody", _SMALL, "float32")


# The table


def _row(ratio: float, floor: float | None) -> ratios.Row:
    ours, tllib = Timing((1e-3, 1e-3)), Timing((ratio * 1e-3, ratio * 1e-3))
    return ratios.Row.of_times(
        "loss 1x2x3", "float32", 1, {OURS: ours, "tllib": tllib}, {} if floor is None else {"tllib": floor}
    )


def test_a_missed_promise_is_seen() -> None:
    rows = [_row(4.4, 4.5), _row(4.6, 4.5), _row(1.0, None), _row(float("nan"), 4.5)]
    missed = ratios.missed_floors(rows)
    assert [sentence.split(": ")[1] for sentence in missed] == [
        "4.40 times tllib, promised 4.5",
        "nan times tllib, promised 4.5",
    ]
    verdicts = [line.split("|")[-2].strip() for line in ratios.render_table(rows).splitlines()[2:]]
    assert verdicts == ["4.5: missed", "4.5: met", "", "4.5: missed"]


def test_table_gives_ours_in_units_and_others_as_multiples() -> None:
    memory_row = ratios.Row.of_bytes("memory", "float32", 1, {OURS: 2_000_000, "authors": 9_000_000})
    header, _, time, size = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ratios.render_table([_row(4.5, None), memory_row]).splitlines()
    )
    assert header == ["measured", "dtype", "threads", OURS, "tllib", "authors", "promised"]
    assert time == ["loss 1x2x3", "float32", "1", "1 ms", "4.50x ±0%", "", ""]
    assert size == ["memory", "float32", "1", "2.0 MB", "", "4.50x", ""]


def test_main_measures_checks_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ratios, "our_backend", lambda _: "cpp")
    monkeypatch.setattr(ratios, "FLOORS_FLOAT32", {_SMALL: 1e9})
    monkeypatch.setattr(ratios, "FLOOR_COMPILED", 0.0)
    result = tmp_path / "result.json"
    arguments = ["--parts", "loss", "--shapes", str(_SMALL), "--seconds", "0.01", "--no-compile", "--allow-reference"]
    assert ratios.main([*arguments, "--json", str(result)]) == 0
    assert ratios.main([*arguments, "--check"]) == 1
    monkeypatch.setattr(ratios, "FLOORS_FLOAT32", {_SMALL: 0.0})
    assert ratios.main([*arguments, "--check"]) == 0
    written = json.loads(result.read_text())
    (row,) = written["rows"]
    assert row["values"].keys() == {contestant.name for contestant in _EAGER}
    assert row["ratios"]["tllib"] == pytest.approx(row["values"]["tllib"] / row["values"][OURS])
    assert row["rounds"] >= 5
    assert written["environment"]["backend"] == "cpp"
    assert written["environment"]["package"] in ("a checkout", "installed")
    assert str(ROOT) not in result.read_text()
    assert "Below the promise: loss 13x7x93" in capsys.readouterr().out


def test_what_is_done_once_is_also_measured_with_the_malloc_of_the_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")

    def child(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert not any(name.startswith("MALLOC_") for name in env)
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [vars(_row(3.0, 4.0))]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(ratios.Bench, "temperature", lambda self, temperature, threads: None)
    monkeypatch.setattr(subprocess, "run", child)
    assert ratios.main(["--parts", "temperature", "--allow-reference", "--check", "--seconds", "3"]) == 1
    assert "loss 1x2x3, system malloc" in capsys.readouterr().out
    assert ratios.main(["--parts", "temperature", "--allow-reference", "--check", "--system-malloc"]) == 0
    (command,) = commands
    assert command[command.index("--parts") + 1 : command.index("--threads") + 2] == ["temperature", "--threads", "1"]
    assert command[command.index("--seconds") + 1] == "3.0"


@pytest.mark.parametrize(("option", "clock"), [([], time.perf_counter), (["--processor-time"], time.process_time)])
def test_the_clock_that_was_asked_for_is_read(
    monkeypatch: pytest.MonkeyPatch, option: list[str], clock: Callable[[], float]
) -> None:
    read = []
    monkeypatch.setattr(ratios, "host_stopwatch", lambda clock, **_: read.append(clock))
    monkeypatch.setattr(ratios, "interleave", lambda calls, **_: dict.fromkeys(calls, Timing((1.0,))))
    arguments = ["--parts", "loss", "--shapes", str(_SMALL), "--no-compile", "--allow-reference"]
    assert ratios.main([*arguments, *option]) == 0
    assert read == [clock]


def test_a_wrong_contestant_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(source: Tensor, target: Tensor, labels: Tensor, relationship: Tensor, trade_off: float) -> Tensor:
        return F.cross_entropy(target, labels)

    def never(*_: object, **__: object) -> None:
        pytest.fail("timed a wrong contestant")

    cheat = LossContestant("cheat", lambda problem: contestants._torch(wrong, problem))
    monkeypatch.setattr(ratios, "LOSS_CONTESTANTS", (*_EAGER, cheat))
    monkeypatch.setattr(ratios, "interleave", never)
    with pytest.raises(DisagreementError, match="cheat"):
        ratios.main(["--parts", "loss", "--shapes", str(_SMALL), "--no-compile", "--allow-reference"])


def test_main_says_what_is_wrong_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ratios.main(["--allow-reference", "--json", str(tmp_path / "missing" / "result.json")])
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ratios.main(["--allow-reference", "--processor-time", "--threads", "1", "2"])
    assert "--processor-time adds up the threads" in capsys.readouterr().err
    monkeypatch.setattr(contestants, "our_backend", lambda _: "reference")
    with pytest.raises(SystemExit):
        ratios.main([])
    assert "Nothing to measure" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["48", "48x200", "48x200x0", "48x-1x5", "axbxc", "1x2x3x4", ""])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected B x N_t x N_s"):
        parse_shape(text)


def test_shape_is_read_as_it_is_written() -> None:
    assert parse_shape(str(Shape(48, 200, 1000))) == Shape(48, 200, 1000)


def _run(arguments: list[str], **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, *arguments]
    child = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.parametrize(("option", "malloc"), [([], "MALLOC_MMAP_MAX_=0"), (["--system-malloc"], "malloc: default")])
def test_the_command_settles_malloc_unless_told_otherwise(option: list[str], malloc: str) -> None:
    measured = ["--parts", "loss", "--shapes", str(_SMALL), "--seconds", "0.01", "--no-compile", "--allow-reference"]
    assert malloc in _run(["-m", "benchmarks", "ratios", *measured, *option])


def test_a_checkout_without_kernels_is_not_measured(tmp_path: Path) -> None:
    """In a checkout, Python finds the checkout before an installed package with kernels: the command says so."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("benchmarks", "cotuning_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder, ignore=ignored)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    (tmp_path / "installed" / "cotuning_kernels").mkdir(parents=True)
    (tmp_path / "installed" / "cotuning_kernels" / "_C.abi3.so").touch()
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "ratios", "--parts", "loss", "--shapes", str(_SMALL)],
        cwd=tmp_path / "checkout", env=os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode != 0
    assert "which Python finds before the installed package" in finished.stderr
    assert "run `pip install -e .` in this one" in finished.stderr


# The page


def test_the_page_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"shapes": [1, 2], "batch": [1], "source classes": [1]}
    points = [
        page.measure(sweep, _SMALL, "float32", threads, device="cpu", seconds=0.01)
        for sweep, numbers in cases.items()
        for threads in numbers
    ]
    others = [each.name for each in LOSS_CONTESTANTS if each.name != OURS and not contestants.unavailable(each, "cpu")]
    assert points[0].seconds.keys() == {*others, OURS, page.COPY}
    # Planted times: the page must divide them as documented.
    planted = dict(zip(others, (9e-3, 8e-3, 7e-3, 6e-3, 5e-3), strict=False))
    fixed = [
        replace(point, seconds={**point.seconds, **planted, OURS: 2e-3 / point.threads, page.COPY: 1e-3})
        for point in points
    ]
    assert all(min(point.seconds.values()) > 0 for point in points)
    assert points[0].loss_bytes == 4 * points[0].elements == 4 * 13 * 100
    peaks = {
        OURS: memory.Peak(2_000_000, 1),
        "tllib": memory.Peak(9_000_000, 1),
        "F.cross_entropy": memory.Peak(None, 5_000_000),
    }
    monkeypatch.setattr(memory, "measure_loss", lambda name, shape, dtype, device: peaks[name])
    remembered = page.measure_memory(_SMALL, "float32", device="cpu")
    assert remembered.gradient_bytes == 4 * 13 * 100
    text = page.write_page(fixed, [remembered], {"processor": "planted"}, tmp_path / "page").read_text()
    multiples = " | ".join(f"{seconds / 2e-3:.2f}x" for seconds in planted.values())
    # The copy reads and writes 5200 bytes in a millisecond.
    assert f"| 13x7x93 | float32 | 1 | 2.00 ms | {multiples} | 50 % | 0 GB/s |" in text
    assert fixed[0].copy_bandwidth() == 2 * 5200 / 1e-3
    assert fixed[0].relationship_bytes == 0
    # With a relationship to read (a GPU's caches are emptied): a quarter more bytes take a quarter more time.
    assert replace(fixed[0], relationship_bytes=2600).share_of_copy() == pytest.approx(1.25 * 0.5)
    assert "| 13x7x93 | float32 | 2.00x |" in text
    assert "| 13x7x93 | float32 | 0.0 MB | 2.0 MB | 4.50x | 2.50x |" in text
    assert "processor: planted" in text
    pictures = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert pictures == {f"{name}.png" for name in ("batch", "source_classes", "ratios", "copy")}
    assert all(f"({name})" in text for name in pictures)
    written = json.loads((tmp_path / "page" / "page.json").read_text())
    assert [page.Point(**point) for point in written["points"]] == fixed
    assert "## Two threads" in text
    assert "## The host" not in text
    # The page of a GPU has no threads, but the host's time per call.
    of_a_gpu = [
        replace(
            point, host_seconds={OURS: 5e-6, "tllib": 2e-5}, warm_seconds=1e-5, graph_seconds=1.2e-5,
            behind={OURS: 0.25, "tllib": 1.0},
        )
        for point in fixed[:1] + fixed[2:]
    ]  # fmt: skip
    text = page.write_page(of_a_gpu, [remembered], {"clock": "the device's"}, tmp_path / "gpu").read_text()
    assert "| B x N_t x N_s | dtype | ours | tllib |" in text
    assert "| 13x7x93 | float32 | 5.0 µs | 4.00x |" in text
    assert "| 13x7x93 | float32 | 2.00 ms | 10 µs | 12 µs | 25 % | tllib |" in text
    assert "## Two threads" not in text
    assert "device's own" in text
    written = json.loads((tmp_path / "gpu" / "page.json").read_text())
    assert [page.Point(**point) for point in written["points"]] == of_a_gpu
    # Where the limit left the rest out, the page has the shapes, and a cell for a contestant that has a time.
    text = page.write_page(of_a_gpu[:1], [], {}, tmp_path / "cut").read_text()
    assert {path.name for path in (tmp_path / "cut").glob("*.png")} == {"ratios.png", "copy.png"}
    assert "| 13x7x93 | float32 | 2.00 ms |" in text


def test_the_page_ends_at_its_limit() -> None:
    done: list[int] = []

    def measured(number: int) -> Callable[[], object]:
        return lambda: (time.sleep(0.2), done.append(number))

    assert page._work_through([measured(number) for number in range(5)], 0.3) == 3
    assert done == [0, 1]
    assert page._work_through([measured(5)], None) == 0


def test_the_page_covers_what_it_promises() -> None:
    sweeps = page.sweeps()
    assert {shape.batch for shape, _, _ in sweeps["batch"]} >= {1, 256, 131_072}
    assert {shape.source_classes for shape, _, _ in sweeps["source classes"]} >= {10, 1000, 262_144}
    assert {(dtype, threads) for _, dtype, threads in sweeps["shapes"]} == {(d, t) for d in DTYPES for t in (1, 2)}
    assert max(shape.batch for shape, _, _ in page.sweeps(largest_batch=100)["batch"]) == 100
    assert {threads for cases in page.sweeps(threads=(1,)).values() for _, _, threads in cases} == {1}
    cut = page.sweeps(threads=(1,), most_rows=2)
    assert {shape.batch for cases in cut.values() for shape, _, _ in cases} == {1, 2}
    assert all(len(set(cases)) == len(cases) for cases in cut.values())


# The bounds


def _needs_the_bounds() -> None:
    if reason := limits.compiler_missing():
        pytest.skip(reason)
    if not contestants.our_backend("cpu").startswith("cpp "):
        pytest.skip("no CPU kernel was built")


@pytest.mark.parametrize("size", [1, 15, 64, 1000])
def test_the_bounds_do_the_work_that_they_say(size: int, seed: int) -> None:
    _needs_the_bounds()
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    total = limits.bounds().sum_of_exponentials(logits.data_ptr(), size)
    assert total == pytest.approx(float(logits.double().exp().sum()), rel=1e-6)
    copy = torch.full((size + 1,), -7.0)
    limits.bounds().streaming_copy(logits.data_ptr(), size, copy.data_ptr())
    assert torch.equal(copy[:size], logits)
    assert copy[size] == -7


def test_the_parts_of_a_call_are_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"whole call": 9e-5, "forward": 5e-5, "operation": 4e-5, "operation on one row": 1e-5}
    found = limits.Limits(_SMALL, {**seconds, "exponentials": 1.5e-5, "streaming copy": 2.7e-5}, page_faults=3.0)
    text = limits.render([found])
    assert "| 13x7x93 | 90 µs | 30 µs | 20 µs | 40 µs | 3 |" in text
    assert "| 13x7x93 | 30 µs | 15 µs | 50 % | 27 µs | 90 % |" in text
    _needs_the_bounds()
    arguments = ["--shapes", str(_SMALL), "--in-place-shape", str(_SMALL), "--seconds", "0.01"]
    assert limits.main(arguments) == 0
    assert capsys.readouterr().out.count("| 13x7x93 |") == 3


def test_a_wrong_gradient_in_place_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = limits.ck.FusedCoTuningLoss

    def halved_in_place(*given: Tensor, **options: float) -> Callable[..., Tensor]:
        criterion = make(*given, **options)
        return lambda *heads: criterion(*heads) * (0.5 if options["inplace"] else 1.0)

    monkeypatch.setattr(limits.ck, "FusedCoTuningLoss", halved_in_place)
    monkeypatch.setattr(limits, "interleave", lambda *_, **__: pytest.fail("timed a wrong contestant"))
    with pytest.raises(DisagreementError, match="the loss is"):
        limits.measure_in_place(_SMALL, seconds=0.01, clock=time.perf_counter)


# The regression of the reverse relationship, and the wordpiece head


def test_objectives_of_the_regression_are_checked() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    probabilities, labels = reverse_relationship.make_problem(120, 5, 20)
    found, seconds = reverse_relationship.measure(["same objectives", "of 2020"], probabilities, labels, 5)
    objectives = reverse_relationship.check_objectives(found, probabilities, labels)
    for name, path in objectives.items():
        assert seconds[name] > 0
        for c, value in path.items():
            # A tighter tolerance finds the minimum; sklearn's float32 ends where its line search sees no more progress.
            assert value == pytest.approx(objectives[OURS][c], rel=1e-2), (name, c)
    found[OURS] = {c: 0.9 * coefficients for c, coefficients in found[OURS].items()}
    with pytest.raises(DisagreementError, match="our objective"):
        reverse_relationship.check_objectives(found, probabilities, labels)


def test_ways_of_the_language_head_compute_the_same() -> None:
    step = language_head.Step(tokens=64, hidden=16, vocabulary=101)
    assert step.entities.any()
    losses, gradients = {}, {}
    for name, way in language_head.WAYS.items():
        step.features.grad = None
        losses[name] = way(step)
        losses[name].backward()
        if not name.startswith("the loss alone"):  # it uses no features
            gradients[name] = step.features.grad
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses["unfused, entities only"], rtol=1e-4, atol=0, msg=name)
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["unfused, entities only"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_ways_of_linear_heads_compute_the_same(share: float) -> None:
    step = linear.Step(40, 16, 101, share, torch.float32)
    found = {}
    for name, way in linear.WAYS.items():
        step.clear()
        loss = way(step)
        loss.backward()
        found[name] = loss.detach(), step.features.grad, step.source.weight.grad, step.target.bias.grad
    for name, each in found.items():
        for ours, theirs in zip(each, found["unfused"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_a_cold_step_gives_the_network_its_gradients() -> None:
    """The loss's backward pass ends at the logits; the network's goes on from there, as in one backward pass."""
    problem = LossProblem.make(_SMALL, torch.float32)
    network, images = cold.Network(7, 93), torch.randn(13, 3, 32, 32)
    weights = list(network.parameters())

    def loss(source: Tensor, target: Tensor) -> Tensor:
        return baselines.cross_entropy_loss(source, target, problem.labels, problem.relationship, 2.3)

    expected = torch.autograd.grad(loss(*network(images)), weights)
    of_loss, of_step = cold._step(
        network, images, problem, lambda: loss(problem.source_logits, problem.target_logits), time.perf_counter
    )
    assert 0 < of_loss < of_step
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("network", ["mobilenet", "none"])
def test_the_table_of_cold_calls(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    if backends.missing_reason("cpp"):
        pytest.skip("it times the CPU kernel")
    options = ("--pixels", "32", "--steps", "2", "--no-compile", "--network", network)
    assert cold.main(["--shapes", str(_SMALL), *options]) == 0
    _, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith(f"| {_SMALL} | loss |")
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [c.name for c in LOSS_CONTESTANTS if not c.compiles] + [cold.A_SUM]
    shares = [float(row.split("|")[5].strip(" %")) for row in rows]
    assert all(share < 100 for share in shares)


def test_the_table_of_linear_heads(capsys: pytest.CaptureFixture[str]) -> None:
    ways = ("linear heads", "unfused")
    size = ("--sizes", "3000", "32", "2000")
    assert linear.main([*size, "--rounds", "1", "--dtypes", "float32", "--ways", *ways]) == 0
    header, shape, *rows = capsys.readouterr().out.splitlines()
    assert "100% of the rows supervised" in header
    assert shape == "3000 x 32 x 2000, float32"
    peaks = [int(row.split()[-2]) for row in rows]
    assert [row[2:28].strip() for row in rows] == list(ways)
    assert 0 < peaks[0] < peaks[1]


def test_single_runs_are_rows_with_their_floors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([{"seconds": 1.0, "bytes": 10.0}, {"seconds": 3.0, "bytes": 20.0}])
    monkeypatch.setattr(language_head, "measure_apart", lambda *sizes, rounds: next(times))
    monkeypatch.setattr(ratios, "our_backend", lambda device: "cpu")
    arguments = ["--parts", "language_head", "--allow-reference", "--check", "--system-malloc"]
    assert ratios.main(arguments) == 1  # 3 times as fast; 4 are promised
    assert f"3.00 times all tokens, promised {ratios.FLOOR_LANGUAGE_HEAD:g}" in capsys.readouterr().out
