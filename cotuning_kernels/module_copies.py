"""Copies of classifiers: gathered if FSDP2 has sharded them, with the right number and names of classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["copy_of", "record_classes"]


def copy_of(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, with whole parameters and without the hooks of ``fully_shard``.

    Gathering sharded parameters is a collective operation: every process must call this.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _gather(module, memo)
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def _gather(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of the modules that FSDP2 has sharded into deepcopy's memo, inner modules first."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    managed = [each for each in module.modules() if isinstance(each, FSDPModule) or _MANAGED in each.__dict__]
    for each in managed:
        if isinstance(each, FSDPModule):
            each.reshard()
    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in memo:
            whole = parameter.full_tensor().detach().clone()
            memo[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
    for each in reversed(managed):
        if id(each) not in memo:
            memo[id(each)] = _without_fsdp(each, memo)


_MANAGED = "_is_fsdp_managed_module"


def _without_fsdp(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy as it would be before ``fully_shard`` changed its class and added hooks and records."""
    kind: Any = next(each for each in type(module).__mro__ if not _is_of_fsdp(each))
    plain: nn.Module = kind.__new__(kind)
    state = {
        name: type(value)((key, hook) for key, hook in value.items() if not _is_of_fsdp(hook))
        if name.endswith("_hooks") and isinstance(value, dict)
        else value
        for name, value in module.__dict__.items()
        if not name.startswith(("__composable_api", "_fsdp", _MANAGED))
    }
    memo[id(module)] = plain
    plain.__dict__.update(copy.deepcopy(state, memo))
    return plain


def _is_of_fsdp(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # the hook may be wrapped
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def record_classes(model: nn.Module, head: str, num_before: int, num_classes: int, names: Sequence[str] | None) -> None:
    """Write the number and the names of the classes where transformers and timm keep them.

    Only modules around the head are changed, and only records with as many classes as the head had before.
    """
    parts = head.split(".") if head else []
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    for module in around:
        for attribute in ("num_labels", "num_classes"):
            if getattr(module, attribute, None) == num_before:
                setattr(module, attribute, num_classes)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "id2label") and getattr(config, "num_labels", None) == num_before:
            labels = names or [f"LABEL_{i}" for i in range(num_classes)]
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
            if getattr(config, "problem_type", None) is not None:
                config.problem_type = "single_label_classification"
        timm: Any = getattr(module, "pretrained_cfg", None)
        if isinstance(timm, dict) and timm.get("num_classes") == num_before:
            timm = {name: value for name, value in timm.items() if not name.startswith("label_")}
            timm |= {"num_classes": num_classes} | ({"label_names": list(names)} if names else {})
            setattr(module, "pretrained_cfg", timm)  # noqa: B010  (of a module mypy knows tensors and modules alone)
