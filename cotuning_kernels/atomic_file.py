"""Files that are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["remove_leftovers", "write_atomically"]

_TEMPORARY = ".cotuning-*.tmp"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write the file whole or not at all: an interrupted write leaves what was there before.

    Raises:
        IsADirectoryError, FileNotFoundError, OSError: the path cannot be written; what was there is untouched.
    """
    # A symbolic link keeps pointing where it did; os.replace on the link itself would put a file in its place.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a directory; give the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist, so {target.name} cannot be saved there; create it")
    # In the same directory, because os.replace is only atomic within one file system.
    temporary = target.parent / _TEMPORARY.replace("*", secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the new name on an empty file
        os.replace(temporary, target)
    except BaseException:  # KeyboardInterrupt too
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove what writes that were killed have left in a folder to which nobody else writes."""
    for path in directory.glob(_TEMPORARY):
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make the new name itself survive a power failure, where the system can; the data is already safe."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
