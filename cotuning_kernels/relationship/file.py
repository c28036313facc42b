"""The file of a relationship: a :class:`~cotuning_kernels.tensor_file.TensorFile` with the tensors ``matrix`` and,
when known, ``counts``.

The record has the class names, how the relationship was learnt, and the user's own metadata.
"""

from __future__ import annotations

from cotuning_kernels.tensor_file import TensorFile

__all__ = ["RELATIONSHIP_FILE", "RelationshipFileError"]


class RelationshipFileError(ValueError):
    """The file is not a relationship, is damaged, or was written by a newer version. The message names the path."""


RELATIONSHIP_FILE = TensorFile(
    format="cotuning_kernels.relationship",
    version=1,
    noun="a relationship",
    if_foreign="give a file that Relationship.save wrote",
    if_damaged="learn the relationship again, or take the file from a copy",
    error=RelationshipFileError,
)
