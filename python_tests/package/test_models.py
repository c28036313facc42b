"""CoTuningModel against separate computations, on architectures with every kind of head that matters."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cotuning_kernels import heads, models
from cotuning_kernels.models import CoTuningLogits, CoTuningModel

N_SOURCE, N_TARGET = 13, 5


class ResNetLike(nn.Module):
    """BatchNorm, pooling, flatten, dropout, Linear head called fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8, momentum=0.01)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, N_SOURCE)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


class SqueezeNetLike(nn.Module):
    """No BatchNorm; a 1x1 convolution is the head, and ReLU, pooling and flatten come after it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Dropout(0.2), nn.Conv2d(8, N_SOURCE, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


class TimmLike(nn.Module):
    """Knows its head; has a second head of the same width for training, and a subclass of BatchNorm."""

    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = self.BatchNormAct(8)
        self.head = nn.ModuleDict({"drop": nn.Identity(), "fc": nn.Linear(8, N_SOURCE)})
        self.auxiliary = nn.Linear(8, N_SOURCE)

    def get_classifier(self) -> nn.Module:
        return self.head["fc"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.head["drop"](self.norm(self.stem(x)).amax((2, 3))))


@dataclass
class Output:
    logits: Tensor
    hidden_states: Tensor | None = None


class TransformerLike(nn.Module):
    """Token logits in an output object; the head's weight is the embedding's (tied); called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(N_SOURCE, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.decoder = nn.Linear(8, N_SOURCE)
        self.decoder.weight = self.embeddings.weight

    def forward(self, input_ids: Tensor) -> Output:
        hidden = self.encoder(self.embeddings(input_ids))
        return Output(self.decoder(hidden), hidden)


class TupleMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, N_SOURCE, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.hidden(x.flatten(2).mean(2) @ torch.ones(3, 6, dtype=x.dtype)))
        return self.head(hidden), hidden


class DictMlp(TupleMlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, hidden = super().forward(x)
        return {"hidden": hidden, "logits": logits}


def efficientnet_lite() -> nn.Module:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    return package.EfficientNet.from_name("efficientnet-lite0", num_classes=N_SOURCE, drop_connect_rate=0.0)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 9, 9)


def tokens(batch: int = 4) -> Tensor:
    return torch.randint(0, N_SOURCE, (batch, 6))


@dataclass
class Architecture:
    make: Callable[[], nn.Module]
    head: str
    inputs: Callable[[], Tensor]
    logits: Callable[[Any], Tensor] = lambda output: output


ARCHITECTURES = {
    "resnet_like": Architecture(ResNetLike, "fc", images),
    "squeezenet_like": Architecture(SqueezeNetLike, "classifier.1", images),
    "timm_like": Architecture(TimmLike, "head.fc", images),
    "transformer_like": Architecture(TransformerLike, "decoder", tokens, lambda output: output.logits),
    "tuple_mlp": Architecture(TupleMlp, "head", images, lambda output: output[0]),
    "dict_mlp": Architecture(DictMlp, "head", images, lambda output: output["logits"]),
    "efficientnet_lite": Architecture(efficientnet_lite, "_fc", lambda: torch.randn(2, 3, 64, 64)),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(autouse=True)
def _numbers_from_the_seed(seed: int) -> None:
    torch.manual_seed(seed)


def with_head(classifier: nn.Module, name: str, head: nn.Module) -> nn.Module:
    """The classifier with ``head`` in place of its own."""
    classifier = copy.deepcopy(classifier)
    parent, _, leaf = name.rpartition(".")
    setattr(classifier.get_submodule(parent), leaf, copy.deepcopy(head))
    return classifier


def check_logits_and_gradients(model: CoTuningModel, classifier: nn.Module, architecture: Architecture) -> None:
    """Both outputs, and all gradients for random upstream gradients, equal those of two separate classifiers."""
    x = architecture.inputs()
    x = x.double() if x.is_floating_point() else x
    source_only = copy.deepcopy(classifier).double().eval()
    target_only = with_head(classifier, architecture.head, model.target_head).double().eval()
    model = copy.deepcopy(model).double().eval()

    source_logits, target_logits = model(x)
    expected_source = architecture.logits(source_only(x))
    expected_target = architecture.logits(target_only(x))
    torch.testing.assert_close(source_logits, expected_source)
    torch.testing.assert_close(target_logits, expected_target)

    upstream_source, upstream_target = torch.randn_like(source_logits), torch.randn_like(target_logits)
    torch.autograd.backward([source_logits, target_logits], [upstream_source, upstream_target])
    expected_source.backward(upstream_source)
    expected_target.backward(upstream_target)

    source_parameters, target_parameters = dict(source_only.named_parameters()), dict(target_only.named_parameters())
    head = architecture.head
    torch.testing.assert_close(model.target_head.weight.grad, target_parameters[f"{head}.weight"].grad)
    heads_at = f"network.{head}."
    for name, parameter in model.named_parameters():
        if name.startswith(heads_at + "target_head."):
            continue
        name = name.replace(heads_at + "source_head.", head + ".").removeprefix("network.")
        terms = [source_parameters[name].grad]
        if not name.startswith(head + "."):
            terms.append(target_parameters[name].grad)
        terms = [term for term in terms if term is not None]
        if terms:
            torch.testing.assert_close(parameter.grad, sum(terms), msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert parameter.grad is None, name


def test_both_heads_equal_separate_classifiers(architecture: Architecture) -> None:
    classifier = architecture.make()
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    assert (model.num_source_classes, model.num_target_classes) == (N_SOURCE, N_TARGET)
    check_logits_and_gradients(model, classifier, architecture)


@pytest.mark.parametrize(
    "fault",
    [
        lambda heads, x: torch.cat([heads.source_head(x), heads.target_head(x.detach())], heads.class_dim),
        lambda heads, x: torch.cat([heads.source_head(x.detach()), heads.target_head(x)], heads.class_dim),
        lambda heads, x: torch.cat([heads.target_head(x), heads.source_head(x)], heads.class_dim),
        lambda heads, x: torch.cat([heads.source_head(x), 2 * heads.target_head(x)], heads.class_dim),
    ],
    ids=["no_gradient_from_target", "no_gradient_from_source", "swapped", "scaled"],
)
@pytest.mark.parametrize("name", ["resnet_like", "squeezenet_like"])
def test_the_check_catches_a_fault_in_the_heads(
    name: str, fault: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES[name]
    classifier = architecture.make()
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    monkeypatch.setattr(heads.TwoHeads, "forward", fault)
    with pytest.raises(AssertionError):
        check_logits_and_gradients(model, classifier, architecture)


def test_head_named_by_the_caller(architecture: Architecture) -> None:
    classifier = architecture.make()
    by_name = CoTuningModel.from_classifier(classifier, N_TARGET, head=architecture.head)
    found = CoTuningModel.from_classifier(classifier, N_TARGET)
    assert list(by_name.state_dict()) == list(found.state_dict())


def test_built_from_parts() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU())
    source_head = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, N_SOURCE))
    target_head = nn.Linear(8, N_TARGET)
    model = CoTuningModel(backbone, source_head, target_head)
    assert model.source_head is source_head
    assert model.target_head is target_head
    x = torch.randn(4, 3, 3, 3)
    source_logits, target_logits = model(x)
    torch.testing.assert_close(source_logits, source_head(backbone(x)))
    torch.testing.assert_close(target_logits, target_head(backbone(x)))
    torch.testing.assert_close(model.target_model()(x), target_logits)
    torch.testing.assert_close(model.source_model()(x), source_logits)


def test_the_classifier_is_left_alone_unless_asked_otherwise(architecture: Architecture) -> None:
    classifier = architecture.make().eval()
    x = architecture.inputs()
    before, state = architecture.logits(classifier(x)), copy.deepcopy(classifier.state_dict())
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    assert not model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(architecture.logits(classifier(x)), before, rtol=0, atol=0)
    assert list(classifier.state_dict()) == list(state)

    taken = CoTuningModel.from_classifier(classifier, N_TARGET, copy=False)
    assert taken.network is classifier
    assert taken.source_head.weight is classifier.get_submodule(architecture.head).source_head.weight


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_module_of_the_classifier_keeps_its_mode(copied: bool, training: bool) -> None:
    classifier = ResNetLike().train(training)
    classifier.bn.train(not training)
    classifier.fc.train(not training)
    model = CoTuningModel.from_classifier(classifier, N_TARGET, copy=copied, example_input=images())
    assert model.training == model.heads.training == model.target_head.training == training
    assert model.network.training == model.network.dropout.training == training
    assert model.network.bn.training == model.source_head.training == classifier.bn.training == (not training)


def test_target_model_has_no_source_head_and_the_same_outputs(architecture: Architecture) -> None:
    classifier = architecture.make()
    model = CoTuningModel.from_classifier(classifier, N_TARGET).eval()
    x = architecture.inputs()
    expected = model(x).target_logits
    target_model = model.train().target_model()
    assert not any(module.training for module in target_model.modules())
    model.eval()
    torch.testing.assert_close(architecture.logits(target_model(x)), expected)
    assert list(target_model.state_dict()) == list(classifier.state_dict())
    assert all(not isinstance(module, heads.TwoHeads) for module in target_model.modules())

    head_parameters = sum(p.numel() for p in model.target_head.parameters())
    backbone = set(model.parameters()) - set(model.target_head.parameters())
    if architecture.make is not TransformerLike:  # its source head shares the embedding's weight
        backbone -= set(model.source_head.parameters())
    else:
        backbone -= {model.source_head.bias}
    assert sum(p.numel() for p in target_model.parameters()) == head_parameters + sum(p.numel() for p in backbone)

    # A snapshot: training the model afterwards does not change it.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(architecture.logits(target_model(x)), expected)
    assert not torch.allclose(model(x).target_logits, expected)


def test_source_model_is_the_classifier(architecture: Architecture) -> None:
    classifier = architecture.make().eval()
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    x = architecture.inputs()
    source_model = model.source_model()
    assert list(source_model.state_dict()) == list(classifier.state_dict())
    torch.testing.assert_close(architecture.logits(source_model(x)), architecture.logits(classifier(x)), rtol=0, atol=0)


def test_tied_weights_stay_tied() -> None:
    model = CoTuningModel.from_classifier(TransformerLike(), N_TARGET)
    assert model.source_head.weight is model.network.embeddings.weight
    source_model = model.source_model()
    assert source_model.decoder.weight is source_model.embeddings.weight


# --- optimizer groups -------------------------------------------------------------------------------------------------


def check_groups(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Each trainable parameter in exactly one group."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in more than one group"
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}, "a parameter is missing, or frozen"


def test_param_groups(architecture: Architecture) -> None:
    model = CoTuningModel.from_classifier(architecture.make(), N_TARGET)
    groups = model.param_groups(1e-3, weight_decay=5e-4)
    check_groups(groups, model)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"backbone": 1e-3, "source_head": 1e-3, "target_head": pytest.approx(1e-2)}
    assert all(group["weight_decay"] == 5e-4 for group in groups)
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in model.target_head.parameters()}


def test_the_group_check_catches_faults() -> None:
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET)
    twice = model.param_groups(1e-3)
    twice[0]["params"] = [*twice[0]["params"], twice[2]["params"][0]]
    with pytest.raises(AssertionError, match="more than one"):
        check_groups(twice, model)
    missing = model.param_groups(1e-3)
    del missing[1]["params"][0]
    with pytest.raises(AssertionError, match="missing"):
        check_groups(missing, model)


def test_frozen_parameters_are_left_out() -> None:
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET)
    model.source_head.requires_grad_(False)
    model.network.conv.requires_grad_(False)
    groups = model.param_groups(0.1)
    assert [group["name"] for group in groups] == ["backbone", "target_head"]
    assert "weight_decay" not in groups[0]
    check_groups(groups, model)


def test_what_the_new_head_shares_is_pretrained() -> None:
    """A layer shared with the backbone or the source head does not train at ten times the rate."""
    shared, with_source, new = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, N_TARGET)
    model = CoTuningModel(
        nn.Sequential(shared, nn.ReLU()),
        nn.Sequential(with_source, nn.Linear(6, N_SOURCE)),
        nn.Sequential(shared, with_source, new),
    )
    groups = model.param_groups(0.1)
    check_groups(groups, model)
    found = {group["name"]: (group["lr"], {id(p) for p in group["params"]}) for group in groups}
    assert found["backbone"] == (0.1, {id(p) for p in shared.parameters()})
    assert found["source_head"] == (0.1, {id(p) for p in model.source_head.parameters()})
    assert found["target_head"] == (1.0, {id(p) for p in new.parameters()})

    # The whole target head is in the backbone: no parameter is new.
    again = CoTuningModel(nn.Sequential(nn.Linear(6, 6), new), nn.Linear(N_TARGET, N_SOURCE), new)
    check_groups(again.param_groups(0.1), again)
    assert [group["name"] for group in again.param_groups(0.1)] == ["backbone", "source_head"]


def test_the_new_head_moves_at_its_own_rate() -> None:
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET)
    optimizer = torch.optim.SGD(model.param_groups(1e-2, new_head_multiplier=7.0))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 7e-2 if "target_head" in name else 1e-2
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"lr": float("nan")}, {"new_head_multiplier": -1.0}, {"weight_decay": -1.0}]
)
def test_bad_rates(bad: dict[str, float]) -> None:
    model = CoTuningModel.from_classifier(TupleMlp(), N_TARGET)
    with pytest.raises(ValueError, match=next(iter(bad))):
        model.param_groups(**({"lr": 0.1} | bad))


# --- finding the head -------------------------------------------------------------------------------------------------


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, N_SOURCE)
        self.head_dist = nn.Linear(8, N_SOURCE)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x)) + self.head_dist(self.body(x))) / 2


class HeadFirst(nn.Module):
    """The head is registered before the body, and the body ends in a layer that could be a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, N_SOURCE)
        self.body = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_ambiguous_heads_are_listed() -> None:
    with pytest.raises(ValueError, match=r"ambiguous.* one of: 'head' \(Linear 8 -> 13\), 'head_dist' \(Lin"):
        CoTuningModel.from_classifier(Distilled(), N_TARGET)
    body_then_norm = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r"ambiguous.*'0' \(1x1 Conv2d 3 -> 8\)"):
        CoTuningModel.from_classifier(body_then_norm, N_TARGET)


def test_no_head() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no head.*CoTuningModel\(backbone"):
        CoTuningModel.from_classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), N_TARGET)
    with pytest.raises(ValueError, match="has no head"):
        CoTuningModel.from_classifier(nn.Sequential(nn.Conv2d(4, 8, 1, groups=2)), N_TARGET)

    class Headless(TimmLike):
        def get_classifier(self) -> nn.Module:
            return nn.Identity()

    with pytest.raises(ValueError, match=r"get_classifier\(\) returns Identity.*num_classes=0"):
        CoTuningModel.from_classifier(Headless(), N_TARGET)


class TimmWithHeadModule(TimmLike):
    """``get_classifier`` gives a module with several layers, as timm's CaFormer and Sequencer2D have it."""

    def __init__(self, hidden: int = 16, ending: nn.Module | None = None) -> None:
        super().__init__()
        layers = {"fc1": nn.Linear(8, hidden), "norm": nn.LayerNorm(hidden), "fc2": nn.Linear(hidden, N_SOURCE)}
        self.head = nn.Sequential(OrderedDict(layers | ({} if ending is None else {"ending": ending})))

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).amax((2, 3)))


def test_head_in_a_module_that_get_classifier_returns() -> None:
    """The head is the module's last layer; the auxiliary classifier after it is no candidate."""
    classifier, images = TimmWithHeadModule().eval(), torch.randn(2, 3, 8, 8)
    model = CoTuningModel.from_classifier(classifier, N_TARGET, example_input=images)
    assert model.source_head.in_features == 16
    torch.testing.assert_close(model(images).source_logits, classifier(images))
    assert model.target_model()(images).shape == (2, N_TARGET)


@pytest.mark.parametrize(
    "classifier", [TimmWithHeadModule(N_SOURCE), TimmWithHeadModule(ending=nn.LayerNorm(N_SOURCE))]
)
def test_head_module_of_which_no_layer_is_surely_the_head(classifier: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"TimmWithHeadModule is ambiguous; name it with head=, one of: 'head.fc1'"):
        CoTuningModel.from_classifier(classifier, N_TARGET)
    assert CoTuningModel.from_classifier(classifier, N_TARGET, head="head.fc2").num_source_classes == N_SOURCE


def test_two_heads_are_not_one() -> None:
    class Distilled(TimmLike):
        def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
            return self.head["fc"], self.auxiliary

    with pytest.raises(ValueError, match=r"get_classifier\(\) returns tuple, expected"):
        CoTuningModel.from_classifier(Distilled(), N_TARGET)


def test_named_head_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"head='fx' names no module of ResNetLike.*'fc' \(Linear 8 -> 13\)"):
        CoTuningModel.from_classifier(ResNetLike(), N_TARGET, head="fx")
    with pytest.raises(TypeError, match=r"head='bn' is BatchNorm2d, expected nn.Linear.*'fc'"):
        CoTuningModel.from_classifier(ResNetLike(), N_TARGET, head="bn")
    with pytest.raises(TypeError, match=r"head='conv' is 3x3 Conv2d 3 -> 8, expected"):
        CoTuningModel.from_classifier(ResNetLike(), N_TARGET, head="conv")


@pytest.mark.parametrize("classes", [0, -1, 2.0, True])
def test_bad_number_of_classes(classes: Any) -> None:
    with pytest.raises(ValueError, match="num_target_classes"):
        CoTuningModel.from_classifier(ResNetLike(), classes)


def test_arguments_that_are_not_modules() -> None:
    with pytest.raises(TypeError, match="classifier is int, expected"):
        CoTuningModel.from_classifier(3, N_TARGET)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="target_head is NoneType"):
        CoTuningModel(nn.Identity(), nn.Linear(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source_head is ReLU"):
        CoTuningModel(nn.Identity(), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="both must be linear or both convolutional"):
        CoTuningModel(nn.Identity(), nn.Conv2d(2, 2, 1), nn.Linear(2, 2))


def test_a_head_whose_last_layer_does_not_end_it() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, N_SOURCE)
            self.down = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.down(x))

    model = CoTuningModel(nn.Identity(), Projected(), nn.Linear(8, N_TARGET))
    with pytest.raises(ValueError, match=r"source_head gave an output of shape \(2, 13\), expected 4 classes"):
        model(torch.randn(2, 8))


def test_the_classifier_itself_is_a_head() -> None:
    classifier = nn.Linear(6, N_SOURCE)
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).source_logits, classifier(x))
    assert isinstance(model.target_model(), nn.Linear)


def test_a_head_registered_under_two_names() -> None:
    classifier = ResNetLike()
    classifier.classifier = classifier.fc
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    assert model.network.fc is model.network.classifier is model.heads
    target_model = model.target_model()
    assert target_model.fc is target_model.classifier


def test_example_input_finds_a_wrong_head_and_mixed_classes() -> None:
    x = images()
    classifier = ResNetLike()
    classifier.train()
    model = CoTuningModel.from_classifier(classifier, N_TARGET, example_input=x)
    assert model.training
    assert classifier.training

    with pytest.raises(ValueError, match="mixes its classes after the head, as a softmax does"):
        CoTuningModel.from_classifier(nn.Sequential(ResNetLike(), nn.Softmax(1)), N_TARGET, example_input=x)

    # Without an example the first call finds the error.
    with pytest.raises(ValueError, match=r"this is not its head .*shapes cannot be multiplied"):
        CoTuningModel.from_classifier(HeadFirst(), N_TARGET)(torch.randn(2, 6))
    # The classifier is unchanged, even with copy=False.
    taken = HeadFirst().eval()
    vectors = torch.randn(2, 6)
    before = taken(vectors)
    with pytest.raises(ValueError, match=r"this is not its head .*shapes cannot be multiplied"):
        CoTuningModel.from_classifier(taken, N_TARGET, example_input=vectors, copy=False)
    torch.testing.assert_close(taken(vectors), before)


class Masked(ResNetLike):
    """Masks a class: its logit is -inf."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.where(torch.arange(logits.shape[1]) == 3, -torch.inf, logits)


def test_masked_classes_are_the_same_in_both() -> None:
    x = images()
    model = CoTuningModel.from_classifier(Masked().eval(), N_TARGET, example_input=x)
    assert (model(x).source_logits[:, 3] == -torch.inf).all()
    classifier = nn.Linear(6, N_SOURCE)
    with torch.no_grad():
        classifier.bias[2] = -torch.inf
    CoTuningModel.from_classifier(classifier, N_TARGET, example_input=torch.randn(2, 6))

    # An infinite logit does not make other differences look small.
    masked = torch.tensor([[-torch.inf, 1.0, 2.0]])
    for other in ([-torch.inf, 1.0, 2.1], [0.0, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf, -torch.inf, 2.0]):
        assert not models._same_logits(torch.tensor([other]), masked)
        assert not models._same_logits(masked, torch.tensor([other]))
    assert models._same_logits(torch.full((1, 3), -torch.inf), torch.full((1, 3), -torch.inf))


def test_an_empty_example_input() -> None:
    classifier = ResNetLike()
    with pytest.raises(ValueError, match=r"example_input gives logits of shape \(0, 13\).* at least one sample"):
        CoTuningModel.from_classifier(classifier, N_TARGET, example_input=images(0), copy=False)
    assert isinstance(classifier.fc, nn.Linear)


@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrized_head_is_found(bias: bool) -> None:
    """Its weight lies in a separate module, after the head."""
    head = nn.utils.parametrizations.weight_norm(nn.Linear(8, N_SOURCE, bias=bias))
    classifier = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head)
    x = torch.randn(3, 6)
    model = CoTuningModel.from_classifier(classifier, N_TARGET, example_input=x)
    torch.testing.assert_close(model(x).source_logits, classifier(x))
    torch.testing.assert_close(model.target_model()(x), model(x).target_logits)
    check_groups(model.param_groups(0.1), model)
    with pytest.raises(ValueError, match="ambiguous"):  # a layer after the head is still ambiguous
        CoTuningModel.from_classifier(nn.Sequential(classifier, nn.BatchNorm1d(N_SOURCE)), N_TARGET)


def test_example_input_by_keyword() -> None:
    CoTuningModel.from_classifier(TransformerLike(), N_TARGET, example_input={"input_ids": tokens()})


def test_outputs_that_cannot_be_cut() -> None:
    class Flattened(SqueezeNetLike):
        def forward(self, x: Tensor) -> Tensor:
            return self.classifier[:3](self.features(x)).flatten(1)

    with pytest.raises(ValueError, match="cannot share"):
        CoTuningModel.from_classifier(Flattened(), N_TARGET)(images())

    class Nothing(ResNetLike):
        def forward(self, x: Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    with pytest.raises(TypeError, match="the classifier returned NoneType, expected logits"):
        CoTuningModel.from_classifier(Nothing(), N_TARGET)(images())


def test_the_new_head_follows_the_old_one() -> None:
    model = CoTuningModel.from_classifier(TupleMlp().to(torch.bfloat16), N_TARGET)
    assert model.target_head.weight.dtype == torch.bfloat16
    assert model.target_head.bias is None  # like the source head
    meta = CoTuningModel.from_classifier(ResNetLike().to("meta"), N_TARGET)
    assert meta.target_head.weight.device.type == "meta"


def test_the_new_head_repeats_with_the_seed() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(CoTuningModel.from_classifier(ResNetLike(), N_TARGET).target_head.weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


# --- a good module ----------------------------------------------------------------------------------------------------


def test_state_dict_copy_and_pickle(architecture: Architecture) -> None:
    model = CoTuningModel.from_classifier(architecture.make(), N_TARGET).eval()
    x = architecture.inputs()
    expected = model(x)
    assert isinstance(expected, CoTuningLogits)
    assert f"network.{architecture.head}.source_head.weight" in model.state_dict()

    other = CoTuningModel.from_classifier(architecture.make(), N_TARGET).eval()
    assert not torch.allclose(other(x).target_logits, expected.target_logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for got, want in zip(twin(x), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet_like", "squeezenet_like"])
def test_compile_and_export(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = CoTuningModel.from_classifier(architecture.make(), N_TARGET).eval()
    x = architecture.inputs()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    exported = torch.export.export(model, (x,)).module()
    for run in (compiled, exported):
        for got, want in zip(run(x), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_threads_do_not_mix_their_results() -> None:
    model = CoTuningModel.from_classifier(SqueezeNetLike(), N_TARGET).eval()
    batches = [images(batch) for batch in range(1, 17)] * 4
    expected = [model(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(model, batches))
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(tuple(got), tuple(want))


def test_logits_may_be_overwritten_in_place() -> None:
    """A loss may write its gradient into the logits: autograd allows that for the views returned here."""
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET).eval()
    x, factor = images(), torch.randn(N_SOURCE)
    source_logits, target_logits = model(x)
    (source_logits.mul_(factor).sum() + target_logits.sum()).backward()
    got = model.network.conv.weight.grad.clone()
    model.zero_grad()
    source_logits, target_logits = model(x)
    ((source_logits * factor).sum() + target_logits.sum()).backward()
    torch.testing.assert_close(got, model.network.conv.weight.grad)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def test_batchnorm_momentum() -> None:
    classifier = TimmLike()
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    assert model.set_batchnorm_momentum(0.25) == 1
    assert classifier.norm.momentum == 0.1
    x = images()
    before = model.network.norm.running_mean.clone()
    batch_mean = model.network.stem(x).mean((0, 2, 3))
    model.train()(x)
    torch.testing.assert_close(model.network.norm.running_mean, 0.75 * before + 0.25 * batch_mean)
    assert CoTuningModel.from_classifier(SqueezeNetLike(), N_TARGET).set_batchnorm_momentum(0.1) == 0
    with pytest.raises(ValueError, match=r"momentum is 1.5, expected a number in \[0, 1\] or None"):
        model.set_batchnorm_momentum(1.5)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: {"input": x}])
def test_reestimated_batchnorm_is_the_mean_over_batches(wrap: Callable[[Tensor], Any]) -> None:
    classifier = nn.Sequential(nn.Dropout(0.5), ResNetLike())  # dropout before BatchNorm must be off
    model = CoTuningModel.from_classifier(classifier, N_TARGET).train()
    network = model.network[1]
    network.dropout.eval()
    modes = [module.training for module in model.modules()]
    model(images())  # old statistics, which must be discarded
    loader = [images(6) * (1 + i) for i in range(3)]
    features = [network.conv(x) for x in loader]
    assert model.reestimate_batchnorm([wrap(x) for x in loader]) == 3
    torch.testing.assert_close(network.bn.running_mean, torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0))
    torch.testing.assert_close(network.bn.running_var, torch.stack([f.var((0, 2, 3)) for f in features]).mean(0))
    assert network.bn.momentum == 0.01
    assert [module.training for module in model.modules()] == modes


def test_batchnorm_that_evaluation_does_not_reach_keeps_its_statistics() -> None:
    class WithAuxiliaryHead(ResNetLike):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.auxiliary(self.conv(x)).mean() if self.training else 0)

    model = CoTuningModel.from_classifier(WithAuxiliaryHead(), N_TARGET, head="fc").train()
    model(images())
    before = copy.deepcopy(model.state_dict())
    assert before["network.auxiliary.num_batches_tracked"] == 1
    assert model.reestimate_batchnorm([images(), images()]) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".bn.running" not in name and ".bn.num" not in name), name
    assert model.network.auxiliary.momentum == 0.1


def test_reestimation_that_fails_changes_nothing() -> None:
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET).train()
    model(images())
    before = copy.deepcopy(model.state_dict())

    def broken_loader() -> Any:
        yield images()
        raise OSError("the disk is gone")

    for loader, error in (
        ([], ValueError), (broken_loader(), OSError), ([torch.randn(2, 4, 9, 9)], RuntimeError),
        ([images()[:0]], ValueError), ([images(), math.nan * images()], ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            model.reestimate_batchnorm(loader)
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        assert model.network.bn.momentum == 0.01
        assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        CoTuningModel.from_classifier(SqueezeNetLike(), N_TARGET).reestimate_batchnorm([images()])
    # An empty batch is skipped.
    assert model.reestimate_batchnorm([images()[:0], (batch := images())]) == 1
    found = copy.deepcopy(model.state_dict())
    assert model.reestimate_batchnorm([batch]) == 1
    torch.testing.assert_close(dict(model.state_dict()), dict(found), rtol=0, atol=0)


def test_end_to_end_on_the_reference_loss() -> None:
    """A few steps of Co-Tuning lower both terms."""
    from cotuning_kernels import reference

    torch.manual_seed(0)
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET)
    x, y = (
        torch.randn(20, 3, 9, 9) + torch.arange(20).remainder(N_TARGET)[:, None, None, None],
        torch.arange(20) % N_TARGET,
    )
    relationship = torch.softmax(2 * torch.randn(N_TARGET, N_SOURCE), 1)
    optimizer = torch.optim.SGD(model.param_groups(0.02), momentum=0.9)
    history = []
    for _ in range(30):
        loss, target_term, source_term = reference.co_tuning_loss(*model(x), y, relationship)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((target_term.item(), source_term.item()))
    assert history[-1][0] < 0.7 * history[0][0]
    assert history[-1][1] < history[0][1]


# --- several heads ----------------------------------------------------------------------------------------------------


def test_combined_heads_are_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"Distilled has other layers of 13 classes beside the head 'head': 'head_dist'"
    ):
        CoTuningModel.from_classifier(Distilled(), N_TARGET, head="head")
    classifier = Distilled().eval()
    x = torch.randn(2, 6)
    before = classifier(x)
    with pytest.raises(ValueError, match=r"with two in its place: .* combines several heads"):
        CoTuningModel.from_classifier(classifier, N_TARGET, head="head", example_input=x, copy=False)
    torch.testing.assert_close(classifier(x), before, rtol=0, atol=0)

    for several in (lambda m: nn.ModuleList([m.head["fc"], m.auxiliary]), lambda m: [m.head["fc"], m.auxiliary]):
        classifier = TimmLike()
        classifier.get_classifier = lambda m=classifier, several=several: several(m)  # type: ignore[method-assign]
        with pytest.raises(
            ValueError, match=r"get_classifier\(\) returns (?i:.*list), expected one head; .* not supported"
        ):
            CoTuningModel.from_classifier(classifier, N_TARGET)


class TrainsASecondHead(nn.Module):
    """Uses the second head in training alone; its name does not say so."""

    def __init__(self, num_classes: int = N_SOURCE) -> None:
        super().__init__()
        self.body, self.second, self.fc = nn.Linear(6, 8), nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        return (self.fc(features), self.second(features)) if self.training else self.fc(features)


def test_a_second_head_for_training_alone_is_taken_with_an_example() -> None:
    with pytest.raises(ValueError, match="pass a batch as example_input="):
        CoTuningModel.from_classifier(TrainsASecondHead(), N_TARGET, head="fc")
    x = torch.randn(2, 6)
    model = CoTuningModel.from_classifier(TrainsASecondHead(), N_TARGET, head="fc", example_input=x)
    assert model.train()(x).target_logits.shape == (2, N_TARGET)


class WithAuxiliary(nn.Module):
    """Like Inception and GoogLeNet: returns auxiliary logits beside the logits in training."""

    def __init__(self, num_classes: int = N_SOURCE) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.AuxLogits = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, num_classes))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        return (self.fc(features), self.AuxLogits(features)) if self.training else self.fc(features)


def test_auxiliary_heads() -> None:
    """They are found, get gradients of exactly 0, and have the target's number of classes at the end."""
    classifier = WithAuxiliary().train()
    model = CoTuningModel.from_classifier(classifier, N_TARGET)  # the name rules AuxLogits out
    x = torch.randn(4, 6)
    source_logits, target_logits = model(x)
    (source_logits.square().sum() + target_logits.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    for name, parameter in model.named_parameters():
        assert (parameter.grad == 0).all() == name.startswith("network.AuxLogits"), name
    WithAuxiliary(N_TARGET).load_state_dict(model.target_model().state_dict())
    torch.testing.assert_close(model.eval()(x).source_logits, classifier.eval()(x))

    # An infinite auxiliary logit does not reach other gradients.
    model.train().network.AuxLogits[1].bias.data[0] = math.inf
    model.zero_grad()
    sum(logits.sum() for logits in model(x)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # The loss may overwrite the logits here too.
    source_logits, target_logits = model(x)
    (source_logits.mul_(2.0).sum() + target_logits.sum()).backward()

    taken = WithAuxiliary()
    with pytest.raises(ValueError, match="mixes its classes"):
        CoTuningModel.from_classifier(
            nn.Sequential(taken, nn.Softmax(1)), N_TARGET, head="0.fc", example_input=x, copy=False
        )
    assert (taken.fc.out_features, taken.AuxLogits[1].out_features) == (N_SOURCE, N_SOURCE)


def test_heads_that_forward_reads() -> None:
    """A classifier may read both heads' weight and bias, to multiply by hand or for their dtype."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, N_SOURCE)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x).to(self.head.weight.dtype)
            return nn.functional.linear(x, self.head.weight, self.head.bias).reshape(-1, self.head.out_features)

    class Direct(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    direct = Direct()
    reads = Reads()
    reads.load_state_dict(direct.state_dict())
    torch.manual_seed(1)
    model = CoTuningModel.from_classifier(reads, N_TARGET)
    torch.manual_seed(1)
    expected = CoTuningModel.from_classifier(direct, N_TARGET)
    x = torch.randn(4, 6)
    for got in (model, expected):
        sum(logits.square().sum() for logits in got.eval()(x)).backward()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


class FixesItsClasses(TrainsASecondHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x)).reshape(-1, N_SOURCE)


class Cosine(nn.Module):
    """Its last linear layer is not a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = nn.Linear(6, 8), nn.Parameter(torch.randn(N_SOURCE, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.body(x)) @ nn.functional.normalize(self.classes).t()


@pytest.mark.parametrize("train", [True, False])
def test_what_two_heads_cannot_do_is_said_at_the_first_call(train: bool) -> None:
    for classifier, head in ((FixesItsClasses(), "fc"), (Cosine(), None)):
        if isinstance(classifier, FixesItsClasses):
            del classifier.second
        model = CoTuningModel.from_classifier(classifier, N_TARGET, head=head).train(train)
        with pytest.raises(ValueError, match="runs with one head but not with two"):
            model(torch.randn(2, 6))
        # An error that also occurs with one head passes through.
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(2, 7))
        assert all(module.training == train for module in model.modules())


# --- transformers, timm, trainers -------------------------------------------------------------------------------------


def tiny_bert(**settings: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers, transformers.BertConfig(**sizes, intermediate_size=64, **settings)


@pytest.mark.parametrize("names", [None, ["ant", "bee", "cat", "dog", "eel"]])
@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_target_model_of_transformers_has_the_targets_classes(
    names: list[str] | None, problem: str | None, tmp_path: Any
) -> None:
    transformers, config = tiny_bert(num_labels=N_SOURCE, problem_type=problem)
    config.id2label = {i: f"source {i}" for i in range(N_SOURCE)}
    classifier = transformers.BertForSequenceClassification(config).eval()
    model = CoTuningModel.from_classifier(classifier, N_TARGET)
    target_model = model.target_model(names)
    labels = names or [f"LABEL_{i}" for i in range(N_TARGET)]
    assert target_model.config.id2label == dict(enumerate(labels))
    assert target_model.config.label2id == {name: i for i, name in enumerate(labels)}
    assert target_model.config.num_labels == target_model.num_labels == N_TARGET
    x, y = torch.randint(0, 99, (2, 7)), torch.tensor([1, 4])
    output = target_model(input_ids=x, labels=y)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, y))
    target_model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=x).logits, output.logits, rtol=0, atol=0)
    # The model and its source keep their own.
    for other in (classifier, model.network, model.source_model()):
        assert other.config.num_labels == N_SOURCE
        assert other.config.id2label[2] == "source 2"
    with pytest.raises(ValueError, match="target_classes has 2 names, expected 5"):
        model.target_model(["ant", "bee"])


def test_labels_in_a_batch_are_left_out() -> None:
    transformers, config = tiny_bert(num_labels=N_SOURCE)
    batch = {"input_ids": torch.randint(0, 99, (2, 7)), "labels": torch.tensor([1, 4])}
    classifier = transformers.BertForSequenceClassification(config).eval()
    model = CoTuningModel.from_classifier(classifier, N_TARGET, example_input=batch)
    torch.testing.assert_close(tuple(model(**batch)), tuple(model(input_ids=batch["input_ids"])), rtol=0, atol=0)

    class Image(ResNetLike):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
            assert labels is None
            return super().forward(pixel_values)

    images_model = CoTuningModel.from_classifier(Image(), N_TARGET)
    assert images_model.reestimate_batchnorm([{"pixel_values": images(), "labels": torch.zeros(4)}]) == 1


def test_a_tied_head_is_in_the_state_dict_once(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = CoTuningModel.from_classifier(TransformerLike(), N_TARGET).eval()
    x = tokens()
    expected = model(x)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    other = CoTuningModel.from_classifier(TransformerLike(), N_TARGET).eval()
    wrapped = nn.ModuleDict({"inner": other})
    assert wrapped.state_dict().keys() == {f"inner.{name}" for name in model.state_dict()}
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert other.source_head.weight is other.network.embeddings.weight
    torch.testing.assert_close(tuple(other(x)), tuple(expected), rtol=0, atol=0)
    # A state dict with both names of the weight, as nn.Module writes it.
    full = dict(nn.Module.state_dict(model))
    assert len(full) == len(model.state_dict()) + 1
    wrapped.load_state_dict({f"inner.{name}": value for name, value in full.items()})
    del full["network.decoder.source_head.weight"], full["network.embeddings.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embeddings"):
        other.load_state_dict(full)


def test_trainer_saves_a_model_with_a_tied_head(tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    transformers, config = tiny_bert()
    model = CoTuningModel.from_classifier(transformers.BertForMaskedLM(config), N_TARGET)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    transformers.Trainer(model, arguments).save_model(str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()


class WithMatcher(TimmLike):
    """Has the methods that timm's layer-wise rates and weight decay exclusions call."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem|norm", "blocks": [(r"^head\.fc", None), (r"^[^x]uxiliary", (7,))]}

    def no_weight_decay(self) -> set[str]:
        return {"norm.weight"}


def test_what_timm_asks_is_answered_with_the_models_names() -> None:
    model = CoTuningModel.from_classifier(WithMatcher(), N_TARGET)
    assert model.no_weight_decay() == {"network.norm.weight"}
    groups = model.group_matcher(coarse=True)
    found = {
        name: [
            group
            for group, patterns in groups.items()
            for pattern in ([patterns] if isinstance(patterns, str) else [p for p, _ in patterns])
            if re.match(pattern, name)
        ]
        for name, _ in model.named_parameters()
    }
    for name, matched in found.items():
        assert matched == [("stem" if ".stem." in name or ".norm." in name else "blocks")], name
    plain = CoTuningModel.from_classifier(ResNetLike(), N_TARGET)
    assert not hasattr(plain, "group_matcher")
    assert not hasattr(plain, "no_weight_decay")
    assert not hasattr(pickle.loads(pickle.dumps(plain)), "group_matcher")


def test_layer_decay_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    import timm.optim  # noqa: F811

    classifier = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=N_SOURCE)
    model = CoTuningModel.from_classifier(classifier, N_TARGET)

    def scales(of: nn.Module) -> dict[str, tuple[float, float]]:
        names = {id(p): name.removeprefix("network.") for name, p in of.named_parameters()}
        groups = timm.optim.param_groups_layer_decay(
            of, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=of.no_weight_decay()
        )
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    expected, found = scales(classifier), scales(model)
    for name, value in found.items():
        assert value == expected[name.replace("source_head.", "").replace("target_head.", "")], name
    assert found["head.target_head.weight"][0] == 1.0 > found["patch_embed.proj.weight"][0]


# --- BatchNorm that stays frozen --------------------------------------------------------------------------------------


def test_frozen_batchnorm_stays_frozen() -> None:
    model = CoTuningModel.from_classifier(TimmLike(), N_TARGET).train()
    assert model.freeze_batchnorm() == 1
    norm, x = model.network.norm, images()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for again in (model, model.train(), model.eval().train(), copy.deepcopy(model).train(),
                  pickle.loads(pickle.dumps(model)).train(), nn.ModuleList([model]).train()[0]):  # fmt: skip
        assert again.training
        assert again.network.stem.training
        assert not again.network.norm.training
    source_logits, _ = model(x)
    source_logits.sum().backward()
    torch.testing.assert_close(dict(norm.state_dict()), before, rtol=0, atol=0)
    assert norm.weight.grad is not None  # it is still trained
    frozen = model.network.eval()(x)
    torch.testing.assert_close(model.train().network(x), frozen)  # the network has no dropout

    assert model.freeze_batchnorm(False) == 1
    assert norm.training
    model(x)
    assert not torch.equal(norm.running_mean, before["running_mean"])
    model.eval().freeze_batchnorm()
    model.freeze_batchnorm(False)
    assert not norm.training
    assert model.train().network.norm.training
    assert CoTuningModel.from_classifier(SqueezeNetLike(), N_TARGET).freeze_batchnorm() == 0


def test_statistics_can_be_estimated_of_frozen_layers() -> None:
    model = CoTuningModel.from_classifier(ResNetLike(), N_TARGET).train()
    model.freeze_batchnorm()
    x = images()
    model.reestimate_batchnorm([x])
    torch.testing.assert_close(model.network.bn.running_mean, model.network.conv(x).mean((0, 2, 3)))
    assert not model.network.bn.training
