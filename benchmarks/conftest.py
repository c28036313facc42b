"""Options of ``pytest benchmarks/``, and the header line that names the backend, threads and malloc."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.contestants import our_backend


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cotuning_kernels benchmarks")
    group.addoption("--bench-threads", type=int, default=1, help="threads of torch (default 1)")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--bench-device", default=there, help="cpu or cuda (default: cuda where there is one)")


def pytest_report_header(config: pytest.Config) -> str:
    device = config.getoption("--bench-device")
    threads = config.getoption("--bench-threads")
    malloc = os.environ.get("MALLOC_MMAP_MAX_", "not set")
    return f"cotuning_kernels: {our_backend(device)}, {threads} thread(s), MALLOC_MMAP_MAX_ {malloc}"


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--bench-threads"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of the logits."""
    name: str = request.config.getoption("--bench-device")
    return name
