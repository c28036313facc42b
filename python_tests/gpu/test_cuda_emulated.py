"""The CUDA kernels and the emulator that runs them: the C++ tests plain and under sanitizers, faults that each layer
must find, the bytes that kernels move, and the launches. (test_conformance.py runs the conformance table through the
emulator, as through all backends.)"""

from __future__ import annotations

import ctypes
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning_kernels import autograd, backends, functional
from support import emulated_cuda
from support.backends import run_public
from support.cases import Case
from support.cpp_builds import MEMORY, THREADS, build, compiler, require, run, run_kernel_tests
from support.layouts import Placed
from support.paths import ROOT
from support.rule import Expectation, assert_same_bits
from tools.machine_code import launches


def all_tests() -> list[str]:
    sources = [path.read_text() for path in (ROOT / "csrc" / "tests" / "cuda").glob("*.cpp")]
    return re.findall(r"^TEST\((\w+)\)", "\n".join(sources), re.MULTILINE)


def run_cuda_tests(sanitize: str, *arguments: str, seed: int) -> tuple[int, str]:
    finished = run_kernel_tests(sanitize, *arguments, seed=seed, program="cuda_tests")
    return finished.returncode, finished.stdout


@pytest.mark.parametrize(("sanitize", "tests"), [("", ()), (MEMORY, ()), ("thread", THREADS)])
def test_kernels_pass_in_the_emulator_without_a_report(sanitize: str, tests: tuple[str, ...], seed: int) -> None:
    code, words = run_cuda_tests(sanitize, *tests, seed=seed)
    assert code == 0, words
    assert not re.search("FAILED|Sanitizer|runtime error", words)
    passed = re.findall(r"^(\w+) +passed$", words, re.MULTILINE)
    assert sorted(passed) == sorted(tests or all_tests())


def test_the_emulator_without_assembly(seed: int) -> None:
    """The same tests of the emulator, switching with ucontext as on other processors."""
    built = run([require("cmake"), "--build", build(""), "--target", "ucontext_tests"])
    assert built.returncode == 0, built.stdout
    finished = run([build("") / "ucontext_tests", "--seed", str(seed)])
    assert finished.returncode == 0, finished.stdout
    assert re.search(r"^misuse_is_an_error +passed$", finished.stdout, re.MULTILINE)


# The fault in the textbook kernel, the layer that must find it, and its report.
FAULTS = [
    ("no-barrier-before-read", "", "wrong value"),
    ("no-barrier-before-read", "thread", "ThreadSanitizer: data race .*faults.h"),
    ("no-barrier-before-reuse", "", "wrong value|gives other bits"),
    ("no-barrier-before-reuse", "thread", "ThreadSanitizer: data race .*faults.h"),
    ("overread", MEMORY, "AddressSanitizer: heap-buffer-overflow .*faults.h"),
    ("misaligned", MEMORY, "runtime error: .*misaligned address"),
    ("careless-update", "thread", "ThreadSanitizer: data race .*faults.h"),
    ("no-fence", "thread", "ThreadSanitizer: data race .*faults.h"),
    ("unwritten", "", "wrong value: .* -?nan"),
    ("order-of-arrival", "", "gives other bits"),
    ("early-return", "", "the emulator reports: .* a barrier that some threads of the block have returned before"),
    ("missing-lane", "", "the emulator reports: .* no thread can go on: thread 0 waits in __shfl_xor_sync"),
    ("lane-returned", "", "the emulator reports: .*(returned while its warp waits|a lane of the mask has returned)"),
    ("divergent-barrier", "", "the emulator reports: .* wait in different barriers: line"),
    ("label", "", "the emulator reports: .* device-side assertion failed"),
    ("much-shared-memory", "", "the emulator reports: .* 61440 bytes of dynamic shared memory .* 49152 were allowed"),
    (
        "all-but-static-memory",
        "",
        "the emulator reports: .* 49152 bytes .* beside 1(28|44) static ones, but 490(24|08)",
    ),
]


@pytest.mark.parametrize(("fault", "sanitize", "report"), FAULTS, ids=lambda value: str(value)[:24])
def test_a_planted_fault_is_found(fault: str, sanitize: str, report: str, seed: int) -> None:
    code, words = run_cuda_tests(sanitize, "--plant", fault, "textbook", seed=seed)
    assert code == (99 if "Sanitizer" in report or "runtime error" in report else 1), words
    assert re.search(report, words), words


def test_every_fault_of_the_textbook_kernel_is_in_the_table() -> None:
    planted = re.findall(r'planted\("([\w-]+)"\)', (ROOT / "csrc/tests/cuda/faults.h").read_text())
    planted += re.findall(r'planted\("([\w-]+)"\)', (ROOT / "csrc/tests/cuda/test_faults.cpp").read_text())
    assert set(planted) == {fault for fault, _, _ in FAULTS}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("float sum = 0; atomicAdd(&sum, 1.0f);", "depends on the order of blocks"),
        ("__shfl_down_sync(0xffffffffu, 1, 1);", "__shfl_down_sync"),
        ("cudaMalloc(nullptr, 1);", "cudaMalloc"),
        ("__nanosleep(1);", "__nanosleep"),
    ],
)
def test_what_the_emulator_does_not_cover_does_not_compile(code: str, why: str, tmp_path: object) -> None:
    source = f"{tmp_path}/uncovered.cpp"
    with open(source, "w") as file:
        file.write(f'#include "{ROOT}/tools/cuda_emulator/include/cuda_runtime.h"\nvoid kernel() {{ {code} }}\n')
    compiled = run([compiler(), "-std=c++17", "-fsyntax-only", source])
    assert compiled.returncode != 0
    assert why in compiled.stdout


# ------------------------------------------------------------------------------------------------ through the library


@pytest.fixture
def emulated() -> None:
    if reason := emulated_cuda.missing():
        pytest.skip(reason)


def _traffic(
    classes: int, dtype: torch.dtype, plan: emulated_cuda.Plan, first_label: int = 0, of_r: torch.dtype = torch.float32
) -> emulated_cuda.Counts:
    """Bytes moved by the source term alone, two rows, with its gradient. With ``first_label=0``, the rows of R are
    aligned like the rows of the logits."""
    rows = 2
    draw = torch.Generator().manual_seed(classes)
    logits = torch.randn(rows, classes, generator=draw).to(dtype).requires_grad_()
    relationship = torch.softmax(torch.randn(3, classes, generator=draw), 1).to(of_r)
    with emulated_cuda.emulated(plan):
        emulated_cuda.take_counts()
        functional.source_label_loss(logits, torch.arange(rows) + first_label, relationship, backend="cuda")
        return emulated_cuda.take_counts()


PLAN = emulated_cuda.Plan()
NARROW = (torch.bfloat16, torch.float16)
HEADS = [
    (classes, dtype, of_r, 227 << 10)
    for classes in (1000, 21841, 30522)
    for dtype, of_r in [(x, torch.float32) for x in (torch.float32, *NARROW)] + [(x, x) for x in NARROW]
]
HEADS.append((21841, torch.float32, torch.float32, 163 << 10))


@pytest.mark.parametrize(("classes", "dtype", "of_r", "shared_memory"), HEADS, ids=str)
def test_a_row_is_read_and_written_once(
    emulated: None, classes: int, dtype: torch.dtype, of_r: torch.dtype, shared_memory: int
) -> None:
    """A staged row moves logits, R and gradient once each, by 16 bytes except at the ends. A row of R whose alignment
    differs from that of the logits is read in pairs of aligned vectors, which neighbouring threads read again."""
    card = emulated_cuda.Plan(shared_bytes=shared_memory - (2 << 10))
    plan = backends.cuda_loss_plan(2, classes, source_dtype=dtype, shared_memory=shared_memory)["source"]
    assert plan["staged_logits"] == plan["vectors"] == plan["staged_target"] + plan["kept_target"]
    # The longest float32 logits leave a block no room for all of R: registers keep the end of it.
    longest = {163 << 10: 21841, 227 << 10: 30522}[shared_memory]
    assert (plan["kept_target"] > 0) == ((classes, dtype) == (longest, torch.float32))
    element, vector = dtype.itemsize, 16 // dtype.itemsize
    once = 2 * classes * (element + of_r.itemsize)
    # Beside each vector of logits, a row of R aligned otherwise reads one vector more than it fills.
    elsewhere = classes * element % 16 != 0 or classes * of_r.itemsize % 16 != 0
    for first_label, more in ((0, 0), (1, 4 / vector if elsewhere else 0)):
        counts = _traffic(classes, dtype, card, first_label, of_r)
        written = counts.vector_bytes_written + counts.other_bytes_written
        assert written == 2 * classes * element
        assert counts.other_bytes_written <= 2 * 2 * 16
        read = counts.vector_bytes_read + counts.other_bytes_read
        if more == 0:
            assert read == once
        assert once <= read <= once + 2 * classes * 4 * more
        # The first and last vector of each row, and those of R whose aligned neighbours would lie outside it.
        assert counts.other_bytes_read <= 2 * (2 * 16 + 4 * vector * 4)


def test_without_staging_a_row_is_read_again(emulated: None) -> None:
    """128 threads can keep 256 of a row's 501 vectors in registers."""
    staged, in_registers, logits_alone, unstaged = (
        _traffic(2000, torch.float32, emulated_cuda.Plan(shared_bytes=16 * vectors))
        for vectors in (2 * 501, 2 * 501 - 256, 2 * 501 - 257, 0)
    )
    assert staged.vector_bytes_read == in_registers.vector_bytes_read == 2 * 2000 * (4 + 4)
    # Unstaged vectors of R are read for the sums and for the gradient: 256, since the row has 500 but room for 501.
    assert logits_alone.vector_bytes_read == 2 * (2000 * (4 + 4) + 256 * 16)
    assert unstaged.vector_bytes_read == 2 * 2000 * (3 * 4 + 2 * 4)  # the logits for the maximum as well


def test_few_long_rows_are_done_by_several_blocks(emulated: None) -> None:
    """Logits and R are read twice, and the gradient is written once; three launches, and the results of whole rows."""
    rows, classes = 2, 40000
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, classes, generator=draw)
    relationship = torch.softmax(torch.randn(3, classes, generator=draw), 1)
    results = []
    for card in (emulated_cuda.Plan(), emulated_cuda.Plan(multiprocessors=132)):
        leaf = logits.clone().requires_grad_()
        with emulated_cuda.emulated(card):
            emulated_cuda.take_counts()
            loss = functional.source_label_loss(leaf, torch.arange(rows), relationship, backend="cuda")
            counts = emulated_cuda.take_counts()
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert counts.launches == 3
    # The loss reads logits for the maximum, the sums and the gradient; R for the last two.
    assert counts.vector_bytes_read == rows * classes * (3 * 4 + 2 * 4)
    assert counts.vector_bytes_written == rows * classes * 4
    for whole, divided in zip(*results, strict=True):
        assert torch.allclose(whole, divided, rtol=1e-5, atol=1e-9)


def test_launches_of_a_training_step(emulated: None) -> None:
    """One launch for the loss with both gradients, one for the upstream gradient, whatever the numbers."""
    problem = Case("step", "", (48, 200, 1000)).build(torch.float32, 1)
    with emulated_cuda.emulated(PLAN):
        source = problem.source_logits.requires_grad_()
        target = problem.target_logits.requires_grad_()
        emulated_cuda.take_counts()
        loss = functional.co_tuning_loss(source, target, problem.target, problem.relationship, backend="cuda")
        assert emulated_cuda.take_counts().launches == 1
        (2.5 * loss).backward()
        assert emulated_cuda.take_counts().launches == 1
        functional.co_tuning_loss(source.bfloat16(), target, problem.target, problem.relationship, backend="cuda")
        assert emulated_cuda.take_counts().launches == 2  # heads of two types


def _upstream_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, the upstream gradient is not compared with 1."""
    monkeypatch.setattr(autograd, "is_known_to_be_one", lambda upstream: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["labels", "ignoring"])
def test_the_backward_pass_moves_gradients_only_where_it_changes_them(
    emulated: None, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every row takes part the gradients are final when stored, except in float16, which would lose digits."""
    _upstream_as_on_a_device(monkeypatch)
    problem = Case("step", "", (48, 20, 100), kind).build(dtype, 1)
    heads = problem.source_logits.requires_grad_(), problem.target_logits.requires_grad_()
    with emulated_cuda.emulated(PLAN):
        loss = functional.co_tuning_loss(*heads, problem.target, problem.relationship, backend="cuda")
        emulated_cuda.take_counts()
        loss.backward()
        counts = emulated_cuda.take_counts()
    assert counts.launches == 1
    written = counts.vector_bytes_written + counts.other_bytes_written
    read = counts.vector_bytes_read + counts.other_bytes_read
    whole = sum(x.numel() * x.element_size() for x in heads)
    stays = kind == "labels" and dtype != torch.float16
    assert read == written == (0 if stays else whole)


def test_launches_beside_the_kernels_of_pytorch(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of docs/cuda.md. PyTorch launches at least one kernel per operation."""
    _upstream_as_on_a_device(monkeypatch)

    def step(trade_off: float | Tensor) -> list[list[str]]:
        def loss(*operands: Any) -> Tensor:
            return functional.co_tuning_loss(*operands[:4], trade_off=trade_off, backend="cuda")

        with emulated_cuda.emulated(PLAN):
            return launches.step(loss, launches.FORMULATIONS["log_softmax"][1])

    loss, scaling = "cotuning_kernels::co_tuning_loss", "cotuning_kernels::scale_gradients_"
    assert step(torch.tensor(2.3, dtype=torch.float64)) == [[loss], [scaling]]
    assert step(2.3) == [["aten::full", loss], [scaling]]  # copies the number to the device
    counted = {name: tuple(map(len, launches.step(*given))) for name, given in launches.FORMULATIONS.items()}
    assert all(forward > 8 and backward > 5 for forward, backward in counted.values()), counted
    if torch.__version__.startswith("2.13."):
        assert counted == {"tllib": (9, 6), "log_softmax": (10, 6), "F.cross_entropy": (10, 7), "F.kl_div": (11, 7)}


def test_memory_that_no_kernel_has_written_is_nan(emulated: None) -> None:
    """Fixed and dynamic shared memory, in the library that these tests use. (A planted bug in test_cuda_planted.py, a
    gradient that is not written, shows that outputs start as NaN.)"""
    read = (ctypes.c_float * 2)(1, 1)
    emulated_cuda.library().cotuning_emulator_read_unwritten(read)
    assert all(map(math.isnan, read))


def test_forward_only_writes_no_gradient(emulated: None) -> None:
    """The logits and R are still read once, and the loss has the same bits."""
    rows, classes = 2, 1000
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, classes, generator=draw)
    relationship = torch.softmax(torch.randn(3, classes, generator=draw), 1)
    losses = []
    with emulated_cuda.emulated(emulated_cuda.Plan()):
        for leaf in (logits, logits.clone().requires_grad_()):
            emulated_cuda.take_counts()
            loss = functional.source_label_loss(leaf, torch.arange(rows), relationship, backend="cuda")
            losses.append(loss.detach())
            counts = emulated_cuda.take_counts()
            written = counts.vector_bytes_written + counts.other_bytes_written
            assert written == (rows * classes * 4 if leaf.requires_grad else 0)
            assert counts.vector_bytes_read == rows * classes * (4 + 4)
            assert counts.launches == 1
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int32 pair", {"label_smoothing": 0.1, "source_loss": "kl"}),
        ("pair ignoring", {"label_smoothing": 0.1, "source_loss": "kl", "reduction": "none"}),
        ("ignoring", {"label_smoothing": 0.1}),
        ("probabilities", {"label_smoothing": 0.1, "source_loss": "kl"}),
    ],
)
def test_every_option_at_once_is_one_launch(emulated: None, kind: str, options: dict[str, Any], seed: int) -> None:
    """With rows without supervision and class weights as well; the results must pass the conformance rule."""
    case = Case("all at once", "", (7, 9, 131), kind, "unsupervised", weight="random", options=options)
    problem = case.build(torch.float32, seed)
    leaves = [x.clone().requires_grad_() for x in (problem.source_logits, problem.target_logits)]
    with emulated_cuda.emulated(emulated_cuda.Plan()):
        emulated_cuda.take_counts()
        loss = functional.co_tuning_loss(
            *leaves, problem.target, problem.relationship, backend="cuda", **problem.options
        )
        assert emulated_cuda.take_counts().launches == 1
        loss.backward(problem.upstream)
        assert emulated_cuda.take_counts().launches == 1
        Expectation(problem, "both heads").check(run_public(problem, "both heads", "cuda"))


FAR, NEAR = 2**31, 128
"""Elements from one row to the next. Both align every row alike in 16 bytes, so sums have one order and equal bits."""


def _apart(x: Tensor, step: int) -> Tensor:
    """Copy ``x`` with its rows (or entries) ``step`` elements apart; the addresses in between are never touched."""
    try:
        memory = torch.empty((x.shape[0] - 1) * step + x[0].numel(), dtype=x.dtype)
    except RuntimeError as error:
        pytest.skip(f"no {(x.shape[0] - 1) * step * x.element_size() >> 30} GiB of addresses to be had: {error}")
    return memory.as_strided(x.shape, (step, 1) if x.dim() == 2 else (step,)).copy_(x)


@pytest.mark.parametrize("name", ["source_logits", "target_logits", "relationship", "target", "weight"])
@pytest.mark.parametrize("form", ["both heads", "in place"])
def test_rows_that_lie_further_apart_than_int32_counts(emulated: None, name: str, form: str, seed: int) -> None:
    """In place, the gradients lie as far apart."""
    case = Case("far", "", (2, 2, 67), "int32", weight="random", relationship_dtype=torch.bfloat16)
    problem = case.build(torch.bfloat16, seed)
    near, far = (
        problem.map(lambda which, x, step=step: _apart(x, step) if which == name else x.clone()) for step in (NEAR, FAR)
    )
    with emulated_cuda.emulated(emulated_cuda.Plan()):
        assert_same_bits(run_public(near, form, "cuda"), run_public(far, form, "cuda"), f"{name} far apart")


def test_the_other_passes_take_rows_far_apart(emulated: None, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, matrix = (torch.rand(2, 67, generator=draw).bfloat16() for _ in range(2))
    labels = torch.tensor([1, 0])
    operations = emulated_cuda.operations()
    results: list[list[Tensor]] = []
    for step in (NEAR, FAR):
        given, sums = _apart(logits, step), _apart(torch.zeros(2, 67), step)
        operations["add_class_sums_"](sums, torch.zeros(2, dtype=torch.int64), given, labels, 0.5, -100)
        translated = operations["translate_labels"](labels, None, None, _apart(matrix, step), -100)
        results.append([sums.clone(), operations["temperature_terms"](given, labels, 0.5, -100), translated])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert torch.equal(translated, matrix[labels])
    torch.testing.assert_close(sums[labels].clone(), torch.softmax(0.5 * logits.float(), 1))


def test_a_bad_label_is_a_device_side_assertion(emulated: None) -> None:
    problem = Case("labels", "", (4, 7, 40)).build(torch.float32, 1)
    assert isinstance(problem.target, Tensor)
    problem.target[2] = 7
    with (
        emulated_cuda.emulated(emulated_cuda.Plan()),
        pytest.raises(RuntimeError, match="device-side assertion failed: ignored"),
    ):
        run_public(problem, "both heads", "cuda")


def test_rows_of_any_alignment(emulated: None) -> None:
    """Logits, R and gradient each start anywhere in 16 bytes."""
    draw = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16):
        for offset in range(9):
            values, matrix = torch.randn(3, 53, generator=draw).to(dtype), torch.rand(4, 53, generator=draw)
            wide = Placed(torch.zeros(3, 53 + offset, dtype=dtype))
            logits = wide.view[:, offset:]
            logits.copy_(values)
            # No clones: they would be aligned.
            relationship = torch.empty(4 * 53 + offset)[offset:].view(4, 53).copy_(matrix)
            target = torch.tensor([0, 3, 1])
            with emulated_cuda.emulated(emulated_cuda.Plan(warp_vectors=offset % 2 * 128)):
                leaf = logits.detach().requires_grad_()
                loss = functional.source_label_loss(leaf, target, relationship, backend="cuda")
                (given,) = torch.autograd.grad(3.0 * loss, leaf)
            leaf = values.double().requires_grad_()
            loss = functional.source_label_loss(leaf, target, matrix.double(), backend="reference")
            (expected,) = torch.autograd.grad(3.0 * loss, leaf)
            assert torch.allclose(given.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the plans


@pytest.fixture
def extension() -> None:
    if backends.extension() is None:
        pytest.skip(f"no extension: {backends.missing_reason('cpp')}")


def test_the_plan_can_be_asked_for(extension: None) -> None:
    plan = backends.cuda_loss_plan(256, 1000, 200)
    for head, threads, vectors in (("source", 128, 251), ("target", 32, 51)):
        assert plan[head] == {
            "threads_per_row": threads, "vectors": vectors,
            "staged_logits": vectors, "staged_target": vectors, "kept_target": 0,
        }  # fmt: skip
    assert "target" not in backends.cuda_loss_plan(256, 1000)
    small, large = (backends.cuda_loss_plan(8, 30522, shared_memory=size << 10)["source"] for size in (64, 227))
    assert (small["staged_logits"], small["staged_target"]) == (0, 0)
    assert large["staged_logits"] == large["vectors"] == large["staged_target"] + large["kept_target"]
    assert large["staged_target"] > 0.85 * large["vectors"]
    whole = backends.cuda_loss_plan(8, 12000, shared_memory=99 << 10)["source"]
    assert (whole["staged_logits"], whole["staged_target"]) == (whole["vectors"], whole["vectors"])
    # The room beside the logits takes a part of R: 59 of 80 KB here.
    part = backends.cuda_loss_plan(8, 20000, source_dtype=torch.bfloat16, shared_memory=99 << 10)["source"]
    assert part["staged_logits"] == part["vectors"] > part["staged_target"] > 0.7 * part["vectors"]
    divided = [backends.cuda_loss_plan(8, classes, multiprocessors=132)["parts"] for classes in (30522, 128256, 262144)]
    assert divided == [0, 7, 16]
    assert backends.cuda_loss_plan(8, 262144)["parts"] == 0
    sizes = [backends.cuda_loss_plan(8, classes)["threads"] for classes in (100, 1000, 4000, 30522)]
    assert all(a <= b for a, b in pairwise(sizes))
    with pytest.raises(ValueError, match=r"source_dtype is torch\.int64, expected one of torch\.float32"):
        backends.cuda_loss_plan(8, 100, source_dtype=torch.int64)
