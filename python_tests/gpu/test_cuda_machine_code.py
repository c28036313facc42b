"""The machine code of the CUDA kernels: no spills, accesses of 16 bytes, and the registers and instructions of
``python_tests/recorded/cuda_machine_code.json``. These tests need no device.

The numbers hold for one compiler: another nvcc than the table's gives nothing to compare. After an intended change,
``python -m tools.machine_code --write cuda`` renews the table; say in the commit what changed and why."""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

import pytest
import torch

from cotuning_kernels import backends
from support.binaries import KERNELS
from support.cpp_builds import require, run
from tools.machine_code import cuda as machine


def architectures() -> list[str]:
    return [f"sm_{a}{b}" for a, b in re.findall(r"(\d+)\.(\d)", (backends.cuda_build() or "").partition(":")[2])]


@pytest.fixture(scope="module")
def tools() -> None:
    try:
        machine.cuobjdump()
    except LookupError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def library(tools: None) -> Path:
    try:
        return machine.library()
    except LookupError as reason:
        pytest.skip(str(reason))


# --------------------------------------------------------------------------------------------------------- the library


def test_no_kernel_spills_or_uses_local_memory(library: Path) -> None:
    used = machine.resources(library)
    assert {usage.architecture for usage in used} == set(architectures())
    assert len(used) == KERNELS * len(architectures())
    for usage in used:
        assert usage.stack == usage.local == 0, usage
        assert usage.registers <= 128, usage


def test_rows_are_accessed_by_16_bytes(library: Path) -> None:
    for name in architectures():
        kernels = machine.disassemble(library, name)
        assert len(kernels) == KERNELS
        for kernel, code in kernels.items():
            counts = collections.Counter(machine.access(instruction.operation) for instruction in code.values())
            assert not any(str(what).startswith(("LDL", "STL")) for what in counts), (name, kernel)
            # Class sums: row_norms reads rows, class_sums adds up columns, of which a thread has single ones.
            if "class_sums" not in kernel:
                assert counts["LDG 16"] > 0, (name, kernel)
            # The statistics need no 16-byte stores.
            if re.search("loss|scale|translate", kernel):
                assert counts["STG 16"] > 0, (name, kernel)
            # Staged rows.
            if "loss" in kernel:
                assert counts["LDS 16"] > 0, (name, kernel)
                assert counts["STS 16"] > 0, (name, kernel)


def test_the_library_carries_ptx_for_later_cards(library: Path) -> None:
    """Only for the architectures listed with +PTX."""
    listed = machine.run_cuobjdump("-lptx", library)
    carried = {f"sm_{name.replace('.', '')}" for name in re.findall(r"(\d+\.\d)\+PTX", backends.cuda_build() or "")}
    assert set(re.findall(r"\.(sm_\d+)[a-z]?\.ptx", listed)) == carried, listed


def test_local_memory_and_narrow_access_are_noticed(tools: None, tmp_path: Path) -> None:
    """The two checks above, on a kernel that indexes an array by a variable and reads single floats."""
    nvcc = require("nvcc")
    source, cubin = tmp_path / "faulty.cu", tmp_path / "faulty.cubin"
    source.write_text(
        "__global__ void faulty(const float* x, float* y, int k) {\n"
        "  float kept[32];\n"
        "  for (int i = 0; i < 32; ++i) kept[(i * k) % 32] = x[threadIdx.x + 97 * i];\n"
        "  y[threadIdx.x] = kept[k % 32] + kept[(k + 7) % 32];\n"
        "}\n"
    )
    compiled = run([nvcc, "-arch=sm_80", "-cubin", source, "-o", cubin])
    assert compiled.returncode == 0, compiled.stdout
    (usage,) = machine.resources(cubin)
    assert "faulty" in usage.kernel
    assert usage.stack + usage.local > 0
    (code,) = machine.disassemble(cubin, "sm_80").values()
    accesses = {machine.access(instruction.operation) for instruction in code.values()}
    assert accesses & {"STL 4", "STL 8", "STL 16"}
    assert "LDG 4" in accesses
    assert "LDG 16" not in accesses


# ----------------------------------------------------------------------------------------------------------- the table


def test_registers_and_instructions_are_those_of_the_table(library: Path) -> None:
    now, before = machine.measure(library), machine.recorded()
    if now.nvcc != before.nvcc:
        pytest.skip(f"the table is for {before.nvcc}, the library was built with {now.nvcc}")
    if not set(architectures()) & {name.partition(":")[0] for name in before.registers}:
        pytest.skip(f"the table has none of the cards that the library is for: {' '.join(architectures())}")
    assert not (found := machine.differences(now, before)), "\n".join(found)


def test_a_slower_kernel_is_noticed_and_so_is_a_faster_one(library: Path) -> None:
    table = machine.recorded()

    def times(factor: float) -> list[str]:
        changed = {name: count * factor for name, count in table.instructions.items()}
        return machine.differences(table._replace(instructions=changed), table)

    assert times(1) == times(1.04) == []
    assert [said.endswith(", worse") for said in times(1.06)] == [True] * len(table.instructions)
    assert ["better: renew the table" in said for said in times(0.94)] == [True] * len(table.instructions)
    lacking = dict(list(table.instructions.items())[1:])
    assert "only in the table" in machine.differences(table._replace(instructions=lacking), table)[0]


def test_what_is_planted_in_the_machine_code_is_noticed(library: Path) -> None:
    """A NOP after each instruction is counted; the reader raises when a gradient is stored by 8 bytes."""
    if "sm_90" not in architectures():
        pytest.skip("the library is not for sm_90")
    (code,) = (c for k, c in machine.disassemble(library, "sm_90").items() if machine.readable(k) == "loss, float32")

    def instructions(code: machine.Code) -> int:
        loops = machine.sweeps(code, torch.float32, alike=True, where="shared memory")
        return sum(loop.instructions for loop in loops.values())

    longer = code | {address + 8: machine.Instruction("NOP", "", False) for address in code}
    assert instructions(longer) > 1.9 * instructions(code)
    narrow = {
        address: x._replace(operation=x.operation.replace("STG.E.128", "STG.E.64")) for address, x in code.items()
    }
    with pytest.raises(LookupError, match=r"no way around a loop with .*'STG 16': 1.* \(gradient\)"):
        instructions(narrow)


def test_the_command_prints_its_tables(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_machine_code", str(library)])
    machine.main()
    printed = capsys.readouterr().out
    for words in ("| loss, bfloat16 |", "| stack or local memory, all kernels | 0 |", "| spills "):
        assert words in printed
    if "sm_90" in architectures():
        assert re.search(r"\| bfloat16 \| \d+\.\d .* \| \d+\.\d, \d+\.\d \(R kept 100%, 75% elsewhere\) \|", printed)


# -------------------------------------------------------------------------------------------------------- the counting

SASS = """
                Function : _ZN8cotuning4cuda11loss_kernelIfEEvNS0_11LossProblemENS0_8LossPlanE
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/               @P1 BRA 0x60 ;                             /* 0x0000000000000947 */
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;       /* 0x0000000402047981 */
                                                                          /* 0x000ea8000c1e9d00 */
        /*0030*/              @!P2 STS.128 [R9], R4 ;                     /* 0x0000000409007388 */
        /*0040*/                   IADD3 R2, R2, 0x10, RZ ;               /* 0x0000001002027810 */
        /*0050*/                   BRA 0x70 ;                             /* 0x0000000000007947 */
        /*0060*/                   LDG.E R4, [R2.64] ;                    /* 0x0000000402047981 */
        /*0070*/                   MUFU.EX2 R5, R4 ;                      /* 0x0000000400057308 */
        /*0080*/                   BRA.DIV UR4, 0xb0 ;                    /* 0x0000000000007947 */
        /*0090*/              @!P0 BRA 0x10 ;                             /* 0x0000000000008947 */
        /*00a0*/                   EXIT ;                                 /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0;                              /* 0xfffffff000007947 */
"""


def test_instructions_once_around_a_loop() -> None:
    ((name, code),) = machine.parse(SASS).items()
    assert machine.readable(name) == "loss, float32"
    assert code[0x20] == machine.Instruction("LDG.E.128.CONSTANT", "R4, [R2.64]", False)
    assert code[0x30] == machine.Instruction("STS.128", "[R9], R4", True)
    # 10, 20, 30, 40, 50, 70, 80, 90; the store has a predicate and may not happen, but it is issued.
    wide = {"LDG 16": 1, "EX2": 1}
    assert machine.around_a_loop(code, wide | {"STS 16": 1}) == 8
    assert machine.around_a_loop(code, wide) == 8
    # 10, 60, 70, 80, 90.
    assert machine.around_a_loop(code, {"LDG 4": 1, "EX2": 1}) == 5


@pytest.mark.parametrize(
    "accesses",
    [{"LDG 16": 2, "EX2": 1}, {"LDG 16": 1}, {"LDG 8": 1, "EX2": 1}, {"LDG 16": 1, "LDG 4": 1, "EX2": 1}],
    ids=str,
)
def test_a_way_that_a_loop_does_not_have_is_not_found(accesses: dict[str, int]) -> None:
    """One access too many; one exponential too few; another width; both sides of one branch."""
    (code,) = machine.parse(SASS).values()
    assert machine.around_a_loop(code, accesses) is None


@pytest.mark.parametrize(
    ("operation", "counted"),
    [
        ("LDG.E.128.CONSTANT", "LDG 16"), ("LDG.E.64", "LDG 8"), ("LDG.E", "LDG 4"), ("LDG.E.U16", "LDG 2"),
        ("STS.128", "STS 16"), ("STG.E.U8", "STG 1"), ("MUFU.EX2", "EX2"), ("MUFU.LG2", None), ("FADD.FTZ", None),
    ],
)  # fmt: skip
def test_what_is_an_access(operation: str, counted: str | None) -> None:
    assert machine.access(operation) == counted


def test_rows_that_start_elsewhere() -> None:
    """The share of rows of R aligned unlike the logits: 3/4 at 21841 columns (odd), 1/2 at 30522, none at 1000."""
    for dtype in machine.DTYPES:
        assert [machine.share_elsewhere(classes, dtype) for classes in machine.SHAPES] == [0, 0.75, 0.5]


def test_turns_of_a_row() -> None:
    """A warp with 125 vectors; four warps with 250, of which the last has 58; 16 warps, and R does not fit."""
    assert machine.turns_of_a_row(125, 125, 32) == (0, 1, 0, 1, 2, 0)
    assert machine.turns_of_a_row(250, 250, 128) == (0, 0, 4, 3, 2, 0)
    fours, masked_fours, masked_pairs, pairs, singles, rest = machine.turns_of_a_row(7630, 6768, 512)
    assert 4 * fours + 4 * masked_fours + 2 * masked_pairs >= 7630 / 32 > 4 * fours
    assert (2 * pairs + singles, rest) == (212, 28)
