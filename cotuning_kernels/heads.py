"""Finds the head of a classifier, and has the module that holds two heads in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn

__all__ = ["TwoHeads", "auxiliary_heads", "find_head", "is_head_layer", "new_head", "replace"]

COMBINED = (
    "classifiers that combine several heads in their output, as distilled and ensemble models do, are not supported"
)


class TwoHeads(nn.Module):
    """Both heads over the same features: ``(..., N_s + N_t, ...)`` along the class dimension.

    With ``bounds_source``, in training, the source head's gradient at the features is at most as large as the target
    head's (:class:`_BoundSource`). With ``gives_features``, in training, the result is not logits, but the features
    twice, side by side: those that the source head would read, then those for the target head.
    """

    gives_features = False

    def __init__(self, source_head: nn.Module, target_head: nn.Module, bounds_source: bool = False) -> None:
        super().__init__()
        self.bounds_source = bounds_source
        source_layer, target_layer = _last_layer(source_head, "source_head"), _last_layer(target_head, "target_head")
        if isinstance(source_layer, nn.Linear) != isinstance(target_layer, nn.Linear):
            raise ValueError(
                f"source_head ends in {_describe(source_layer)} and target_head in {_describe(target_layer)}: both "
                "must be linear or both convolutional, so that their outputs lie side by side"
            )
        self.source_head = source_head
        self.target_head = target_head
        self.num_source_classes = _num_classes(source_layer)
        self.num_target_classes = _num_classes(target_layer)
        self.class_dim = -1 if isinstance(source_layer, nn.Linear) else 1

    def require_linear(self) -> tuple[nn.Linear, nn.Linear]:
        """Both heads, if each is a single linear layer on features of the same width.

        Raises:
            TypeError: a head is something else.
        """
        heads = self.source_head, self.target_head
        if not all(isinstance(head, nn.Linear) for head in heads) or len({head.in_features for head in heads}) > 1:
            raise TypeError(
                f"linear=True needs two nn.Linear heads on the same features, got {_describe(heads[0])} and "
                f"{_describe(heads[1])}"
            )
        return heads  # type: ignore[return-value]

    # Some classifiers read their head's weight, for its dtype or for a product: they get that of both heads.
    @property
    def weight(self) -> Tensor:
        """``(N_s + N_t, features)``, if both heads are single layers."""
        return torch.cat([cast(Tensor, head.weight) for head in (self.source_head, self.target_head)])

    @property
    def bias(self) -> Tensor | None:
        """``(N_s + N_t,)``, if both heads are single layers."""
        biases = [cast(Tensor, head.bias) for head in (self.source_head, self.target_head) if head.bias is not None]
        return torch.cat(biases) if biases else None

    @property
    def out_features(self) -> int:
        """``N_s + N_t``."""
        return self.num_source_classes + self.num_target_classes

    def forward(self, features: Tensor) -> Tensor:
        """Logits of both heads, ``N_s + N_t`` of them along the class dimension."""
        for_source, for_target = features, features
        if self.bounds_source and self.training and features.requires_grad and torch.is_grad_enabled():
            for_source, for_target = _BoundSource.apply(features, _processes())
        if self.gives_features and self.training:
            return torch.cat([for_source, for_target], dim=-1)
        source_logits, target_logits = self.source_head(for_source), self.target_head(for_target)
        for name, logits, classes in (
            ("source_head", source_logits, self.num_source_classes),
            ("target_head", target_logits, self.num_target_classes),
        ):
            if logits.shape[self.class_dim] != classes:
                raise ValueError(
                    f"{name} gave an output of shape {tuple(logits.shape)}, expected {classes} classes in dimension "
                    f"{self.class_dim}, as its last layer has"
                )
        return torch.cat([source_logits, target_logits], dim=self.class_dim)


class _BoundSource(torch.autograd.Function):
    r"""The features, once for each head; their gradient is the target head's plus the source head's, bounded.

    With the heads' gradients :math:`g_s` (which includes the trade-off) and :math:`g_t`, the features' gradient is

    .. math:: g_t + \min(1, |g_t| / |g_s|) \, g_s

    A pretrained head has large weights and may send gradients into the backbone that are many times those of the new
    head, which destroys it. Both gradients exist in a backward pass anyway, so the bound costs two norms and no wait
    for a device. It does not depend on the scale of the loss. If the target head has no gradient at all, as in a loss
    of the source logits alone, there is no bound.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        return features.view_as(features), features.view_as(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.group = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, source: Tensor | None, target: Tensor | None) -> tuple[Tensor | None, None]:
        if source is None or target is None:
            return source if target is None else target, None
        dtype = torch.promote_types(source.dtype, torch.float32)
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in (source, target)])
        if ctx.group is not None:  # norms over the rows of all processes, so that all use the same factor
            squares = norms.square()
            torch.distributed.all_reduce(squares, group=ctx.group)
            norms = squares.sqrt()
        source_norm, target_norm = norms.unbind()
        bounded = (target_norm > 0) & (source_norm > target_norm)
        factor = torch.where(bounded, target_norm / source_norm, 1.0)
        return target + source * factor.to(source.dtype), None


def _processes() -> Any:
    """The process group of the ``DistributedDataParallel`` that is calling, or ``None``."""
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return None
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return None if ddp is None or ddp.process_group.size() == 1 else ddp.process_group


HeadLayer: TypeAlias = nn.Linear | nn.Conv2d


def is_head_layer(module: object) -> TypeGuard[HeadLayer]:
    """Whether this is a layer that gives logits: linear, or a convolution that is linear at each place."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _num_classes(layer: HeadLayer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _num_inputs(layer: HeadLayer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"Linear {layer.in_features} -> {layer.out_features}"
    if isinstance(layer, nn.Conv2d):
        return f"{layer.kernel_size[0]}x{layer.kernel_size[1]} Conv2d {layer.in_channels} -> {layer.out_channels}"
    return type(layer).__name__


def _last_layer(head: nn.Module, name: str) -> HeadLayer:
    """The layer whose outputs are the head's classes: its last linear layer or 1x1 convolution."""
    layers = [module for module in head.modules() if is_head_layer(module)]
    if not layers:
        raise TypeError(
            f"{name} is {_describe(head)}, expected nn.Linear, a 1x1 nn.Conv2d, or a module that ends in one of them"
        )
    return layers[-1]


def new_head(layer: HeadLayer, num_classes: int) -> nn.Module:
    """A fresh layer that reads what ``layer`` reads."""
    bias, device, dtype = layer.bias is not None, layer.weight.device, layer.weight.dtype
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, num_classes, bias=bias, device=device, dtype=dtype)
    return nn.Conv2d(layer.in_channels, num_classes, kernel_size=1, bias=bias, device=device, dtype=dtype)


def find_head(classifier: nn.Module, head: str | None, *, checked_later: bool) -> str:
    """Dotted name of the classifier's head.

    Args:
        classifier: the module.
        head: its name, or ``None`` to find it.
        checked_later: whether the outputs with two heads will be compared with the classifier's own. That tells layers
            that are used in training only from heads that are combined.

    Raises:
        TypeError, ValueError: there is no head or more than one; the message lists the candidates.
    """
    modules: dict[str, nn.Module] = dict(classifier.named_modules())
    layers: dict[str, HeadLayer] = {name: module for name, module in modules.items() if is_head_layer(module)}
    name = (
        _named_head(classifier, head, modules, layers) if head is not None else _own_head(classifier, modules, layers)
    )
    beside = [
        (other, layer)
        for other, layer in layers.items()
        if layer is not layers[name] and _is_beside(layer, layers[name]) and not _is_auxiliary(other)
    ]
    if beside and not checked_later:
        raise ValueError(
            f"{type(classifier).__name__} has other layers of {_num_classes(layers[name])} classes beside the head "
            f"{name!r}: {_list_layers(beside)}; {COMBINED}. If they serve training alone, pass a batch as "
            "example_input=, with which that is checked"
        )
    return name


def _named_head(
    classifier: nn.Module, head: str, modules: Mapping[str, nn.Module], layers: Mapping[str, HeadLayer]
) -> str:
    listed = _list_layers(list(layers.items())[-8:])
    if head not in modules:
        raise ValueError(f"head={head!r} names no module of {type(classifier).__name__}; its last layers: {listed}")
    if head not in layers:
        raise TypeError(
            f"head={head!r} is {_describe(modules[head])}, expected nn.Linear or a 1x1 nn.Conv2d with stride 1; "
            f"the last ones of {type(classifier).__name__}: {listed}"
        )
    return head


def _own_head(classifier: nn.Module, modules: dict[str, nn.Module], layers: dict[str, HeadLayer]) -> str:
    """The result of ``get_classifier()`` (timm) or its last layer, else the last layer of the classifier."""
    get_classifier = getattr(classifier, "get_classifier", None)
    if callable(get_classifier):
        own = get_classifier()
        if isinstance(own, list | tuple | nn.ModuleList | nn.ModuleDict) and len(own) > 1:
            raise ValueError(
                f"{type(classifier).__name__}.get_classifier() returns {type(own).__name__}, expected one head; "
                f"{COMBINED}"
            )
        # Some heads are modules that end in the layer with the classes.
        inside = {id(module) for module in own.modules()} if isinstance(own, nn.Module) else set()
        listed = _list_layers(list(layers.items())[-8:])
        modules = {name: module for name, module in modules.items() if id(module) in inside}
        layers = {name: module for name, module in layers.items() if id(module) in inside}
        if not layers:
            raise ValueError(
                f"{type(classifier).__name__}.get_classifier() returns {type(own).__name__}, expected nn.Linear, a 1x1 "
                "nn.Conv2d, or a module that ends in one: was the model made without a classifier (num_classes=0)? "
                f"Else name one with head=: {listed}"
            )
        for name, module in layers.items():
            if module is own:
                return name

    if not layers:
        raise ValueError(
            f"{type(classifier).__name__} has no head: no nn.Linear and no 1x1 nn.Conv2d in it. Build the model from "
            "its parts instead: CoTuningModel(backbone, source_head, target_head)"
        )
    name, last = list(layers.items())[-1]
    rivals = [
        (other, layer)
        for other, layer in layers.items()
        if layer is last or (_is_alike(layer, last) and not _is_auxiliary(other))
    ]
    # A head ends the network: a candidate with later layers that have weights is no head.
    # A parametrized head (weight_norm) has its weights in submodules, which do not count as later layers.
    *_, ending = (module for module in modules.values() if module._parameters)
    if len(rivals) > 1 or all(module is not ending for module in last.modules()):
        choice = _list_layers(rivals if len(rivals) > 1 else list(layers.items())[-8:])
        raise ValueError(
            f"the head of {type(classifier).__name__} is ambiguous; name it with head=, one of: {choice} ({COMBINED})"
        )
    return name


def _is_alike(layer: HeadLayer, head: HeadLayer) -> bool:
    """Whether both give the same number of classes in the same dimension."""
    return isinstance(layer, nn.Linear) == isinstance(head, nn.Linear) and _num_classes(layer) == _num_classes(head)


def _is_beside(layer: HeadLayer, head: HeadLayer) -> bool:
    """Whether a layer may be a second head. A layer that the head itself could read counts as hidden."""
    return _is_alike(layer, head) and _num_inputs(head) != _num_classes(layer)


def _is_auxiliary(name: str) -> bool:
    """Whether a layer's name says that it is for training only: ``AuxLogits.fc``, ``aux1.fc2``, ``auxiliary_head``."""
    return any(part.lower().startswith("aux") for part in name.split("."))


def auxiliary_heads(classifier: nn.Module, head: nn.Module) -> list[HeadLayer]:
    """The layers of auxiliary heads: those with such a name and as many classes as the head."""
    return [
        layer
        for name, layer in classifier.named_modules()
        if is_head_layer(layer) and is_head_layer(head) and layer is not head
        and _is_alike(layer, head) and _is_auxiliary(name)
    ]  # fmt: skip


def _list_layers(layers: list[tuple[str, HeadLayer]]) -> str:
    return ", ".join(f"{name!r} ({_describe(layer)})" for name, layer in layers) or "none"


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is registered in ``network``, under every name; returns the network."""
    if network is old:
        return new
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would hide a second name
            if child is old:
                setattr(parent, name, new)
    return network
