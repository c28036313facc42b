"""Wrong arguments: each error names the argument, the value given, the value expected, or the fix.

No wrong argument crashes the process or writes to the caller's tensors. The error is always a TypeError, ValueError,
IndexError or RuntimeError.
"""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

import cotuning_kernels as ck
from cotuning_kernels import autograd, backends, functional
from cotuning_kernels.backends.registry import REGISTRY
from cotuning_kernels.relationship import RelationshipFileError
from support.backends import BACKENDS, Backend
from support.layouts import Placed
from support.stand_in import cpu_served_by

_B, _T, _S = 4, 3, 20


def _arguments() -> dict[str, Any]:
    """A valid call."""
    draw = torch.Generator().manual_seed(7)
    return {
        "source_logits": torch.randn(_B, _S, generator=draw),
        "target_logits": torch.randn(_B, _T, generator=draw),
        "target": torch.tensor([0, 1, 2, 0]),
        "relationship": torch.softmax(torch.randn(_T, _S, generator=draw), 1),
    }


def _pair(**changes: Any) -> tuple[Any, Any, Any]:
    parts = {"a": torch.tensor([0, 1, 2, 0]), "b": torch.tensor([2, 2, 1, 0]), "share": torch.rand(_B)} | changes
    return parts["a"], parts["b"], parts["share"]


_Z, _Y, _R = torch.zeros(_B, _S), torch.zeros(_B, dtype=torch.long), torch.full((_T, _S), 1 / _S)

# The change to a valid call, the error's type, and parts of its message: name, value given, value expected or fix.
_BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "source logits as a list": ({"source_logits": [[0.0] * _S] * _B}, TypeError, ["source_logits", "list", "Tensor"]),
    "target logits as an array": (
        {"target_logits": torch.zeros(_B, _T).numpy()},
        TypeError,
        ["target_logits", "ndarray", "Tensor"],
    ),
    "integer logits": ({"source_logits": _Z.long()}, TypeError, ["source_logits", "int64", "float32"]),
    "complex logits": ({"source_logits": _Z.to(torch.complex64)}, TypeError, ["source_logits", "complex64", "float32"]),
    "boolean target logits": (
        {"target_logits": torch.zeros(_B, _T).bool()},
        TypeError,
        ["target_logits", "bool", "float32"],
    ),
    "no target logits": ({"target_logits": None}, TypeError, ["target_logits is None", "source_label_loss"]),
    "3-D logits": ({"source_logits": _Z.reshape(2, 2, _S)}, ValueError, ["source_logits", r"\(2, 2, 20\)", "flatten"]),
    "3-D target logits": (
        {"target_logits": torch.zeros(2, 2, _T)},
        ValueError,
        ["target_logits", r"\(2, 2, 3\)", "flatten"],
    ),
    "1-D logits": ({"source_logits": _Z[0]}, ValueError, ["source_logits", r"\(20,\)", r"\(B, classes\)"]),
    "no classes": (
        {"source_logits": _Z[:, :0], "relationship": _R[:, :0]},
        ValueError,
        ["source_logits", r"\(4, 0\)", "at least one"],
    ),
    "batches that differ": (
        {"target_logits": torch.zeros(_B + 1, _T)},
        ValueError,
        ["source_logits", "target_logits", r"\(4, 20\)", r"\(5, 3\)"],
    ),
    "too few labels": ({"target": _Y[:3]}, ValueError, ["target", r"\(3,\)", r"\(4,\)"]),
    "labels as a column": ({"target": _Y[:, None]}, ValueError, ["target", r"\(4, 1\)", r"\(4,\)"]),
    "labels as a list": ({"target": [0, 1, 2, 0]}, TypeError, ["target", "list", "class indices"]),
    "labels as uint8": ({"target": _Y.to(torch.uint8)}, TypeError, ["target", "uint8", "int64", r"\.long\(\)"]),
    "labels as int16": ({"target": _Y.short()}, TypeError, ["target", "int16", "int64", r"\.long\(\)"]),
    "labels as bool": ({"target": _Y.bool()}, TypeError, ["target", "bool", "int64"]),
    "labels as float": (
        {"target": _Y.float()},
        ValueError,
        ["target", "probabilities", r"\(4,\)", r"\(4, 3\)", "int64"],
    ),
    "probabilities of another width": (
        {"target": torch.zeros(_B, _T + 1)},
        ValueError,
        ["target", r"\(4, 4\)", r"\(4, 3\)"],
    ),
    "probabilities of another batch": (
        {"target": torch.zeros(_B + 1, _T)},
        ValueError,
        ["target", r"\(5, 3\)", r"\(4, 3\)"],
    ),
    "probabilities with a gradient": (
        {"target": torch.zeros(_B, _T, requires_grad=True)},
        ValueError,
        ["target", "requires grad", "detach"],
    ),
    "probabilities and ignore_index": (
        {"target": torch.zeros(_B, _T), "ignore_index": 1},
        ValueError,
        ["ignore_index is 1", "probabilities"],
    ),
    "a pair of two": ({"target": (_Y, _Y)}, ValueError, ["target", "tuple of 2", "share"]),
    "a pair of different dtypes": ({"target": _pair(b=_Y.int())}, TypeError, [r"target\[0\]", "int64", "int32"]),
    "a pair of different lengths": ({"target": _pair(b=_Y[:3])}, ValueError, [r"target\[1\]", r"\(3,\)", r"\(4,\)"]),
    "a pair of floats": ({"target": _pair(a=_Y.float())}, TypeError, [r"target\[0\]", "float32", "int64"]),
    "share above 1": ({"target": _pair(share=1.5)}, ValueError, ["share", "1.5", r"\[0, 1\]"]),
    "share NaN": ({"target": _pair(share=math.nan)}, ValueError, ["share", "nan", r"\[0, 1\]"]),
    "shares of another batch": ({"target": _pair(share=torch.rand(3))}, ValueError, ["share", r"\(3,\)", r"\(4,\)"]),
    "shares as two columns": (
        {"target": _pair(share=torch.rand(_B, 2))},
        ValueError,
        ["share", r"\(4, 2\)", r"\(4,\)"],
    ),
    "shares as integers": ({"target": _pair(share=_Y)}, TypeError, ["share", "int64", "float"]),
    "shares with a gradient": (
        {"target": _pair(share=torch.rand(_B, requires_grad=True))},
        ValueError,
        ["share", "requires grad"],
    ),
    "share as a word": ({"target": _pair(share="half")}, TypeError, ["share"]),
    "reduction as a list": ({"reduction": ["mean"]}, ValueError, ["reduction", "mean", "none"]),
    "source_loss as a list": ({"source_loss": []}, ValueError, ["source_loss", "kl"]),
    "trade_off beyond float64": ({"trade_off": 10**400}, ValueError, ["trade_off", "finite"]),
    "relationship as a list": ({"relationship": [[1.0]]}, TypeError, ["relationship", "list", "Tensor"]),
    "relationship as integers": ({"relationship": _R.long()}, ValueError, ["relationship", "int64", "float"]),
    "relationship of one dimension": (
        {"relationship": _R[0]},
        ValueError,
        ["relationship", r"\(20,\)", r"\(N_t, N_s\)"],
    ),
    "transposed relationship": (
        {"relationship": _R.T},
        ValueError,
        ["relationship", "3", "20", "transposed", "swapped"],
    ),
    "floating labels": ({"target": torch.zeros(_B)}, ValueError, ["class probabilities", r"target\.long\(\)"]),
    "relationship of another source head": (
        {"relationship": _R[:, :19]},
        ValueError,
        ["relationship", "19", "20", "source"],
    ),
    "relationship of other classes": ({"relationship": _R[:2]}, ValueError, ["relationship", "2 rows", "3 classes"]),
    "relationship with a gradient": (
        {"relationship": _R.clone().requires_grad_()},
        ValueError,
        ["relationship", "requires grad", "detach"],
    ),
    "weight of another length": ({"weight": torch.ones(_T + 1)}, ValueError, ["weight", r"\(4,\)", r"\(3,\)"]),
    "weight as a matrix": ({"weight": torch.ones(_T, 1)}, ValueError, ["weight", r"\(3, 1\)", r"\(3,\)"]),
    "weight as integers": ({"weight": torch.ones(_T).long()}, TypeError, ["weight", "float"]),
    "weight as a list": ({"weight": [1.0] * _T}, TypeError, ["weight", r"\(3,\)"]),
    "weight with a gradient": (
        {"weight": torch.ones(_T, requires_grad=True)},
        ValueError,
        ["weight", "requires grad", "detach"],
    ),
    "label_smoothing above 1": ({"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1", r"\[0, 1\]"]),
    "label_smoothing below 0": ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", r"\[0, 1\]"]),
    "label_smoothing NaN": ({"label_smoothing": math.nan}, ValueError, ["label_smoothing", "nan", r"\[0, 1\]"]),
    "reduction misspelt": ({"reduction": "avg"}, ValueError, ["reduction", "'avg'", "'mean', 'sum' or 'none'"]),
    "source_loss misspelt": ({"source_loss": "ce"}, ValueError, ["source_loss", "'ce'", "'cross_entropy' or 'kl'"]),
    "logits on another device": (
        {"target_logits": torch.zeros(_B, _T, device="meta")},
        ValueError,
        ["target_logits", "meta", "cpu", "same device"],
    ),
    "labels on another device": ({"target": _Y.to("meta")}, ValueError, ["target", "meta", "cpu"]),
    "relationship on another device": ({"relationship": _R.to("meta")}, ValueError, ["relationship", "meta", "cpu"]),
    "weight on another device": ({"weight": torch.ones(_T, device="meta")}, ValueError, ["weight", r"\.to\('cpu'\)"]),
    "trade_off as a word": ({"trade_off": "2.3"}, TypeError, ["trade_off", "str", "number"]),
    "trade_off a row": ({"trade_off": torch.ones(_B)}, ValueError, ["trade_off", r"\(4,\)", "number"]),
    "an unknown backend": ({"backend": "fortran"}, ValueError, ["backend", "'fortran'", "'cpp'", "'reference'"]),
}


def _says(parts: list[str]) -> str:
    """A pattern that matches all parts in any order."""
    return "(?s)" + "".join(f"(?=.*{part})" for part in parts)


@pytest.mark.parametrize("what", _BAD)
def test_the_function_says_what_is_wrong(backend: Backend, what: str) -> None:
    change, error, parts = _BAD[what]
    arguments = _arguments() | {"backend": backend.argument} | change
    with pytest.raises(error, match=_says(parts)):
        functional.co_tuning_loss(**arguments)


@pytest.mark.parametrize(
    "what", [x for x in _BAD if not {"target_logits", "weight", "label_smoothing", "trade_off"} & _BAD[x][0].keys()]
)
def test_the_source_head_alone_says_what_is_wrong(backend: Backend, what: str) -> None:
    change, error, parts = _BAD[what]
    arguments = _arguments() | {"backend": backend.argument} | change
    del arguments["target_logits"]
    if what == "relationship of other classes":
        functional.source_label_loss(**arguments | {"target": torch.tensor([0, 1, 1, 0])})  # no target head to disagree
        return
    with pytest.raises(error, match=_says(parts)):
        functional.source_label_loss(**arguments)


@pytest.mark.parametrize(
    "what", [x for x in _BAD if x.startswith(("labels", "a pair", "share", "relationship as", "relationship of one"))]
)
def test_translation_says_what_is_wrong(backend: Backend, what: str) -> None:
    change, error, parts = _BAD[what]
    arguments = _arguments() | change
    if what in ("labels as a list", "too few labels", "relationship on another device", "labels on another device"):
        parts = parts[:1]
    with pytest.raises(error, match=_says(parts)):
        functional.translate_labels(arguments["target"], arguments["relationship"], backend=backend.argument)


@pytest.mark.parametrize(
    "what", [x for x in _BAD if set(_BAD[x][0]) <= {"weight", "label_smoothing", "reduction", "source_loss", "backend"}]
)
def test_the_module_says_what_is_wrong_when_it_is_made(backend: Backend, what: str) -> None:
    change, error, parts = _BAD[what]
    if what == "weight with a gradient":
        pytest.skip("the module keeps a detached copy")
    with pytest.raises(error, match=_says(parts)):
        ck.FusedCoTuningLoss(_R, **{"backend": backend.argument} | change)


@pytest.mark.parametrize(
    ("row", "column", "value"), [(0, 0, math.nan), (2, 19, -1e-6), (1, 5, math.inf), (1, 4, -math.inf)]
)
def test_a_relationship_that_is_no_probability_is_refused_by_the_module(row: int, column: int, value: float) -> None:
    relationship = _R.clone()
    relationship[row, column] = value
    with pytest.raises(ValueError, match=rf"relationship\[{row}, {column}\] is .*expected a probability"):
        ck.FusedCoTuningLoss(relationship)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ignore_index": 1.5}, TypeError, r"ignore_index is 1\.5, expected an integer"),
        ({"weight": torch.tensor([1.0, math.nan, 1.0])}, ValueError, r"weight is tensor.*nan.*expected finite numbers"),
        ({"relationship": "r.safetensors"}, TypeError, r"relationship is a str, expected a Tensor; Relationship\.load"),
        ({"relationship": _R.numpy()}, TypeError, r"relationship is a ndarray, expected a Tensor; torch\.from_numpy"),
    ],
    ids=["ignore_index", "weight", "path", "array"],
)
def test_the_module_refuses_what_no_step_could_use(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ck.FusedCoTuningLoss(**{"relationship": _R} | change)


@pytest.mark.parametrize("where", ["labels", "first of a pair", "second of a pair"])
@pytest.mark.parametrize("bad", [_T, -1, -99, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_label_out_of_range_is_an_index_error_and_nothing_is_written(
    backend: Backend, where: str, bad: int, inplace: bool
) -> None:
    """The error names row and value; logits stay unchanged, even where gradients would overwrite them."""
    if backend.device_code:
        pytest.skip(f"{backend.name}: an assertion of the device, as test_triton.py shows")
    if inplace and "in place" not in backend.forms:
        pytest.skip(f"{backend.name}: refuses inplace=True")
    labels = torch.tensor([0, -100, bad, bad])
    target = {"labels": labels, "first of a pair": _pair(a=labels), "second of a pair": _pair(b=labels)}[where]
    name = {"labels": "target", "first of a pair": r"target\[0\]", "second of a pair": r"target\[1\]"}[where]
    arguments = _arguments()
    source, head = Placed(arguments["source_logits"]), Placed(arguments["target_logits"])
    logits = {
        "source_logits": source.view.detach().requires_grad_(),
        "target_logits": head.view.detach().requires_grad_(),
    }
    if inplace:
        logits = {key: _Alias.apply(x) for key, x in logits.items()}  # type: ignore[no-untyped-call]
    with pytest.raises(IndexError, match=rf"{name}\[2\] is {bad}, .*\[0, 3\).*ignore_index=-100"):
        functional.co_tuning_loss(
            **arguments | logits | {"target": target, "inplace": inplace, "backend": backend.argument}
        )
    source.assert_unchanged("source_logits")
    head.assert_unchanged("target_logits")


class _Alias(torch.autograd.Function):
    """Shares the input's memory, but is not a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize("bad", [_T, -1, 2**40])
def test_labels_out_of_range_elsewhere(backend: Backend, bad: int) -> None:
    if backend.device_code:
        pytest.skip(f"{backend.name}: an assertion of the device, as test_triton.py shows")
    arguments = _arguments()
    labels = torch.tensor([0, 1, 2, bad])
    match = rf"target\[3\] is {bad}, expected a class index in \[0, 3\)"
    with pytest.raises(IndexError, match=match):
        functional.translate_labels(labels, arguments["relationship"], backend=backend.argument)
    with pytest.raises(IndexError, match=match):
        functional.source_label_loss(
            arguments["source_logits"], labels, arguments["relationship"], backend=backend.argument
        )


def test_a_large_batch_with_one_bad_label_names_it(backend: Backend) -> None:
    """Threads share the rows; the error must come out of a thread intact, and name the first row."""
    if backend.device_code:
        pytest.skip(f"{backend.name}: an assertion of the device, as test_triton.py shows")
    torch.set_num_threads(2)
    labels = torch.arange(3000) % _T
    labels[[1777, 2999]] = 9
    with pytest.raises(IndexError, match=r"target\[1777\] is 9"):
        functional.co_tuning_loss(torch.zeros(3000, _S), torch.zeros(3000, _T), labels, _R, backend=backend.argument)


def test_a_backend_that_is_absent_says_how_to_get_it() -> None:
    reason = "the C++ extension is not available (planted); run `pip install .`"
    with REGISTRY.override(missing={"cpp": reason}):
        with pytest.raises(RuntimeError, match=_says(["'cpp'", "planted", "pip install"])):
            functional.co_tuning_loss(**_arguments(), backend="cpp")
        with pytest.raises(RuntimeError, match=_says(["'cpp'", "planted", "pip install"])):
            ck.FusedCoTuningLoss(_R, backend="cpp")
        with pytest.raises(RuntimeError, match="planted"), backends.use_cpu_isa("portable"):
            pass
        assert backends.select("cpu") == "reference"
        assert torch.isfinite(functional.co_tuning_loss(**_arguments()))  # type: ignore[arg-type]


def test_an_unknown_instruction_set_is_refused() -> None:
    if backends.extension() is None:
        pytest.skip(str(backends.missing_reason("cpp")))
    before = backends.cpu_isa()
    with pytest.raises(RuntimeError, match="sse9"), backends.use_cpu_isa("sse9"):
        pass
    assert backends.cpu_isa() == before


def _loss_op(**changes: Any) -> None:
    """Call the operation itself with valid arguments, except for ``changes``."""
    given = {
        "source": _Z, "head": torch.zeros(_B, _T), "target": _Y, "target_b": None, "mix": None, "relationship": _R,
        "weight": None, "trade_off": torch.tensor(2.3, dtype=torch.float64), "smoothing": 0.0, "ignore_index": -100,
        "reduction": 1, "kl": False,
    } | changes  # fmt: skip
    torch.ops.cotuning_kernels.co_tuning_loss(*given.values(), True, True)


def _sums_op(**changes: Any) -> None:
    sums, counts = torch.zeros(_T, _S), torch.zeros(_T).long()
    given = {"sums": sums, "counts": counts, "logits": _Z, "labels": _Y, "b": 1.0, "ignore": -100} | changes
    torch.ops.cotuning_kernels.add_class_sums_(*given.values())


def _scale_op(*arguments: Tensor) -> None:
    torch.ops.cotuning_kernels.scale_gradients_(*arguments)


_ONE, _MIX = torch.ones(()), torch.ones(_B, dtype=torch.float64)
_P = torch.full((_B, _T), 1 / _T)
_WRONG_CALLS: dict[str, Callable[[], None]] = {
    "a wider target head": lambda: _loss_op(head=torch.zeros(_B, _T + 1)),
    "a shorter target head": lambda: _loss_op(head=torch.zeros(_B - 1, _T)),
    "a target head of one dimension": lambda: _loss_op(head=torch.zeros(_B)),
    "columns not dense": lambda: _loss_op(source=_Z[:, ::2], relationship=_R[:, :10]),
    "too few labels": lambda: _loss_op(target=_Y[:3]),
    "labels of 2 bytes": lambda: _loss_op(target=_Y.short()),
    "labels too large": lambda: _loss_op(target=_Y + 3),
    "labels too small": lambda: _loss_op(target=_Y - 1),
    "a narrower relationship": lambda: _loss_op(relationship=_R[:, :19]),
    "a shorter weight": lambda: _loss_op(weight=torch.ones(2)),
    "an integer weight": lambda: _loss_op(weight=torch.ones(_T).long()),
    "a pair without shares": lambda: _loss_op(target_b=_Y),
    "too few shares": lambda: _loss_op(target_b=_Y, mix=_MIX[:3]),
    "shares in float32": lambda: _loss_op(target_b=_Y, mix=_MIX.float()),
    "a shorter second label": lambda: _loss_op(target_b=_Y[:2], mix=_MIX),
    "a second label too large": lambda: _loss_op(target_b=_Y + 3, mix=_MIX),
    "a second label of another type": lambda: _loss_op(target_b=_Y.int()[:2], mix=_MIX),
    "probabilities with a row of R a class": lambda: _loss_op(target=_P, mix=_MIX),
    "probabilities without supervised shares": lambda: _loss_op(target=_P, relationship=torch.zeros(_B, _S)),
    "probabilities and a second label": lambda: _loss_op(target=_P, target_b=_Y, mix=_MIX, relationship=_Z),
    "a trade-off in float32": lambda: _loss_op(trade_off=torch.tensor(2.3)),
    "a trade-off a row": lambda: _loss_op(trade_off=_MIX),
    "an unknown reduction": lambda: _loss_op(reduction=7),
    "label smoothing of 2": lambda: _loss_op(smoothing=2.0),
    "too few upstream gradients": lambda: _scale_op(_Z.clone(), _P.clone(), torch.ones(2), torch.ones(3)),
    "one factor": lambda: _scale_op(_Z.clone(), _P.clone(), torch.ones(1), _ONE),
    "gradients that overlap": lambda: _scale_op(torch.zeros(1, _S).expand(_B, -1), _P.clone(), torch.ones(2), _ONE),
    "integer gradients": lambda: _scale_op(_Z.long(), _P.clone(), torch.ones(2), _ONE),
    "sums too narrow": lambda: _sums_op(sums=torch.zeros(_T, _S - 1)),
    "sums of half precision": lambda: _sums_op(sums=torch.zeros(_T, _S).half()),
    "sums that overlap": lambda: _sums_op(sums=torch.zeros(1, _S).expand(_T, -1)),
    "too few counts": lambda: _sums_op(counts=torch.zeros(_T - 1).long()),
    "floating counts": lambda: _sums_op(counts=torch.zeros(_T)),
    "a label beyond the sums": lambda: _sums_op(labels=_Y + 3),
    "too few labels to sum by": lambda: _sums_op(labels=_Y[:2]),
    "a label beyond the translation": lambda: torch.ops.cotuning_kernels.translate_labels(_Y + 3, None, None, _R, -100),
    "probabilities to translate": lambda: torch.ops.cotuning_kernels.translate_labels(_P, None, None, _R, -100),
    "too few labels to fit": lambda: torch.ops.cotuning_kernels.temperature_terms(_Z, _Y[:2], 1.0, -100),
    "a label beyond the logits": lambda: torch.ops.cotuning_kernels.temperature_terms(_Z, _Y + _S, 1.0, -100),
    "integer logits to fit": lambda: torch.ops.cotuning_kernels.temperature_terms(_Z.long(), _Y, 1.0, -100),
}


@pytest.mark.parametrize("what", _WRONG_CALLS)
def test_operations_called_directly_do_not_leave_their_tensors(what: str) -> None:
    """``torch.ops`` skips the Python checks; a call that would read or write outside a tensor still raises."""
    if backends.extension() is None:
        pytest.skip(str(backends.missing_reason("cpp")))
    _loss_op()
    _sums_op()
    _scale_op(_Z.clone(), _P.clone(), torch.ones(2), torch.ones(_B))
    with pytest.raises((RuntimeError, IndexError)):
        _WRONG_CALLS[what]()


# ------------------------------------------------------------------------------------------------------------ fuzzing

_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.int32,
                           torch.uint8, torch.bool, torch.complex64])  # fmt: skip
_sizes = st.lists(st.sampled_from([0, 1, 2, _T, _B, _S]), min_size=0, max_size=3)


@st.composite
def _any_tensor(draw: st.DrawFn) -> Tensor:
    """Small numbers, sometimes with NaN, in any shape, dtype and strides, on the CPU or the meta device."""
    x = torch.randint(-2, 4, draw(_sizes)).to(draw(_dtypes))
    if x.is_floating_point() and x.numel() and draw(st.booleans()):
        x.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    how = draw(st.sampled_from(["", "", "", "transposed", "strided", "expanded", "meta", "grad", "sparse"]))
    if how == "transposed" and x.dim() >= 2:
        return x.transpose(0, 1)
    if how == "strided" and x.dim():
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if how == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    if how == "meta":
        return x.to("meta")
    if how == "grad" and x.is_floating_point():
        return x.requires_grad_()
    if how == "sparse" and x.dim() == 2:
        return x.to_sparse()
    return x


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**70]),
    st.floats(), st.text(max_size=3), st.just([1.0]), st.just(()), st.just({}),
)  # fmt: skip
_anything = st.one_of(_any_tensor(), _scalars)
_targets = st.one_of(
    _anything, st.tuples(_anything, _anything, _anything), st.tuples(_any_tensor(), _any_tensor(), _scalars)
)

_FUZZED = {
    "source_logits": _anything,
    "target_logits": _anything,
    "target": _targets,
    "relationship": _anything,
    "trade_off": _anything,
    "weight": _anything,
    "label_smoothing": _scalars,
    "ignore_index": _scalars,
    "reduction": st.one_of(st.sampled_from(["mean", "sum", "none"]), _scalars),
    "source_loss": st.one_of(st.sampled_from(["cross_entropy", "kl"]), _scalars),
    "inplace": st.booleans(),
    "backend": st.one_of(st.sampled_from(["auto", "cpp", "reference"]), _scalars),
    "return_terms": st.booleans(),
}


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_whatever_is_passed_ends_in_a_result_or_in_an_ordinary_error(backend: Backend, data: st.DataObject) -> None:
    """Arbitrary values replace one to four arguments of a valid call."""
    changed = data.draw(st.lists(st.sampled_from(sorted(_FUZZED)), min_size=1, max_size=4, unique=True))
    arguments = (
        _arguments() | {"backend": backend.argument} | {name: data.draw(_FUZZED[name], name) for name in changed}
    )
    before = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    try:
        result = functional.co_tuning_loss(**arguments)
        loss = result.loss if isinstance(result, ck.CoTuningTerms) else result
        if loss.requires_grad:
            torch.autograd.backward(loss, torch.ones_like(loss))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if not str(error):
            pytest.fail(f"{type(error).__name__} without a word")
    else:
        _assert_it_made_sense(before, loss)


def _assert_it_made_sense(arguments: dict[str, Any], loss: Tensor) -> None:
    """The kernels see arguments before the Python checks: both must accept the same arguments, with the same result."""
    same = functional.co_tuning_loss(**arguments | {"backend": "reference", "inplace": False, "return_terms": False})
    assert isinstance(same, Tensor)
    assert (loss.shape, loss.dtype, loss.device) == (same.shape, same.dtype, same.device)
    both_finite = loss.isfinite() & same.isfinite()  # 0 * NaN is NaN in a matrix product; a kernel skips it
    torch.testing.assert_close(loss[both_finite], same[both_finite], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [BACKENDS[1]], ids=lambda backend: backend.name, indirect=True)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_whatever_an_operation_is_called_with(backend: Backend, data: st.DataObject) -> None:
    """The same without the Python layer: only the C++ checks protect memory."""
    ops = torch.ops.cotuning_kernels
    tensor, maybe = _any_tensor(), st.one_of(st.none(), _any_tensor())
    number, label = st.floats(), st.integers(-5, 5)
    name = data.draw(st.sampled_from(["co_tuning_loss", "co_tuning_loss_", "scale_gradients_", "translate_labels",
                                      "add_class_sums_", "add_to_class_sums_", "temperature_terms"]))  # fmt: skip
    valid = _arguments()
    lambda_ = torch.tensor(2.3, dtype=torch.float64)
    loss = [valid["source_logits"], valid["target_logits"], valid["target"], None, None, valid["relationship"], None,
            lambda_, 0.0, -100, 1, False]  # fmt: skip
    fuzz_loss = [tensor, maybe, tensor, maybe, maybe, tensor, maybe, tensor, number, label, label, st.booleans()]
    sums, counts = torch.zeros(_T, _S, dtype=torch.float64), torch.zeros(_T, dtype=torch.int64)
    calls: dict[str, tuple[list[Any], list[st.SearchStrategy[Any]]]] = {
        "co_tuning_loss": ([*loss, True, True], [*fuzz_loss, st.booleans(), st.booleans()]),
        "co_tuning_loss_": (loss, fuzz_loss),
        "scale_gradients_": ([_Z.clone(), torch.ones(_B, _T), torch.ones(2), torch.ones(_B)], [tensor] * 4),
        "translate_labels": ([_Y, None, None, _R, -100], [tensor, maybe, maybe, tensor, label]),
        "add_class_sums_": ([sums, counts, _Z, _Y, 1.0, -100], [tensor, tensor, tensor, tensor, number, label]),
        "add_to_class_sums_": (
            [sums, counts, sums.clone(), counts.clone(), _Z, _Y, 1.0, -100],
            [*[tensor] * 6, number, label],
        ),
        "temperature_terms": ([_Z, _Y, 1.0, -100], [tensor, tensor, number, label]),
    }
    arguments, fuzz = calls[name]
    for position in data.draw(st.lists(st.integers(0, len(fuzz) - 1), min_size=1, max_size=3, unique=True)):
        arguments = [*arguments[:position], data.draw(fuzz[position], str(position)), *arguments[position + 1 :]]
    # Detach: autograd's own errors about gradients are not tested here.
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    try:
        getattr(ops, name)(*arguments)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        if not str(error):
            pytest.fail(f"{type(error).__name__} without a word")


def _crashes(*_: Any) -> Any:
    raise KeyError("source_logits")


def _without_a_word(*_: Any) -> Any:
    raise ValueError


def _takes_nonsense(*arguments: Any) -> Any:
    try:
        return _SOUND(*arguments)
    except Exception:
        return torch.zeros(()), None


def _another_shape(*arguments: Any) -> Any:
    loss, terms = _SOUND(*arguments)
    return loss[None], terms


def _off_by_1_percent(*arguments: Any) -> Any:
    loss, terms = _SOUND(*arguments)
    return 1.01 * loss, terms


_SOUND = autograd.co_tuning_loss


class _Found(unittest.SkipTest):
    """Hypothesis stops at a test that skips itself, without shrinking the example."""


def _assert_that_it_fails(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = fuzz.hypothesis.inner_test

    def until_found(**example: Any) -> None:
        try:
            call(**example)
        except UnsatisfiedAssumption:
            raise
        except (Exception, pytest.fail.Exception) as error:
            raise _Found from error

    monkeypatch.setattr(fuzz.hypothesis, "inner_test", until_found)
    with pytest.raises(_Found):
        fuzz(backend=Backend("planted", "cpp"))


@pytest.mark.parametrize("fault", [_crashes, _without_a_word, _takes_nonsense, _another_shape, _off_by_1_percent])
def test_the_fuzz_of_the_function_finds(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.extension() is None:
        pytest.skip(str(backends.missing_reason("cpp")))
    monkeypatch.setattr(autograd, "co_tuning_loss", fault)
    with backends.without_fast_path():
        _assert_that_it_fails(test_whatever_is_passed_ends_in_a_result_or_in_an_ordinary_error, monkeypatch)


@pytest.mark.parametrize("fault", [_crashes, _without_a_word])
def test_the_fuzz_of_the_operations_finds(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu_served_by("planted", {"temperature_terms": fault}):
        _assert_that_it_fails(test_whatever_an_operation_is_called_with, monkeypatch)


@pytest.mark.parametrize(
    ("source_columns", "target_columns", "apart"),
    [((0, 6), (6, 12), True), ((7, 13), (1, 7), True), ((0, 6), (5, 11), False), ((0, 6), (0, 6), False)],
)
def test_in_place_refuses_heads_that_overlap(
    source_columns: tuple[int, int], target_columns: tuple[int, int], apart: bool
) -> None:
    """A model may compute both heads as columns of one matrix: this must work; an overlap must raise."""
    if backends.select("cpu") == "reference":
        pytest.skip(str(backends.missing_reason("cpp")))
    both = torch.randn(5, 14, requires_grad=True)
    relationship, labels = torch.rand(6, 6), torch.randint(6, (5,))

    def loss(inplace: bool) -> torch.Tensor:
        computed = both * 1
        heads = computed[:, slice(*source_columns)], computed[:, slice(*target_columns)]
        return functional.co_tuning_loss(*heads, labels, relationship, inplace=inplace)

    if not apart:
        with pytest.raises(ValueError, match="overlap in memory"):
            loss(inplace=True)
        return
    (expected,) = torch.autograd.grad(loss(inplace=False) * 1.7, both)
    (got,) = torch.autograd.grad(loss(inplace=True) * 1.7, both)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("start", [6, 5])
def test_in_place_takes_the_two_parts_of_one_row(start: int) -> None:
    """In a batch of one the row strides are meaningless."""
    if backends.select("cpu") == "reference":
        pytest.skip(str(backends.missing_reason("cpp")))
    both = torch.randn(12, requires_grad=True)
    computed = both * 1
    arguments = computed[:6][None], computed[start:][None], torch.tensor([1]), torch.rand(12 - start, 6)
    if start < 6:
        with pytest.raises(ValueError, match="overlap in memory"):
            functional.co_tuning_loss(*arguments, inplace=True)
        return
    (expected,) = torch.autograd.grad(functional.co_tuning_loss(*arguments), both, retain_graph=True)
    (got,) = torch.autograd.grad(functional.co_tuning_loss(*arguments, inplace=True), both)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_an_empty_batch_may_have_any_strides(kind: str, backend: Backend) -> None:
    logits = torch.randn(0, 18)[:, ::2].requires_grad_()
    target = torch.zeros(0).long() if kind == "labels" else torch.rand(0, 8)[:, ::2]
    loss = functional.source_label_loss(logits, target, torch.rand(4, 9), reduction="sum", backend=backend.argument)
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 9)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_meta_tensors_have_a_loss_of_the_right_shape(kind: str) -> None:
    """Tools for large models count memory with meta tensors. They have no kernel; the reference serves them."""
    source, target_logits, relationship = (torch.randn(n, m, device="meta") for n, m in ((5, 9), (5, 4), (4, 9)))
    target = torch.zeros(5, dtype=torch.int64, device="meta") if kind == "labels" else torch.rand(5, 4, device="meta")
    loss = functional.co_tuning_loss(source.requires_grad_(), target_logits, target, relationship, reduction="none")
    assert isinstance(loss, torch.Tensor)
    (gradient,) = torch.autograd.grad(loss.sum(), source)
    assert (loss.shape, gradient.shape) == ((5,), (5, 9))
    assert functional.translate_labels(target, relationship).shape == (5, 9)


@pytest.mark.parametrize("where", [3, 40])  # in the body of the vector loop, and in its tail
def test_the_entropy_of_a_negative_relationship_is_nan(where: int, backend: Backend) -> None:
    relationship = torch.rand(2, 43).softmax(1)
    relationship[:, where] = -0.1
    loss = functional.source_label_loss(
        torch.randn(3, 43), torch.tensor([0, 1, 0]), relationship, source_loss="kl", backend=backend.argument
    )
    assert torch.isnan(loss)


def test_no_weight_with_smoothing_is_no_silent_zero(backend: Backend) -> None:
    """Labels of total weight 0 divide by 0: the gradient must not be 0, as after a finished training."""
    target_logits = torch.randn(4, 3, requires_grad=True)
    loss = functional.co_tuning_loss(
        torch.randn(4, 5), target_logits, torch.tensor([0, 0, 0, 0]), torch.rand(3, 5),
        weight=torch.tensor([0.0, 1.0, 1.0]), label_smoothing=0.1, backend=backend.argument,
    )  # fmt: skip
    assert not torch.isfinite(loss)
    assert not torch.isfinite(torch.autograd.grad(loss, target_logits)[0]).any()


class TransferLearningLibraryRelationship:
    """The interface of tllib.regularization.co_tuning.Relationship."""

    relationship = np.full((3, 4), 0.25, np.float32)


def test_what_tllib_gives_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"pass its array: torch\.from_numpy\(relationship\.relationship\)"):
        ck.FusedCoTuningLoss(TransferLearningLibraryRelationship())  # type: ignore[arg-type]
    empty_class = torch.full((3, 4), 0.25)
    empty_class[1] = torch.nan
    with pytest.raises(ValueError, match=r"\[1, 0\] is nan.* the whole row is NaN.* relationship\[1\] = 0 leaves"):
        ck.FusedCoTuningLoss(empty_class)
    empty_class[1] = 0
    ck.FusedCoTuningLoss(empty_class)
    np.save(tmp_path / "cache.npy", TransferLearningLibraryRelationship.relationship)
    with pytest.raises(
        RelationshipFileError, match=r"cache\.npy is an array of NumPy; Relationship\(torch\.from_numpy"
    ):
        ck.Relationship.load(tmp_path / "cache.npy")


def test_deferred_initialisation_has_no_values_to_check() -> None:
    with torch.device("meta"):
        criterion = ck.FusedCoTuningLoss(torch.zeros(5, 11), weight=torch.ones(5))
        relationship = ck.Relationship(torch.zeros(5, 11), counts=torch.ones(5, dtype=torch.int64))
    assert criterion.relationship.is_meta
    assert "meta" in repr(relationship)
    loaded = criterion.to_empty(device="cpu")
    other = ck.FusedCoTuningLoss(torch.full((5, 11), 1 / 11), weight=torch.ones(5))
    loaded.load_state_dict(other.state_dict())
    heads = torch.randn(3, 11), torch.randn(3, 5)
    assert torch.equal(loaded(*heads, torch.arange(3)), other(*heads, torch.arange(3)))
