"""The C++ tests of the kernels, plain and under sanitizers; and faults that they and the sanitizers must find.

The tests themselves are in csrc/tests: each instruction set and scalar type against long double, rows that end where
their page ends, all half-precision values, any number of threads.
"""

from __future__ import annotations

import re
import signal

import pytest

from support.cpp_builds import instruction_sets, run_kernel_tests
from support.paths import ROOT

MEMORY = "address,undefined"
THREADS = ("same_bits_in_any_threads", "calls_at_once")


def all_tests() -> list[str]:
    sources = [path.read_text() for path in (ROOT / "csrc" / "tests").glob("*.cpp")]
    return re.findall(r"^TEST\((\w+)\)", "\n".join(sources), re.MULTILINE)


@pytest.mark.parametrize(("sanitize", "tests"), [("", ()), (MEMORY, ()), ("thread", THREADS)])
def test_kernels_pass_without_a_report(sanitize: str, tests: tuple[str, ...], seed: int) -> None:
    finished = run_kernel_tests(sanitize, *tests, seed=seed)
    assert finished.returncode == 0, finished.stdout
    assert "FAILED" not in finished.stdout
    assert "Sanitizer" not in finished.stdout
    assert "runtime error" not in finished.stdout
    passed = re.findall(r"^(\w+) +passed$", finished.stdout, re.MULTILINE)
    assert sorted(passed) == sorted(tests or all_tests())


# The fault, the build that must find it, the test that triggers it, and the report.
SANITIZER_FAULTS = [
    ("heap-overread", MEMORY, "scaled_rows", "AddressSanitizer: heap-buffer-overflow"),
    ("class-too-many", MEMORY, "loss", "AddressSanitizer: SEGV"),
    ("signed-overflow", MEMORY, "loss", "runtime error: signed integer overflow"),
    ("misaligned-label", MEMORY, "loss", "runtime error: load of misaligned address"),
    ("race", "thread", "same_bits_in_any_threads", "ThreadSanitizer: data race"),
]


@pytest.mark.parametrize(("fault", "sanitize", "test", "report"), SANITIZER_FAULTS, ids=lambda value: str(value))
def test_sanitizer_reports_a_planted_fault(fault: str, sanitize: str, test: str, report: str, seed: int) -> None:
    finished = run_kernel_tests(sanitize, "--plant", fault, test, seed=seed)
    assert finished.returncode == 99, finished.stdout
    assert report in finished.stdout


VALUE_FAULTS = [
    ("late-maximum", "sweep"),
    ("hidden-nan", "sweep"),
    ("coarse-exp", "sweep"),
    ("short-gradient", "gradient"),
    ("truncation", "store"),
    ("truncation", "halves_round_to_even"),
    ("wrong-moment", "moments"),
    ("forgotten-row", "loss"),
    ("forgotten-row", "scaled_rows"),
    ("forgotten-row", "translated_labels"),
    ("forgotten-row", "class_sums"),
    ("forgotten-row", "temperature"),
    ("race", "same_bits_in_any_threads"),
]


@pytest.mark.parametrize(("fault", "test"), VALUE_FAULTS)
def test_a_wrong_value_is_found(fault: str, test: str, seed: int) -> None:
    finished = run_kernel_tests("", "--plant", fault, test, seed=seed)
    assert finished.returncode == 1, finished.stdout
    assert re.search(rf"^{test} +\d+ checks FAILED$", finished.stdout, re.MULTILINE), finished.stdout


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("fault", ["read-past-row", "write-past-row"])
def test_touching_the_page_after_a_row_crashes(fault: str, isa: str, seed: int) -> None:
    """No sanitizer sees the masked loads of AVX2 and AVX-512, so the rows end where their page ends."""
    if isa not in instruction_sets():
        pytest.skip(f"this processor does not run {isa}")
    finished = run_kernel_tests("", "--plant", fault, "sweep", seed=seed, isa=isa)
    assert finished.returncode == -signal.SIGSEGV, finished.stdout


def test_a_misspelt_test_is_not_a_pass(seed: int) -> None:
    finished = run_kernel_tests("", "no_such_test", seed=seed)
    assert finished.returncode == 2
    assert "no test is called no_such_test" in finished.stdout
