"""Atomic saves: which targets are replaced, the new file's owner and rights, and leftovers of killed saves."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cotuning_kernels import atomic_file
from cotuning_kernels.atomic_file import check_writable, remove, write_atomically
from support.scripts import run_script

AS_ROOT = os.geteuid() == 0


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -------------------------------------------------------------------------------------- targets that are not replaced


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # a second /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("write", [lambda path: write_atomically(path, b"new"), check_writable], ids=["write", "check"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (os.mkfifo, OSError, "is not a regular file"),
        (make_device, OSError, "is not a regular file"),
        (make_loop, OSError, "Too many levels of symbolic links"),
        (os.mkdir, IsADirectoryError, "is a directory; give the name of a file"),
    ],
)
def test_only_regular_files_are_replaced(
    write: Callable[[Path], None], make: Callable[[Path], None], error: type[OSError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "there"
    make(path)
    before = path.lstat()
    with pytest.raises(error, match=message):
        write(path)
    assert path.lstat() == before
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("make", [os.mkfifo, make_device])
def test_a_special_file_behind_a_link_is_not_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Uses own special files: with this fault, a test run as root would replace the machine's /dev/null."""
    make(tmp_path / "special")
    before = (tmp_path / "special").stat()
    (tmp_path / "link").symlink_to("special")
    with pytest.raises(OSError, match="link is not a regular file"):
        write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "special").stat() == before


def test_a_check_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r"
    check_writable(path)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    before = path.stat()
    check_writable(path)
    assert path.stat() == before
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, so r cannot be saved there; create it"):
        check_writable(tmp_path / "nowhere/r")


def test_pieces_follow_each_other_and_long_names_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    write_atomically(path, b"one ", memoryview(b"two"), b"")
    assert path.read_bytes() == b"one two"


# ------------------------------------------------------------------------------------ owner and rights of the new file


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400, 0o755])
def test_the_mode_is_kept(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.touch()
    path.chmod(mode)
    write_atomically(path, b"new")
    assert mode_of(path) == mode


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    path.touch(0o600)
    seen = []
    monkeypatch.setattr(os, "fchmod", lambda descriptor, mode: seen.append(os.fstat(descriptor)))
    write_atomically(path, b"secret")
    assert [(stat.S_IMODE(status.st_mode), status.st_size) for status in seen] == [(0o600, 6)]


@pytest.mark.skipif(not AS_ROOT, reason="only root gives files away")
def test_root_keeps_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.touch(0o640)
    os.chown(path, 1234, 5678)
    write_atomically(path, b"new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode_of(path)) == (1234, 5678, 0o640)


@pytest.mark.parametrize(("mode", "expected"), [(0o640, 0o600), (0o664, 0o644), (0o600, 0o600), (0o666, 0o666)])
def test_another_group_does_not_get_the_rights_of_the_old_one(
    mode: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, user: int, group: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "r"
    path.touch()
    path.chmod(mode)
    monkeypatch.setattr(os, "fchown", refuse)
    write_atomically(path, b"new")
    assert mode_of(path) == expected


# ---------------------------------------------------------------------------------------------------------- leftovers

NAME = re.compile(r"\.r\.[0-9a-f]{16}\.tmp")

# A child that writes in an endless loop is killed, many times.
_KILLED = """
import json, os, random, signal, sys, time
from cotuning_kernels.atomic_file import write_atomically
path, content = sys.argv[1], bytes(4 << 20)
random.seed(int(sys.argv[3]))
left = 0
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        while True:
            write_atomically(path, content)
    time.sleep(random.uniform(0.002, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left += len(os.listdir(os.path.dirname(path))) > os.path.exists(path)
most = len(os.listdir(os.path.dirname(path)))
write_atomically(path, content)
json.dump({"left": left, "most": most, "after": os.listdir(os.path.dirname(path))}, sys.stdout)
"""


def test_the_next_save_removes_what_killed_ones_left(tmp_path: Path, seed: int) -> None:
    done = run_script(_KILLED, str(tmp_path / "r"), "30", str(seed))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["left"] > 0  # kills that hit a save
    assert report["most"] <= 2  # leftovers do not accumulate
    assert report["after"] == ["r"]


def test_only_leftovers_of_the_same_target_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / ".r.0123456789abcdef.tmp"
    others = [
        tmp_path / name
        for name in (".s.0123456789abcdef.tmp", ".r.notes.tmp", ".r.0123456789abcdef.tmp.txt", "r.0123456789abcdef.tmp")
    ]
    for path in (mine, *others):
        path.write_bytes(b"half")
    write_atomically(tmp_path / "r", b"new")
    assert not mine.exists()
    assert all(path.exists() for path in others)
    mine.write_bytes(b"half")
    remove(tmp_path / "r")
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in others)
    remove(tmp_path / "r")  # the file does not exist


def test_a_link_and_a_pipe_with_the_name_of_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "important").write_bytes(b"mine")
    (tmp_path / ".r.0123456789abcdef.tmp").symlink_to("important")
    os.mkfifo(tmp_path / ".r.1123456789abcdef.tmp")  # opening it to write would wait for a reader
    write_atomically(tmp_path / "r", b"new")
    assert (tmp_path / "important").read_bytes() == b"mine"


def test_the_temporary_of_a_save_that_goes_on_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save of the same target starts and ends in the middle of the first."""
    path, fsync, nested = tmp_path / "r", os.fsync, []

    def save_in_between(descriptor: int) -> None:
        fsync(descriptor)
        if not nested:
            nested.append([name for name in os.listdir(tmp_path) if NAME.fullmatch(name)])
            write_atomically(path, b"second")

    monkeypatch.setattr(os, "fsync", save_in_between)
    write_atomically(path, b"first")
    assert len(nested[0]) == 1
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("moment", ["locked", "removed"])
def test_a_temporary_taken_for_a_leftover_before_it_is_locked(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a writer's open and its lock another save may lock and remove the new file."""
    path, flock, taken = tmp_path / "r", fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            (name,) = (name for name in os.listdir(tmp_path) if NAME.fullmatch(name))
            taken.append(os.open(tmp_path / name, os.O_RDWR))
            flock(taken[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if moment == "removed":
                os.unlink(tmp_path / name)
                os.close(taken[0])
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    if moment == "locked":
        os.close(taken[0])
        write_atomically(path, b"second")
    assert os.listdir(tmp_path) == ["r"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = tmp_path / ".r.0123456789abcdef.tmp"
    leftover.touch()
    write_atomically(tmp_path / "r", b"new")
    assert (tmp_path / "r").read_bytes() == b"new"
    assert leftover.exists()  # another save may be using it


_RACE = """
import os, sys
from cotuning_kernels.atomic_file import write_atomically
path, rounds = sys.argv[1], int(sys.argv[2])
os.fsync = lambda descriptor: None  # more saves a second
children = []
for which in b"abcd":
    child = os.fork()
    if child == 0:
        for _ in range(rounds):
            write_atomically(path, bytes([which]) * 100_000)
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""


def test_processes_that_save_the_same_target_at_once(tmp_path: Path) -> None:
    done = run_script(_RACE, str(tmp_path / "r"), "150")
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "r").read_bytes()
    assert content in {bytes([which]) * 100_000 for which in b"abcd"}
    assert os.listdir(tmp_path) == ["r"]


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A file size limit simulates it: the write itself fails."""
    path = tmp_path / "r"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(0o500)
    for write in (lambda: write_atomically(folder / "r", b"new"), lambda: check_writable(folder / "r")):
        with pytest.raises(PermissionError):
            write()


def test_planted_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock's check, and with another group's rights, the tests above fail."""
    monkeypatch.setattr(atomic_file, "_locked_file", lambda target, mode: _unlocked(target, mode))
    with pytest.raises(FileNotFoundError):
        test_the_temporary_of_a_save_that_goes_on_is_not_removed(tmp_path, monkeypatch)


def _unlocked(target: Path, mode: int) -> tuple[Path, int]:
    temporary = target.parent / f".{target.name}.{os.urandom(8).hex()}.tmp"
    return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
