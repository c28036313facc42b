"""Arrows go one way: no module imports, and no C++ file includes, a file above it or one that leads back to it.

The floors name every module of the package and every folder of ``csrc``. Imports only for types do not count; late
imports in functions do. Each check is shown to catch planted faults.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import cotuning_kernels
from support.paths import ROOT

CSRC = ROOT / "csrc"
PACKAGE = Path(cotuning_kernels.__file__).parent

# From the roof down. A module imports only from lower floors. A package's name stands for its modules too
# (backends.triton for backends.triton.rows), unless they have their own floor.
MODULE_FLOORS = (
    ("__main__",),
    ("environment",),
    ("cotuning_kernels",),
    ("models", "transfer_scores"),
    ("relationship",),
    ("relationship.learn",),
    ("relationship.estimator", "relationship.passes", "relationship.reverse"),
    ("relationship.matrix",),
    ("relationship.file",),
    ("calibration", "distributed", "loss"),
    ("functional",),
    ("linear_loss",),
    ("linear_head",),
    ("sharded_loss",),
    ("autograd",),
    ("backends",),
    ("backends.triton_version",),
    ("backends.cuda", "backends.triton"),
    ("backends.cpp", "backends.dense_rows"),
    ("backends.operations", "backends.registry", "backends.torch_version"),
    ("options",),
    ("labelled_logits", "plots", "tensor_file", "validation"),
    (
        "atomic_file",
        "calling",
        "dtypes",
        "heads",
        "module_copies",
        "processes",
        "reference",
        "shapes",
        "targets",
    ),
    ("sparse_rows",),
)
FOLDER_FLOORS = (
    ("tests",),
    ("../tools",),
    ("bindings", "fast_path"),
    ("ops",),
    ("kernels/cpu", "kernels/cuda"),
    ("kernels",),
)


def floor_of(name: str, floors: tuple[tuple[str, ...], ...], separator: str) -> tuple[int, str] | None:
    """The floor of the longest name in ``floors`` that ``name`` is or begins with, and that name."""
    parts = name.split(separator)
    for length in range(len(parts), 0, -1):
        prefix = separator.join(parts[:length])
        for floor, names in enumerate(floors):
            if prefix in names:
                return floor, prefix
    return None


def upward(arrows: Mapping[str, set[str]], floors: tuple[tuple[str, ...], ...], separator: str) -> list[str]:
    """Arrows that do not lead down, and names in arrows that have no floor."""
    found = []
    for start in arrows:
        for end in arrows[start]:
            above, below = floor_of(start, floors, separator), floor_of(end, floors, separator)
            if above is None or below is None or not (above[0] < below[0] or above[1] == below[1]):
                found.append(f"{start} -> {end}")
    return sorted(found)


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """Every arrow that is part of a circle."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        new = set(arrows.get(start, ()))
        while new:
            found |= new
            new = set().union(*(arrows.get(name, set()) for name in new)) - found
        return found

    return sorted(f"{start} -> {end}" for start in arrows for end in arrows[start] if start in {end} | reached(end))


# ------------------------------------------------------------------------------------------------------- the package


def imports_of(package: Path) -> dict[str, set[str]]:
    """By module of ``package``: those of its modules that it imports, in functions too, but not only for types."""
    files = {".".join(file.relative_to(package).with_suffix("").parts): file for file in package.rglob("*.py")}
    files = {name.removesuffix("__init__").rstrip(".") or package.name: file for name, file in files.items()}

    def imported(module: str, file: Path) -> set[str]:
        tree = ast.parse(file.read_text())
        types_only = {
            node for test in ast.walk(tree) if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
            for statement in test.body for node in ast.walk(statement)
        }  # fmt: skip
        names = []
        for node in set(ast.walk(tree)) - types_only:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                own = [package.name, *(module.split(".") if module != package.name else []), "__init__"]
                above = own[: -node.level - (file.name != "__init__.py")] if node.level else []
                names += [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        within = [name.removeprefix(f"{package.name}.") for name in names if name.split(".")[0] == package.name]
        # The last part is a module, or a name in one.
        return {name if name in files else name.rpartition(".")[0] or package.name for name in within} - {module}

    return {module: imported(module, file) for module, file in files.items()}


def test_every_module_has_a_floor() -> None:
    modules = imports_of(PACKAGE)
    assert [module for module in modules if floor_of(module, MODULE_FLOORS, ".") is None] == []
    assert {name for floor in MODULE_FLOORS for name in floor} <= set(modules)


def test_no_module_imports_what_is_above_it() -> None:
    imports = imports_of(PACKAGE)
    assert upward(imports, MODULE_FLOORS, ".") == []
    assert circles(imports) == []
    assert imports["reference"] == set()


def test_planted_imports_are_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "cotuning_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def add(module: str, line: str) -> None:
        with (copy / module).open("a") as file:
            file.write(f"\n\n{line}\n")

    add("targets.py", "def late():\n    from cotuning_kernels.loss import FusedCoTuningLoss")
    add("backends/operations.py", "from .. import autograd")
    add("backends/triton/scale_gradients.py", "import cotuning_kernels.functional")
    add("backends/triton/labels.py", "if TYPE_CHECKING:\n    from cotuning_kernels import loss")
    add("backends/triton/launch.py", "from cotuning_kernels.backends.triton import rows")  # which imports launch
    add("reference.py", "from cotuning_kernels import backends")
    add("plots.py", "from cotuning_kernels.calibration import Reliability")
    add("relationship/file.py", "from cotuning_kernels.relationship import matrix")
    (copy / "stray.py").write_text("from cotuning_kernels import dtypes\n")
    imports = imports_of(copy)
    assert upward(imports, MODULE_FLOORS, ".") == [
        "backends.operations -> autograd",
        "backends.triton.scale_gradients -> functional",
        "plots -> calibration",
        "reference -> backends",
        "relationship.file -> relationship.matrix",
        "stray -> dtypes",
        "targets -> loss",
    ]
    found = circles(imports)
    assert "backends.triton.launch -> backends.triton.rows" in found
    assert "relationship.file -> relationship.matrix" in found
    assert not [line for line in found if line.startswith(("backends.triton.labels", "plots", "stray"))]


# ------------------------------------------------------------------------------------------------------------- csrc


def includes_of(folder: Path) -> dict[str, set[str]]:
    """By file of ``folder``: the project's files that it includes, relative to ``folder`` (``../`` where outside)."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh", ".cpp", ".cu")]

    def included(path: Path) -> set[str]:
        found = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), flags=re.MULTILINE)
        return {Path(os.path.relpath(path.parent / name, folder)).as_posix() for name in found}

    return {path.relative_to(folder).as_posix(): included(path) for path in files}


def includes_of_torch(folder: Path) -> list[str]:
    """Lines of the sources below ``folder`` that include torch, Python or pybind11."""
    foreign = re.compile(r"\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2|pybind11|Python\.h)")
    return [
        f"{path.name}: {line.strip()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for line in path.read_text().splitlines()
        if foreign.match(line)
    ]


def test_kernels_know_nothing_of_torch() -> None:
    assert includes_of_torch(CSRC / "kernels") == []


def test_an_include_of_torch_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "kernel.h").write_text(
        '#pragma once\n#include <cstdint>\n# include <ATen/Parallel.h>\n#include "c10/x.h"\n'
    )
    assert includes_of_torch(tmp_path) == ["kernel.h: # include <ATen/Parallel.h>", 'kernel.h: #include "c10/x.h"']


def test_no_source_includes_what_is_above_it() -> None:
    includes = includes_of(CSRC)
    assert upward(includes, FOLDER_FLOORS, "/") == []
    assert circles(includes) == []


def test_planted_includes_are_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)

    def add(file: str, line: str) -> None:
        with (copy / file).open("a") as source:
            source.write(f"\n{line}\n")

    add("kernels/cuda/plan.h", '#include "../../../tools/cuda_emulator/emulator.h"')
    add("kernels/cpu/rows.h", '#  include "../../ops/dtypes.h"')
    add("kernels/cpu/isa.cpp", '#include "../cuda/plan.h"')
    add("kernels/types.h", '#include "cpu/rows.h"')  # which includes it
    add("ops/dtypes.h", '// #include "../bindings/module.cpp"')
    found = includes_of(copy)
    assert upward(found, FOLDER_FLOORS, "/") == [
        "kernels/cpu/isa.cpp -> kernels/cuda/plan.h",
        "kernels/cpu/rows.h -> ops/dtypes.h",
        "kernels/cuda/plan.h -> ../tools/cuda_emulator/emulator.h",
        "kernels/types.h -> kernels/cpu/rows.h",
    ]
    assert "kernels/types.h -> kernels/cpu/rows.h" in circles(found)
