"""Runs ``@triton.jit`` kernels in Triton's interpreter, on CPU tensors, within a ``with`` block.

Triton itself interprets a whole process or nothing: it reads an environment variable when a kernel is decorated. Here
the kernels of the named modules, and the functions of ``triton.language`` that they call, are replaced by interpreted
ones and restored afterwards, so that the same process can compile them before and after.

The interpreter runs one program after another in NumPy. Where it differs from a GPU, it is corrected here:

* float32 to bfloat16 rounds to nearest even, as hardware does (the interpreter truncates);
* a scalar that is compared and then broadcast stays a boolean (the interpreter makes it a number);
* a parameter has the type of its annotation (the interpreter makes a Python float a float32 constant);
* device assertions are checked, and so is every address before it is used: an access outside the tensors of the launch
  is an error and does not happen;
* NaN and infinity give no warning.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.experimental.gluon  # noqa: F401  (triton imports it late, and not among interpreted functions)
import triton.language as tl
import triton.runtime.interpreter as ti
from triton.runtime.jit import JITFunction

__all__ = ["AnyOrder", "interpreted", "program_order", "traffic"]

program_order = np.ndindex
"""Programs run one after another, in this order."""


class AnyOrder:
    """Programs one after another, in a random order. For ``program_order``."""

    def __init__(self, draw: np.random.Generator) -> None:
        self._draw = draw

    def __call__(self, *size: int) -> Iterator[tuple[int, ...]]:
        return iter(self._draw.permutation(np.array(list(np.ndindex(*size)))).tolist())


# Modules with Triton's own jitted functions that kernels call: tl.sum, tl.max and so on.
_TRITON_MODULES = (tl, tl.standard, tl.random, tl.core.tensor)


# Small kernels spend most of their time not on arithmetic but on the types of intermediate values, which Triton makes
# again for each value. Here each type is made once, and operands that agree are not converted.
_np_dtype_of_scalars = functools.cache(ti._get_np_dtype)


def _np_dtype(dtype: tl.dtype) -> Any:
    return np.dtype(np.uint64) if dtype.is_ptr() else _np_dtype_of_scalars(dtype.scalar)


_make_block_type = tl.block_type.__init__
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}


@functools.cache
def _shape(*lengths: int) -> tuple[tl.constexpr, tl.tuple]:
    """The number of elements and the lengths, as tensors have them."""
    return tl.constexpr(math.prod(lengths)), tl.tuple([tl.constexpr(n) for n in lengths])


_OF_A_SCALAR = _shape()


def _block_type(self: tl.block_type, element: tl.dtype, lengths: Any) -> None:
    key = (element.name, *[n.value if isinstance(n, tl.constexpr) else n for n in lengths])
    if key not in _block_types:
        _make_block_type(self, element, lengths)
        _block_types[key] = vars(self) | {"of_tensors": _shape(*key[1:])}
    vars(self).update(_block_types[key])


def _tensor(self: tl.tensor, handle: ti.TensorHandle, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else _OF_A_SCALAR


_types_of_operands: dict[tuple[Any, ...], tuple[tl.dtype, tl.dtype]] = {}


def _operands(a: Any, b: Any, *rules: Any, **more_rules: Any) -> tuple[tl.tensor, tl.tensor]:
    """The two operands of an operation in one type and one shape. Triton's rules are asked once for two types, or for
    a type and a number."""
    semantic = ti.interpreter_semantic
    key = (*_kind(a), *_kind(b), *rules, *more_rules.items())
    if key not in _types_of_operands:
        first, second = type(semantic).binary_op_type_checking_impl(semantic, a, b, *rules, **more_rules)
        _types_of_operands[key] = first.dtype, second.dtype
        return first, second
    x, y = _types_of_operands[key]
    return _broadcast(_converted(a, x), _converted(b, y))


def _kind(operand: Any) -> tuple[Any, ...]:
    return ("tensor", operand.dtype.name) if isinstance(operand, tl.tensor) else (type(operand), operand)


def _converted(operand: Any, dtype: tl.dtype) -> tl.tensor:
    if not isinstance(operand, tl.tensor):
        return ti.interpreter_semantic.scalar_constant(operand, dtype)
    return operand if operand.dtype.name == dtype.name else ti.interpreter_semantic.cast(operand, dtype)


def _broadcast(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    if a.shape is b.shape:
        return a, b
    semantic = ti.interpreter_semantic
    both: tuple[tl.tensor, tl.tensor] = type(semantic).broadcast_impl_value(semantic, a, b)
    return both


class _Interpreted:
    """Stands in for a jitted function: a kernel, called with a grid, or a function that a kernel calls."""

    def __init__(self, function: JITFunction[Any]) -> None:
        self.fn = function.fn
        self._parameters = {parameter.name: parameter for parameter in function.params}
        self._rewritten: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._body()(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**arguments: Any) -> None:
            _memory.enter(arguments)
            converted = {name: self._operand(name, arguments[name]) for name in self._parameters}
            size = (*grid, 1, 1)[:3]
            ti.interpreter_builder.set_grid_dim(*size)
            for index in program_order(*size):
                ti.interpreter_builder.set_grid_idx(*index)
                self._body()(**converted)

        return run

    def _body(self) -> Any:
        if self._rewritten is None:
            # The rewriter adds the interpreter's names to the function's module: give it a copy.
            copy = types.FunctionType(
                self.fn.__code__, dict(self.fn.__globals__), self.fn.__name__, self.fn.__defaults__, self.fn.__closure__
            )
            copy.__module__, copy.__qualname__ = self.fn.__module__, self.fn.__qualname__
            self._rewritten = ti.FunctionRewriter(copy).rewrite_ast()
        return self._rewritten

    def _operand(self, name: str, value: Any) -> Any:
        parameter = self._parameters[name]
        if parameter.is_constexpr:
            return value
        if isinstance(value, (int, float)) and parameter.annotation_type:
            dtype = tl.str_to_ty(parameter.annotation_type, None)
            return tl.tensor(ti.TensorHandle(np.array([value], ti._get_np_dtype(dtype)), dtype), dtype)
        return ti._implicit_cvt(value)


_stand_ins: dict[int, tuple[JITFunction[Any], _Interpreted]] = {}


def _stand_in(function: JITFunction[Any]) -> _Interpreted:
    """One per function: rewriting its source takes longer than running it."""
    if id(function) not in _stand_ins:  # hashing a jitted function hashes all its source
        _stand_ins[id(function)] = function, _Interpreted(function)
    return _stand_ins[id(function)][1]


@contextmanager
def interpreted(*modules: types.ModuleType) -> Iterator[None]:
    """The jitted functions of ``modules`` run in the interpreter; afterwards everything is restored."""
    with ExitStack() as stack:
        for module in (*_TRITON_MODULES, *modules):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    stack.enter_context(mock.patch.object(module, name, _stand_in(function)))
        builder = ti.interpreter_builder
        stack.enter_context(mock.patch.object(builder, "cast_impl", _cast, create=True))
        stack.enter_context(mock.patch.object(builder, "create_splat", _splat, create=True))
        stack.enter_context(mock.patch.object(builder, "create_masked_load", _memory.load, create=True))
        stack.enter_context(mock.patch.object(builder, "create_masked_store", _memory.store, create=True))
        stack.enter_context(mock.patch.object(builder, "create_atomic_rmw", _memory.atomic, create=True))
        stack.enter_context(mock.patch.object(ti, "_get_np_dtype", _np_dtype))
        stack.enter_context(mock.patch.object(tl.block_type, "__init__", _block_type))
        stack.enter_context(mock.patch.object(tl.tensor, "__init__", _tensor))
        stack.enter_context(mock.patch.object(ti.interpreter_semantic, "binary_op_type_checking_impl", _operands))
        stack.enter_context(mock.patch.object(ti.interpreter_semantic, "broadcast_impl_value", _broadcast))
        stack.enter_context(mock.patch.object(builder, "options", _options(builder.options)))
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        # Triton replaces its language in the modules that a function refers to; this function refers to all.
        sees_both = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
        for owner in (tl, tl.core, tl.math, tl.core.dtype, tl.core.tensor, tl.core.tensor_descriptor_base):
            stack.callback(_restore, owner, dict(vars(owner)))
        ti._patch_lang(sees_both)
        # Before Triton 3.7 this is int(array of one number), which NumPy 2.4 refuses.
        stack.enter_context(mock.patch.object(tl.core.tensor, "__index__", lambda self: int(self.handle.data.item())))
        yield


def _restore(owner: types.ModuleType | type, before: dict[str, Any]) -> None:
    """Give a module or class exactly the names that it had. (Triton 3.5 cannot undo its replacements.)"""
    for name, value in list(vars(owner).items()):
        if name not in before:
            delattr(owner, name)
        elif value is not before[name]:
            setattr(owner, name, before[name])


def _options(options: ti.InterpreterOptions) -> ti.InterpreterOptions:
    return type(options)(**{**vars(options), "debug": True, "sanitize_overflow": False})


def _cast(source: ti.TensorHandle, target: tl.dtype) -> ti.TensorHandle:
    """A conversion between numbers, bfloat16 being the upper half of a float32."""
    given, wanted = source.dtype.scalar, target.scalar
    if given == tl.bfloat16:
        data = (source.data.astype(np.uint32) << 16).view(np.float32)
        return ti.TensorHandle(data.astype(ti._get_np_dtype(wanted)), wanted)
    if wanted == tl.bfloat16:
        exact = source.data.astype(np.float32)
        data = exact.view(np.uint32)
        rounded = (data + 0x7FFF + ((data >> 16) & 1)) >> 16
        return ti.TensorHandle(np.where(np.isnan(exact), 0x7FC0, rounded).astype(np.uint16), wanted)
    return ti.TensorHandle(source.data.astype(ti._get_np_dtype(wanted)), wanted)


def _splat(block_type: tl.block_type, scalar: ti.TensorHandle) -> ti.TensorHandle:
    """A scalar in every element of a block."""
    return ti.TensorHandle(np.full(block_type.shape, scalar.data), block_type.scalar)


class _Memory:
    """Checks every access of an interpreted kernel: outside its tensors it is an error and does not happen."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, int]] = {}
        self.moved: Counter[str] | None = None

    def enter(self, arguments: dict[str, Any]) -> None:
        """Note where each tensor of a launch begins and ends, which may be within a larger storage."""
        self.tensors = {}
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
                self.tensors[name] = x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    def check(self, kind: str, pointers: ti.TensorHandle, mask: ti.TensorHandle) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if self.moved is not None:
            self.moved[kind] += size * touched.size
        if touched.size == 0:
            return
        first, last = int(touched.min()), int(touched.max()) + size
        if not any(begin <= first and last <= end for begin, end in self.tensors.values()):
            raise AssertionError(f"a {kind} out of bounds: bytes {first} to {last}, but tensors are at {self.tensors}")

    def load(self, pointers: ti.TensorHandle, mask: ti.TensorHandle, *others: Any, **options: Any) -> Any:
        self.check("load", pointers, mask)
        return ti.InterpreterBuilder.create_masked_load(ti.interpreter_builder, pointers, mask, *others, **options)

    def store(
        self, pointers: ti.TensorHandle, value: Any, mask: ti.TensorHandle, *others: Any, **options: Any
    ) -> Any:  # fmt: skip
        self.check("store", pointers, mask)
        builder = ti.interpreter_builder
        return ti.InterpreterBuilder.create_masked_store(builder, pointers, value, mask, *others, **options)

    def atomic(self, operation: Any, pointers: ti.TensorHandle, value: Any, mask: ti.TensorHandle, *order: Any) -> Any:
        self.check("atomic", pointers, mask)
        builder = ti.interpreter_builder
        return ti.InterpreterBuilder.create_atomic_rmw(builder, operation, pointers, value, mask, *order)


_memory = _Memory()


@contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Bytes that interpreted kernels load, store and update atomically within a ``with`` block. Each unmasked access
    counts."""
    moved: Counter[str] = Counter()
    with mock.patch.object(_memory, "moved", moved):
        yield moved
