"""The model of time against sums by hand, and its reader of Triton's machine code. It needs no device."""

from __future__ import annotations

import pytest
import torch

from tools.machine_code import cuda, time_model
from tools.machine_code.time_model import Bounds, Card, Counts, bounds, card_named, distinct_rows, moved_bytes

# 10 multiprocessors at 1 GHz: 4e10 instructions of a warp and 1.6e11 exponentials a second.
CARD = Card("a card", 90, 1e12, 10, 1e9)


def by_hand(model: object = bounds) -> None:
    """1000 rows of 1000 bfloat16 logits with 200 rows of R in float32: 4 MB and 0.8 MB."""
    logits = 1000 * 1000
    moved = moved_bytes(logits, 2, 200 * 1000 * 4)
    assert moved == 4.8e6
    found = model(CARD, logits, moved, Counts(instructions=16, exponentials=2))  # type: ignore[operator]
    # 4.8e6 / 1e12; 1e6 x 16 / 32 = 5e5 of 4e10; 2e6 of 1.6e11.
    assert found == pytest.approx((4.8e-6, 12.5e-6, 12.5e-6))
    assert found.seconds == pytest.approx(12.5e-6)


def test_the_bounds_are_those_of_a_sum_by_hand() -> None:
    by_hand()
    assert Bounds(3.0, 1.0, 2.0).limit == "memory"
    assert Bounds(1.0, 3.0, 2.0).limit == "issue"
    assert Bounds(1.0, 2.0, 3.0).limit == "exponentials"


@pytest.mark.parametrize(("name", "wrong"), [("_LANES", 1), ("_ISSUED_A_CLOCK", 1), ("_EXPONENTIALS_A_CLOCK", 4)])
def test_a_planted_mistake_in_a_rate_is_noticed(name: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_model, name, wrong)
    with pytest.raises(AssertionError):
        by_hand()


def test_how_many_rows_of_r_a_batch_names() -> None:
    """One label names one row; two of two classes name 1.5 on average; a large batch names nearly all."""
    assert distinct_rows(1, 200) == pytest.approx(1)
    assert distinct_rows(2, 2) == pytest.approx(1.5)
    assert 199.9 < distinct_rows(4096, 200) <= 200


def test_data_sheets_are_consistent() -> None:
    """Float32 operations a second, 256 a multiprocessor and clock, are those that the makers give."""
    given = {"H100": 67e12, "H200": 67e12, "B200": 75e12, "RTX 4090": 82.6e12, "RTX 5090": 104.8e12}
    assert {card.name for card in time_model.CARDS} == given.keys()
    for card in time_model.CARDS:
        assert 256 * card.multiprocessors * card.clock == pytest.approx(given[card.name], rel=0.01), card


def test_a_card_is_found_by_the_name_that_the_driver_gives() -> None:
    found = {name: card_named(name) for name in ("NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "T4")}
    assert [card and card.name for card in found.values()] == ["H200", "RTX 4090", None, None]


# A row without supervision goes from 20 to .L_x_1 and stores zeros twice. An ordinary one stores twice as well, after
# two exponentials. Where its sums are not finite, it takes them once more (70 to 90). The branch at f0 goes back.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/                   MUFU.EX2 R6, R4 ;
        /*0050*/                   FADD R7, R5, R6 ;
        /*0060*/              @!P1 BRA `(.L_x_0) ;
        /*0070*/                   MUFU.EX2 R5, R4 ;
        /*0080*/                   MUFU.EX2 R6, R4 ;
        /*0090*/                   FADD R7, R5, R6 ;
.L_x_0:
        /*00a0*/                   STG.E.128 [R2.64], R4 ;
        /*00b0*/              @!P3 STG.E.128 [R2.64+0x10], R4 ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*00d0*/                   STG.E.128 [R2.64], RZ ;
        /*00e0*/                   STG.E.128 [R2.64+0x10], RZ ;
        /*00f0*/               @P4 BRA `(.L_x_1) ;
.L_x_2:
        /*0100*/                   MEMBAR.SC.GPU ;
        /*0110*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, [R2.64], R4 ;
        /*0120*/                   EXIT ;
"""


def test_the_ordinary_way_through_a_kernel() -> None:
    """00 to 60, a0 to c0, 100, and what stands before the atomic on its line is no instruction."""
    instructions, exponentials = time_model.along_the_row(SASS)
    assert (instructions, exponentials) == (11, 2)


def test_a_longer_way_through_a_kernel_is_noticed() -> None:
    longer = SASS.replace("        /*0050*/", "        /*0048*/                   FMUL R5, R5, R8 ;\n        /*0050*/")
    assert time_model.along_the_row(longer) == (12, 2)
    more = SASS.replace("FADD R7, R5, R6 ;\n        /*0060*/", "MUFU.EX2 R7, R6 ;\n        /*0060*/")
    assert time_model.along_the_row(more) == (11, 3)


def test_the_machine_code_of_the_installed_kernels_is_read() -> None:
    """As the recorded table has it: 14.5 instructions a float32 element at 1000 classes, one exponential."""
    try:
        library = cuda.library()
        counts = time_model.cuda_counts(library, 90, 1000, torch.float32)
    except LookupError as reason:
        pytest.skip(str(reason))
    recorded = cuda.recorded().instructions["sm_90: 1000, float32, alike"]
    assert counts.instructions == pytest.approx(recorded, rel=0.06)
    assert counts.exponentials == 1


def test_triton_is_read_on_the_ordinary_way() -> None:
    """All instructions before the first atomic are more than twice those of the ordinary way."""
    pytest.importorskip("triton")
    counts = time_model.triton_counts(90, 1000, torch.float32)
    assert 12 < counts.instructions < 22
    assert 1 <= counts.exponentials < 1.1
    with pytest.raises(LookupError, match="do not stay in registers"):
        time_model.triton_counts(90, 100, torch.float32)
