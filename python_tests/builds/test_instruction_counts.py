"""The number of instructions that the CPU kernels run per element of a row may not grow unnoticed.

``python -m tools.machine_code --write instructions`` renews the table; say in the commit what changed and why.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from support.cpp_builds import build, compiler, run
from tools.machine_code import __main__ as command
from tools.machine_code import instructions
from tools.machine_code.instructions import Measured, differences, recorded


@functools.cache
def measured() -> Measured:
    try:
        return instructions.measure(build() / "count_instructions", compiler())
    except LookupError as reason:
        pytest.skip(str(reason))


def counted() -> dict[str, float]:
    return measured().instructions


def test_no_kernel_runs_more_instructions_than_the_table_says() -> None:
    table = recorded()
    if measured()[:2] != table[:2]:
        pytest.skip(f"the table is for {table.compiler} on {table.machine}, here is {measured().compiler}")
    assert counted(), "no instruction set of this processor is counted"
    assert not (found := differences(counted(), table.instructions)), "\n".join(found)


def test_counts_repeat_and_a_slower_kernel_is_noticed() -> None:
    first = counted()
    assert run([build() / "count_instructions"]).stdout.split() == [
        word for case, count in first.items() for word in (*case.split(), f"{count:.4f}")
    ]
    assert not differences(first, first)
    slower = {case: count * 1.06 for case, count in first.items()}
    assert len(differences(slower, first)) == len(first)
    assert differences({"a case that the table lacks": 1.0}, first)


def test_the_command_says_which_table_differs_and_renews_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    table.write_text('{"a": 1}')

    def missing() -> tuple[Path, object]:
        raise LookupError("there is no nvcc")

    monkeypatch.setattr(command, "TABLES", {"numbers": lambda: (table, {"a": 2}), "cuda": missing})
    assert command.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "numbers: table.json differs; --write renews it", "cuda: not measured: there is no nvcc"
    ]  # fmt: skip
    assert command.main(["--write", "numbers"]) == 0
    assert json.loads(table.read_text()) == {"a": 2}
    assert command.main(["numbers"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "numbers: table.json holds"
    with pytest.raises(SystemExit):
        command.main(["nothing"])
    assert "there is no table 'nothing': expected numbers, cuda" in capsys.readouterr().err
