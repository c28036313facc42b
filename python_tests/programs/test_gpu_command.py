"""``make gpu`` without a GPU: its limits, its summary, and that its checks find a planted fault."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cases import CASES, Case, covering
from support.paths import ROOT
from tools.gpu import __main__ as command
from tools.gpu import checks
from tools.gpu.__main__ import Outcome, Step, run_steps, steps, summary


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def run_all(chosen: list[Step], folder: Path, limit: float = 60.0) -> dict[str, Outcome]:
    outcomes = run_steps(chosen, folder / "log.txt", limit=limit, environment=dict(os.environ))
    return {outcome.name: outcome for outcome in outcomes}


def test_a_step_that_fails_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    ended = run_all(
        [
            Step("wrong", python("print('what went wrong'); raise SystemExit(3)"), 30),
            Step("right", python("print(7)"), 30),
        ],
        tmp_path,
    )
    assert (ended["wrong"].state, ended["wrong"].words) == ("failed", "3: what went wrong")
    assert (ended["right"].state, ended["right"].words) == ("passed", "7")
    log = (tmp_path / "log.txt").read_text()
    assert log.index("what went wrong") < log.index("== right:")


def test_a_step_that_is_too_slow_ends_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    slow = f"(sleep 3; touch {child}) & echo begun; sleep 60"
    started = time.monotonic()
    ended = run_all([Step("slow", ("sh", "-c", slow), 1), Step("next", python("print('there')"), 30)], tmp_path)
    assert time.monotonic() - started < 20
    assert ended["slow"].state == "too slow"
    assert ended["slow"].words == "ended after 1 s; last: begun"
    assert ended["next"].state == "passed"
    time.sleep(max(0.0, started + 4 - time.monotonic()))
    assert not child.exists()


def test_all_steps_together_have_a_limit(tmp_path: Path) -> None:
    chosen = [Step("slow", ("sleep", "60"), 60), Step("late", python(""), 30)]
    ended = run_all(chosen, tmp_path, limit=0.5)
    assert ended["slow"].state == "too slow"
    assert (ended["late"].state, ended["late"].words) == ("skipped", "the 0 seconds of all steps were spent")


def test_a_program_that_is_not_there_or_is_refused_is_said(tmp_path: Path) -> None:
    ended = run_all(
        [
            Step("absent", ("no-such-program",), 5, needs="no-such-program"),
            Step("refused", python("print('Device not supported'); raise SystemExit(1)"), 30, needs="sh"),
            Step("wrong", python("print('ERROR SUMMARY: 1 error'); raise SystemExit(9)"), 30, needs="sh"),
        ],
        tmp_path,
    )
    assert ended["absent"].words == "there is no no-such-program on the path"
    assert (ended["refused"].state, ended["refused"].words) == ("skipped", "sh is refused here: Device not supported")
    assert ended["wrong"].state == "failed"


_NO_ERROR = "========= COMPUTE-SANITIZER\nvalues: OK\n========= ERROR SUMMARY: 0 errors\n"
_OVERREAD = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void cotuning::cuda::loss_kernel<float>(cotuning::cuda::LossProblem, LossPlan)+0x12e0
=========     by thread (9,0,0) in block (4,0,0)
=========     Address 0x7f2a6be00e80 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2a6be00000 of size 3712 bytes
========= ERROR SUMMARY: 2 errors
"""
_RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at reduce(float)+0x1d0 in team.cuh:41
=========     and Read access at reduce(float)+0x2a0 in team.cuh:44 [96 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
_WITHOUT_A_CARD = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(("output", "status", "state", "words"), [
    (_NO_ERROR, 0, "passed", "========= ERROR SUMMARY: 0 errors"),
    (_NO_ERROR, 1, "failed", "1: ========= ERROR SUMMARY: 0 errors"),  # the program itself failed
    (_OVERREAD, 9, "failed", "9: Invalid __global__ read of size 16 bytes at void cotuning::cuda::loss_kernel<float>"),
    (_OVERREAD, 0, "failed", "0: Invalid __global__ read"),  # errors count whatever the status says
    (_RACE, 9, "failed", "9: Race reported between Write access at reduce(float)+0x1d0 in team.cuh:41 (1 hazard"),
    ("values: OK\n", 0, "failed", "0: it printed no summary, so it looked at nothing"),
    (_WITHOUT_A_CARD, 9, "skipped", "compute-sanitizer is refused here: Device not supported"),
])  # fmt: skip
def test_the_reports_of_compute_sanitizer_are_read(
    output: str, status: int, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs in the format of NVIDIA's documentation, printed by a program of the tool's name."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{output}EOF\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    outcome = run_all([Step("memcheck", ("compute-sanitizer",), 30, "compute-sanitizer")], tmp_path)["memcheck"]
    assert outcome.state == state
    assert outcome.words.startswith(words)


def test_the_summary_begins_with_what_failed() -> None:
    outcomes = [Outcome(f"step {i}", "passed", 1.0, "fine") for i in range(12)]
    outcomes[4] = replace(outcomes[4], state="too slow", words="ended after 9 s; last: x")
    outcomes[9] = replace(outcomes[9], state="failed", words="1: y")
    lines = summary(outcomes).splitlines()
    assert lines[:3] == [
        "1 failed, 1 too slow, 0 skipped, 10 passed",
        "failed: step 9 (1 s): 1: y",
        "too slow: step 4 (1 s): ended after 9 s; last: x",
    ]
    assert len(lines) == 10


def test_every_step_names_what_is_there(tmp_path: Path) -> None:
    chosen = steps(tmp_path)
    assert len({step.name for step in chosen}) == len(chosen)
    for step in (*chosen, *map(command.rehearsed, chosen)):
        for word in map(str, step.command):
            assert not word.startswith(str(ROOT)) or Path(word).exists(), word
        if "tools.gpu.checks" in step.command:
            given = [str(word) for word in step.command[step.command.index("tools.gpu.checks") + 1 :]]
            named = given[: next((k for k, word in enumerate(given) if word.startswith("--")), None)]
            assert set(named) <= {*checks.CHECKS, "main shapes"}


def test_a_rehearsal_says_what_it_leaves_out(tmp_path: Path) -> None:
    chosen = [command.rehearsed(step) for step in steps(tmp_path) if step.name == "triton tests"]
    (outcome,) = run_all(chosen, tmp_path).values()
    assert outcome.state == "skipped"
    assert "a simulated device has none" in outcome.words


def test_covering_rows_have_every_pair_of_values() -> None:
    rows = [
        Case(f"{shape}, {target}, {weight}", "", shape, target, weight=weight)
        for shape in ((1, 2, 3), (4, 5, 6))
        for target in ("labels", "pair")
        for weight in ("none", "random")
    ]
    assert 4 <= len(covering(rows)) <= 5  # of 8: each pair is in two of them
    chosen = covering(CASES)
    assert len(chosen) < len(CASES) / 2
    for name in ("shape", "target", "relationship", "weight", "upstream", "relationship_dtype", "target_logits_dtype"):
        assert {getattr(case, name) for case in chosen} == {getattr(case, name) for case in CASES}
    pairs = [{(case.target, *option) for case in rows for option in case.options.items()} for rows in (chosen, CASES)]
    assert pairs[0] == pairs[1]


def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out"
    status = command.main(["--installed", "--out", str(out), "--only", "report", "first checks"])
    assert status == 1
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "steps.json", "summary.txt"]
    states = {step["name"]: step["state"] for step in json.loads((out / "steps.json").read_text())}
    assert states == {"report": "passed", "first checks": "failed"}
    assert "1: There is no GPU that this torch can use." in (out / "summary.txt").read_text()
    assert "cotuning_kernels" in (out / "log.txt").read_text()
    assert "Written to" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--only", "rapport"], "--only names 'rapport', expected some of report,"),
    (["--wheel", "none.whl"], "--wheel is none.whl, which is no file"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_checks_pass_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main(["values", "--device", "cpu"]) == 0
    assert re.fullmatch(r"values: OK \(\d+\.\d s\)\nevery check is OK\n", capsys.readouterr().out)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_checks_find_a_wrong_step(
    wrong: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = checks.Batch.step

    def step(self: checks.Batch, backend: str = "auto") -> tuple[Any, ...]:
        result = list(right(self, backend))
        if backend != "reference":
            result[wrong] = result[wrong] * 1.01 if self.source_logits.dtype != torch.bfloat16 else result[wrong]
        return tuple(result)

    monkeypatch.setattr(checks.Batch, "step", step)
    assert checks.main(["values", "--device", "cpu"]) == 1
    named = ("loss", "source gradient", "target gradient")[wrong]
    assert f"values: WRONG: WrongError: {named} of torch.float32" in capsys.readouterr().out
