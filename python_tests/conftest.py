"""One seed per session, one thread unless a test asks for more, and the table of errors at the end."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch

from support import cpp_builds
from support.backends import BACKENDS, Backend
from support.paths import ROOT
from support.rule import RECORDS, Record, error_lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=None, help="draw the tests' numbers from this seed (default: a fresh one)"
    )
    parser.addoption(
        "--planted-cuda", action="store_true", help="plant every bug of test_cuda_planted.py, not just one"
    )


def pytest_configure(config: pytest.Config) -> None:
    sys.path.append(str(ROOT))  # `benchmarks` and `tools`; an installed cotuning_kernels in site-packages comes first
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
    else:
        cpp_builds.workspace()  # before the workers start, which share it
        if config.getoption("--seed") is None:
            config.option.seed = secrets.randbelow(2**31)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Keep a file's content out of the test's name: it may hold the time, and two workers then disagree on the name."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


# pytest-xdist calls the next hooks: its workers get the session's seed and return their rows of the table.
@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.option.seed


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, dtype, *numbers in getattr(node, "workeroutput", {}).get("records", ()):
        RECORDS.setdefault((name, dtype), Record()).merge(Record(*numbers))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["records"] = [(*key, *astuple(record)) for key, record in RECORDS.items()]


def pytest_report_header(config: pytest.Config) -> str:
    return f"cotuning_kernels: repeat this session's numbers with --seed {config.option.seed}"


# Files whose tests take seconds each. They run first; the many short tests then keep all workers busy to the end.
LONG = (
    "test_sanitizers.py", "test_cuda_emulated.py", "test_cuda_build.py", "test_cuda_machine_code.py",
    "test_cuda_planted.py", "test_triton_static.py", "test_build.py",
    "test_instruction_counts.py", "test_distributed.py", "test_benchmarks.py", "test_torch_integration.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    _leave_out_rows_for_a_gpu(config, items)
    _keep_ttsem_apart(items)


def _leave_out_rows_for_a_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU every test keeps one of its GPU rows, which is skipped with the reason."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    said: set[tuple[str, str]] = set()
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if not isinstance(backend, Backend) or backend.device == "cpu" or backend.missing() is None:
            kept.append(item)
            continue
        test = (item.nodeid.split("[")[0], backend.name)
        (left_out if test in said else kept).append(item)
        said.add(test)
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _keep_ttsem_apart(items: list[pytest.Item]) -> None:
    """ttsem's first kernel changes how MLIR prints until the process ends. The rules of test_triton_static.py for
    intermediate code could not read a kernel that is compiled later."""
    apart = [item for item in items if item.path.name == "test_triton_ttsem.py"]
    if len(apart) < len(items):
        for item in apart:
            item.add_marker(pytest.mark.skip(reason="ttsem needs a process to itself: run this file alone"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The session's seed."""
    return int(request.config.option.seed)


@pytest.fixture
def draw(seed: int) -> torch.Generator:
    """Random numbers from the session's seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors of these tests are small: threads only cost time. Tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn, selected; skipped with the reason where it cannot run here."""
    chosen: Backend = request.param
    reason = chosen.missing()
    if reason is not None:
        pytest.skip(f"{chosen.name}: {reason}")
    with chosen.using():
        yield chosen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := error_lines(RECORDS):
        terminalreporter.section(
            "largest errors against float64, relative to a tensor's largest number (beside torch's own)"
        )
        for line in lines:
            terminalreporter.line(line)
