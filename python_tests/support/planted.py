"""Triton modules with a bug planted in their source."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

from cotuning_kernels.backends.triton import co_tuning_loss as loss
from cotuning_kernels.backends.triton import labels

_number = itertools.count()


def _with(directory: Path, module: ModuleType, changes: dict[str, str]) -> ModuleType:
    """A copy of a module with its source changed, loaded beside the original."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    for before, after in changes.items():
        assert before in text, f"the source no longer has {before!r}"
        text = text.replace(before, after)
    name = f"planted_{next(_number)}"
    file = directory / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def plant(directory: Path, module: ModuleType, changes: dict[str, str]) -> tuple[ModuleType, ModuleType]:
    """Plant a bug in the loss or a module that it uses; return the loss and that module (or, for the loss, labels)."""
    if module is loss:
        return _with(directory, loss, changes), labels
    changed = _with(directory, module, changes)
    copy = _with(directory, loss, {})
    for name in vars(copy).keys() & set(changed.__all__):
        setattr(copy, name, getattr(changed, name))
    return copy, changed
