"""Files that are there whole or not at all, whatever interrupts the writing.

The content goes to a temporary file beside the target, which then takes the target's name. A process that is killed
in between leaves its temporary. The next save of the same target removes it, and must not remove the temporary of
another process that saves the same target at that moment: every writer holds a lock on its own (``flock``), which the
system releases when the process ends, so a temporary that can be locked belongs to no one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_writable", "remove", "write_atomically"]

_LONGEST_STEM = 50  # of a temporary's name, in characters: file systems allow 255 bytes a name


def write_atomically(path: str | os.PathLike[str], *pieces: bytes | memoryview) -> None:
    """Write the pieces, one after the other, as one file: an interrupted write leaves what was there before.

    A file that is replaced keeps its mode, and its owner and group where the system allows it. A group that cannot be
    kept loses what others may not do either, so that no one can read the new file who could not read the old one.

    Raises:
        IsADirectoryError, FileNotFoundError, PermissionError, OSError: the path cannot be written, or it is no regular
            file (a device, a pipe, a loop of links); what was there is untouched.
    """
    target, before = _target(path)
    with _temporary(target, private=before is not None) as (temporary, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            for piece in pieces:
                file.write(piece)
        if before is not None:
            _copy_permissions(descriptor, before)
        os.fsync(descriptor)  # or a power failure could leave the new name on an empty file
        os.replace(temporary, target)
    _sync_directory(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what :func:`write_atomically` would raise at once, without changing the file.

    Raises:
        IsADirectoryError, FileNotFoundError, PermissionError, OSError: as :func:`write_atomically`.
    """
    with _temporary(_target(path)[0], private=True):
        pass


def remove(path: str | os.PathLike[str]) -> None:
    """Remove the file, if it exists, and the temporaries of killed writes of it."""
    target = Path(os.path.realpath(path))
    Path(path).unlink(missing_ok=True)
    _remove_leftovers(target)


def _target(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """The file that a path stands for, behind symbolic links, and what is known of it if it exists."""
    try:
        before = os.stat(path)  # of a loop of links: OSError
    except FileNotFoundError:
        before = None
    # A symbolic link keeps pointing where it did; os.replace on the link itself would put a file in its place.
    target = Path(os.path.realpath(path))
    if before is None:
        if not target.parent.is_dir():
            where = target.parent
            raise FileNotFoundError(f"{where} does not exist, so {target.name} cannot be saved there; create it")
    elif stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(f"{os.fspath(path)} is a directory; give the name of a file")
    elif not stat.S_ISREG(before.st_mode):
        raise OSError(
            f"{os.fspath(path)} is not a regular file (but a device, pipe or socket); give the name of a file"
        )
    return target, before


@contextlib.contextmanager
def _temporary(target: Path, private: bool) -> Iterator[tuple[Path, int]]:
    """A new locked file beside the target, removed at the end unless it has got another name."""
    _remove_leftovers(target)
    temporary, descriptor = _locked_file(target, 0o600 if private else 0o666)
    try:
        yield temporary, descriptor
    finally:  # also after KeyboardInterrupt
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _locked_file(target: Path, mode: int) -> tuple[Path, int]:
    while True:
        # In the same directory, because os.replace is only atomic within one file system.
        temporary = target.parent / f"{_stem(target)}{secrets.token_hex(8)}.tmp"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            if _lock(descriptor):
                return temporary, descriptor
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a new file; False where another save has taken it for a leftover, and has removed it or is about to."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where no leftover is removed
        return True
    return os.fstat(descriptor).st_nlink > 0


def _copy_permissions(descriptor: int, before: os.stat_result) -> None:
    mode = before.st_mode & 0o777
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except OSError:  # only root gives files away
        try:
            os.fchown(descriptor, -1, before.st_gid)
        except OSError:
            mode &= ~0o070 | (mode & 0o007) << 3
    os.fchmod(descriptor, mode)


def _stem(target: Path) -> str:
    return f".{target.name[:_LONGEST_STEM]}."


def _remove_leftovers(target: Path) -> None:
    """Remove the temporaries of the target whose processes are gone."""
    pattern = re.compile(re.escape(_stem(target)) + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # somebody else's, locked, or gone already
                    _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path: str) -> None:
    # Not to follow a link, and not to wait for the other end of a pipe.
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Make the new name itself survive a power failure, where the system can; the data is already safe."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
