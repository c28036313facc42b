"""Step 1 of Co-Tuning: the category relationship, how it is learnt, and its file.

``matrix`` has the relationship itself, ``estimator`` the direct method, ``reverse`` the paper's other method and
``file`` the format on disk. ``learn`` has the one call that learns a relationship from a model and a loader; ``passes``
runs the model over the loader.
"""

from __future__ import annotations

from cotuning_kernels.relationship.estimator import RelationshipEstimator
from cotuning_kernels.relationship.file import RelationshipFileError
from cotuning_kernels.relationship.matrix import Relationship

__all__ = ["Relationship", "RelationshipEstimator", "RelationshipFileError"]
