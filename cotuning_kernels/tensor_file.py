"""Tensors and a record in a file that names its format and reveals damage.

The file is a safetensors file, which any program can read without running code from it. Its metadata hold:

    format     the kind of file, for instance ``cotuning_kernels.relationship``; a reader refuses another kind
    version    of the format; a reader refuses a newer one instead of guessing
    record     JSON: everything that is no tensor
    sha256     over the record and the tensors: without it a flipped bit would give a wrong answer silently

The same content gives the same bytes in every process. This module writes the header, because safetensors' own writer
orders the metadata at random. Readers read the file into memory and never map it: truncating a mapped file in another
process would kill this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cotuning_kernels.atomic_file import write_atomically

__all__ = ["TensorFile"]

# Names of 21841 classes take 1 MB. The parser takes 28 bytes of memory for each byte of a hostile header.
_LONGEST_HEADER = 16 << 20
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorFile:
    """One kind of file: its marker, and the messages for a file that cannot be read.

    Attributes:
        format, version: the marker in the file.
        noun: what the file holds, with its article.
        if_foreign, if_damaged: advice for a file of another kind, and for a damaged one.
        error: raised for both.
    """

    format: str
    version: int
    noun: str
    if_foreign: str
    if_damaged: str
    error: type[Exception]

    def write(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the file whole or not at all: an interrupted write leaves the old file unchanged.

        Raises:
            ValueError: the header would be longer than a reader accepts (16 MiB).
            OSError: see :func:`cotuning_kernels.atomic_file.write_atomically`.
        """
        # The widest dtypes first, so that each tensor begins at a multiple of its element size.
        ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
        ordered = {name: tensor.detach().cpu().contiguous() for name, tensor in ordered.items()}
        text = json.dumps(record)
        header: dict[str, Any] = {
            "__metadata__": {
                "format": self.format, "version": str(self.version), "record": text, "sha256": _digest(text, ordered)
            }
        }  # fmt: skip
        end = 0
        for name, tensor in ordered.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        beginning = json.dumps(header, separators=(",", ":")).encode()
        beginning += b" " * (-len(beginning) % 8)
        if len(beginning) > _LONGEST_HEADER:
            raise ValueError(
                f"the names and the record of {os.fspath(path)} take {len(beginning)} bytes, expected at most "
                f"{_LONGEST_HEADER}; shorten the metadata"
            )
        write_atomically(path, len(beginning).to_bytes(8, "little"), beginning, *map(_bytes, ordered.values()))

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the record of a file that :meth:`write` made.

        Raises:
            FileNotFoundError, PermissionError, OSError: the file does not exist, or cannot be read.
            self.error: it is a directory, damaged, truncated, of another kind, or of a newer version.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {self.if_foreign}")
        if not path.is_file():
            raise self.error(f"{path} is not a regular file; {self.if_foreign}")
        with open(path, "rb") as file:
            metadata = self._read_metadata(path, file)
            # Check the marker first, to refuse a foreign checkpoint of many gigabytes without reading it.
            if metadata.get("format") != self.format:
                raise self.error(
                    f"{path} is a safetensors file, but not {self.noun} (format {metadata.get('format')!r:.80}, "
                    f"expected {self.format!r}); {self.if_foreign}"
                )
            self._check_version(path, metadata.get("version"))
            file.seek(0)
            content = file.read()
        text = metadata.get("record")
        try:
            tensors = safetensors.torch.load(content)
            digest = _digest(str(text), tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise self.error(f"{path} is damaged or truncated ({error}); {self.if_damaged}") from error
        if not isinstance(text, str) or metadata.get("sha256") != digest:
            raise self.error(f"{path} is damaged: its content does not match its checksum; {self.if_damaged}")
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{path} is damaged: its record is not JSON ({error}); {self.if_damaged}") from error
        if not isinstance(record, dict):
            raise self.error(
                f"{path} is damaged: its record is a {type(record).__name__}, not a table; {self.if_damaged}"
            )
        return tensors, record

    def _read_metadata(self, path: Path, file: BinaryIO) -> dict[str, Any]:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        size = os.fstat(file.fileno()).st_size
        if len(prefix) < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise self.error(
                f"{path} is not a safetensors file ({size} bytes, and the first 8 are not the length of a header of at "
                f"most {_LONGEST_HEADER}); {self.if_foreign}"
            )
        text = file.read(length)
        if len(text) < length:
            raise self.error(
                f"{path} is truncated or not a safetensors file: its header should be {length} bytes, but the whole "
                f"file has {size}; {self.if_damaged}"
            )
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(
                f"{path} is damaged or not a safetensors file: its header is not JSON ({error}); {self.if_damaged}"
            ) from error
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        return metadata if isinstance(metadata, dict) else {}

    def _check_version(self, path: Path, version: Any) -> None:
        if version == str(self.version):
            return
        # No version has ten digits, and int() rejects thousands of them.
        if isinstance(version, str) and version.isdecimal() and len(version) < 10 and int(version) > self.version:
            raise self.error(
                f"{path} has format version {version}, written by a newer cotuning_kernels; this one reads up to "
                f"{self.version}: pip install --upgrade cotuning_kernels"
            )
        raise self.error(
            f"{path} is damaged: its format version is {version!r:.80}, not {self.version}; {self.if_damaged}"
        )


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
