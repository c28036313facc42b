"""Every room of ``python_tests`` runs alone: its tests import from ``support``, never from another test module."""

from __future__ import annotations

import ast
from pathlib import Path

from support.paths import TESTS


def imported_tests(folder: Path) -> list[str]:
    """``"file: module"`` for every import of a test module or of a conftest.py below ``folder``."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            parts = {name: name.split(".") for name in names}
            found += [
                f"{file.relative_to(folder)}: {name}"
                for name in names
                if parts[name][0] == folder.name or any(x.startswith("test_") or x == "conftest" for x in parts[name])
            ]
    return found


def outside_a_room(folder: Path) -> list[str]:
    """Test modules that are in no room, and those that pytest would collect among the helpers."""
    tests = [path.relative_to(folder) for path in folder.rglob("test_*.py")]
    return sorted(str(path) for path in tests if len(path.parts) != 2 or path.parts[0] in ("support", "recorded"))


def test_no_test_imports_a_test() -> None:
    assert imported_tests(TESTS) == []


def test_every_test_module_is_in_a_room() -> None:
    assert outside_a_room(TESTS) == []


def test_an_import_and_a_stray_module_are_noticed(tmp_path: Path) -> None:
    room, support = tmp_path / "room", tmp_path / "support"
    for folder in (room, support):
        folder.mkdir()
    (room / "test_a.py").write_text("def test() -> None:\n    from test_b import helper\n")
    third = f"import {tmp_path.name}.room.test_a\nfrom conftest import helper\nimport support.x\n"
    (room / "test_c.py").write_text(third)
    (support / "test_d.py").write_text("from . import test_e\n")
    (tmp_path / "test_f.py").write_text("import pytest\nfrom torch import testing\n")
    assert imported_tests(tmp_path) == [
        "room/test_a.py: test_b.helper",
        f"room/test_c.py: {tmp_path.name}.room.test_a",
        "room/test_c.py: conftest.helper",
        "support/test_d.py: .test_e",
    ]
    assert outside_a_room(tmp_path) == ["support/test_d.py", "test_f.py"]
