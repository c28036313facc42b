"""Which families of timm ``CoTuningModel.from_classifier`` takes: the list in docs/limits.md comes from here.

A family is a module of ``timm.models``. One model of each is built without memory (on the meta device), so no forward
pass runs and no weights are downloaded.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import cotuning_kernels as ck
from support.paths import ROOT

REFUSED = {
    "crossvit": "CrossViT",
    "efficientformer": "EfficientFormer",
    "efficientformer_v2": "its second version",
    "efficientvim": "EfficientViM",
    "levit": "LeViT",
    "repvit": "RepViT",
    "swiftformer": "SwiftFormer",
}
"""Families whose output combines several heads, with their names in docs/limits.md."""
REFUSED_MODELS = {
    "deit_tiny_distilled_patch16_224": "DeiT",
    "iformer_m_distilled": "iFormer",
    "pit_ti_distilled_224": "PiT",
}
"""A distilled model of each family that has models of both kinds."""


def _refusal(name: str) -> str | None:
    """Why the model is refused, or ``None``."""
    timm = pytest.importorskip("timm", reason="pip install timm")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about shapes on the meta device
        classifier = timm.create_model(name, pretrained=False, num_classes=13)
    try:
        model = ck.CoTuningModel.from_classifier(classifier, 5, copy=False)
    except ValueError as error:
        return str(error)
    assert getattr(model.source_head, "out_features", 13) == 13, name
    return None


def test_the_families_of_timm_that_are_refused_are_those_of_the_docs() -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    families = {module: timm.list_models(module=module) for module in timm.list_modules()}
    smallest = {family: min(names, key=lambda name: (len(name), name)) for family, names in families.items() if names}
    refusals = {family: reason for family, name in smallest.items() if (reason := _refusal(name)) is not None}
    assert refusals.keys() == REFUSED.keys()
    assert not [name for name in REFUSED_MODELS if _refusal(name) is None]
    for reason in refusals.values():
        assert "classifiers that combine several heads in their output" in reason

    limits = " ".join((ROOT / "docs" / "limits.md").read_text().split())
    stated = re.search(r"Of timm's (\d+) families \(([\d.]+)\), (\d+) are taken", limits)
    assert stated is not None
    assert stated.groups() == (str(len(smallest)), timm.__version__, str(len(smallest) - len(refusals)))
    sentence = limits[stated.end() : limits.index("Auxiliary heads")]
    assert not [name for name in [*REFUSED.values(), *REFUSED_MODELS.values()] if name not in sentence]
