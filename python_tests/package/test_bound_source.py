"""The bound on the source head's gradient into the backbone, against separate gradients of the two terms."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import cotuning_kernels as ck
from cotuning_kernels import heads

N_S, N_T, B = 11, 5, 8


class Classifier(nn.Module):
    def __init__(self, convolutional: bool = False) -> None:
        super().__init__()
        self.convolutional = convolutional
        self.body = nn.Conv2d(3, 6, 1) if convolutional else nn.Linear(3, 6)
        self.head = nn.Conv2d(6, N_S, 1) if convolutional else nn.Linear(6, N_S)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).tanh())
        return logits.mean((2, 3)) if self.convolutional else logits


def inputs(convolutional: bool = False) -> Tensor:
    return torch.randn(B, 3, 4, 4) if convolutional else torch.randn(B, 3)


@pytest.fixture(autouse=True)
def _numbers_from_the_seed(seed: int) -> None:
    torch.manual_seed(seed)


def terms(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    source_logits, target_logits = model(x)
    y = torch.arange(B) % N_T
    relationship = torch.softmax(torch.linspace(0, 9, N_T * N_S).reshape(N_T, N_S).sin() * 3, 1).to(x.dtype)
    return nn.functional.cross_entropy(target_logits, y), nn.functional.cross_entropy(source_logits, relationship[y])


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(model.named_parameters(), found, strict=True)
    }


def check_bound(model: ck.CoTuningModel, x: Tensor, trade_off: float) -> float:
    """Check that training gradients equal those of the separate terms, with the factor from its formula.

    Returns the factor.
    """
    plain = copy.deepcopy(model)
    plain.bound_source = False
    features: list[Tensor] = []
    handle = plain.heads.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    target_term, source_term = terms(plain, x)
    handle.remove()
    norm_target, norm_source = (
        torch.autograd.grad(term, features[0], retain_graph=True)[0].norm().item()
        for term in (target_term, trade_off * source_term)
    )
    factor = min(1.0, norm_target / norm_source) if norm_target > 0 else 1.0
    of_target, of_source = gradients(target_term, plain), gradients(trade_off * source_term, plain)
    target_term, source_term = terms(model, x)
    for name, got in gradients(target_term + trade_off * source_term, model).items():
        bounded = factor if "head" not in name else 1.0
        torch.testing.assert_close(got, of_target[name] + bounded * of_source[name], msg=lambda s, n=name: f"{n}: {s}")
    return factor


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("size_of_the_source_head", [0.01, 30.0])
def test_the_gradients_are_those_of_the_formula(convolutional: bool, size_of_the_source_head: float) -> None:
    model = ck.CoTuningModel.from_classifier(Classifier(convolutional).double().train(), N_T)
    model.source_head.weight.data *= size_of_the_source_head
    factor = check_bound(model, inputs(convolutional).double(), 2.3)
    assert (factor < 1) == (size_of_the_source_head > 1)  # both branches of min


@pytest.mark.parametrize(
    "fault",
    [
        lambda source, target, factor: target + source,
        lambda source, target, factor: target + source * factor.square(),
        lambda source, target, factor: (target + source) * factor,
        lambda source, target, factor: source + target * factor,
    ],
    ids=["no_bound", "squared", "both", "swapped"],
)
def test_the_check_catches_a_wrong_bound(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: object, source: Tensor, target: Tensor) -> tuple[Tensor, None]:
        return fault(source, target, target.norm() / source.norm()), None  # type: ignore[operator]

    monkeypatch.setattr(heads._BoundSource, "backward", staticmethod(backward))
    model = ck.CoTuningModel.from_classifier(Classifier().double().train(), N_T)
    model.source_head.weight.data *= 30
    with pytest.raises(AssertionError):
        check_bound(model, inputs().double(), 2.3)


def test_without_a_gradient_to_compare_with_there_is_no_bound() -> None:
    """A loss of the source logits alone trains the backbone; so does a batch with only ignored labels."""
    model = ck.CoTuningModel.from_classifier(Classifier().train(), N_T)
    x = inputs()
    _, source_term = terms(model, x)
    found = gradients(source_term, model)
    _, expected = terms(model.eval(), x)
    for name, gradient in gradients(expected, model).items():
        torch.testing.assert_close(found[name], gradient)
    assert found["network.body.weight"].abs().max() > 0


def test_plain_fine_tuning_and_evaluation_are_as_without() -> None:
    model = ck.CoTuningModel.from_classifier(Classifier().train(), N_T)
    model.source_head.weight.data *= 30
    x = inputs()
    plain = copy.deepcopy(model)
    plain.bound_source = False
    assert model.bound_source
    for got, want in zip(
        gradients(terms(model, x)[0], model).values(), gradients(terms(plain, x)[0], plain).values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(tuple(model(x)), tuple(plain(x)), rtol=0, atol=0)
    model.eval(), plain.eval()
    for got, want in zip(
        gradients(sum(terms(model, x)), model).values(), gradients(sum(terms(plain, x)), plain).values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    made = ck.CoTuningModel.from_classifier(Classifier(), N_T, bound_source=False)
    assert not made.bound_source


def test_the_scale_of_the_loss_does_not_matter_and_an_overflow_stays_one() -> None:
    """A GradScaler needs both."""
    model = ck.CoTuningModel.from_classifier(Classifier().train(), N_T)
    model.source_head.weight.data *= 30
    x = inputs()
    loss = sum(terms(model, x))
    one, scaled = gradients(loss, model), gradients(65536.0 * loss, model)
    for name, gradient in one.items():
        torch.testing.assert_close(scaled[name], 65536 * gradient)
    overflow = gradients(loss * torch.inf, model)
    assert not overflow["network.body.weight"].isfinite().any()


def test_compiled_and_under_vmap() -> None:
    model = ck.CoTuningModel.from_classifier(Classifier().train(), N_T)
    model.source_head.weight.data *= 30
    x = inputs()
    expected = gradients(sum(terms(model, x)), model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(sum(terms(compiled, x)), list(model.parameters()))
    for got, want in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(got, want)
    batches = torch.stack([x, 2 * x])
    mapped = torch.func.vmap(model)(batches).source_logits
    torch.testing.assert_close(mapped, torch.stack([model(each).source_logits for each in batches]))


def test_the_bound_saves_a_backbone() -> None:
    """A pretrained head with large weights destroys a backbone that plain fine-tuning improves; the bound saves it."""
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    relationship = torch.softmax(3 * torch.randn(4, N_S), 1)
    start = ck.CoTuningModel.from_classifier(Classifier().train(), 4)
    start.source_head.weight.data *= 100

    def accuracy(trade_off: float, bound: bool, lr: float) -> float:
        model = copy.deepcopy(start)
        model.bound_source = bound
        criterion = ck.FusedCoTuningLoss(relationship, trade_off)
        optimizer = torch.optim.SGD(model.param_groups(lr), momentum=0.9)
        for _ in range(150):
            loss = criterion(*model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (model.target_model()(x).argmax(1) == y).double().mean().item()

    for lr in (1e-3, 3e-2):
        plain = accuracy(0.0, False, lr)
        assert accuracy(2.3, True, lr) > plain - 0.1
        assert accuracy(2.3, False, lr) < plain - 0.2


@pytest.fixture
def _one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_norms_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor uses squared norms summed over the processes, of which the second is simulated."""
    model = ck.CoTuningModel.from_classifier(Classifier().train(), N_T)
    model.source_head.weight.data *= 30
    x = inputs()
    plain = copy.deepcopy(model)
    plain.bound_source = False
    of_target, of_source = (gradients(term, plain)["network.body.weight"] for term in terms(plain, x))
    others = torch.tensor([40.0, 3.0])
    seen: list[Tensor] = []

    def all_reduce(squares: Tensor, group: object) -> None:
        seen.append(squares.clone())
        squares += others

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    wrapped = DistributedDataParallel(model)
    monkeypatch.setattr(type(wrapped.process_group), "size", lambda self: 2)
    found = gradients(sum(terms(wrapped, x)), model)["network.body.weight"]
    (squares,) = seen
    source, target = (squares + others).tolist()
    torch.testing.assert_close(found, of_target + (target / source) ** 0.5 * of_source)
