"""How a relationship lies on disk: a safetensors file that says what it is, and that notices when it was damaged.

The tensors are ``matrix`` and, when known, ``counts``. Everything else is text in the safetensors metadata:

    format     always ``cotuning_kernels.relationship``; a file without it is somebody else's
    version    of this layout; a reader refuses a newer one instead of guessing
    record     JSON: class names, how the relationship was learnt, the user's own metadata
    sha256     over the record and the tensors: a flipped bit in a probability is otherwise a silent wrong answer

The file is read into memory and never mapped: a mapped file that another process truncates would kill this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

__all__ = ["RelationshipFileError", "read", "write"]

FORMAT = "cotuning_kernels.relationship"
VERSION = 1
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors format itself
_MEND = "learn the relationship again, or take the file from a copy"


class RelationshipFileError(ValueError):
    """The file is not a relationship, is damaged, or was written by a newer version. The message names the path."""


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write the file whole or not at all: an interrupted write leaves what was there before.

    Raises:
        IsADirectoryError, FileNotFoundError, OSError: the path cannot be written; what was there is untouched.
    """
    # A symbolic link keeps pointing where it did; os.replace on the link itself would put a file in its place.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a directory; give the name of a file, ending in .safetensors")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist, so {target.name} cannot be saved there; create it")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record)
    metadata = {"format": FORMAT, "version": str(VERSION), "record": text, "sha256": _digest(text, tensors)}
    content = safetensors.torch.save(tensors, metadata)

    # In the same directory, because os.replace is only atomic within one file system.
    temporary = target.parent / f".cotuning-{secrets.token_hex(8)}.tmp"
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


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file that :func:`write` made.

    Raises:
        FileNotFoundError: there is no such file.
        RelationshipFileError: it is a directory, damaged, truncated, foreign, or of a newer version.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; save a relationship there first with Relationship.save(path)")
    if not path.is_file():
        raise RelationshipFileError(f"{path} is not a regular file; give the file that Relationship.save wrote")
    with open(path, "rb") as file:
        beginning, metadata = _read_header(path, file)
        # The marker comes first: a foreign checkpoint of many gigabytes is refused without reading it.
        if metadata.get("format") != FORMAT:
            raise RelationshipFileError(
                f"{path} is a safetensors file, but not a relationship (format {metadata.get('format')!r:.80}, "
                f"expected {FORMAT!r}); give a file that Relationship.save wrote"
            )
        _check_version(path, metadata.get("version"))
        content = beginning + file.read()
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise RelationshipFileError(f"{path} is damaged or truncated ({error}); {_MEND}") from error
    text = metadata.get("record")
    if text is None or metadata.get("sha256") != _digest(text, tensors):
        raise RelationshipFileError(f"{path} is damaged: its content does not match its checksum; {_MEND}")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RelationshipFileError(f"{path} is damaged: its record is not JSON ({error}); {_MEND}") from error
    if not isinstance(record, dict):
        raise RelationshipFileError(f"{path} is damaged: its record is a {type(record).__name__}, not a table; {_MEND}")
    return tensors, record


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The bytes up to the tensors, and the metadata in them."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    size = os.fstat(file.fileno()).st_size
    if len(prefix) < 8 or not 2 <= length <= _LONGEST_HEADER:
        raise RelationshipFileError(
            f"{path} is not a safetensors file ({size} bytes, and the first 8 are not the length of a header); "
            "give a file that Relationship.save wrote"
        )
    text = file.read(length)
    if len(text) < length:
        raise RelationshipFileError(
            f"{path} is truncated or not a safetensors file: its header should be {length} bytes, but the whole file "
            f"has {size}; {_MEND}"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RelationshipFileError(
            f"{path} is damaged or not a safetensors file: its header is not JSON ({error}); {_MEND}"
        ) from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return prefix + text, metadata if isinstance(metadata, dict) else {}


def _check_version(path: Path, version: Any) -> None:
    if version == str(VERSION):
        return
    if isinstance(version, str) and version.isdecimal() and int(version) > VERSION:
        raise RelationshipFileError(
            f"{path} has format version {version}, written by a newer cotuning_kernels; this one reads up to "
            f"{VERSION}: pip install --upgrade cotuning_kernels"
        )
    raise RelationshipFileError(f"{path} is damaged: its format version is {version!r:.80}, not {VERSION}; {_MEND}")


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    """Make the new name itself survive a power failure, where the system can; the data is already safe."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
