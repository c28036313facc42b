"""Folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "python_tests"
EXAMPLES = ROOT / "examples"
RECORDED = TESTS / "recorded"
