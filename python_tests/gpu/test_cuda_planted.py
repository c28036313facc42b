"""Bugs planted in the CUDA kernels, one at a time. The layers that claim to find such a bug must find it.

    python -m pytest python_tests/gpu/test_cuda_planted.py --planted-cuda    # all of them: about half an hour
    python -m pytest python_tests/gpu/test_cuda_planted.py                   # the one in the ordinary run

A bug is a change of text in a copy of ``csrc``. The ordinary tests then run on a build of the copy instead of the
checkout's build. The table in docs/cuda.md is this list."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import emulated_cuda
from support.cpp_builds import ENVIRONMENT, MEMORY, THREADS, alone, compiler, launcher, require, run, tool, workspace
from support.paths import ROOT

LAYERS = {
    "conformance": ("conformance/test_conformance.py", "-k", "emulated"),
    "accuracy": ("conformance/test_accuracy.py", "-k", "emulated and (kl_is or nearly_1)"),
    "bytes": ("gpu/test_cuda_emulated.py", "-k", "read_and_written_once or staging or forward_only"),
    "far rows": ("gpu/test_cuda_emulated.py", "-k", "far or further"),
    "alignment": ("gpu/test_cuda_emulated.py", "-k", "any_alignment"),
    "every option": ("gpu/test_cuda_emulated.py", "-k", "every_option"),
    "C++ tests": "",
    "ThreadSanitizer": "thread",
    "AddressSanitizer": MEMORY,
    "machine code": None,
}
"""What each layer runs: ordinary tests on the emulated library; ``cuda_tests`` with or without a sanitizer; nvcc."""

_RACE = r"ThreadSanitizer: data race .*(\.cuh|cotuning::cuda::)"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # in csrc/kernels
    old: str
    new: str
    found: dict[str, str]  # by layer: a pattern in its report


def _without(name: str, file: str, old: str, found: dict[str, str]) -> Bug:
    """A bug that removes the first statement of ``old``."""
    statement = old.lstrip().partition(";")[0] + ";"
    return Bug(f"without {name}", file, old, old.replace(statement, "", 1), found)


BUGS = [
    _without("the barrier before a reduction is read", "cuda/team.cuh",
             "    __syncthreads();\n    // The number of warps is a power of two",
             {"ThreadSanitizer": _RACE, "C++ tests": "FAILED"}),
    _without("the barrier after a reduction", "cuda/team.cuh",
             "    __syncthreads();  // before a thread writes to `shared` again\n",
             {"ThreadSanitizer": _RACE, "conformance": "AssertionError"}),
    _without("the barrier before the warps' totals are added", "cuda/team.cuh",
             "  __syncthreads();\n  if (thread < kCount) {",
             {"ThreadSanitizer": _RACE}),
    _without("the barrier after a block's sums are stored", "cuda/team.cuh",
             "  __syncthreads();\n  if (thread == 0) {\n    __threadfence();",
             {"ThreadSanitizer": _RACE}),
    _without("the fence before a block's number", "cuda/team.cuh",
             "    __threadfence();  // what this block wrote is seen before its number is\n",
             {"ThreadSanitizer": _RACE}),
    _without("the fence before others' sums are read", "cuda/team.cuh",
             "    __threadfence();                                        // and what the others",
             {"ThreadSanitizer": _RACE}),
    _without("the counter's return to 0", "cuda/team.cuh",
             "    if (is_last[0]) atomicAdd(sums.finished, 0u - blocks);",
             {"C++ tests": "the counter is left at"}),
    _without("the barrier between the items of a block", "cuda/co_tuning_loss.cuh",
             "    __syncthreads();  // before the shared memory of the rows before is written again",
             {"ThreadSanitizer": _RACE}),
    _without("the barrier before the rows of a class are counted", "cuda/class_sums.cuh",
             "    __syncthreads();\n    int before = 0",
             {"ThreadSanitizer": _RACE}),
    _without("the barrier before the rows of a class are added", "cuda/class_sums.cuh",
             "    __syncthreads();\n    // No barrier after this",
             {"ThreadSanitizer": _RACE}),
    Bug("the rows of a class leave gaps in their list", "cuda/class_sums.cuh",
        "(1u << lane) - 1", "(2u << lane) - 1",
        {"C++ tests": "FAILED"}),
    Bug("only the first part of a class's columns is summed", "cuda/plan.h",
        "plan.parts = ceil_div(columns, plan.columns);", "plan.parts = 1;",
        {"C++ tests": "FAILED"}),
    Bug("a vector reaches one column beyond its row", "cuda/vectors.cuh",
        "columns - count + 1;", "columns - count + 2;",
        {"C++ tests": "FAILED", "conformance": "AssertionError"}),
    Bug("a part of a vector is read beyond its row", "cuda/vectors.cuh",
        "if (column < 0 || column >= columns) continue;\n    COTUNING_COUNT_READ",
        "if (column < 0) continue;\n    COTUNING_COUNT_READ",
        {"AddressSanitizer": "AddressSanitizer: SEGV"}),
    Bug("aligned vectors around a row's end are read", "cuda/vectors.cuh",
        "begin >= reinterpret_cast<const char*>(row) && begin + 32 <=", "begin <=",
        {"C++ tests": "exit status -11"}),
    Bug("the last vector of a row is missed", "cuda/vectors.cuh",
        "(columns + beyond + kLanes<T> - 1)", "(columns + beyond + kLanes<T> - 2)",
        {"conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("a shifted load is off by a word", "cuda/vectors.cuh",
        "offset & 4 ? words[i + 1] : words[i]", "offset & 4 ? words[i] : words[i]",
        {"conformance": "AssertionError", "alignment": "assert False"}),
    Bug("offsets of rows that are read count in 32 bits", "views.h",
        "static_cast<const char*>(data) + i * row_stride * size_of(type)",
        "static_cast<const char*>(data) + static_cast<int>(i * row_stride) * size_of(type)",
        {"far rows": "differs|Segmentation fault"}),
    Bug("offsets of rows that are written count in 32 bits", "views.h",
        "static_cast<char*>(data) + i * row_stride * size_of(type)",
        "static_cast<char*>(data) + static_cast<int>(i * row_stride) * size_of(type)",
        {"far rows": "differs|Segmentation fault"}),
    Bug("labels are taken for dense", "views.h", "[i * stride]", "[i]",
        {"conformance": "AssertionError|device-side assertion", "C++ tests": "FAILED|assertion failed"}),
    Bug("an ignored label takes part", "cuda/row_target.cuh", "if (ignored) target.share[k] = 0;", "",
        {"conformance": "AssertionError|Segmentation fault", "C++ tests": "FAILED|exit status -11"}),
    Bug("the gradient of an unsupervised row is left as it is", "cuda/row.cuh",
        "    zero_row(team, gradient, columns);\n    return result;", "    return result;",
        {"every option": "NaN misplaced", "conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("the gradient of an ignored row is left as it is", "cuda/co_tuning_loss.cuh",
        "    zero_row(team, gradient, columns);\n", "    ;\n",
        {"conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("the target's planes are written over each other", "cuda/row.cuh",
        "*target_at(k, vector) = bytes;", "*target_at(0, vector) = bytes;",
        {"alignment": "assert False", "conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("the second launch forgets the first one's sums", "cuda/co_tuning_loss.cuh",
        "all_totals[threadIdx.x] += p.first_sums[threadIdx.x]", "all_totals[threadIdx.x] += 0",
        {"conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("0 times an infinite factor", "cuda/scale_gradients.cuh",
        "narrow(value == 0 ? value : value * scale,", "narrow(value * scale,",
        {"C++ tests": "FAILED"}),
    Bug("more than 48 KB without asking", "cuda/co_tuning_loss.cu",
        "  if (!*allowed) {", "  if (false) {",
        {"bytes": "47728 were allowed", "C++ tests": "FAILED"}),
    Bug("the limit is asked for only above 48 KB", "cuda/co_tuning_loss.cu",
        "  if (!*allowed) {", "  if (!*allowed && plan.shared_bytes > 48 << 10) {",
        {"C++ tests": "beside 1424 static ones, but 47728 were allowed"}),
    Bug("the limit is a launch's own", "cuda/co_tuning_loss.cu",
        "  if (!*allowed) {\n", "  device.dynamic_shared_bytes = plan.shared_bytes;\n  {\n",
        {"C++ tests": r"\d+ bytes of dynamic shared memory beside 1424 static ones, but \d+ were allowed"}),
    Bug("the limit is all that the device has", "cuda/device.cu",
        "device->dynamic_shared_bytes = device->rules.shared_bytes = shared - kStaticSharedBytes;",
        "device->dynamic_shared_bytes = shared;\n  device->rules.shared_bytes = shared - kStaticSharedBytes;",
        {"C++ tests": "together are more than the device has", "bytes": "together are more than the device has"}),
    Bug("staged logits are read from memory again", "cuda/ordinary_row.cuh",
        "widen_words<T>(stage.words(vector), z);", "COTUNING_COUNT_READ(16);\n      widen_words<T>(from[vector], z);",
        {"bytes": r"assert \d+ == \d+"}),
    Bug("the staged target is read from memory again", "cuda/ordinary_row.cuh",
        "k >= staged; k = pairs.previous(k)", "k >= 0; k = pairs.previous(k)",
        {"bytes": r"assert \d+ == "}),
    Bug("the target in registers is read from memory again", "cuda/ordinary_row.cuh",
        "if (kAsWide && stage.keeps_rest()) {", "if (false) {",
        {"bytes": r"assert \d+ == \d+"}),
    Bug("the target in registers is off by one turn", "cuda/ordinary_row.cuh",
        "rest.take(q);", "rest.take(q);\n      rest.take(q);",
        {"C++ tests": "FAILED"}),
    Bug("a thread keeps more than two vectors in registers", "cuda/plan.h",
        "int64_t{threads} * kKeptVectors", "int64_t{threads} * 3",
        {"C++ tests": "FAILED"}),
    Bug("a row with NaN stays on the way of ordinary rows", "cuda/ordinary_row.cuh",
        "if (!(sums[0] > 0.5f && fabsf(*loss) < INFINITY && sums[2] != 0)) return false;", "",
        {"conformance": "AssertionError"}),
    Bug("the factor of an ordinary row lacks Q", "cuda/ordinary_row.cuh",
        "const float factor = sums[2] / sums[0],", "const float factor = 1 / sums[0],",
        {"C++ tests": "FAILED", "conformance": "AssertionError"}),
    Bug("a probability is rounded before its difference from q", "cuda/ordinary_row.cuh",
        "stored * fmaf(factor, e, -q);", "stored * (__uint_as_float(__float_as_uint(factor * e) & 0xffff0000u) - q);",
        {"accuracy": "AssertionError"}),
    Bug("words of R do not take the place of the logits", "cuda/ordinary_row.cuh",
        "        stage.put_words(vector, same_bits<Bytes16>(target));\n", "",
        {"C++ tests": "FAILED", "conformance": "AssertionError"}),
    Bug("a shifted load is off by half a word", "cuda/vectors.cuh",
        "8 * (offset & 2)", "0",
        {"C++ tests": "FAILED", "conformance": "AssertionError"}),
    Bug("a column beside the whole vectors is missed", "cuda/ordinary_row.cuh",
        "const bool has_edge = edge < columns;", "const bool has_edge = edge < columns - 1;",
        {"C++ tests": "FAILED", "conformance": "AssertionError"}),
    Bug("an ordinary row of the target head leaves its label out of the gradient", "cuda/ordinary_row.cuh",
        "if (k == vector_of_class) narrow", "if (false) narrow",
        {"C++ tests": "FAILED", "conformance": "AssertionError"}),
    Bug("parts of a row are added as if they had one maximum", "cuda/split_rows.cuh",
        "mine.exponentials * exp(below)", "mine.exponentials",
        {"conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("parts of a row all begin at the start of R's row", "cuda/split_rows.cuh",
        "+ first * size_of(q->type)", "+ 0 * size_of(q->type)",
        {"conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("every part of a row counts as a row", "cuda/split_rows.cuh",
        "if (part.part == 0) {", "if (true) {",
        {"conformance": "AssertionError", "C++ tests": "FAILED"}),
    Bug("a part of nothing but -inf spoils its row", "cuda/split_rows.cuh",
        "return top == -static_cast<double>(INFINITY) ? 0 : top;", "return top;",
        {"conformance": "AssertionError"}),
    Bug("a source term with factor 0 is computed", "cuda/co_tuning_loss.cuh",
        "return p.target_logits.columns == 0 || *p.trade_off != 0;", "return true;",
        {"conformance": "AssertionError"}),
    Bug("KL adds its parts in float", "cuda/row.cuh",
        "exact = target.kl_divergence;", "exact = false;",
        {"accuracy": "AssertionError"}),
    Bug("ordinary rows by the way with masks", "cuda/co_tuning_loss.cuh",
        "if (ordinary_source_row(p, team, row, stage, totals)) return;", "",
        {"machine code": "no way around a loop|more instructions"}),
]  # fmt: skip

# Bugs of the ordinary run, each by its first layer. This one shows that memory which no kernel has written is NaN.
ALWAYS = ("the gradient of an unsupervised row is left as it is",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bug" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--planted-cuda")
        chosen = [
            (bug, layer) for bug in BUGS for layer in bug.found
            if everything or (bug.name in ALWAYS and layer == next(iter(bug.found)))
        ]  # fmt: skip
        metafunc.parametrize(("bug", "layer"), chosen, ids=[f"{bug.name}, {layer}" for bug, layer in chosen])


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files from which the C++ side is built."""
    if reason := emulated_cuda.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("planted")
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tools", folder / "tools")
    return folder


def test_a_bug_in_the_kernels_is_found(copy: Path, bug: Bug, layer: str, seed: int) -> None:
    file = copy / "csrc" / "kernels" / bug.file
    sound = file.read_text()
    assert bug.old in sound, f"{bug.file} no longer has the text that {bug.name!r} changes"
    file.write_text(sound.replace(bug.old, bug.new))
    try:
        code, words = _run(layer, copy, file, seed)
    finally:
        file.write_text(sound)
    assert code != 0, f"{layer} does not find it"
    words += f"\nexit status {code}"
    assert re.search(bug.found[layer], words), words[-4000:]


def _run(layer: str, copy: Path, changed: Path, seed: int) -> tuple[int, str]:
    what = LAYERS[layer]
    if what is None:
        return _machine_code(copy)
    if isinstance(what, str):
        return _cuda_tests(copy, what, seed)
    return _tests_of_the_library(copy, what, seed, only_kernels=changed.suffix in (".cu", ".cuh"))


def _tests_of_the_library(copy: Path, tests: tuple[str, ...], seed: int, *, only_kernels: bool) -> tuple[int, str]:
    """Run the ordinary tests, which find the copy's library already built."""
    builds, session = copy / "builds", workspace() / "emulated"
    shutil.rmtree(builds, ignore_errors=True)
    with alone("emulated"):
        emulated_cuda.build(ROOT, session)
    if only_kernels:  # only kernels include the file: take the other objects from the session's build
        (builds / "emulated").mkdir(parents=True)
        for name in ("cuda_cpp.o", "fiber_cpp.o", "emulator_cpp.o", "controls_cpp.o"):
            shutil.copy(session / name, builds / "emulated")
    emulated_cuda.build(copy, builds / "emulated")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--seed", str(seed), "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "COTUNING_KERNELS_TEST_BUILDS": str(builds), "OMP_NUM_THREADS": "1"}
    finished = run(command, cwd=ROOT / "python_tests", env=environment)
    assert "no tests ran" not in finished.stdout, finished.stdout
    return finished.returncode, finished.stdout


def _cuda_tests(copy: Path, sanitize: str, seed: int) -> tuple[int, str]:
    """Run ``cuda_tests``, built in the same folder for all bugs so that only changed files are compiled."""
    start, folder = launcher(sanitize), copy / f"build_{sanitize or 'plain'}"
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [require("cmake"), "-S", copy, "-B", folder, *generator, f"-DCMAKE_CXX_COMPILER={compiler()}",
         f"-DCOTUNING_SANITIZE={sanitize}", "-DCOTUNING_CUDA=OFF"],
        [require("cmake"), "--build", folder, "--target", "cuda_tests"],
    ):  # fmt: skip
        built = run(command)
        assert built.returncode == 0, built.stdout
    tests = THREADS if sanitize == "thread" else ()
    finished = run([*start, folder / "cuda_tests", "--seed", str(seed), *tests], env=ENVIRONMENT)
    return finished.returncode, finished.stdout


def _machine_code(copy: Path) -> tuple[int, str]:
    """Check machine code as for the built library, but only of the loss in float32 at 21841 columns."""
    import torch

    from tools.machine_code import cuda as machine

    source, cubin = copy / "csrc/kernels/cuda/co_tuning_loss.cu", copy / "loss.cubin"
    compiled = run([require("nvcc"), "-std=c++17", "-O3", "-arch=sm_90", "-cubin", source, "-o", cubin])
    assert compiled.returncode == 0, compiled.stdout
    machine.disassemble.cache_clear()
    try:
        now = machine.instructions_of_a_row(cubin, "sm_90", 21841, torch.float32, alike=True)
    except LookupError as error:
        return 1, str(error)
    table = machine.recorded().instructions["sm_90: 21841, float32, alike"]
    return int(now > (1 + machine.TOLERANCE) * table), f"more instructions: {now}, {table} in the table"


def test_the_table_of_the_page_is_this_list() -> None:
    page = (ROOT / "docs" / "cuda.md").read_text()
    for bug in BUGS:
        assert f"| {bug.name} | {', '.join(bug.found)} |" in page, bug.name
