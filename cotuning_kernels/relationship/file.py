"""How a relationship lies on disk: a safetensors file that says what it is, and that notices when it was damaged.

The tensors are ``matrix`` and, when known, ``counts``. Everything else is text in the safetensors metadata:

    format     always ``cotuning_kernels.relationship``; a file without it is somebody else's
    version    of this layout; a reader refuses a newer one instead of guessing
    record     JSON: class names, how the relationship was learnt, the user's own metadata
    sha256     over the record and the tensors: a flipped bit in a probability is otherwise a silent wrong answer

The file is read into memory and never mapped: a mapped file that another process truncates would kill this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cotuning_kernels.atomic_file import write_atomically

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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record)
    metadata = {"format": FORMAT, "version": str(VERSION), "record": text, "sha256": _digest(text, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


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
    # No version ever has ten digits, and of thousands of them int() makes nothing.
    if isinstance(version, str) and version.isdecimal() and len(version) < 10 and int(version) > VERSION:
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
