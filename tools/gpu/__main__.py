"""All checks and measurements on a GPU machine, in eight minutes, without network and without changing its Python.

    python -m tools.gpu [--out gpu_report] [--wheel FILE | --installed] [--only STEP ...] [--limit 480]
    PYTHONPATH=python_tests python -m support.simulated_gpu -m tools.gpu --rehearse     # without a GPU

The package is built for the card with the machine's torch and nvcc, or taken from a wheel, into a separate folder
(``--installed`` uses the one that Python finds). Then each step runs as a process with its own limit; the next one runs
even if a step fails or is too slow. ``OUT`` gets at most eight files: ``summary.txt`` (failures first), ``steps.json``,
``log.txt`` and the steps' measurements. The exit status is 1 if a step failed.

A rehearsal runs the same steps on simulated devices (``--installed`` is implied): small problems, long limits, and no
kernel that Triton compiles, since a simulated device has no driver.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tools.gpu import sanitizer

__all__ = ["Outcome", "Step", "run_steps", "steps", "summary"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "python_tests"
# The messages of compute-sanitizer and ncu if a virtual machine does not give access to the card's counters.
_REFUSALS = (*sanitizer.REFUSALS, "ERR_NVGPUCTRPERM")
_METRICS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "smsp__issue_active.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active"
)


@dataclass(frozen=True)
class Step:
    """A process, the seconds that it may take, the program that it needs on the path, and why not to run it."""

    name: str
    command: Sequence[str]
    limit: float
    needs: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    left_out: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``passed``, ``failed``, ``too slow`` or ``skipped``, with its last output."""

    name: str
    state: str
    seconds: float
    words: str


def steps(out: Path, python: str = sys.executable) -> list[Step]:
    """The steps, most important first, in case the machine is taken away.

    The limits are upper bounds. Estimated for 16 cores and one card: 60 s for the installation, then 10, 60, 70, 105,
    60, 45, 45 and 20 s. Triton compiles 783 kernels in its tests, 570 s of a core; every worker compiles.
    """
    checks = [python, "-m", "tools.gpu.checks"]
    workers = str(min(14, max(1, (os.cpu_count() or 2) - 2)))
    pytest = [
        python, "-m", "pytest", "-q", "-rfE", "-n", workers, "--dist", "worksteal", "-p", "no:cacheprovider",
        "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"),
    ]  # fmt: skip
    table = str(TESTS / "conformance" / "test_conformance.py")
    one_thread = (("OMP_NUM_THREADS", "1"),)
    no_cache = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    sanitized = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9"]
    counters = ["ncu", "--metrics", _METRICS, "--kernel-name", "regex:loss", "--launch-count", "40", "--csv"]
    return [
        Step("report", [python, "-m", "cotuning_kernels"], 30),
        Step("first checks", checks, 90),
        Step("cuda tests", [
            *pytest, str(TESTS / "gpu" / "test_cuda_device.py"), str(TESTS / "gpu" / "test_cuda_build.py"), table,
            "-k", "(test_cuda_device or test_cuda_build or cuda) and not emulated and not stand-in and not sanitizer",
        ], 120, environment=one_thread),
        Step("page", [
            python, "-m", "benchmarks", "page", "--device", "cuda", "--seconds", "0.2", "--output", str(out / "page"),
            "--limit", "90",
        ], 120),
        Step("triton tests", [
            *pytest, table, "-m", "covering", "-k", "triton and not triton-rows and not triton-loops",
        ], 100, environment=one_thread),
        Step("memcheck", [*sanitized, *checks, "values", "limits"], 60, "compute-sanitizer", no_cache),
        Step("racecheck", [*sanitized, "--tool", "racecheck", *checks, "values"], 60, "compute-sanitizer", no_cache),
        Step("counters", [*counters, *checks, "main shapes"], 60, "ncu"),
    ]  # fmt: skip


_SMALLER = {
    "first checks": ["--rows", "8", "--repeat", "2", "--backends", "cuda"],
    "cuda tests": ["-k", "(test_cuda_device or covering and cuda) and not (emulated or stand-in or cpu or benchmarks)"],
    "page": ["--rows", "2", "--largest-head", "1000", "--eager", "--seconds", "0", "--limit", "300"],
}


def rehearsed(step: Step) -> Step:
    """The step as simulated devices can run it: a processor emulates them, and they have no driver."""
    if step.name == "triton tests":
        return replace(step, left_out="Triton compiles its kernels for a driver, and a simulated device has none")
    return replace(step, command=[*step.command, *_SMALLER.get(step.name, [])], limit=10 * step.limit)


def run_steps(chosen: Sequence[Step], log: Path, *, limit: float, environment: dict[str, str]) -> list[Outcome]:
    """Run the steps one after the other, each within its own limit and all within ``limit`` seconds.

    Their output goes to ``log`` at once.
    """
    end = time.monotonic() + limit
    outcomes = []
    for step in chosen:
        left = end - time.monotonic()
        if left <= 0:
            outcome = Outcome(step.name, "skipped", 0.0, f"the {limit:.0f} seconds of all steps were spent")
        elif step.left_out is not None:
            outcome = Outcome(step.name, "skipped", 0.0, step.left_out)
        elif step.needs is not None and shutil.which(step.needs) is None:
            outcome = Outcome(step.name, "skipped", 0.0, f"there is no {step.needs} on the path")
        else:
            outcome = _run(step, log, min(step.limit, left), environment)
        outcomes.append(outcome)
        print(f"{outcome.state:9} {outcome.name:14} {outcome.seconds:6.1f} s  {outcome.words}", flush=True)
    return outcomes


def _run(step: Step, log: Path, limit: float, environment: dict[str, str]) -> Outcome:
    started = time.monotonic()
    with log.open("a+b") as file:
        file.write(f"\n== {step.name}: {' '.join(step.command)}\n".encode())
        file.flush()
        begin = file.tell()
        # In its own session, so that all processes that the step started end with it.
        process = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            cwd=log.parent, env=environment | dict(step.environment),
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        file.seek(begin)
        words = file.read().decode(errors="replace")
    seconds = time.monotonic() - started
    last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "it printed nothing")[:160]
    if status is None:
        return Outcome(step.name, "too slow", seconds, f"ended after {limit:.0f} s; last: {last}")
    refusal = next((refusal for refusal in _REFUSALS if refusal in words), None)
    if step.needs is not None and refusal is not None:
        return Outcome(step.name, "skipped", seconds, f"{step.needs} is refused here: {refusal}")
    error = sanitizer.first_error(words) if step.needs == "compute-sanitizer" else None
    if error is not None:
        return Outcome(step.name, "failed", seconds, f"{status}: {error}"[:200])
    return Outcome(
        step.name, "passed" if status == 0 else "failed", seconds, last if status == 0 else f"{status}: {last}"
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """At most ten lines: steps that failed or were too slow, then those skipped, then those that passed."""
    order = ("failed", "too slow", "skipped", "passed")
    ranked = sorted(outcomes, key=lambda outcome: order.index(outcome.state))
    counts = ", ".join(f"{sum(o.state == state for o in outcomes)} {state}" for state in order)
    lines = [f"{o.state}: {o.name} ({o.seconds:.0f} s): {o.words}" for o in ranked]
    return "\n".join([counts, *lines[:9]]) + "\n"


def _install(site: Path, wheel: Path | None) -> Step:
    """Install into ``site``, for the cards of this machine, with the installed packages: pip needs no network."""
    offline = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    what = ["--no-build-isolation", str(ROOT)] if wheel is None else [str(wheel.resolve())]
    return Step("install", [sys.executable, "-m", "pip", "install", *offline, "--target", str(site), *what], 180)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="a folder; default %(default)s")
    parser.add_argument("--wheel", type=Path, help="install this instead of building")
    parser.add_argument("--installed", action="store_true", help="use the package that Python finds")
    parser.add_argument("--rehearse", action="store_true", help="small problems and long limits, for simulated devices")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds in all; default %(default)s")
    parsed = parser.parse_args(arguments)
    out = parsed.out.resolve()
    chosen = steps(out)
    names = [step.name for step in chosen]
    if unknown := set(parsed.only or ()) - set(names):
        parser.error(f"--only names {sorted(unknown)[0]!r}, expected some of {', '.join(names)}")
    if parsed.wheel is not None and not parsed.wheel.is_file():
        parser.error(f"--wheel is {parsed.wheel}, which is no file")
    chosen = [step for step in chosen if parsed.only is None or step.name in parsed.only]
    if parsed.rehearse:
        parsed.installed, chosen = True, [rehearsed(step) for step in chosen]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        found = os.environ.get("PYTHONPATH")
        # The installed package comes before the checkout, whose `benchmarks`, `tools` and tests are used.
        paths = [*([] if parsed.installed else [str(site)]), *([found] if found else []), str(ROOT), str(TESTS)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(Path(scratch) / "triton"),
        }
        started = time.monotonic()
        outcomes = []
        if not parsed.installed:
            outcomes = run_steps([_install(site, parsed.wheel)], log, limit=parsed.limit, environment=environment)
        if not outcomes or outcomes[0].state == "passed":
            left = parsed.limit - (time.monotonic() - started)
            outcomes += run_steps(chosen, log, limit=left, environment=environment)
    page = out / "page"
    for name in ("page.md", "page.json"):
        if (page / name).is_file():
            shutil.move(page / name, out / name)
    shutil.rmtree(page, ignore_errors=True)  # the pictures, which `python -m benchmarks page` draws from page.json
    (out / "steps.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    text = summary(outcomes)
    (out / "summary.txt").write_text(text)
    print(f"\n{text}\nWritten to {out}.")
    return int(any(outcome.state in ("failed", "too slow") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
