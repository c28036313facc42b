"""Atomic writes: a file exists whole or not at all, whatever interrupts the writing.

The content goes to a temporary file beside the target, which is then renamed to the target. A killed process leaves its
temporary file, and the next save of the same target removes it. That save must not remove the temporary file of another
process that saves the same target at that moment. So every writer locks its temporary file (``flock``). The system
releases the lock when the process ends: a temporary file that can be locked is a leftover.
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

_LONGEST_STEM = 50  # characters of the target's name in a temporary file's name: a name may have 255 bytes


def write_atomically(path: str | os.PathLike[str], *pieces: bytes | memoryview) -> None:
    """Write the pieces, one after the other, as one file. An interrupted write leaves the old file unchanged.

    The new file gets the mode of the old one, and its owner and group where the system allows it. Where the group
    cannot be kept, the group gets no more permissions than others have: users who could not read the old file cannot
    read the new one.

    Raises:
        IsADirectoryError, FileNotFoundError, PermissionError, OSError: the path cannot be written, or is not a
            regular file (a device, a pipe, a loop of links). The old file is untouched.
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
    """Remove the file, if it exists, and the temporary files that killed writes of it left."""
    target = Path(os.path.realpath(path))
    Path(path).unlink(missing_ok=True)
    _remove_leftovers(target)


def _target(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """The file behind the path's symbolic links, and its ``stat`` if it exists."""
    try:
        before = os.stat(path)  # a loop of links raises OSError
    except FileNotFoundError:
        before = None
    # Write to the link's target: os.replace on the link itself would replace the link by a file.
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
    """A new locked file beside the target, removed at the end unless it was renamed."""
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
    """Lock a new file. False if another save took it for a leftover and has removed it, or is about to."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: no leftover is removed
        return True
    return os.fstat(descriptor).st_nlink > 0


def _copy_permissions(descriptor: int, before: os.stat_result) -> None:
    mode = before.st_mode & 0o777
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except OSError:  # only root may change the owner
        try:
            os.fchown(descriptor, -1, before.st_gid)
        except OSError:
            mode &= ~0o070 | (mode & 0o007) << 3
    os.fchmod(descriptor, mode)


def _stem(target: Path) -> str:
    return f".{target.name[:_LONGEST_STEM]}."


def _remove_leftovers(target: Path) -> None:
    """Remove the target's temporary files whose processes have ended."""
    pattern = re.compile(re.escape(_stem(target)) + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # another user's, locked, or already removed
                    _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path: str) -> None:
    # Do not follow a link, and do not wait for the other end of a pipe.
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Make the rename survive a power failure, where the system can. The data is already safe."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
