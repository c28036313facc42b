"""Co-Tuning models: one backbone, the pretrained source head and a new target head, in one pass.

Any pretrained classifier becomes a Co-Tuning model without changes to its code::

    model = CoTuningModel.from_classifier(torchvision.models.resnet50(weights="DEFAULT"), num_target_classes=200)
    source_logits, target_logits = model(images)

How it works: a module that holds both heads replaces the classifier's last layer in place. It returns
``concatenate(source logits, target logits)`` along the class dimension. Everything that the classifier does before its
head (pooling, dropout, flattening) and after it (ReLU and pooling over a convolutional head, picking one token,
wrapping the result in a dictionary) then applies to both, and the result is split at the very end. No state is kept
between calls, so threads, ``torch.compile``, ``copy.deepcopy`` and pickle need no special care.
"""

from __future__ import annotations

import copy as copying
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cotuning_kernels.calling import call, evaluating, inputs_in, logits_in
from cotuning_kernels.heads import TwoHeads, auxiliary_heads, find_head, is_head_layer, new_head, replace
from cotuning_kernels.labelled_logits import positive_integer
from cotuning_kernels.module_copies import copy_of, record_classes
from cotuning_kernels.relationship.matrix import class_names

__all__ = ["CoTuningFeatures", "CoTuningLogits", "CoTuningModel"]


class CoTuningLogits(NamedTuple):
    """The result of a :class:`CoTuningModel`; unpacks as ``source_logits, target_logits``."""

    source_logits: Tensor
    """``(B, N_s)``, over the classes that the classifier was pretrained on."""
    target_logits: Tensor
    """``(B, N_t)``, over the classes of the new task."""


class CoTuningFeatures(NamedTuple):
    """The result of a :class:`CoTuningModel` with ``linear=True`` in training.

    Unpacks as what :class:`cotuning_kernels.FusedLinearCoTuningLoss` takes: ``criterion(*model(images), labels)``.
    """

    features: tuple[Tensor, Tensor]
    """``(..., D)``: the features that the source head reads, and those that the target head reads."""
    source_weight: Tensor
    """``(N_s, D)``"""
    source_bias: Tensor | None
    """``(N_s,)``"""
    target_weight: Tensor
    """``(N_t, D)``"""
    target_bias: Tensor | None
    """``(N_t,)``"""


class CoTuningModel(nn.Module):
    """A backbone with two heads; ``forward`` returns :class:`CoTuningLogits` from one pass through the backbone.

    Args:
        backbone: gives the features that both heads read.
        source_head: the pretrained head, ``N_s`` classes. ``nn.Linear``, a 1x1 ``nn.Conv2d``, or a module that ends in
            one of them.
        target_head: the new head, ``N_t`` classes, of the same kind.
        bound_source: whether the source head's gradient into the backbone is bounded in training; see
            :attr:`bound_source`.
        linear: whether the model gives :class:`CoTuningFeatures` instead of logits in training; see :attr:`linear`.

    Use :meth:`from_classifier` if the pretrained model is one module, as in timm, torchvision and transformers.

    Raises:
        TypeError: an argument is not a module, or no class dimension can be found in a head.
        ValueError: one head is convolutional and the other is not.
    """

    def __init__(
        self,
        backbone: nn.Module,
        source_head: nn.Module,
        target_head: nn.Module,
        *,
        bound_source: bool = True,
        linear: bool = False,
    ) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("source_head", source_head), ("target_head", target_head)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {type(module).__name__}, expected a torch.nn.Module")
        heads = TwoHeads(source_head, target_head, bound_source)
        self.network: nn.Module = nn.Sequential(OrderedDict(backbone=backbone, heads=heads))
        self.num_source_classes = heads.num_source_classes
        self.num_target_classes = heads.num_target_classes
        self._class_dim = heads.class_dim
        self._has_auxiliary_heads = False
        self._freezes_batchnorm = False
        self.linear = linear

    @classmethod
    def from_classifier(
        cls,
        classifier: nn.Module,
        num_target_classes: int,
        *,
        head: str | None = None,
        example_input: Tensor | Mapping[str, Any] | None = None,
        copy: bool = True,
        bound_source: bool = True,
        linear: bool = False,
    ) -> CoTuningModel:
        """Wrap a pretrained classifier: its head becomes the source head, and a new target head is added.

        Args:
            classifier: any module whose output is logits ``(B, N_s)``, or has them as ``.logits``, as ``["logits"]`` or
                as the first item of a tuple. Its head is an ``nn.Linear``, or a 1x1 ``nn.Conv2d`` as in SqueezeNet.
            num_target_classes: ``N_t``, at least 1.
            head: dotted name of the head in the classifier, e.g. ``"fc"`` or ``"classifier.1"``. By default it is the
                result of ``classifier.get_classifier()`` (timm) or its last layer, else the classifier's last layer.
            example_input: a batch (a mapping is passed as keyword arguments, without ``"labels"``). If given, the
                wrapped model's source logits are compared with the classifier's own once, in evaluation mode. Only this
                finds a wrong head, or a classifier that mixes its classes after the head (a softmax).
            copy: ``True`` copies the classifier and leaves it unchanged. ``False`` saves the memory: the classifier
                becomes part of this model and must not be used on its own any more.
            bound_source: whether the source head's gradient into the backbone is bounded in training; see
                :attr:`bound_source`.
            linear: whether the model gives :class:`CoTuningFeatures` instead of logits in training; see :attr:`linear`.
                With ``example_input`` the logits of these features are compared as well.

        The target head is initialised as PyTorch does (``torch.manual_seed`` repeats it), in the dtype and on the
        device of the source head. New modules are in training mode if ``classifier`` is; every module of the classifier
        keeps its own mode, such as a BatchNorm layer that was frozen with ``eval()``.

        Auxiliary heads, which some classifiers have for training (Inception's ``AuxLogits``, a name that begins with
        "aux"), get a new layer of ``N_t`` classes too, so that :meth:`target_model` has the parameters of a classifier
        of ``N_t`` classes. Their outputs are dropped, so they are not trained. Their gradient is 0, not None, because
        ``DistributedDataParallel`` needs one. A classifier made with ``aux_logits=False`` trains faster.

        Raises:
            TypeError: ``classifier`` is not a module, or ``head`` names a module that is neither layer.
            ValueError: ``num_target_classes`` is below 1, no head is found, ``head`` names no module, more than one
                layer could be the head (the message lists the candidates), several heads are combined in the output,
                ``example_input`` is empty, or the check with it fails.
        """
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier is {type(classifier).__name__}, expected a torch.nn.Module")
        num_target_classes = positive_integer("num_target_classes", num_target_classes)
        head_name = find_head(classifier, head, checked_later=example_input is not None)
        network = copying.deepcopy(classifier) if copy else classifier
        source_head = network.get_submodule(head_name)
        assert is_head_layer(source_head)  # find_head returns no other
        expected = None if example_input is None else _evaluate(network, example_input)
        if expected is not None and expected.numel() == 0:
            raise ValueError(
                f"example_input gives logits of shape {tuple(expected.shape)}, which are none to compare: give a batch "
                "of at least one sample"
            )
        own_modules = {id(module) for module in network.modules()}
        target_head = new_head(source_head, num_target_classes)
        model = cls(nn.Identity(), source_head, target_head, bound_source=bound_source, linear=linear)
        replaced: list[tuple[nn.Module, nn.Module]] = [(source_head, model.heads)]
        replaced += [(layer, new_head(layer, num_target_classes)) for layer in auxiliary_heads(network, source_head)]
        for old, new in replaced:
            network = replace(network, old, new)
        model.network = network
        model._has_auxiliary_heads = len(replaced) > 1
        for module in model.modules():
            if id(module) not in own_modules:
                module.training = classifier.training
        if example_input is not None and expected is not None:
            try:
                _check_source_logits(_evaluate(model, example_input), expected, head_name)
                if linear:
                    _check_source_logits(_source_logits_of_features(model, example_input), expected, head_name)
            except Exception:
                for old, new in replaced:  # matters if the classifier was not copied
                    replace(network, new, old)
                raise
        return model

    def forward(self, *args: Any, **kwargs: Any) -> CoTuningLogits | CoTuningFeatures:
        """``(source_logits (B, N_s), target_logits (B, N_t))``; the arguments are the classifier's own.

        With :attr:`linear`, in training, :class:`CoTuningFeatures`.

        ``labels=`` is dropped: classifiers of transformers would compute their own loss from it.

        Further dimensions of the output are kept: ``(B, T, N_s)`` for logits per token, ``(B, N_s, H, W)`` for a
        convolutional head that is not pooled. Both results are views of one tensor.

        Raises:
            ValueError: the classifier uses its head, or its head's output, in a way that two heads cannot share.
        """
        kwargs.pop("labels", None)
        output = self._output(args, kwargs)
        logits = _logits(output)
        if self._has_auxiliary_heads and self.training and torch.is_grad_enabled():
            logits = _Reach.apply(logits, *_tensors_beside(logits, output))
        heads = self.heads
        if heads.gives_features and heads.training:
            return _features_of_heads(logits, *heads.require_linear())
        dim = self._class_dim
        if logits.shape[dim] != self.num_source_classes + self.num_target_classes:
            raise ValueError(
                f"the classifier turned the {self.num_source_classes} source and {self.num_target_classes} target "
                f"classes of its two heads into an output of shape {tuple(logits.shape)}: it does something to its "
                f"head's output that both heads cannot share. {_OTHER_WAYS}"
            )
        return CoTuningLogits(
            logits.narrow(dim, 0, self.num_source_classes),
            logits.narrow(dim, self.num_source_classes, self.num_target_classes),
        )

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's output. If the network fails with two heads but not with one, the error says so."""
        if torch.compiler.is_compiling():
            return self.network(*args, **kwargs)
        try:
            return self.network(*args, **kwargs)
        except (RuntimeError, AttributeError, TypeError, IndexError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not self._runs_with_one_head(args, kwargs):
                raise
            raise ValueError(
                "the classifier runs with one head but not with two in its place: it reads its head elsewhere, fixes "
                "the number of its classes, combines several heads, or this is not its head "
                f"({type(error).__name__}: {error}). {_OTHER_WAYS}"
            ) from error

    def _runs_with_one_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        try:
            with torch.no_grad():
                self._with_one_head(self.source_head, shared)(*args, **kwargs)
        except Exception:
            return False
        return True

    @property
    def heads(self) -> TwoHeads:
        """The module that replaces the classifier's head."""
        return next(module for module in self.network.modules() if isinstance(module, TwoHeads))

    @property
    def bound_source(self) -> bool:
        """Whether the source head's gradient into the backbone is bounded in training. May be set at any time.

        If so, the gradient of the features that both heads read is ``g_t + min(1, |g_t| / |g_s|) g_s``, where ``g_t``
        is the target head's and ``g_s`` the source head's, trade-off included. The trade-off is then an upper limit:
        the source term's gradient at the backbone is never larger than the target term's. Without the bound a
        pretrained head may send gradients into the backbone that destroy it in a few steps, at a trade-off and a
        learning rate that another network tolerates. The heads' own parameters get the gradient of the loss unchanged;
        so does every parameter in evaluation mode. The norms are taken over a batch: over the batches of all processes
        under ``DistributedDataParallel``, over that of each process under FSDP or when compiled.
        """
        return self.heads.bounds_source

    @bound_source.setter
    def bound_source(self, value: bool) -> None:
        self.heads.bounds_source = value

    @property
    def linear(self) -> bool:
        """Whether ``forward`` gives :class:`CoTuningFeatures` instead of logits in training. May be set at any time.

        The logits of a head of many classes then never exist all at once:
        ``FusedLinearCoTuningLoss(relationship)(*model(images), labels)`` is the loss of the logits, up to rounding. In
        evaluation mode the model gives logits. Both heads must be ``nn.Linear``. What the classifier does after its
        head is done to the features: it may pick a token or wrap its result, but must not compute with the logits.
        """
        return self.heads.gives_features

    @linear.setter
    def linear(self, value: bool) -> None:
        if value:
            self.heads.require_linear()
        self.heads.gives_features = value

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

        ``torch.optim.SGD(model.param_groups(1e-3), momentum=0.9)``. Each parameter is in exactly one group, even if the
        source head shares its weight with the backbone (tied embeddings). Parameters that the new head shares with
        either are pretrained, so they get ``lr``. Parameters with ``requires_grad=False`` and empty groups are left
        out. Each group has a ``"name"``: ``"backbone"``, ``"source_head"`` or ``"target_head"``.

        Raises:
            ValueError: a rate, multiplier or decay is negative or not finite.
        """
        for name, value in (("lr", lr), ("new_head_multiplier", new_head_multiplier), ("weight_decay", weight_decay)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a finite number that is not negative")
        # named_modules skips modules in its memo: this is the network without its two heads.
        backbone = [module for _, module in self.network.named_modules(memo={self.heads})]
        pretrained = {id(p) for module in backbone for p in module.parameters(recurse=False)}
        pretrained |= {id(p) for p in self.source_head.parameters()}
        grouped: set[int] = set()
        groups: list[dict[str, Any]] = []
        # The heads come first: the remaining parameters are the backbone's.
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

    def target_model(self, target_classes: Sequence[str] | None = None) -> nn.Module:
        """The classifier with the target head in place of its own, for inference; it has no source head.

        A copy in evaluation mode: further training of this model does not change it. Its output is the classifier's,
        with the target logits as logits. The parameters have the classifier's names, so its ``state_dict`` loads into
        a classifier that was made with ``N_t`` classes.

        Classifiers of transformers and timm record the number and the names of their classes. The copy records those
        of the target, so ``labels=`` and ``save_pretrained`` work. (A language model's embeddings have as many rows as
        its vocabulary has words: with another head, save the ``state_dict``.)

        Under FSDP2 (``fully_shard``) every process must call this: the parameters are gathered.

        Args:
            target_classes: the names of the ``N_t`` classes, for classifiers that record them; by default
                ``"LABEL_0"``, ...

        Raises:
            TypeError, ValueError: not ``N_t`` names.
        """
        names = class_names("target_classes", target_classes, self.num_target_classes)
        model = self._with_one_head(self.target_head)
        at = next(name for name, module in self.network.named_modules() if module is self.heads)
        record_classes(model, at, self.num_source_classes, self.num_target_classes, names)
        return model

    def source_model(self) -> nn.Module:
        """The classifier with its current source head, from which the category relationship is learnt.

        A copy in evaluation mode. Before training it equals the classifier that this model was made from, except for
        auxiliary heads (see :meth:`from_classifier`). Under FSDP2 every process must call this.
        """
        return self._with_one_head(self.source_head)

    def set_batchnorm_momentum(self, momentum: float | None) -> int:
        """Set the momentum of every BatchNorm layer; returns how many there are (0 is no error).

        The momentum is the share of a new batch in the running statistics; ``None`` averages over all batches. Some
        pretrained models have a very small one (EfficientNet: 0.01). After a short fine-tuning their running statistics
        are still those of the source images, which lowers accuracy in evaluation mode: 0.1 mends it.

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

        Use it at the end of training, if the statistics lag behind the weights. Dropout and the like are off. After an
        error the old statistics are restored. A layer that no batch reaches in evaluation mode, as in an auxiliary head
        for training only, keeps its own.

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
                    inputs = inputs_in(batch)
                    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) and inputs else inputs
                    if isinstance(first, Tensor) and first.dim() and len(first) == 0:
                        continue  # no rows would give a mean of 0 and a variance of 1
                    call(self.network, inputs, device)
                    batches += 1
                if batches == 0:
                    raise ValueError("loader is empty: BatchNorm statistics need at least one batch")
                for layer, (state, _) in zip(layers, before, strict=True):
                    if layer.num_batches_tracked == 0:  # it has seen no batch: mean 0, variance 1
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

    def freeze_batchnorm(self, frozen: bool = True) -> int:
        """Keep every BatchNorm layer in evaluation mode, even after ``model.train()``; returns how many there are.

        The layers then normalise with the running statistics of pretraining and do not change them. That is better for
        small batches or few images: batch statistics of 16 images are noise, and they hide how large the gradients are.
        The layers' weights and biases are still trained.

        ``freeze_batchnorm(False)`` undoes it: the layers get the model's mode at once and follow ``train()`` and
        ``eval()`` again. The setting is copied and pickled with the model, but is not in its ``state_dict``. It works
        the same under ``DistributedDataParallel``, FSDP and trainers, whose ``train()`` calls this model's. Nothing is
        synchronised, since the statistics do not change. A layer without running statistics cannot be frozen: it
        normalises by batches in any mode.
        """
        layers = _batchnorm_layers(self.network)
        self._freezes_batchnorm = frozen
        for layer in layers:
            layer.train(self.training and not frozen)
        return len(layers)

    def train(self, mode: bool = True) -> CoTuningModel:
        """Training mode (or evaluation mode with ``False``), except for frozen BatchNorm layers."""
        super().train(mode)
        if self._freezes_batchnorm:
            for layer in _batchnorm_layers(self.network):
                layer.eval()
        return self

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The module's state, in which a tensor with several names appears once.

        A language model's head may be its embedding, and the safetensors files that trainers write hold no tensor
        twice. Loading restores the tensor under all its names, and accepts a state dict that has all names as well.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self._second_names():
            state.pop(prefix + name, None)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, first in self._second_names().items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _second_names(self) -> dict[str, str]:
        """All names of shared parameters but the first, each with the first. The head's name counts as the first."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        of_heads = {f".{name}" for name, _ in self.heads.named_parameters(remove_duplicate=False)}
        second = {}
        for aliases in names.values():
            if len(aliases) > 1:
                first = next((name for name in aliases if any(map(name.endswith, of_heads))), aliases[0])
                second.update({name: first for name in aliases if name != first})
        return second

    def __getattr__(self, name: str) -> Any:
        # timm looks here for the functions that group parameters by layers; the network's own give other names.
        if name in ("group_matcher", "no_weight_decay"):
            network = self._modules.get("network")
            if hasattr(network, name):
                return partial(_NETWORK_PARAMETERS[name], network)
        return super().__getattr__(name)

    def _with_one_head(self, head: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
        # deepcopy looks up each module in its memo first. The memo maps the pair of heads to one head, so the copy has
        # that head in their place, and the other head is never copied.
        memo = {} if shared is None else dict(shared)
        memo[id(self.heads)] = copy_of(head, memo)
        return copy_of(self.network, memo).eval()


_OTHER_WAYS = (
    "Name another layer with head=, or build the model from its parts: CoTuningModel(backbone, source_head, "
    "target_head)"
)


def _group_matcher(network: Any, *args: Any, **kwargs: Any) -> Any:
    """timm's patterns of parameter names, changed to names that begin with ``network.``."""

    def renamed(pattern: Any) -> Any:
        if pattern is None or not isinstance(pattern, str):
            return pattern if pattern is None else type(pattern)((renamed(each[0]), *each[1:]) for each in pattern)
        unanchored = re.sub(r"(?<!\[)\^", "", pattern)
        return rf"^network\.(?:{unanchored})"

    matcher = network.group_matcher(*args, **kwargs)
    if callable(matcher):
        return lambda name: matcher(name.removeprefix("network."))
    return {group: renamed(pattern) for group, pattern in matcher.items()}


def _no_weight_decay(network: Any) -> set[str]:
    return {f"network.{name}" for name in network.no_weight_decay()}


_NETWORK_PARAMETERS: dict[str, Any] = {"group_matcher": _group_matcher, "no_weight_decay": _no_weight_decay}


class _Reach(torch.autograd.Function):
    """The logits. The other tensors get gradients of 0, so that every parameter behind them has a gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *others: Tensor) -> Tensor:
        ctx.zeros = [other.new_zeros(()).expand(other.shape) for other in others]
        return logits.clone()  # a loss may write its gradient into the logits, which a view would not allow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *ctx.zeros


def _tensors_beside(logits: Tensor, output: Any) -> list[Tensor]:
    """The other tensors of an output that have a gradient."""
    if isinstance(output, Tensor):
        return []
    members = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [x for x in members if isinstance(x, Tensor) and x is not logits and x.requires_grad]


@torch.no_grad()
def _evaluate(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    """The model's (source) logits in evaluation mode."""
    with evaluating(model):
        return _logits(call(model, inputs_in(inputs), next(model.parameters()).device))


def _features_of_heads(both: Tensor, source_head: nn.Linear, target_head: nn.Linear) -> CoTuningFeatures:
    """Split the features that the two heads would read. The parameters are views: DDP then sees that they are used."""
    if both.shape[-1] != 2 * source_head.in_features:
        raise ValueError(
            f"the classifier turned {source_head.in_features} features for each of its two heads into an output of "
            f"shape {tuple(both.shape)}: it does something to its head's output that linear=True does not allow"
        )
    for_source, for_target = both.chunk(2, dim=-1)
    parameters = (source_head.weight, source_head.bias, target_head.weight, target_head.bias)
    source_weight, source_bias, target_weight, target_bias = (None if x is None else x.view_as(x) for x in parameters)
    assert source_weight is not None
    assert target_weight is not None
    return CoTuningFeatures((for_source, for_target), source_weight, source_bias, target_weight, target_bias)


@torch.no_grad()
def _source_logits_of_features(model: CoTuningModel, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    """The source logits from what the model gives in training, with all else in evaluation mode."""
    with evaluating(model):
        model.heads.training = True
        found = call(model, inputs_in(inputs), next(model.parameters()).device)
    return nn.functional.linear(found.features[0], found.source_weight, found.source_bias)


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
    """Whether both agree up to rounding, relative to the largest finite logit. A masked class is -inf in both."""
    if got.shape != expected.shape:
        return False
    infinite = torch.isinf(expected)
    # The difference of equal infinities is NaN, and relative to an infinite scale every difference is small.
    difference = (got - expected).abs().masked_fill(infinite & (got == expected), 0)
    scale = expected.abs().masked_fill(infinite, 0).max()
    return bool(difference.max() <= 1e-3 * scale)


def _batchnorm_layers(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]
