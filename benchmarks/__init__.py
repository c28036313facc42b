"""How fast cotuning_kernels is, beside the formulations that people use today. ``README.md`` says how to run it."""

from __future__ import annotations

import sys
from pathlib import Path

# Started in a checkout, Python looks for cotuning_kernels there first; but the kernels of an installed one are in
# site-packages, and it is those that are to be measured. The checkout stays, as the last place.
_checkout = Path(__file__).resolve().parents[1]
_others = [entry for entry in sys.path if Path(entry).resolve() != _checkout]
sys.path[:] = [*_others, str(_checkout)]
