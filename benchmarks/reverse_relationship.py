"""The regression of the reverse relationship against scikit-learn's, along the authors' list of penalties.

``python -m benchmarks reverse_relationship`` prints both times and, for each penalty, both objectives. A fit that stops
early is fast, so a time means nothing without its objective. There are three ways to call scikit-learn:

* *defaults*: ``LogisticRegression(C=C, fit_intercept=False)``, as the authors write it, in the installed version. It
  computes in float32 and ends when no element of the mean gradient is above 1e-4: too early under weak penalties.
* *same objectives*: float32, ending at 1e-6, where its objectives are close to ours.
* *of 2020*: the authors ran scikit-learn 0.22, which converts to float64, compares the gradient's *sum* over rows with
  1e-4 and takes at most 100 iterations. The installed version gets these settings.

The data are logits of 1000 source classes around one centre for each of 200 target classes; about 80% of validation
rows are predicted right. Times are processor time of one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contestants import OURS, DisagreementError
from benchmarks.timing import host_stopwatch
from cotuning_kernels.relationship.reverse import INVERSE_PENALTIES, regression_path

__all__ = ["SCIKIT_LEARN", "SIZES", "check_objectives", "make_problem", "measure", "objective", "ours", "scikit_learn"]

_stopwatch = host_stopwatch(time.process_time)

SIZES = (6000, 200, 1000)  # rows, target classes, source classes

# name -> (dtype, tolerance for n rows, largest number of iterations)
SCIKIT_LEARN = {
    "defaults": (np.float32, lambda rows: 1e-4, 100),
    "same objectives": (np.float32, lambda rows: 1e-6, 10_000),
    "of 2020": (np.float64, lambda rows: 1e-4 / rows, 100),
}


def make_problem(rows: int, target_classes: int, source_classes: int, seed: int = 2020) -> tuple[Tensor, Tensor]:
    """Make probabilities ``(rows, N_s)`` and labels ``(rows,)``."""
    random = torch.Generator().manual_seed(seed)
    centres = 1.8 * torch.randn(target_classes, source_classes, generator=random)
    labels = torch.randint(target_classes, (rows,), generator=random)
    logits = centres[labels] + 2.2 * torch.randn(rows, source_classes, generator=random)
    return logits.softmax(dim=1), labels


def objective(coefficients: Tensor, probabilities: Tensor, labels: Tensor, inverse_penalty: float) -> float:
    """The objective that both minimise, in float64."""
    losses = F.cross_entropy(probabilities.double() @ coefficients.double().T, labels, reduction="sum")
    return float(losses + coefficients.double().square().sum() / (2 * inverse_penalty))


def ours(probabilities: Tensor, labels: Tensor, target_classes: int) -> tuple[dict[float, Tensor], float]:
    """Return our coefficients for each ``C``, and the processor seconds of the whole path."""
    found: dict[float, Tensor] = {}

    def fit_all() -> None:
        for fit in regression_path(probabilities, labels, target_classes):
            found[fit.inverse_penalty] = fit.coefficients

    return found, _stopwatch(fit_all)


def scikit_learn(
    way: str, probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> tuple[dict[float, Tensor], float]:
    """Return the same from scikit-learn, with a cold start for each ``C`` as in the authors' loop."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    dtype, tolerance, iterations = SCIKIT_LEARN[way]
    data = probabilities.astype(dtype)
    found: dict[float, Tensor] = {}

    def fit_all() -> None:
        for inverse_penalty in INVERSE_PENALTIES:
            fit = LogisticRegression(
                C=inverse_penalty, fit_intercept=False, tol=tolerance(len(data)), max_iter=iterations
            ).fit(data, labels)
            found[inverse_penalty] = torch.from_numpy(fit.coef_)

    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 100 iterations are sometimes too few
        return found, _stopwatch(fit_all)


def measure(
    ways: Sequence[str], probabilities: Tensor, labels: Tensor, target_classes: int
) -> tuple[dict[str, dict[float, Tensor]], dict[str, float]]:
    """Return, by contestant, the coefficients for each ``C`` and the processor seconds of the whole path."""
    torch.set_num_threads(1)
    list(regression_path(probabilities[:50], labels[:50], target_classes, [1.0]))  # late imports
    found, seconds = {}, {}
    found[OURS], seconds[OURS] = ours(probabilities, labels, target_classes)
    for way in ways:
        found[way], seconds[way] = scikit_learn(way, probabilities.numpy(), labels.numpy())
    return found, seconds


def check_objectives(
    found: dict[str, dict[float, Tensor]], probabilities: Tensor, labels: Tensor, tolerance: float = 1e-4
) -> dict[str, dict[float, float]]:
    """Return the objectives for each contestant and ``C``.

    Raises:
        DisagreementError: an objective of ours exceeds the best one by more than the tolerance.
    """
    objectives = {
        name: {c: objective(coefficients, probabilities, labels, c) for c, coefficients in path.items()}
        for name, path in found.items()
    }
    for c, value in objectives[OURS].items():
        best = min(path[c] for path in objectives.values())
        if not value <= best * (1 + tolerance):
            raise DisagreementError(f"at C = {c:g} our objective is {value}, the best one {best}")
    return objectives


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reverse_relationship", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--rows", type=int, default=SIZES[0])
    parser.add_argument("--target-classes", type=int, default=SIZES[1])
    parser.add_argument("--source-classes", type=int, default=SIZES[2])
    parser.add_argument("--ways", nargs="*", choices=list(SCIKIT_LEARN), default=list(SCIKIT_LEARN))
    options = parser.parse_args(arguments)
    sizes = (options.rows, options.target_classes, options.source_classes)
    probabilities, labels = make_problem(*sizes)
    found, seconds = measure(options.ways, probabilities, labels, sizes[1])
    objectives = check_objectives(found, probabilities, labels)
    print(f"{sizes[0]} x {sizes[2]} into {sizes[1]} classes, {len(INVERSE_PENALTIES)} penalties, one thread")
    print("objective at C" + "".join(f"{name:>18}" for name in found))
    for inverse_penalty in INVERSE_PENALTIES:
        values = (path[inverse_penalty] for path in objectives.values())
        print(f"{inverse_penalty:14g}" + "".join(f"{value:18.3f}" for value in values))
    print(f"{'seconds':14}" + "".join(f"{value:18.1f}" for value in seconds.values()))
    print(f"{'times ours':14}" + "".join(f"{value / seconds[OURS]:18.1f}" for value in seconds.values()))
    return 0
