"""Co-Tuning models: one backbone, the pretrained source head and a new target head, in one pass.

Any pretrained classifier becomes a Co-Tuning model without being rewritten::

    model = CoTuningModel.from_classifier(torchvision.models.resnet50(weights="DEFAULT"), num_target_classes=200)
    source_logits, target_logits = model(images)

How it works: the classifier's last layer is replaced, where it stands, by a module that holds both heads and returns
``concatenate(source logits, target logits)`` along the class dimension. Whatever the classifier does before its head
(pooling, dropout, flattening) and after it (ReLU and pooling over a convolutional head, picking one token, wrapping
the result in a dictionary) then happens to both at once, and the result is cut in two at the very end. Nothing is
remembered between calls, so threads, ``torch.compile``, ``copy.deepcopy`` and pickle need no special care.
"""

from __future__ import annotations

import copy as copying
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cotuning_kernels.calling import call, evaluating, logits_in

__all__ = ["CoTuningLogits", "CoTuningModel"]


class CoTuningLogits(NamedTuple):
    """What a :class:`CoTuningModel` returns; unpacks as ``source_logits, target_logits``."""

    source_logits: Tensor
    """``(B, N_s)``, over the classes that the classifier was pretrained on."""
    target_logits: Tensor
    """``(B, N_t)``, over the classes of the new task."""


class CoTuningModel(nn.Module):
    """A backbone with two heads; ``forward`` returns :class:`CoTuningLogits` from one pass through the backbone.

    Args:
        backbone: gives the features that both heads read.
        source_head: the pretrained head, ``N_s`` classes. ``nn.Linear``, a 1x1 ``nn.Conv2d``, or a module that ends in
            one of them.
        target_head: the new head, ``N_t`` classes, of the same kind.

    Use :meth:`from_classifier` when the pretrained model is one module, as those of timm, torchvision and transformers.

    Raises:
        TypeError: an argument is not a module, or no class dimension can be found in a head.
        ValueError: one head is convolutional and the other is not.
    """

    def __init__(self, backbone: nn.Module, source_head: nn.Module, target_head: nn.Module) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("source_head", source_head), ("target_head", target_head)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {type(module).__name__}, expected a torch.nn.Module")
        heads = _TwoHeads(source_head, target_head)
        self.network: nn.Module = nn.Sequential(OrderedDict(backbone=backbone, heads=heads))
        self.num_source_classes = heads.num_source_classes
        self.num_target_classes = heads.num_target_classes
        self._class_dim = heads.class_dim

    @classmethod
    def from_classifier(
        cls,
        classifier: nn.Module,
        num_target_classes: int,
        *,
        head: str | None = None,
        example_input: Tensor | Mapping[str, Any] | None = None,
        copy: bool = True,
    ) -> CoTuningModel:
        """Wrap a pretrained classifier: its head stays as the source head, a fresh head stands beside it.

        Args:
            classifier: any module whose output is logits ``(B, N_s)``, or has them as ``.logits``, as ``["logits"]`` or
                as the first item of a tuple. Its head is an ``nn.Linear``, or a 1x1 ``nn.Conv2d`` as in SqueezeNet.
            num_target_classes: ``N_t``, at least 1.
            head: dotted name of the head in the classifier, e.g. ``"fc"`` or ``"classifier.1"``. Left out, it is what
                ``classifier.get_classifier()`` returns (timm) or its last layer, else the last layer of the classifier.
            example_input: a batch (a mapping is passed as keyword arguments). With it, the wrapped model's source
                logits are compared with the classifier's own once, in evaluation mode. This finds a wrong head, and a
                classifier that mixes its classes after the head (a softmax), which cannot be seen otherwise.
            copy: with ``True`` the classifier is copied and stays as it is. ``False`` saves the memory: the classifier
                itself is taken over, and must not be used by itself any more.

        The target head is initialised as PyTorch does (``torch.manual_seed`` repeats it), in the dtype and on the
        device of the source head. What is new is in training mode if ``classifier`` is; every module of the classifier
        keeps its own mode, such as a BatchNorm layer that was frozen with ``eval()``.

        Raises:
            TypeError: ``classifier`` is not a module, or ``head`` names something that is neither layer.
            ValueError: ``num_target_classes`` is below 1, no head is found, ``head`` names nothing, more than one layer
                could be the head (the message lists the candidates), ``example_input`` is empty, or the check with it
                fails.
        """
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier is {type(classifier).__name__}, expected a torch.nn.Module")
        if isinstance(num_target_classes, bool) or not isinstance(num_target_classes, int) or num_target_classes < 1:
            raise ValueError(f"num_target_classes is {num_target_classes!r}, expected an integer of at least 1")
        head_name = _find_head(classifier, head)
        network = copying.deepcopy(classifier) if copy else classifier
        source_head = network.get_submodule(head_name)
        assert _is_head_layer(source_head)  # _find_head gives no other
        expected = None if example_input is None else _evaluate(network, example_input)
        if expected is not None and expected.numel() == 0:
            raise ValueError(
                f"example_input gives logits of shape {tuple(expected.shape)}, which are none to compare: give a batch "
                "of at least one sample"
            )
        own_modules = {id(module) for module in network.modules()}
        model = cls(nn.Identity(), source_head, _new_head(source_head, num_target_classes))
        heads = model.heads
        model.network = _replace(network, source_head, heads)
        for module in model.modules():
            if id(module) not in own_modules:
                module.training = classifier.training
        if example_input is not None and expected is not None:
            try:
                _check_source_logits(_evaluate(model, example_input), expected, head_name)
            except Exception:
                _replace(network, heads, source_head)  # matters where the classifier was not copied
                raise
        return model

    def forward(self, *args: Any, **kwargs: Any) -> CoTuningLogits:
        """``(source_logits (B, N_s), target_logits (B, N_t))``; the arguments are the classifier's own.

        A model whose output keeps further dimensions keeps them here: ``(B, T, N_s)`` for logits a token, ``(B, N_s, H,
        W)`` for a convolutional head that is not pooled. Both results are views of one tensor.
        """
        logits = _logits(self.network(*args, **kwargs))
        dim = self._class_dim
        if logits.shape[dim] != self.num_source_classes + self.num_target_classes:
            raise ValueError(
                f"the classifier turned the {self.num_source_classes} source and {self.num_target_classes} target "
                f"classes of its two heads into an output of shape {tuple(logits.shape)}: it does something to its "
                "head's output that both heads cannot share. Name another layer with head=, or build the model from "
                "its parts: CoTuningModel(backbone, source_head, target_head)"
            )
        return CoTuningLogits(
            logits.narrow(dim, 0, self.num_source_classes),
            logits.narrow(dim, self.num_source_classes, self.num_target_classes),
        )

    @property
    def heads(self) -> _TwoHeads:
        """The module that stands where the classifier's head stood."""
        return next(module for module in self.network.modules() if isinstance(module, _TwoHeads))

    @property
    def source_head(self) -> nn.Module:
        """The pretrained head."""
        return self.heads.source_head

    @property
    def target_head(self) -> nn.Module:
        """The new head."""
        return self.heads.target_head

    def param_groups(
        self, lr: float, *, new_head_multiplier: float = 10.0, weight_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups as in the paper: backbone and source head at ``lr``, the new head at ten times that.

        ``torch.optim.SGD(model.param_groups(1e-3), momentum=0.9)``. Each parameter is in one group exactly, also where
        the source head shares its weight with the backbone (tied embeddings). What the new head shares with either is
        pretrained, and at ``lr`` like the rest of it. Parameters with ``requires_grad=False`` are left out, and so is
        a group that has none left. Each group carries its ``"name"``: ``"backbone"``, ``"source_head"`` or
        ``"target_head"``.

        Raises:
            ValueError: a rate, multiplier or decay is negative or not finite.
        """
        for name, value in (("lr", lr), ("new_head_multiplier", new_head_multiplier), ("weight_decay", weight_decay)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a finite number that is not negative")
        # named_modules goes past what its memo holds: this is the network without its two heads.
        backbone = [module for _, module in self.network.named_modules(memo={self.heads})]
        pretrained = {id(p) for module in backbone for p in module.parameters(recurse=False)}
        pretrained |= {id(p) for p in self.source_head.parameters()}
        grouped: set[int] = set()
        groups: list[dict[str, Any]] = []
        # The heads first: what is left over is the backbone.
        for name, module, rate in (
            ("target_head", self.target_head, lr * new_head_multiplier),
            ("source_head", self.source_head, lr),
            ("backbone", self.network, lr),
        ):
            taken = grouped | pretrained if name == "target_head" else grouped
            parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
            grouped.update(id(p) for p in parameters)
            if parameters:
                group = {"params": parameters, "lr": rate, "name": name}
                groups.append(group if weight_decay is None else group | {"weight_decay": weight_decay})
        return groups[::-1]

    def target_model(self) -> nn.Module:
        """The classifier with the target head in place of its own, for inference: no parameter of the source head.

        A copy, in evaluation mode: training this model further does not change it. It returns what the classifier
        returns, with the target logits for logits; the parameters have the classifier's names, so that its
        ``state_dict`` loads into a classifier that was made with ``N_t`` classes.

        What a classifier of transformers or timm writes down of its classes stays that of the source head: set
        ``config.num_labels`` (with ``config.id2label``) or ``num_classes`` before ``save_pretrained``.
        """
        return self._with_one_head(self.target_head)

    def source_model(self) -> nn.Module:
        """The classifier with its source head as it is now: what the category relationship is learnt from.

        A copy, in evaluation mode. Before training it equals the classifier that this model was made from.
        """
        return self._with_one_head(self.source_head)

    def set_batchnorm_momentum(self, momentum: float | None) -> int:
        """Set the momentum of every BatchNorm layer; returns how many there are (0 is no error).

        The momentum is the share of a new batch in the running statistics; ``None`` averages over all batches. Some
        pretrained models keep a very small one (EfficientNet: 0.01). After a short fine-tuning their running statistics
        are then still those of the source images, and accuracy in evaluation mode suffers: 0.1 mends it.

        Raises:
            ValueError: ``momentum`` is not in [0, 1].
        """
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, expected a number in [0, 1] or None")
        layers = _batchnorm_layers(self.network)
        for layer in layers:
            layer.momentum = momentum
        return len(layers)

    @torch.no_grad()
    def reestimate_batchnorm(self, loader: Iterable[Any]) -> int:
        """Replace all BatchNorm running statistics by their average over the batches of ``loader``.

        For a model whose statistics lag behind its weights, at the end of training. Dropout and the like are off. If
        anything goes wrong on the way the old statistics are put back. A layer that no batch reaches in evaluation
        mode, as in an auxiliary head that is there for training only, keeps its own.

        Args:
            loader: batches of inputs, or tuples that begin with them, or mappings of keyword arguments; they are moved
                to the model's device. Batches count equally: leave out a small last one.

        Returns:
            The number of batches used.

        Raises:
            ValueError: the loader is empty, its statistics are not finite, or the model has no BatchNorm layer with
                running statistics.
        """
        layers = [layer for layer in _batchnorm_layers(self.network) if layer.track_running_stats]
        if not layers:
            raise ValueError(
                "the model has no BatchNorm layer with running statistics, so there is nothing to estimate"
            )
        before = [(copying.deepcopy(layer.state_dict()), layer.momentum) for layer in layers]
        device = next(self.parameters()).device
        batches = 0
        try:
            with evaluating(self):
                for layer in layers:
                    layer.reset_running_stats()
                    layer.momentum = None
                    layer.train()
                for batch in loader:
                    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) and inputs else inputs
                    if isinstance(first, Tensor) and first.dim() and len(first) == 0:
                        continue  # no rows: their mean would be 0, and their variance 1
                    call(self.network, inputs, device)
                    batches += 1
                if batches == 0:
                    raise ValueError("loader is empty: BatchNorm statistics need at least one batch")
                for layer, (state, _) in zip(layers, before, strict=True):
                    if layer.num_batches_tracked == 0:  # its statistics are of nothing: mean 0, variance 1
                        layer.load_state_dict(state)
                    elif not all(x is None or x.isfinite().all() for x in (layer.running_mean, layer.running_var)):
                        raise ValueError(
                            "BatchNorm statistics that are not finite; is there a NaN in the loader's inputs?"
                        )
        except BaseException:
            for layer, (state, _) in zip(layers, before, strict=True):
                layer.load_state_dict(state)
            raise
        finally:
            for layer, (_, momentum) in zip(layers, before, strict=True):
                layer.momentum = momentum
        return batches

    def _with_one_head(self, head: nn.Module) -> nn.Module:
        # deepcopy looks a module up in its memo before it copies it: with the pair of heads already "copied" to one
        # head, the copy has that head in their place, and the other one is never touched.
        memo: dict[int, Any] = {}
        memo[id(self.heads)] = copying.deepcopy(head, memo)
        model: nn.Module = copying.deepcopy(self.network, memo)
        return model.eval()


class _TwoHeads(nn.Module):
    """Both heads over the same features: ``(..., N_s + N_t, ...)`` along the class dimension."""

    def __init__(self, source_head: nn.Module, target_head: nn.Module) -> None:
        super().__init__()
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

    def forward(self, features: Tensor) -> Tensor:
        source_logits, target_logits = self.source_head(features), self.target_head(features)
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


_HeadLayer: TypeAlias = nn.Linear | nn.Conv2d


def _is_head_layer(module: object) -> TypeGuard[_HeadLayer]:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _num_classes(layer: _HeadLayer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"Linear {layer.in_features} -> {layer.out_features}"
    if isinstance(layer, nn.Conv2d):
        return f"{layer.kernel_size[0]}x{layer.kernel_size[1]} Conv2d {layer.in_channels} -> {layer.out_channels}"
    return type(layer).__name__


def _last_layer(head: nn.Module, name: str) -> _HeadLayer:
    """The layer that gives a head its classes: the last linear or 1x1 convolution in it."""
    layers = [module for module in head.modules() if _is_head_layer(module)]
    if not layers:
        raise TypeError(
            f"{name} is {_describe(head)}, expected nn.Linear, a 1x1 nn.Conv2d, or a module that ends in one of them"
        )
    return layers[-1]


def _new_head(layer: _HeadLayer, num_classes: int) -> nn.Module:
    """A fresh layer that reads what ``layer`` reads."""
    bias, device, dtype = layer.bias is not None, layer.weight.device, layer.weight.dtype
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, num_classes, bias=bias, device=device, dtype=dtype)
    return nn.Conv2d(layer.in_channels, num_classes, kernel_size=1, bias=bias, device=device, dtype=dtype)


def _find_head(classifier: nn.Module, head: str | None) -> str:
    """Dotted name of the classifier's head; ValueError or TypeError with the candidates if there is not exactly one."""
    modules: dict[str, nn.Module] = dict(classifier.named_modules())
    candidates: dict[str, _HeadLayer] = {name: module for name, module in modules.items() if _is_head_layer(module)}
    listed = _list_layers(list(candidates.items())[-8:])

    if head is not None:
        if head not in modules:
            raise ValueError(f"head={head!r} names no module of {type(classifier).__name__}; its last layers: {listed}")
        if head not in candidates:
            raise TypeError(
                f"head={head!r} is {_describe(modules[head])}, expected nn.Linear or a 1x1 nn.Conv2d with stride 1; "
                f"the last ones of {type(classifier).__name__}: {listed}"
            )
        return head

    get_classifier = getattr(classifier, "get_classifier", None)  # timm models know their head
    if callable(get_classifier):
        own = get_classifier()
        # Some heads are modules that end in the layer with the classes; a tuple would be two heads.
        inside = {id(module) for module in own.modules()} if isinstance(own, nn.Module) else set()
        modules = {name: module for name, module in modules.items() if id(module) in inside}
        candidates = {name: module for name, module in candidates.items() if id(module) in inside}
        if not candidates:
            raise ValueError(
                f"{type(classifier).__name__}.get_classifier() returns {type(own).__name__}, expected nn.Linear, a 1x1 "
                "nn.Conv2d, or a module that ends in one: was the model made without a classifier (num_classes=0)? "
                f"Else name one with head=: {listed}"
            )
        for name, module in candidates.items():
            if module is own:
                return name

    if not candidates:
        raise ValueError(
            f"{type(classifier).__name__} has no head: no nn.Linear and no 1x1 nn.Conv2d in it. Build the model from "
            "its parts instead: CoTuningModel(backbone, source_head, target_head)"
        )
    name, last = list(candidates.items())[-1]
    same_kind = nn.Linear if isinstance(last, nn.Linear) else nn.Conv2d
    rivals = [
        (other, module)
        for other, module in candidates.items()
        if isinstance(module, same_kind) and _num_classes(module) == _num_classes(last)
    ]
    # A head ends the network. If more layers with weights come after the last candidate, that one is no head.
    # A parametrized head (weight_norm) has weights in modules of its own, which are not later ones.
    *_, ending = (module for module in modules.values() if module._parameters)
    if len(rivals) > 1 or all(module is not ending for module in last.modules()):
        choice = _list_layers(rivals) if len(rivals) > 1 else listed
        raise ValueError(f"the head of {type(classifier).__name__} is ambiguous; name it with head=, one of: {choice}")
    return name


def _list_layers(layers: list[tuple[str, _HeadLayer]]) -> str:
    return ", ".join(f"{name!r} ({_describe(layer)})" for name, layer in layers) or "none"


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is registered in ``network``, under every name; returns the network."""
    if network is old:
        return new
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would hide a second name
            if child is old:
                setattr(parent, name, new)
    return network


@torch.no_grad()
def _evaluate(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    """The model's (source) logits in evaluation mode."""
    with evaluating(model):
        return _logits(call(model, inputs, next(model.parameters()).device))


def _logits(output: Any) -> Tensor:
    logits = logits_in(output)
    if logits is None:
        raise TypeError(
            f"the classifier returned {type(output).__name__}, expected logits: a tensor, an object or mapping with "
            "logits, or a tuple that begins with them"
        )
    return logits


def _check_source_logits(got: Tensor, expected: Tensor, head_name: str) -> None:
    if not _same_logits(got, expected):
        raise ValueError(
            f"with a second head beside {head_name!r} the source logits, shape {tuple(got.shape)}, are not what "
            f"the classifier gives by itself, shape {tuple(expected.shape)}: either {head_name!r} is not "
            "its head (name it with head=), or the classifier mixes its classes after the head, as a softmax does "
            "(take that out: the loss wants logits)"
        )


def _same_logits(got: Tensor, expected: Tensor) -> bool:
    """Up to rounding, relative to the largest finite logit. A masked class is -inf in both, and then the same."""
    if got.shape != expected.shape:
        return False
    infinite = torch.isinf(expected)
    # Of equal infinities the difference would be NaN, and against an infinite scale every difference would be small.
    difference = (got - expected).abs().masked_fill(infinite & (got == expected), 0)
    scale = expected.abs().masked_fill(infinite, 0).max()
    return bool(difference.max() <= 1e-3 * scale)


def _batchnorm_layers(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]
