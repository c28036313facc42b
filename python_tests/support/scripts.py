"""Runs a script in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cotuning_kernels


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = Path(cotuning_kernels.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
