"""Attack saved files and estimators: kills, full disks, hostile files, interruptions, memory limits.

    python -m tools.torture [--effort 1.0] [--seed 0] [--only NAME ...]

Each attack counts how its tries ended. A try that does not end as documented is a failure: it is printed, and the exit
status is 1. docs/robustness.md has the rules and the counts of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cotuning_kernels
from cotuning_kernels import Relationship, RelationshipEstimator, learn_relationship
from cotuning_kernels.relationship import RelationshipFileError, passes
from cotuning_kernels.relationship.file import RELATIONSHIP_FILE

Batches = list[tuple[Tensor, Tensor]]
N_T, N_S = 20, 60


class WrongError(Exception):
    """A try that did not end as documented."""


def check(right: bool, message: str) -> None:
    if not right:
        raise WrongError(message)


def relationship(seed: int, rows: int = 4, columns: int = 6) -> Relationship:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).softmax(1)
    names = tuple(f"class {row}" for row in range(rows))
    return Relationship(matrix, names, counts=torch.arange(rows) + 1, metadata={"which": str(seed)})


def same(one: Relationship, other: Relationship) -> bool:
    fields = ("target_classes", "source_classes", "method", "temperature", "metadata")
    return (
        torch.equal(one.matrix, other.matrix)
        and (one.counts is None) == (other.counts is None)
        and (one.counts is None or other.counts is None or torch.equal(one.counts, other.counts))
        and all(getattr(one, name) == getattr(other, name) for name in fields)
    )


def made_batches(number: int, rows: int = 8) -> Batches:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, N_S, generator=draw), torch.randint(0, N_T, (rows,), generator=draw)) for _ in range(number)
    ]


def learn(batches: Batches, path: Path | None, every: int = 1) -> Relationship:
    return learn_relationship(
        lambda x: x, batches, N_T, checkpoint=path, checkpoint_every=every, progress=False, empty="uniform"
    )


@contextlib.contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """A fork that runs ``work``, and is killed at the end if it is still running."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(300)  # ends a child that hangs
            work()
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:  # also after a failed write: standard error may be a file beyond the child's limit
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):  # it has ended already
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def status_of(work: Callable[[], None]) -> int:
    """The exit status of a fork that runs ``work``: 0, 1 for an exception, or minus the signal."""
    with child(work) as pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -------------------------------------------------------------------------------------------------------------- kills


def killed_saves(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    """Two processes save the same target again and again, and both are killed."""
    path, counts = folder / "r", Counter[str]()
    both = [relationship(0, 40, 1000), relationship(1, 40, 1000)]
    both[0].save(path)
    path.chmod(0o640)

    def save_for_ever(which: int) -> None:
        while True:
            both[which].save(path)

    for _ in range(tries):
        with child(lambda: save_for_ever(0)), child(lambda: save_for_ever(1)):
            time.sleep(draw.uniform(0, 0.02))
        names = os.listdir(folder)
        check(len(names) <= 3, f"leftovers gather: {names}")
        counts["killed in the middle of a save"] += len(names) > 1
        loaded = Relationship.load(path)
        check(same(loaded, both[int(loaded.metadata["which"])]), "the file is neither of the two")
        check(path.stat().st_mode & 0o777 == 0o640, f"the mode is {path.stat().st_mode:o}")
        counts["kills"] += 2
    both[0].save(path)
    check(os.listdir(folder) == ["r"], f"after a whole save there are {os.listdir(folder)}")
    return counts


def killed_passes(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    """A pass with a checkpoint after every batch is killed and resumed until it is complete."""
    batches, counts = made_batches(24), Counter[str]()
    path, result = folder / "statistics", folder / "result"
    right = learn(batches, None)

    def work() -> None:
        learn(batches, path).save(result)

    # Passes are measured here, since on a busy machine a fixed time may end before a child has counted one batch.
    begun = time.monotonic()
    check(status_of(work) == 0, "a pass ended in an error")
    longest = (time.monotonic() - begun) / 2
    result.unlink()
    while counts["kills"] < tries or not counts["resumed to the same bits"]:
        with child(work) as pid:
            deadline, ended = time.monotonic() + draw.uniform(0, longest), None
            while ended is None and time.monotonic() < deadline:
                time.sleep(0.001)
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            check(ended is None or ended.si_status == 0, "a resumed pass ended in an error")
            counts["kills"] += ended is None
        if result.exists():
            check(torch.equal(Relationship.load(result).matrix, right.matrix), "resumed to another relationship")
            check(sorted(os.listdir(folder)) == ["result"], f"left over: {os.listdir(folder)}")
            result.unlink()
            counts["resumed to the same bits"] += 1
    return counts


# -------------------------------------------------------------------------------------------------------------- disks


def failing_disks(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    """Limit the file size to every length, and let every system call fail with several errors."""
    path, counts = folder / "r", Counter[str]()
    old, new = relationship(0), relationship(1, 9)
    old.save(path)
    content = path.read_bytes()
    new.save(folder / "new")
    size = (folder / "new").stat().st_size
    (folder / "new").unlink()

    def failed(what: str) -> None:
        try:
            new.save(path)
        except OSError:
            counts[what] += 1
        else:
            raise WrongError(f"{what}: the save says that it is well")
        check(path.read_bytes() == content, f"{what}: the old file has changed")
        check(os.listdir(folder) == ["r"], f"{what}: left over {os.listdir(folder)}")

    for limit in sorted(draw.sample(range(size), min(tries, size))):

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            failed("the file too large")

        check(status_of(limited) == 0, f"a limit of {limit} bytes")
        counts["the file too large"] += 1
    for call in ("open", "fsync", "fchmod", "replace", "fstat"):
        for code in (5, 28, 30, 122):  # EIO, ENOSPC, EROFS, EDQUOT
            with mock.patch.object(os, call, side_effect=OSError(code, os.strerror(code))):
                failed("a call of the system that fails")
    counts.update(_full_tmpfs(folder))
    return counts


_ON_TMPFS = """
import json, os, sys, torch
from cotuning_kernels import Relationship
path, counts = sys.argv[1] + "/r", {"a full disk": 0, "saved": 0}
old = Relationship(torch.eye(4))
old.save(path)
for rows in range(4, 200, 4):  # up to 160 kB, on 64
    before = open(path, "rb").read()
    try:
        Relationship(torch.full((rows, 200), 1 / 200)).save(path)
        counts["saved"] += 1
    except OSError as error:
        assert error.errno == 28, error
        assert open(path, "rb").read() == before
        counts["a full disk"] += 1
    assert os.listdir(sys.argv[1]) == ["r"], os.listdir(sys.argv[1])
assert counts["a full disk"] and counts["saved"], counts
json.dump(counts, sys.stdout)
"""


def _full_tmpfs(folder: Path) -> Counter[str]:
    """Save to a file system of 64 kB, if the user may mount one."""
    mount = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    disk = folder / "disk"
    disk.mkdir()
    try:
        if not shutil.which("unshare") or subprocess.run([*command, mount, "", disk, "true", ""]).returncode != 0:
            return Counter({"full disks left out: no mount is allowed here": 1})
        package = str(Path(cotuning_kernels.__file__).parent.parent)
        done = subprocess.run(
            [*command, mount, "", disk, sys.executable, _ON_TMPFS], env=os.environ | {"PYTHONPATH": package},
            capture_output=True, text=True,
        )  # fmt: skip
        check(done.returncode == 0, f"on a full disk: {done.stderr}")
        return Counter(json.loads(done.stdout))
    finally:
        disk.rmdir()


# ------------------------------------------------------------------------------------------------------ hostile files


def mutants(draw: random.Random, content: bytes, tries: int) -> Iterator[bytes]:
    """Every bit flipped if the tries suffice, every length, and random edits."""
    bits = range(8 * len(content))
    for bit in bits if 8 * len(content) <= tries else draw.sample(bits, tries):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    for length in range(0, len(content), max(1, 2 * len(content) // tries)):
        yield content[:length]
    for _ in range(tries // 2):
        begin, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        middle = draw.choice(
            [b"", draw.randbytes(end - begin), bytes(end - begin), content[begin:end] * 2, draw.randbytes(3)]
        )
        yield content[:begin] + middle + content[end:]


VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**63, 10**30, -0.5, 1e999, "", "x" * 100, [], [[]], {}, {"a": 1}, [1, "a", None], "direct",
]  # fmt: skip


def edited(draw: random.Random, tree: Any) -> Any:
    """A copy of JSON in which one value is changed, missing, or duplicated."""
    if isinstance(tree, dict) and tree and draw.random() < 0.8:
        key = draw.choice(list(tree))
        if draw.random() < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        return tree | {draw.choice([key] * 9 + ["more"]): edited(draw, tree[key])}
    if isinstance(tree, list) and tree and draw.random() < 0.8:
        index = draw.randrange(len(tree))
        return [*tree[:index], edited(draw, tree[index]), *tree[index + draw.randrange(2) :]]
    return draw.choice(VALUES)


def edited_headers(draw: random.Random, content: bytes, tries: int) -> Iterator[bytes]:
    """Safetensors files whose header is valid JSON but wrong."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(tries):
        text = json.dumps(edited(draw, header)).encode()
        yield len(text).to_bytes(8, "little") + text + data


def tensors_edited(draw: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = draw.choice(list(tensors))
    tensor = tensors[name]
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor.double(), lambda: tensor.to(torch.int32), lambda: tensor.bool(), lambda: tensor[:0],
        lambda: tensor[None], lambda: tensor.reshape(-1)[0], lambda: tensor * -1, lambda: tensor.half() * torch.inf,
        lambda: tensor.float() * torch.nan, lambda: tensor + 1000, lambda: torch.cat([tensor, tensor]),
        lambda: tensor.float(), lambda: tensor * 0,
    ]  # fmt: skip
    changed = tensors | {draw.choice([name, name, name, "more"]): draw.choice(changes)()}
    if draw.random() < 0.1:
        del changed[name]
    return changed


def attack_file(
    files: Iterator[bytes],
    path: Path,
    read: Callable[[], Any],
    error: type[Exception],
    right: Any,
    counts: Counter[str],
) -> None:
    """Every file must be refused with the documented error, or give the right content."""
    for content in files:
        path.write_bytes(content)
        begun = time.monotonic()
        try:
            found = read()
        except error as refusal:
            check(str(path) in str(refusal), f"the refusal does not name the file: {refusal}")
            counts["refused"] += 1
        else:
            check(right(found), f"another content is accepted: {content!r:.2000}")
            counts["harmless, and read as it was"] += 1
        check(time.monotonic() - begun < 20, f"20 seconds for {content!r:.200}")


def hostile_relationships(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    path, counts = folder / "r", Counter[str]()
    saved = relationship(0)
    saved.save(path)
    content = path.read_bytes()

    def read() -> Relationship:
        return Relationship.load(path)

    files = (*mutants(draw, content, tries), *edited_headers(draw, content, tries))
    attack_file(iter(files), path, read, RelationshipFileError, lambda found: same(found, saved), counts)
    # With a correct digest, so that only checks of the content can find the error.
    path.write_bytes(content)
    tensors, record = RELATIONSHIP_FILE.read(path)
    crafted = Counter[str]()
    for _ in range(tries // 2):
        if draw.random() < 0.5:
            RELATIONSHIP_FILE.write(path, tensors, edited(draw, record))
        else:
            RELATIONSHIP_FILE.write(path, tensors_edited(draw, tensors), record)
        # The constructor checks a relationship, so what is accepted is one.
        attack_file(iter([path.read_bytes()]), path, read, RelationshipFileError, lambda found: True, crafted)
    counts["crafted with a right digest, refused"] = crafted["refused"]
    counts["crafted with a right digest, a relationship"] = crafted["harmless, and read as it was"]
    return counts


def hostile_checkpoints(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    path, counts = folder / "statistics", Counter[str]()
    batches = made_batches(7)
    right = learn(batches, None)

    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches[:6]
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        learn(interrupted(), path, every=6)  # type: ignore[arg-type]
    content = path.read_bytes()

    def read() -> Relationship:
        return learn(batches, path)

    files = (*mutants(draw, content, tries), *edited_headers(draw, content, tries))
    attack_file(
        iter(files), path, read, passes.CheckpointError, lambda found: torch.equal(found.matrix, right.matrix), counts
    )
    path.write_bytes(content)
    tensors, record = passes._CHECKPOINT_FILE.read(path)
    crafted = Counter[str]()
    for _ in range(tries // 2):
        if draw.random() < 0.5:
            passes._CHECKPOINT_FILE.write(path, tensors, edited(draw, record))
        else:
            passes._CHECKPOINT_FILE.write(path, tensors_edited(draw, tensors), record)
        attack_file(iter([path.read_bytes()]), path, read, passes.CheckpointError, lambda found: True, crafted)
    counts["crafted with a right digest, refused"] = crafted["refused"]
    counts["crafted with a right digest, plausible"] = crafted["harmless, and read as it was"]
    return counts


# ------------------------------------------------------------------------------------------------------ interruptions


def state_of(estimator: RelationshipEstimator) -> tuple[bytes, bytes, bool]:
    state = estimator.state_dict()
    return state["sums"].numpy().tobytes(), state["counts"].numpy().tobytes(), state["all_reduced"]


def _called_by(call: Callable[..., Any], frame: FrameType | None) -> bool:
    """Whether ``call`` has called the function of the frame, directly or not."""
    while frame is not None:
        frame = frame.f_back
        if frame is not None and frame.f_code is call.__code__:
            return True
    return False


def interruptions(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    """A signal, as Ctrl-C sends it, at a random time in a method of an estimator or in a save."""
    counts, path = Counter[str](), folder / "r"
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(15, 400, generator=generator), torch.randint(0, 20, (15,), generator=generator)
    large = torch.randn(500, 400, generator=generator), torch.randint(0, 20, (500,), generator=generator)
    wrong = large[0].clone(), large[1]
    wrong[0][-1, 7] = torch.nan
    wrong[1][-1] = 3
    other = RelationshipEstimator(20, 400)
    other.update(*large)
    files = [relationship(0, 10), relationship(1, 10)]
    files[0].save(path)

    def save(_: RelationshipEstimator) -> None:
        files[1].save(path)

    calls: dict[str, Callable[[RelationshipEstimator], None]] = {
        "a small batch": lambda estimator: estimator.update(*small),
        "a large batch": lambda estimator: estimator.update(*large),
        "a batch with NaN": lambda estimator: estimator.update(*wrong),
        "merge": lambda estimator: estimator.merge(other),
        "load_state_dict": lambda estimator: estimator.load_state_dict(other.state_dict()),
        "save": save,
    }

    def interrupt(_: int, frame: FrameType | None) -> None:
        # A late signal may find this function anywhere, for instance where it handles a ValueError.
        if _called_by(call, frame):
            raise KeyboardInterrupt

    before_signal = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # a finalizer swallows what is raised in it
    grad_mode = torch.is_grad_enabled()  # an interruption within torch's no_grad leaves gradients off
    try:
        for name, call in calls.items():
            durations = []
            for _ in range(5):
                whole = RelationshipEstimator(20, 400)
                whole.update(*large)
                before = state_of(whole)
                files[0].save(path)
                begun = time.perf_counter()
                with contextlib.suppress(ValueError):
                    call(whole)
                durations.append(time.perf_counter() - begun)
            after = state_of(whole)
            duration = statistics.median(durations)  # one alone may contain other programs' time
            for _ in range(tries):
                estimator = RelationshipEstimator(20, 400)
                estimator.update(*large)
                files[0].save(path)
                try:
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 1.2 * duration))
                    call(estimator)
                    ended = "whole"
                except KeyboardInterrupt:
                    ended = "interrupted"
                except ValueError:
                    ended = "refused"
                signal.setitimer(signal.ITIMER_REAL, 0)
                counts[f"{name}: {ended}"] += 1
                expected = after if ended == "whole" else before
                check(state_of(estimator) == expected, f"{name} was {ended}, and the state differs")
                if name == "save":
                    loaded = Relationship.load(path)
                    check(same(loaded, files[0]) or same(loaded, files[1]), "a file that is neither")
                elif ended == "interrupted" and name != "a batch with NaN":
                    call(estimator)
                    check(state_of(estimator) == after, f"{name}: the same again is not as without an interruption")
    finally:
        gc.enable()
        torch.set_grad_enabled(grad_mode)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before_signal)
    return counts


# ------------------------------------------------------------------------------------------------------------- memory


def memory_limits(draw: random.Random, tries: int, folder: Path) -> Counter[str]:
    """Less and less memory must give an error that says so, and leave state and files unchanged."""
    path, counts = folder / "r", Counter[str]()
    large = Relationship(torch.full((900, 10000), 1e-4))  # 36 MB: malloc asks the system for each
    large.save(path)
    batch = torch.zeros(950, 10000), torch.arange(950) % 900
    estimator = RelationshipEstimator(900, 10000)
    estimator.update(*batch)
    before = state_of(estimator)
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: Relationship.load(path),
        "save": lambda: large.save(path),
        "update with a large batch": lambda: estimator.update(*batch),
        "update with a small batch": lambda: estimator.update(batch[0][:800], batch[1][:800]),
        "merge": lambda: estimator.merge(estimator),
    }

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()

    def starved(call: Callable[[], object], more: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
        try:
            call()
        except (MemoryError, RuntimeError, OSError) as error:  # the last of them where the system is asked
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            check(isinstance(error, MemoryError) or "memory" in str(error), f"{type(error).__name__}: {error}")
            check(state_of(estimator) == before, "the state has changed")
            os._exit(2)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    for name, call in calls.items():
        for step in range(tries):
            more = int(160e6 * step / tries)
            status = status_of(lambda call=call, more=more: starved(call, more))  # type: ignore[misc]
            check(status in (0, 2), f"{name} with {more} bytes more than are used ended with status {status}")
            counts[f"{name}: {'an error' if status else 'enough'}"] += 1
            check(same(Relationship.load(path), large), "the file has changed")
            check(os.listdir(folder) == ["r"], f"left over: {os.listdir(folder)}")
    return counts


# --------------------------------------------------------------------------------------------------------- the program

# The tries of each attack at an effort of 1, which takes a few minutes.
ATTACKS: dict[Callable[[random.Random, int, Path], Counter[str]], int] = {
    killed_saves: 150,
    killed_passes: 150,
    failing_disks: 800,
    hostile_relationships: 8000,
    hostile_checkpoints: 4000,
    interruptions: 1500,
    memory_limits: 30,
}


def main(arguments: list[str] | None = None) -> int:
    names = [attack.__name__ for attack in ATTACKS]
    parser = argparse.ArgumentParser(prog="python -m tools.torture", description=__doc__.split("\n\n")[0])
    parser.add_argument("--effort", type=float, default=1.0, help="more or fewer tries than usual")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork has no threads but its own
    failures = 0
    for attack, tries in ATTACKS.items():
        if attack.__name__ not in options.only:
            continue
        begun = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="torture-"))
        try:
            counts = attack(random.Random(options.seed), max(2, round(tries * options.effort)), folder)
        except WrongError as error:
            failures += 1
            print(f"{attack.__name__}: FAILED: {error}")
            continue
        finally:
            shutil.rmtree(folder)
        print(f"{attack.__name__} ({time.monotonic() - begun:.0f} s)")
        for what, count in counts.items():
            print(f"    {count:6} {what}")
    print(f"{failures} of {len(options.only)} attacks found something" if failures else "nothing was found")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
