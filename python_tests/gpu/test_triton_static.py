"""The Triton kernels compiled for six GPUs, on a machine without one; and planted bugs that these checks and those of
the interpreter must find.

``python_tests/recorded/triton_static_3.8.json`` holds the numbers of every kernel compiled by Triton 3.8. Each version
is another compiler and has its own file. ``python -m tools.machine_code --write triton`` renews that of the installed
version; say in the commit what a larger number buys.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from cotuning_kernels import backends
from cotuning_kernels.options import REDUCTIONS
from support.backends import Backend
from support.cases import Case, masked_where_not_a_label, rows_that_cancel, source, supervised_late, target
from support.layouts import CONTIGUOUS, LAYOUTS
from support.problems import Problem
from support.rule import Expectation, verify

_MISSING = backends.missing_reason("triton")
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"triton: {_MISSING}")

if _MISSING is not None:
    pytest.skip(f"triton: {_MISSING}", allow_module_level=True)

import triton  # noqa: E402

from cotuning_kernels.backends.triton import co_tuning_loss as loss  # noqa: E402
from cotuning_kernels.backends.triton import counters, labels, launch, rows, scale_gradients  # noqa: E402
from support.planted import plant  # noqa: E402
from support.stand_in import cpu_served_by  # noqa: E402
from support.triton_interpreter import AnyOrder, interpreted  # noqa: E402
from support.triton_stand_in import MODULES, long_rows, ordinary_rows  # noqa: E402
from tools.machine_code import triton as static  # noqa: E402

_RECORDED = static.recorded()


@cache
def _launches(name: str, target: str) -> list[static.Compiled]:
    return static.launches_of(name, target)


def _key(target: str, compiled: static.Compiled, name: str) -> str:
    return f"{target}: {compiled.name.removesuffix('_kernel')} of {name}"


def _each(*targets_of: str) -> list[Any]:
    chosen = [(n, t) for n, (ts, _) in static.KERNELS.items() for t in ts if not targets_of or t in targets_of]
    return [pytest.param(n, t, id=f"{t}-{n}") for n, t in chosen]


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("name", "target"), _each())
def test_nothing_got_worse(name: str, target: str) -> None:
    """Against the recorded table. Whatever it says, spills, stack and atomics must be 0, except for two counters: of
    the programs that share a group of rows, and of the groups."""
    for compiled in _launches(name, target):
        now = static.measure(compiled)
        counters = 2 if compiled.name == "co_tuning_loss_kernel" else 0
        assert (now["spills"], now["stack"], now["atomics"]) == (0, 0, counters), f"{compiled.name}: {now}"
        if _RECORDED["triton"] == triton.__version__:
            said = static.worse(_RECORDED["kernels"][_key(target, compiled, name)], now)
            assert not said, f"{compiled.name}: {'; '.join(said)} (python -m tools.machine_code --write triton)"


def test_the_table_was_compared() -> None:
    if _RECORDED["triton"] != triton.__version__:
        pytest.skip(f"no table of triton {triton.__version__} is recorded, and another version is another compiler")
    names = {_key(target, c, n) for n, (ts, _) in static.KERNELS.items() for target in ts for c in _launches(n, target)}
    assert names == set(_RECORDED["kernels"])


_OF_1000 = [name for name in static.KERNELS if "1000, " in name and name.startswith(("loss", "scaling"))]


@pytest.mark.parametrize("name", [n for n in _OF_1000 if "smoothing" not in n and "x 8192" not in n])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_heads_of_1000_and_200_are_moved_128_bits_at_a_time(name: str, target: str) -> None:
    """Only values that a row has once are narrower: a label or share of 8 bytes, a loss or count of 4 (8)."""
    (kernel, *_) = _launches(name, target)
    accesses = static.measure(kernel)["accesses"]
    once_a_row = {"load 8", "store 8"} if "float64" in name else {"load 8", "store 4"}
    if "scaling" in name:
        once_a_row = {"load 4"}  # the factor
    assert accesses["load 16"] >= 2
    assert accesses.keys() - {"load 16", "store 16"} <= once_a_row, accesses


@pytest.mark.parametrize("name", [name for name in static.KERNELS if "head of 32000" in name or "of 128256" in name])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_long_row_is_moved_128_bits_at_a_time(name: str, target: str) -> None:
    """Exceptions: values that a row has once, and the glance at the start of a row of R, one number per thread."""
    accesses = Counter(static.measure(_launches(name, target)[0])["accesses"])
    if "32000, float32" in name:  # a kept row; the others are packed or looped over
        accesses["load 4"] -= 1
    assert (+accesses).keys() - {"load 16", "store 16"} <= {"load 8", "store 4"}, accesses


def test_rows_of_odd_pairs_are_moved_64_bits_at_a_time() -> None:
    accesses = static.measure(_launches("loss, 200 x 1002, float32", "sm_90")[0])["accesses"]
    assert not {"load 4", "load 2"} & accesses.keys(), accesses


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_rows_that_lie_apart_are_moved_as_widely_as_their_stride_allows(target: str) -> None:
    """1004 is a multiple of 4: 8 bytes of bfloat16, 16 of R in float32. 1001 is odd. Columns are moved once, besides
    two labels of 8 bytes and a loss and two counts of 4. AMD's numbers include loops for rows that are not finite."""
    for name, columns, careful in (
        (
            "loss, source head of 1000 in rows of 1004, bfloat16",
            {"load 16": 4, "load 8": 4, "store 8": 4},
            {"load 16": 2, "load 8": 1, "store 8": 2},
        ),
        (
            "loss, source head of 1000 in rows of 1001, float32",
            {"load 4": 32, "store 4": 16},
            {"load 4": 3, "store 4": 2},
        ),
    ):
        compiled = _launches(name, target)[0]
        if target == "sm_90":  # a thread has 32 columns, of 16 on AMD
            most = Counter(columns) + Counter(columns)
            accesses = static.accesses(static.path_of(compiled))
        else:
            most = Counter(columns) + Counter(careful)
            accesses = Counter(static.measure(compiled)["accesses"])
        most += Counter({"load 8": 2, "store 4": 3})
        assert all(accesses[width] <= most[width] for width in accesses), f"{name}: {accesses}, expected {dict(most)}"


# ---------------------------------------------------------------------------------------- rules for intermediate code


def objections(ttir: str) -> Iterator[str]:
    """Forbidden operations in Triton's first intermediate code."""
    if not re.search(r"^ *tt\.func ", ttir, re.MULTILINE):
        yield "a form of intermediate code that these rules do not read"  # MLIR has two, chosen once per process
    for line in ttir.splitlines():
        if re.search(r"\b(arith\.(add|sub|mul|div|max|min|cmp)\w*f|math\.\w+)\b", line) and re.search(r"f16\b", line):
            yield f"arithmetic in half precision: {line.strip()}"
    # A 32-bit product of two numbers known only at run time: the offset of a far row would overflow.
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    for name in re.findall(r"(%\S+) = tt\.splat (%\S+)", ttir):
        if name[1] in constants:
            constants.add(name[0])
    for left, right in re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<[\dx]*xi32>|i32)", ttir):
        if left not in constants and right not in constants:
            yield f"a product in 32 bits: {left} * {right}"
    # Atomics may only count programs: sums in the order of programs have other bits in every run. The machine code
    # often has a barrier there for another reason, which would hide that ours is missing, so it is checked here.
    for before, atomic in re.findall(r"(.*)\n.*(tt\.atomic.*)", ttir):
        if not re.match(r"tt\.atomic_rmw add, acq_rel, gpu, .*-> i32\b", atomic):
            yield f"an atomic that does not count programs: {atomic}"
        if not re.match(r"\s+ttg\.barrier all\b", before):
            yield f"no barrier before the atomic, but {before.strip()}"


def test_what_the_rules_cannot_read_is_no_praise() -> None:
    assert [*objections('  "tt.func"() <{sym_name = "_kernel"}> ({')] == [
        "a form of intermediate code that these rules do not read"
    ]


@pytest.mark.parametrize(("name", "target"), _each("sm_90"))
def test_arithmetic_is_in_float32_and_offsets_in_64_bits(name: str, target: str) -> None:
    for compiled in _launches(name, target):
        assert list(objections(compiled.kernel.asm["ttir"])) == []


_SPARSE = "loss, 1000 x 21840, bfloat16, sparse"


def sweep_without_barriers(ttir: str) -> list[str]:
    """Events of the gradient's sweep of a row with a sparse row of R, if they are not those of ``sparse_row``.

    The logits of the entries are read, then the sweep stores the whole row, then the entries are stored once more. The
    threads must meet in between: another thread stores the same places.
    """
    sweep = ttir[ttir.rindex("scf.while") :]
    events = re.findall(r"tt\.load|tt\.store|ttg\.barrier|scf\.for", sweep)[:9]
    # Columns, values and logits of the entries; the sweep; the entries.
    expected = ["tt.load"] * 3 + ["ttg.barrier", "scf.for", "tt.load", "tt.store", "ttg.barrier", "tt.store"]
    return [] if events == expected else events


def test_the_sweep_of_a_sparse_row_lies_between_barriers() -> None:
    ttir = _launches(_SPARSE, "sm_90")[0].kernel.asm["ttir"]
    assert sweep_without_barriers(ttir) == []
    for barrier in list(re.finditer(r".*ttg\.barrier.*\n", ttir[ttir.rindex("scf.while") :]))[:2]:
        start = ttir.rindex("scf.while") + barrier.start()
        assert sweep_without_barriers(ttir[:start] + ttir[start + len(barrier[0]) :])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_sparse_row_is_moved_128_bits_at_a_time(target: str) -> None:
    """Exceptions: values that a row has once, and those of its entries (column, value, logit)."""
    accesses = static.measure(_launches(_SPARSE, target)[0])["accesses"]
    assert accesses["load 16"] >= 4
    assert accesses["store 16"] >= 2
    assert accesses["store 2"] == 1, accesses  # the gradient at the entries


# ------------------------------------------------------------------------- what the last program sees of all others
#
# No run on a CPU can show that the last program sees what the others have stored. It does if the machine code has this
# order, in a straight line on either side of the atomic (the top of co_tuning_loss.py says why):
#
#     stores of the program | barrier | atomic, acq_rel, of the whole device | barrier | loads of the last program

_PTX_EVENTS = {
    "barrier": r"bar\.sync",
    "count": r"(?:@%p\d+ )?atom\.global\.gpu\.acq_rel\.add\.u32",
    "other atomic": r"(?:@%p\d+ )?(?:atom|red)\.",
    "access": r"(?:@!?%p\d+ )?(?:ld|st)\.(?:volatile\.)?global",
    "jump": r"(?:@!?%p\d+ )?bra|\$L__BB",
}
# The counting wave writes back, waits, counts, waits and invalidates its cache; the barriers join it to the others.
_AMD_EVENTS = {
    "barrier": r"s_barrier",
    "count": r"global_atomic_add v\d+, .* sc0$",
    "other atomic": r"(?:global|buffer|flat|ds)_\w*(?:atomic|add)",
    "access": r"(?:global|buffer|flat)_(?:load|store)",
    "write back": r"buffer_wbl2 sc1",
    "wait": r"s_waitcnt vmcnt\(0\)",
    "forget": r"buffer_inv sc1",
}


def _events(code: str, patterns: dict[str, str]) -> list[str]:
    kinds = {kind: re.compile(pattern) for kind, pattern in patterns.items()}
    found = (next((kind for kind, pattern in kinds.items() if pattern.match(x.strip())), "") for x in code.splitlines())
    return [kind for kind in found if kind]


def disorder(compiled: static.Compiled) -> list[str]:
    """Errors in the order of events around a kernel's counts; another rule checks the number of counts."""
    if "ptx" in compiled.kernel.asm:
        events = _events(compiled.kernel.asm["ptx"], _PTX_EVENTS)
        expected = ["barrier"], ["barrier"]
    else:
        events = _events(compiled.kernel.asm["amdgcn"], _AMD_EVENTS)
        joined = ["barrier"] if compiled.kernel.metadata.num_warps > 1 else []  # a single wave waits for no other
        expected = [*joined, "write back", "wait"], ["wait", "forget", *joined]
    said = ["another atomic"] if "other atomic" in events else []
    for at in [k for k, event in enumerate(events) if event == "count"]:
        before, after = (len(side) for side in expected)
        around = events[max(0, at - before) : at], events[at + 1 : at + 1 + after]
        if around != expected:
            said.append(f"{around[0]} before and {around[1]} after a count, expected {expected[0]} and {expected[1]}")
    return said


@pytest.mark.parametrize(("name", "target"), [p for p in _each() if p.values[0].startswith("loss")])
def test_the_last_program_sees_what_all_have_stored(name: str, target: str) -> None:
    (compiled,) = _launches(name, target)
    assert disorder(compiled) == []


def test_without_a_reduction_programs_are_counted_once() -> None:
    with static.compiled_for(static.TARGETS["sm_90"]) as launches:
        static._loss(torch.bfloat16, 200, 1000, reduction=REDUCTIONS["none"])()
    (compiled,) = launches
    assert static.measure(compiled)["atomics"] == 1
    assert [*objections(compiled.kernel.asm["ttir"]), *disorder(compiled)] == []


@pytest.mark.parametrize(
    ("target", "missing"),
    [("sm_90", "barrier"), *(("gfx942", event) for event in ("barrier", "write back", "wait", "forget"))],
)
def test_disorder_is_found(target: str, missing: str) -> None:
    """When any one of these is removed from the machine code."""
    compiled = _launches("loss, 1000 x 16384, float32", target)[0]
    language, patterns = ("ptx", _PTX_EVENTS) if target == "sm_90" else ("amdgcn", _AMD_EVENTS)
    kept = [x for x in compiled.kernel.asm[language].splitlines() if not re.match(patterns[missing], x.strip())]
    kernel = mock.Mock(asm={language: "\n".join(kept)}, metadata=compiled.kernel.metadata)
    assert len(disorder(dataclasses.replace(compiled, kernel=kernel))) == 2


# -------------------------------------------------------------------------------------------------------- planted bugs

_CASES = (
    (Case("planted labels", "", (5, 9, 67), "ignoring", weight="random"), CONTIGUOUS),
    (Case("planted pair", "", (5, 9, 150), "pair", "unsupervised", options={"source_loss": "kl"}), CONTIGUOUS),
    (Case("planted rows", "", (5, 90, 300), "labels", options={"reduction": "none"}), LAYOUTS[1]),
    (Case("planted cancelling", "", (5, 9, 90), edits=(rows_that_cancel,)), CONTIGUOUS),
    (Case("planted pairs of bfloat16", "", (5, 9, 150), relationship_dtype=torch.bfloat16), CONTIGUOUS),
    (
        Case("planted trade-off of 0", "", (5, 9, 70), options={"trade_off": 0.0}, edits=(source(1, 2, np.inf),)),
        CONTIGUOUS,
    ),
    (Case("planted -inf", "", (5, 9, 150), edits=(masked_where_not_a_label,)), CONTIGUOUS),
    (Case("planted late supervision", "", (5, 9, 150), edits=(supervised_late,)), LAYOUTS[1]),
    (
        Case("planted late maximum", "", (3, 90, 300), edits=(source(slice(None), 250, 90.0), target(1, 80, 90.0))),
        CONTIGUOUS,
    ),
    (Case("planted maximum of a kept row", "", (3, 9, 150), edits=(source(1, 140, 90.0),)), CONTIGUOUS),
)


@cache
def _drawn(number: int, dtype: torch.dtype, seed: int) -> tuple[Problem, Expectation]:
    """All bugs run the same problems; no layout of these cases changes the expectation."""
    problem = _CASES[number][0].build(dtype, seed)
    return problem, Expectation(problem, "both heads")


def _found_by_the_table(planted: tuple[ModuleType, ModuleType], loops: bool, seed: int) -> Iterator[str]:
    """Cases of a small conformance table that object, in the interpreter; an error is an objection too."""
    implementations: dict[str, Callable[..., Any]] = {
        f"{name}{overload}": getattr(planted[0], name)
        for name in ("co_tuning_loss", "co_tuning_loss_") for overload in ("", ".triton")
    } | {f"scale_gradients_{overload}": scale_gradients.scale_gradients_ for overload in ("", ".triton")}  # fmt: skip

    @contextmanager
    def using() -> Iterator[None]:
        with (
            cpu_served_by("triton", implementations),
            interpreted(*MODULES, *planted),
            long_rows(planted[0]) if loops else ordinary_rows(),
            mock.patch.dict(counters.of_streams, clear=True),
        ):
            yield
            assert not any(x.any() for x in counters.of_streams.values()), "a counter is not 0 again"

    for (number, (case, layout)), dtype in itertools.product(enumerate(_CASES), (torch.float32, torch.float16)):
        problem, expectation = _drawn(number, dtype, seed)
        try:
            verify(Backend("planted", "triton", using), problem, logits_layout=layout, expectation=expectation)
        except Exception as error:
            yield f"{case.name}, {dtype}: {type(error).__name__}"


def _found_by_the_rules(planted: tuple[ModuleType, ModuleType]) -> list[str]:
    with static.compiled_for(static.TARGETS["sm_90"]) as launches, _serving(planted):
        static.KERNELS["loss, 200 x 1000, bfloat16"][1]()
    (compiled,) = launches
    return [*objections(compiled.kernel.asm["ttir"]), *disorder(compiled)]


def _found_by_another_order(planted: tuple[ModuleType, ModuleType], seed: int) -> list[str]:
    """Programs in other orders, and 29 groups of one row each. The losses of two rows are huge and cancel: anything
    added between them is lost."""
    draw, results = np.random.default_rng(seed), []
    logits, relationship = (torch.from_numpy(draw.random((29, 90), np.float32)) for _ in range(2))
    trade_off = torch.ones((), dtype=torch.float64)
    logits[1] = logits[0]
    relationship[0] *= 1e10
    relationship[1] = -relationship[0]

    for order in (np.ndindex, AnyOrder(draw), AnyOrder(draw)):
        with (
            interpreted(*MODULES, *planted),
            mock.patch("support.triton_interpreter.program_order", order),
            mock.patch.object(planted[0], "GROUP_ROWS", 1),
            mock.patch.object(launch, "MAX_WHOLE_ROW_BYTES", 256),
            mock.patch.dict(counters.of_streams, clear=True),
        ):
            loss_of_rows, *_ = planted[0].co_tuning_loss(
                logits, None, torch.arange(29), None, None, relationship, None, trade_off, 0.0, -100,
                REDUCTIONS["sum"], False, False, False,
            )  # fmt: skip
            results.append(loss_of_rows.item())
    return [f"{results[0]} is {other} in another order" for other in results[1:] if other != results[0]]


def _found_by_the_static_table(planted: tuple[ModuleType, ModuleType]) -> list[str]:
    name = "loss, 200 x 1000, bfloat16"
    with static.compiled_for(static.TARGETS["sm_90"]) as launches, _serving(planted):
        static.KERNELS[name][1]()
    found = []
    for compiled, sound in zip(launches, _launches(name, "sm_90"), strict=True):
        found += static.worse(static.measure(sound), static.measure(compiled))
    return found


def _serving(planted: tuple[ModuleType, ModuleType]) -> Any:
    return mock.patch.object(loss, "co_tuning_loss", planted[0].co_tuning_loss)


_BUGS: dict[str, tuple[ModuleType, dict[str, str], tuple[str, ...]]] = {
    "a mask off by one": (rows, {"(columns < columns_count)": "(columns <= columns_count)"}, ("rows", "loops")),
    "no cast to float32": (
        rows, {"x = z - tl.max(z, 1, keep_dims=True)": "half = logits.dtype.element_ty\n    x = (z.to(half) - tl.max("
               "z, 1, keep_dims=True).to(half)).to(HEAD.dtype)"}, ("rows", "rules"),
    ),
    "a wrong stride": (rows, {"logits + rows * logits_stride": "logits + rows * columns_count"}, ("rows",)),
    "a wrong stride of long rows": (
        loss, {"logits + rows * logits_stride": "logits + rows * columns_count"}, ("loops",),
    ),
    "a wrong stride of kept rows": (loss, {"logits += rows * logits_stride": "logits += rows * columns_count"},
                                    ("loops",)),
    "an offset that overflows int32": (loss, {"tl.int64": "tl.int32"}, ("rules",)),
    "no mask for ignored labels": (labels, {" & (label != ignore_index)": ""}, ("rows", "loops")),
    "a pair's second label ignored": (labels, {"is_bad_b, float(\"nan\"), tl.where(counts_b, 1.0 - share, 0.0)":
                                                "is_bad_b, 0.0, tl.where(counts_b, 0.0, 0.0)"}, ("rows", "loops")),
    "no maximum subtracted": (rows, {"x = z - tl.max(z, 1, keep_dims=True)": "x = z"}, ("rows",)),
    "no maximum subtracted on the ordinary way": (
        rows, {"highest = tl.max(top, 0)": "highest = 0 * tl.max(top, 0)"}, ("rows",),
    ),
    "no maximum subtracted from a kept row": (
        rows, {"shift = tl.max(top, 0) * _LOG2_E": "shift = 0 * tl.max(top, 0)"}, ("loops",),
    ),
    "KL without the sum of exponentials": (rows, {"tl.log(q * total)": "tl.log(q)"}, ("rows", "loops")),
    "KL of a long row's last block alone": (
        rows, {"divergence += _lanes": "divergence = _lanes"}, ("loops",),
    ),
    "sums that do not shrink with a new maximum": (rows, {"total * exp(fall) + ": "total + "}, ("loops",)),
    "a dot product that does not follow the maximum": (
        rows, {"tl.where(mass != 0, mass * fall, 0.0) + _lanes": "_lanes"}, ("loops",),
    ),
    "lanes that keep their own maximum": (rows, {"tl.sum(total * exp(fall), 0)": "tl.sum(total, 0)"}, ("loops",)),
    "the end of a long row left out": (rows, {"if full < count:": "if full > count:"}, ("loops",)),
    "a kept row's sum taken for granted": (rows, {"writes = GRADIENT and _is_other(found, row_mass)": "writes = False"},
                                           ("loops",)),
    "a kept row that is not looked through": (rows, {"    if row_size == 0:": "    if row_size < 0:"}, ("loops",)),
    "a kept row whose last block has no end": (rows, {"(k + 1 < BLOCKS)": "(k < BLOCKS)"}, ("loops",)),
    "a kept row's first block taken for all": (rows, {"x = z[k] * _LOG2_E": "x = z[0] * _LOG2_E"}, ("loops",)),
    "numbers unpacked in the other order": (
        rows, {"tl.join(pairs << 16, pairs & -65536)": "tl.join(pairs & -65536, pairs << 16)"}, ("rows", "loops"),
    ),
    "a row that is not finite left on the ordinary way": (rows, {
        'if ((tl.abs(row_dot) < float("inf")) & (row_mass != 0)) == 0:': "if row_mass == 0:",
        'if (tl.abs(row_dot) < float("inf")) == 0:': "if row_mass == 0:"}, ("rows", "loops")),
    "a row that cancels taken for none on the ordinary way": (
        rows, {'if ((tl.abs(row_dot) < float("inf")) & (row_mass != 0)) == 0:':
               'if (tl.abs(row_dot) < float("inf")) == 0:'}, ("rows",),
    ),
    "a factor that leaves the mass out": (
        rows, {"scale = stored * row_mass / row_total": "scale = stored / row_total"}, ("rows", "loops"),
    ),
    "a factor that is folded into one part alone": (
        rows, {"e[k] * scale - stored * q[k]": "e[k] * scale - q[k]", "e * scale - stored * q": "e * scale - q"},
        ("rows", "loops"),
    ),
    "a loss left as a power of two": (rows, {"- row_dot) * _LN_2": "- row_dot)"}, ("rows", "loops")),
    "a source term whose trade-off is 0": (loss, {"is_used = factor != 0": "is_used = factor == factor"}, ("rows",)),
    "entries that cancel taken for none": (rows, {"tl.abs(": "("}, ("rows", "loops")),
    "an unsupervised row that counts": (
        loss, {"supervised = tl.where(size != 0, share, 0.0)": "supervised = share"}, ("rows", "loops"),
    ),
    "the factor of the mean missing": (loss, {"factor / count": "factor"}, ("rows",)),
    "accesses element by element": (
        loss, {"vec = vector(source_logits, source_grad, relationship)": "vec = 1"}, ("static",),
    ),
    "too many rows a program": (
        loss, {"blocks(max(1, batch), source.rows)": "blocks(max(1, batch), 4)", '"rows": rows.rows,': '"rows": 4,'},
        ("static",),
    ),
    "an atomic sum": (
        loss, {"tl.store(out + _SOURCE_LOSS * pitch, loss,": "tl.atomic_add(out + _SOURCE_LOSS * pitch, loss,"},
        ("static", "rules"),
    ),
    "no barrier before a program is counted": (loss, {"    tl.debug_barrier()\n": ""}, ("rules",)),
    "a count that orders nothing": (loss, {'sem="acq_rel"': 'sem="relaxed"'}, ("rules",)),
    "a counter that is not set back": (loss, {"tl.store(counter, 0)": "tl.store(counter, count.to(tl.int32))"},
                                       ("rows", "loops")),
    "a program that waits for one too many": (loss, {"== count - 1": "== count"}, ("rows", "loops")),
    "a program that does not wait for the last": (loss, {"== count - 1": "== count - 2"}, ("rows", "loops")),
    "sums in the order of arrival": (
        loss, {"+ number * pitch + batch + group, totals": "+ number * pitch + batch + tl.load(counters), totals"},
        ("order",),
    ),
    "logits read twice": (rows, {"tl.sum(_product(q, x), 1, keep_dims=True)": (
        "tl.sum(_product(q, tl.load(logits + rows * logits_stride + columns, mask=read, other=0.0, volatile=True)"
        ".to(HEAD.dtype) - tl.max(z, 1, keep_dims=True)), 1, keep_dims=True)")}, ("static",)),
}  # fmt: skip
"""By name: the file, the change in it, and the layers of checks that must find it. ``rows`` and ``loops`` are the
conformance table in the interpreter, ``order`` runs the programs in other orders there, ``rules`` are those for
intermediate code and for the order of events in machine code, ``static`` is the static table."""


@pytest.mark.parametrize("bug", _BUGS)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path, seed: int) -> None:
    module, changes, layers = _BUGS[bug]
    planted = plant(tmp_path, module, changes)
    for layer in layers:
        if layer in ("rows", "loops"):
            found = [*itertools.islice(_found_by_the_table(planted, layer == "loops", seed), 1)]
        elif layer == "order":
            found = _found_by_another_order(planted, seed)
        else:
            found = _found_by_the_rules(planted) if layer == "rules" else _found_by_the_static_table(planted)
        assert found, f"{layer}: nothing objects to {bug}"


def test_without_a_bug_nothing_is_found(tmp_path: Path, seed: int) -> None:
    """A copy without a bug passes every layer, so the objections above are to the bugs."""
    for module in (loss, rows, labels):
        copy = plant(tmp_path, module, {})
        for loops in (False, True):
            assert [*_found_by_the_table(copy, loops, seed)] == []
        assert _found_by_another_order(copy, seed) == []
        assert _found_by_the_rules(copy) == []
        assert _found_by_the_static_table(copy) == []


def test_every_change_for_the_worse_is_named() -> None:
    numbers = {"registers": 40, "stack": 0, "spills": 0, "shared": 64, "atomics": 0, "bytes": 4096, "instructions": 900,
               "finish": 500, "threads": 128, "accesses": {"load 16": 4}}  # fmt: skip
    assert static.worse(numbers, dict(numbers)) == []
    for name in ("registers", "stack", "spills", "shared", "atomics", "bytes"):
        assert static.worse(numbers, numbers | {name: numbers[name] + 1}) == [  # type: ignore[operator]
            f"{name} {numbers[name]} -> {numbers[name] + 1}"  # type: ignore[operator]
        ]
    assert static.worse(numbers, numbers | {"instructions": 946}) == ["instructions 900 -> 946"]
    assert "accesses" in static.worse(numbers, numbers | {"accesses": {"load 4": 16}})[0]


_BRANCHES = """
        /*0000*/                   LDG.E R2, [R4] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
.L_x_0:
        /*0040*/                   FMUL R3, R2, R2 ;
        /*0050*/                   STG.E [R4], R3 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_1:
        /*0070*/                   STG.E [R4], RZ ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   LDG.E R2, [R6] ;
        /*00a0*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, [R4], R3 ;
        /*00c0*/                   STG.E [R4], R3 ;
        /*00d0*/                   EXIT ;
"""


def test_the_ordinary_path_takes_one_side_of_a_branch() -> None:
    """It computes, does not go through the careful way of ``.L_x_2``, and ends where programs are counted."""
    operations = [text.split()[0] for text in static.ordinary_path(_BRANCHES)]
    assert operations == ["LDG.E", "@P0", "MUFU.EX2", "@P1", "FMUL", "STG.E", "BRA", "ATOM"]
