"""The fast path: which calls it serves, the same bits as the operations, and its autograd node.

The conformance table covers labels on the fast path (rows ``cpp-``) and off it (``cpp-operations``). The tests here
cover the rest.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cotuning_kernels as ck
from cotuning_kernels import backends, functional
from cotuning_kernels.backends.registry import REGISTRY
from support.layouts import bits

if REGISTRY.fast_path_loss is None:
    pytest.skip(f"no fast path: {backends.missing_reason('fast_path')}", allow_module_level=True)

Arguments = dict[str, Any]
NODE = "CoTuningLossBackward"


def arguments(seed: int, dtype: torch.dtype = torch.float32, batch: int = 7, **options: Any) -> Arguments:
    draw = torch.Generator().manual_seed(seed)
    logits = {
        name: torch.randn(batch, columns, generator=draw).to(dtype).requires_grad_()
        for name, columns in (("source_logits", 37), ("target_logits", 5))
    }
    relationship = torch.rand(5, 37, generator=draw)
    target = torch.randint(5, (batch,), generator=draw)
    return {**logits, "target": target, "relationship": relationship / relationship.sum(1, keepdim=True), **options}


def loss_of(given: Arguments) -> Tensor:
    loss = functional.co_tuning_loss(**given)
    assert isinstance(loss, Tensor)
    return loss


def gradients(given: Arguments, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    leaves = [given["source_logits"], given["target_logits"]]
    return torch.autograd.grad(loss_of(given), leaves, upstream)


def served_by_fast_path(given: Arguments) -> bool:
    node = loss_of(given).grad_fn
    # Before torch 2.13 the node of a Function in Python has no name().
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    return node is not None and not in_python and node.name() == NODE


# --------------------------------------------------------------------------------------------- which calls it serves

ORDINARY: dict[str, Arguments] = {
    "defaults": {},
    "weight": {"weight": torch.rand(5) + 0.1},
    "label smoothing": {"label_smoothing": 0.1},
    "no reduction": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "kl": {"source_loss": "kl"},
    "trade-off as a tensor": {"trade_off": torch.tensor(0.7, dtype=torch.float64)},
    "another ignore_index": {"ignore_index": 2},
    "by name": {"backend": "cpp"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_calls_are_served_with_the_bits_of_the_operations(
    options: Arguments, dtype: torch.dtype, seed: int
) -> None:
    given = arguments(seed, dtype, **options)
    assert served_by_fast_path(given)
    loss = loss_of(given)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed + 1)).to(loss.dtype)
    terms = functional.co_tuning_loss(**given, return_terms=True)
    ours = (*gradients(given, upstream), *terms)
    with backends.without_fast_path():
        assert not served_by_fast_path(given)
        theirs = (*gradients(given, upstream), *functional.co_tuning_loss(**given, return_terms=True))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        # fp16 factors are float32 tensors there and doubles here: powers of two, so equal.
        assert torch.equal(bits(one), bits(other))
    assert not terms.target_term.requires_grad
    assert not terms.source_term.requires_grad


def test_the_source_term_alone_and_the_module(seed: int) -> None:
    given = arguments(seed)
    loss = functional.source_label_loss(given["source_logits"], given["target"], given["relationship"])
    assert loss.grad_fn.name() == NODE
    module = ck.FusedCoTuningLoss(given["relationship"])
    assert module(given["source_logits"], given["target_logits"], given["target"]).grad_fn.name() == NODE


class Subclass(Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _changed(**changes: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    return lambda given: {**given, **{name: change(given.get(name)) for name, change in changes.items()}}


def _identity(given: Arguments) -> Arguments:
    return given


# Calls that the fast path would get wrong or has no code for. The operations serve them, with the same numbers.
NOT_ORDINARY: dict[str, tuple[Callable[[Arguments], Arguments], Callable[[], AbstractContextManager[Any]]]] = {
    "a subclass": (_changed(source_logits=lambda x: x.as_subclass(Subclass)), nullcontext),
    "probabilities": (_changed(target=lambda y: torch.nn.functional.one_hot(y, 5).float()), nullcontext),
    "a mixup pair": (_changed(target=lambda y: (y, y.flip(0), 0.3)), nullcontext),
    "columns apart": (_changed(source_logits=lambda x: x.t().contiguous().t()), nullcontext),
    "a negated view": (_changed(source_logits=torch._neg_view), nullcontext),
    "a tensor made in inference mode": (_changed(relationship=lambda _: _inference_relationship()), nullcontext),
    "trade-off in float32": (_changed(trade_off=lambda _: torch.tensor(0.7)), nullcontext),
    "trade-off as an integer": (_changed(trade_off=lambda _: 2), nullcontext),
    "a torch_function mode": (_identity, FunctionMode),
    "a torch_dispatch mode": (_identity, DispatchMode),
    "a default device": (_identity, lambda: torch.device("cpu")),
}


def _inference_relationship() -> Tensor:
    with torch.inference_mode():
        return torch.full((5, 37), 1 / 37)


@pytest.mark.parametrize(("change", "mode"), NOT_ORDINARY.values(), ids=NOT_ORDINARY)
def test_what_is_not_ordinary_is_declined(
    change: Callable[[Arguments], Arguments], mode: Callable[[], AbstractContextManager[Any]], seed: int
) -> None:
    given = change(arguments(seed))
    with mode():
        assert not served_by_fast_path(given)
        loss = loss_of(given)
    with backends.without_fast_path():
        assert torch.equal(loss, loss_of(given))


def test_transforms_are_declined(seed: int) -> None:
    given = arguments(seed)
    expected = gradients(given)

    def of_source(source_logits: Tensor) -> Tensor:
        return loss_of({**given, "source_logits": source_logits})

    # The Python Function rejects functorch; the C++ node must not run first and give wrong numbers.
    source_logits = given["source_logits"].detach()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(of_source)(source_logits)
    with torch.no_grad():
        two = torch.stack((source_logits, -source_logits))
        assert torch.equal(torch.func.vmap(of_source)(two), torch.stack([of_source(x) for x in two]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given["source_logits"], torch.randn(7, 37))
        with pytest.raises(RuntimeError, match="jvp"):
            loss_of({**given, "source_logits": dual})
    assert torch.equal(gradients(given)[0], expected[0])


def test_without_a_gradient_there_is_no_node(seed: int) -> None:
    given = arguments(seed)
    with torch.no_grad():
        assert loss_of(given).grad_fn is None
    with torch.inference_mode():
        assert loss_of(given).is_inference()
    detached = {**given, **{name: given[name].detach() for name in ("source_logits", "target_logits")}}
    assert not loss_of(detached).requires_grad


@pytest.mark.parametrize("frozen", ["source_logits", "target_logits"])
def test_a_frozen_head_gets_no_gradient(frozen: str, seed: int) -> None:
    given = arguments(seed)
    both = dict(zip(("source_logits", "target_logits"), gradients(given), strict=True))
    one = {**given, frozen: given[frozen].detach()}
    assert served_by_fast_path(one)
    loss_of(one).backward()
    (other,) = set(both) - {frozen}
    assert torch.equal(one[other].grad, both[other])
    assert one[frozen].grad is None


# ------------------------------------------------------------------------------------------------------- its node


def test_backward_again(seed: int) -> None:
    given = arguments(seed)
    leaves = [given["source_logits"], given["target_logits"]]
    expected = gradients(given, torch.tensor(3.0))
    loss = loss_of(given)
    for _ in range(2):
        kept = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_second_derivative_raises(seed: int) -> None:
    given = arguments(seed)
    assert served_by_fast_path(given)
    with pytest.raises(RuntimeError, match=r"create_graph=True .* once.*reference"):
        torch.autograd.grad(loss_of(given), given["source_logits"], create_graph=True)


def test_batched_upstream_gradients_are_not_read_as_plain_memory(seed: int) -> None:
    loss = loss_of(given := arguments(seed, reduction="none"))
    with pytest.raises(RuntimeError, match="scale_gradients_"):
        torch.autograd.grad(loss, given["source_logits"], torch.eye(7), is_grads_batched=True)


def test_saved_tensor_hooks_see_the_gradients(seed: int) -> None:
    given = arguments(seed)
    expected = gradients(given)
    seen: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> bytes:
        seen.append(tuple(x.shape))
        return x.numpy().tobytes()

    def unpack(x: bytes) -> Tensor:
        columns = len(x) // 4 // 7
        return torch.frombuffer(bytearray(x), dtype=torch.float32).reshape(7, columns)

    with saved_tensors_hooks(pack, unpack):
        loss = loss_of(given)
    assert loss.grad_fn.name() == NODE
    assert sorted(seen) == [(7, 5), (7, 37)]
    loss.backward()
    assert torch.equal(given["source_logits"].grad, expected[0])
    assert torch.equal(given["target_logits"].grad, expected[1])


def test_a_hook_that_raises_is_heard(seed: int) -> None:
    def pack(x: Tensor) -> Tensor:
        raise ValueError("planted")

    with saved_tensors_hooks(pack, lambda x: x), pytest.raises(ValueError, match="planted"):
        loss_of(arguments(seed))
    assert served_by_fast_path(arguments(seed))


@pytest.mark.parametrize("last", [True, False])
def test_activation_checkpointing(last: bool, seed: int) -> None:
    """A checkpoint's hook raises once it has all its tensors: in the middle of the loss, if the loss is last."""
    given = arguments(seed)

    def run(source_logits: Tensor, target_logits: Tensor) -> Tensor:
        loss = loss_of({**given, "source_logits": source_logits * 0.7, "target_logits": target_logits.sin()})
        return loss if last else loss.exp()

    heads = given["source_logits"], given["target_logits"]
    expected = torch.autograd.grad(run(*heads), heads)
    found = torch.autograd.grad(checkpoint(run, *heads, use_reentrant=False), heads)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def saved_by(given: Arguments) -> list[tuple[torch.Size, torch.dtype]]:
    seen: list[tuple[torch.Size, torch.dtype]] = []

    def pack(x: Tensor) -> Tensor:
        seen.append((x.shape, x.dtype))
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss_of(given)
    return seen


@pytest.mark.parametrize("frozen", [None, "source_logits", "target_logits"])
@pytest.mark.parametrize("options", ORDINARY.values(), ids=ORDINARY)
def test_both_paths_save_the_same_tensors(options: Arguments, frozen: str | None, seed: int) -> None:
    given = arguments(seed, **options)
    if frozen is not None:
        given[frozen] = given[frozen].detach()
    assert served_by_fast_path(given)
    saved = saved_by(given)
    assert len(saved) == (2 if frozen is None else 1)
    with backends.without_fast_path():
        assert saved_by(given) == saved


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_may_take_both_paths(first: bool, seed: int) -> None:
    """Backward may run in another state than forward, so the fast path may serve one and decline the other."""
    given = arguments(seed)
    expected = gradients(given)
    takes_it = iter((first, not first))

    def run(source_logits: Tensor, target_logits: Tensor) -> Tensor:
        with nullcontext() if next(takes_it) else backends.without_fast_path():
            return loss_of({**given, "source_logits": source_logits * 1, "target_logits": target_logits * 1}).clone()

    heads = given["source_logits"], given["target_logits"]
    found = torch.autograd.grad(checkpoint(run, *heads, use_reentrant=False), heads)
    assert not list(takes_it)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [None, "source_logits", "target_logits"])
def test_compiled_autograd(frozen: str | None, seed: int) -> None:
    from torch._dynamo import compiled_autograd

    given = arguments(seed)
    if frozen is not None:
        given[frozen] = given[frozen].detach()
    names = [name for name in ("source_logits", "target_logits") if name != frozen]
    expected = torch.autograd.grad(loss_of(given), [given[name] for name in names], torch.tensor(0.3))
    for _ in range(2):  # the second time from the cache
        for name in names:
            given[name].grad = None
        with compiled_autograd._enable(torch.compile(backend="eager")):
            (0.3 * loss_of(given)).backward()
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(given[name].grad, gradient, rtol=1e-6, atol=0)


def test_profiler_and_anomaly_mode_name_it(seed: int) -> None:
    given = arguments(seed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(given).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"cotuning_kernels::co_tuning_loss", NODE} <= names
    given["target_logits"].data.fill_(float("nan"))
    with (
        torch.autograd.set_detect_anomaly(True, check_nan=True),
        pytest.warns(UserWarning, match=f"detected in {NODE}"),
        pytest.raises(RuntimeError, match=NODE),
    ):
        loss_of(given).backward()


def _operations(work: Callable[[], object]) -> list[str]:
    """The names, in order, of operations that the dispatcher ran or that reported themselves to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return [event.name for event in profile.events() if event.name.partition("::")[0] in ("aten", "cotuning_kernels")]


# Torch allocates a gradient of 1 and fills it (four operations). One detach per head: .grad is the saved gradient.
BACKWARD = {"aten::ones_like": 1, "aten::empty_like": 1, "aten::empty_strided": 1, "aten::fill_": 1, "aten::detach": 2}


def test_a_training_step_runs_one_operation_of_ours(seed: int) -> None:
    """Counts are exact on a busy machine. backward() only adds torch's own gradient of 1 for the loss."""
    given = arguments(seed)
    assert _operations(lambda: loss_of(given)) == ["cotuning_kernels::co_tuning_loss"]
    assert Counter(_operations(loss_of(given).backward)) == BACKWARD
    loss = loss_of(given)
    scaled = _operations(lambda: loss.backward(torch.tensor(0.5)))
    assert not [name for name in scaled if name.startswith("cotuning_kernels")]
    with backends.without_fast_path():  # the count can fail: here it has one more, for the factor 0.5
        loss = loss_of(given)
        assert "cotuning_kernels::scale_gradients_" in _operations(lambda: loss.backward(torch.tensor(0.5)))


def test_one_more_operation_is_noticed(seed: int) -> None:
    """Even if backward runs the same operation anyway."""
    given = arguments(seed)
    given["source_logits"].register_hook(lambda gradient: gradient.detach())
    assert Counter(_operations(loss_of(given).backward)) == {**BACKWARD, "aten::detach": 3}


def test_nothing_is_leaked(seed: int) -> None:
    given = arguments(seed)

    def tensors() -> int:
        gc.collect()
        return sum(type(each) is Tensor for each in gc.get_objects())

    references = [sys.getrefcount(x) for x in given.values()]
    before = tensors()
    for _ in range(50):
        gradients(given)
        functional.co_tuning_loss(**given, return_terms=True)
        with pytest.raises(IndexError):
            loss_of({**given, "target": given["target"] + 5})
    assert tensors() <= before  # fewer if tensors of an earlier test are freed meanwhile
    assert [sys.getrefcount(x) for x in given.values()] == references


def test_the_interpreter_lock_is_free_while_the_kernel_runs() -> None:
    """Another Python thread counts milliseconds during one long call; with the lock held it could not."""
    given = arguments(0, batch=200_000)
    count, done = 0, threading.Event()

    def counting() -> None:
        nonlocal count
        while not done.wait(0.001):
            count += 1

    thread = threading.Thread(target=counting)
    thread.start()
    with torch.no_grad():
        loss_of(given)
        start = count
        loss_of(given)
        counted = count - start
    done.set()
    thread.join()
    assert counted >= 3


@pytest.mark.parametrize("path", [nullcontext, backends.without_fast_path], ids=["fast path", "operation"])
def test_memory_that_is_not_there(path: Callable[[], AbstractContextManager[Any]]) -> None:
    """The message is torch's own: programs that retry with a smaller batch look for it."""
    rows = columns = 2**23  # a gradient of 2^49 bytes exceeds the address space
    source_logits = torch.zeros(1, columns, dtype=torch.float64).expand(rows, columns).requires_grad_()
    target = torch.zeros(1, dtype=torch.int64).expand(rows)
    relationship = torch.full((1, columns), 1 / columns, dtype=torch.float64)
    with path(), pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory: you tried to allocate"):
        functional.source_label_loss(source_logits, target, relationship)


# -------------------------------------------------------------------------------------- which versions of torch


def test_beside_another_torch_it_is_not_even_loaded() -> None:
    script = """
        import sys
        import torch
        torch.__version__ = "2.99.0"
        import cotuning_kernels as ck
        from cotuning_kernels import backends, environment
        assert backends.registry.REGISTRY.fast_path_loss is None
        assert "cotuning_kernels._fast_path" not in sys.modules
        assert backends.select("cpu") == "cpp"
        logits = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        ck.FusedCoTuningLoss(torch.full((2, 4), 0.25))(*logits, torch.tensor([0, 1, 0])).backward()
        print(environment.report())
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2.99.0" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "fast path" in line)
    assert "built with torch" in line
