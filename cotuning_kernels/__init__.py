"""Co-Tuning (You, Kou, Long, Wang, NeurIPS 2020) in fused kernels: right, fast, and easy to put into a training loop.

Step 1 learns the category relationship ``R[t, s] = p(y_source = s | y_target = t)`` from a pretrained classifier
(:func:`learn_relationship`), step 2 fine-tunes with both heads (:class:`FusedCoTuningLoss`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cotuning_kernels import functional
from cotuning_kernels.functional import CoTuningMetrics, CoTuningTerms
from cotuning_kernels.loss import FusedCoTuningLoss, FusedLinearCoTuningLoss
from cotuning_kernels.targets import MixedTarget

if TYPE_CHECKING:
    from cotuning_kernels.calibration import TemperatureFit, expected_calibration_error, fit_temperature
    from cotuning_kernels.models import CoTuningFeatures, CoTuningLogits, CoTuningModel
    from cotuning_kernels.relationship import Relationship, RelationshipEstimator
    from cotuning_kernels.relationship.learn import learn_relationship
    from cotuning_kernels.relationship.reverse import learn_reverse_relationship
    from cotuning_kernels.transfer_scores import Transferability, transferability

__version__ = "0.2.0"

# Imported when first used: a training loop that only needs the loss does not load them.
_LAZY = {
    "CoTuningFeatures": "models",
    "CoTuningLogits": "models",
    "CoTuningModel": "models",
    "Relationship": "relationship",
    "RelationshipEstimator": "relationship",
    "TemperatureFit": "calibration",
    "expected_calibration_error": "calibration",
    "fit_temperature": "calibration",
    "learn_relationship": "relationship.learn",
    "learn_reverse_relationship": "relationship.reverse",
    "Transferability": "transfer_scores",
    "transferability": "transfer_scores",
}

__all__ = [
    "CoTuningFeatures",
    "CoTuningLogits",
    "CoTuningMetrics",
    "CoTuningModel",
    "CoTuningTerms",
    "FusedCoTuningLoss",
    "FusedLinearCoTuningLoss",
    "MixedTarget",
    "Relationship",
    "RelationshipEstimator",
    "TemperatureFit",
    "Transferability",
    "expected_calibration_error",
    "fit_temperature",
    "functional",
    "learn_relationship",
    "learn_reverse_relationship",
    "transferability",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
