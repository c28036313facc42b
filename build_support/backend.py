"""The PEP 517 build backend: setuptools' backend, but it uses an installed torch instead of downloading another.

pip builds in an isolated environment. Naming torch in ``build-system.requires`` would download and unpack gigabytes
into it. But the extension needs only torch's headers, and any torch that meets :data:`TORCH_REQUIREMENT` will do. So
this backend looks into the environment that pip installs into, and asks pip for torch only if there is none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist as build_sdist
from setuptools.build_meta import get_requires_for_build_sdist as get_requires_for_build_sdist

TORCH_REQUIREMENT = "torch>=2.10"  # csrc/ops/stable_abi.h
_LEAST = (2, 6)  # the floor of pyproject.toml
_LEAST_FOR_KERNELS = (2, 10)


def pure_python() -> str | None:
    """Why the extensions are left out (on request, no compiler, or a torch too old to load them), else None."""
    if os.environ.get("COTUNING_KERNELS_PURE_PYTHON") == "1":
        return "COTUNING_KERNELS_PURE_PYTHON is 1"
    if find_compiler() is None:
        return "there is no C++ compiler"
    # pip replaces a torch that is too old for the Python part; the kernels are then built for the new one.
    kept = [version for version in map(_version, _torch_folders()) if version is not None and version >= _LEAST]
    if kept and kept[0] < _LEAST_FOR_KERNELS:
        return f"torch {kept[0][0]}.{kept[0][1]} is installed here, and the kernels need {TORCH_REQUIREMENT}"
    return None


def find_compiler() -> list[str] | None:
    """The command in ``$CXX`` (``ccache g++``, say), else the first C++ compiler on the path."""
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]) is None:
            raise SystemExit(f"cotuning_kernels: CXX is {os.environ['CXX']!r}, but there is no {command[0]}; unset it")
        return command
    found = next((path for path in map(shutil.which, ("g++", "clang++", "c++")) if path), None)
    return None if found is None else [found]


def find_torch() -> Path | None:
    """The folder of an installed torch that the kernels can be built with."""
    return next((folder for folder in _torch_folders() if (_version(folder) or (0,)) >= _LEAST_FOR_KERNELS), None)


def _torch_folders() -> list[Path]:
    """The folders where torch may be: first this environment's, then those that pip installs into."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    return folders + [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]


def _version(torch: Path) -> tuple[int, ...] | None:
    try:
        text = (torch / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _requirements() -> list[str]:
    if pure_python():
        return []
    return ["pybind11>=2.13", "ninja>=1.11", *([] if find_torch() else [TORCH_REQUIREMENT])]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements()


prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
