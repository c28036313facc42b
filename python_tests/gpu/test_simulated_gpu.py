"""The GPU tests on simulated devices, and bugs planted between torch and the kernels, which they must find.

They run where torch is built with CUDA and nvcc is installed, with or without a GPU. simulated_gpu.py says what is
simulated."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import simulated_gpu
from support.cpp_builds import alone, run, workspace
from support.paths import ROOT, TESTS

pytestmark = pytest.mark.skipif(
    simulated_gpu.missing() is not None or "COTUNING_SIMULATED_GPU" in os.environ,
    reason=simulated_gpu.missing() or "within the simulation",
)


def _pytest(folder: Path, *arguments: str) -> tuple[int, str]:
    environment = {name: x for name, x in simulated_gpu.environment(folder).items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *arguments]
    finished = run(command, cwd=ROOT, env=environment)
    return finished.returncode, finished.stdout


def _built() -> Path:
    folder = workspace() / "simulated_gpu"
    with alone("simulated_gpu"):
        simulated_gpu.build(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "chosen", "least"),
    [
        ("gpu/test_cuda_device.py", "not stand-in and not cpu and not benchmarks", 25),
        ("conformance/test_conformance.py", "cuda and not emulated and table", 200),
        ("conformance/test_conformance.py", "cuda and not emulated and not table", 50),
    ],
)
def test_what_runs_on_a_gpu(file: str, chosen: str, least: int) -> None:
    status, words = _pytest(_built(), str(TESTS / file), "-k", chosen)
    assert status == 0, words
    passed = re.search(r"(\d+) passed", words)
    assert passed, words
    assert int(passed[1]) >= least, words


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str
    new: str
    found: dict[str, str]  # by test of test_cuda_device.py: a pattern in its report


BUGS = (
    Bug(
        "launched on the default stream", "ops/cuda.cpp",
        "void* stream() const { return stream_; }", "void* stream() const { return nullptr; }",
        {"current_stream": "AssertionError", "stream_of_the_forward": "AssertionError"},
    ),
    Bug(
        "memory of a launch is kept for the next one", "ops/cuda.cpp",
        "const Tensor memory = device.empty({(first + 8 * (sums + 1)) / element}, type);",
        "static const Tensor memory = device.empty({1 << 20}, type);",
        {"graph_has_memory": "AssertionError"},
    ),
    Bug(
        "a gradient is written behind its memory", "ops/cuda.cpp",
        '  *view = matrix(device, gradient, "gradient");\n  return gradient;',
        '  *view = matrix(device, gradient, "gradient");\n'
        "  view->data = static_cast<char*>(view->data) + 4096 * 512;\n  return gradient;",
        {"own_memory": "ended with -11"},
    ),
    Bug(
        "on the device that is current", "ops/cuda.cpp", "guard_(tensor.get_device_index())", "guard_(0)",
        {"devices_in_turn": "AssertionError"},
    ),
    Bug(
        "the host reads a number of the device", "ops/cuda.cpp",
        "    problem.trade_off = read_trade_off(device, tensors.trade_off);\n",
        "    problem.trade_off = read_trade_off(device, tensors.trade_off);\n"
        "    problem.kl_divergence = *problem.trade_off > 0;\n",
        {"nothing_waits": "Segmentation fault"},
    ),
    Bug(
        "the host waits", "kernels/cuda/device.cu",
        "bool is_capturing(void* stream) {\n",
        'bool is_capturing(void* stream) {\n  check(cudaDeviceSynchronize(), "waiting");\n',
        {
            "launch_forward": "AssertionError",
            "graph_captures": "operation not permitted when stream is capturing",
        },
    ),
    Bug(
        "a counter in a graph is not cleared", "kernels/cuda/device.cu",
        "cudaMemsetAsync(own, 0, sizeof *own, static_cast<cudaStream_t>(stream))", "cudaSuccess",
        {"graph_captures": "AssertionError"},
    ),
    Bug(
        "every device counts in the first device's counters", "kernels/cuda/device.cu",
        "  void* first = nullptr;\n  check(cudaGetSymbolAddress(&first, counters)",
        "  static void* first = nullptr;\n  if (first == nullptr) check(cudaGetSymbolAddress(&first, counters)",
        {"devices_in_turn": "Segmentation fault"},
    ),
    Bug(
        "shared memory is not asked for", "kernels/cuda/co_tuning_loss.cu", "  if (!*allowed) {", "  if (false) {",
        {
            "devices_in_turn": "launching a kernel: invalid argument",
            "around_48_kilobytes": "launching a kernel: invalid argument",
        },
    ),
    Bug(
        "shared memory is asked for only above 48 KB", "kernels/cuda/co_tuning_loss.cu",
        "  if (!*allowed) {", "  if (!*allowed && plan.shared_bytes > 48 << 10) {",
        {"around_48_kilobytes": "launching a kernel: invalid argument"},
    ),
    Bug(
        "the limit of shared memory is a launch's own", "kernels/cuda/co_tuning_loss.cu",
        "  if (!*allowed) {\n", "  device.dynamic_shared_bytes = plan.shared_bytes;\n  {\n",
        {
            "two_host_threads": "launching a kernel: invalid argument",
            "smaller_rows": "invalid argument",
        },
    ),
    Bug(
        "shared memory is asked for once, of one device", "kernels/cuda/co_tuning_loss.cu",
        "std::atomic<bool>* allowed = &device.allowed[static_cast<int>(type)];",
        "std::atomic<bool>* allowed = &device_at(0).allowed[static_cast<int>(type)];",
        {"devices_in_turn": "launching a kernel: invalid argument"},
    ),
    Bug(
        "a refused launch is not checked", "kernels/cuda/co_tuning_loss.cu",
        "  launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, problem, plan);\n",
        "  try {\n    launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, problem, plan);\n"
        "  } catch (const std::runtime_error&) {\n  }\n",
        {"refused_launch": "DID NOT RAISE"},
    ),
    Bug(
        "the error of a refused launch stays with the thread", "kernels/cuda/device.h",
        "  (void)cudaGetLastError();\n", "",
        {"refused_launch": "cudaPeekAtLastError"},
    ),
)  # fmt: skip


@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name) for bug in BUGS])
def test_a_bug_on_the_way_to_the_kernels_is_found(bug: Bug, tmp_path: Path) -> None:
    root, folder = tmp_path / "checkout", tmp_path / "built"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copytree(ROOT / "tools", root / "tools")
    source = root / "csrc" / bug.file
    text = source.read_text()
    assert text.count(bug.old) == 1, f"{bug.file} has no longer what {bug.name!r} changes"
    source.write_text(text.replace(bug.old, bug.new))
    folder.mkdir()
    for compiled in _built().glob("*.o"):  # only the bug's file differs
        of_a_header = source.suffix == ".h" and compiled.name.startswith(f"{source.parent.name}_")
        if compiled.name != simulated_gpu.object_name(source) and not of_a_header:
            (folder / compiled.name).symlink_to(compiled)
    simulated_gpu.build(folder, root)
    for test, expected in bug.found.items():
        status, words = _pytest(folder, str(TESTS / "gpu/test_cuda_device.py"), "-x", "-k", f"{test} and not stand-in")
        assert status != 0, f"{bug.name!r} is not found by {test}:\n{words}"
        assert expected in words, words
