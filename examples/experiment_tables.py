"""Tables and figure of docs/results.md from the lines that examples/experiments.py wrote.

    python examples/experiment_tables.py     # needs scipy and matplotlib

Every comparison is paired: a method's result minus that of plain fine-tuning with the same seed, so the difficulty of a
seed's images cancels. Intervals are 95% intervals of Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from command_line import UserError, exit_code
from experiments import FIRST_TUNING_SEED, PROJECT, RESULTS, Setting, read_results
from scipy import stats

PAGE = PROJECT / "docs" / "results.md"
BEGIN, END = "<!-- tables: written by examples/experiment_tables.py -->\n", "<!-- end of the tables -->\n"
NAMES = {
    "plain": "plain",
    "linear-probe": "linear probe, SGD",
    "linear-probe-lbfgs": "linear probe, L-BFGS",
    "lp-ft": "LP-FT",
    "l2-sp": "L2-SP",
    "co-tuning": "Co-Tuning",
    "co-tuning-reverse": "Co-Tuning, reverse",
    "co-tuning-uncalibrated": "Co-Tuning, uncalibrated",
    "lp-co-tuning": "Co-Tuning after a probe",
}
RECIPES = ("lp-co-tuning", "co-tuning")  # the recommended one, and what stands in where it was not run
ITERATIONS = 30  # of a run, unless its setting is named with another number
# Gains that a score could predict: of the first method over the second.
GAINS = (("co-tuning", "plain"), ("lp-co-tuning", "plain"), ("lp-co-tuning", "lp-ft"))
SCORES = ("leep", "nce", "log_me", "h_score", "label_mapping_accuracy", "relationship_entropy", "top_mass")

Results = dict[int, dict[str, Any]]  # by seed


class Task(NamedTuple):
    """What all methods of a table share."""

    data: str
    network: str
    images_per_class: int
    iterations: int
    crop: int

    def __str__(self) -> str:
        images = f"{self.images_per_class} image{'s' if self.images_per_class > 1 else ''} a class"
        longer = "" if self.iterations in (0, ITERATIONS) else f", {self.iterations} iterations"
        return f"{self.data}, {self.network}, {images}{longer}"


def task_of(setting: Setting, iterations: int = 0) -> Task:
    return Task(setting.data, setting.network, setting.images_per_class, setting.iterations or iterations, setting.crop)


@dataclass(frozen=True)
class Paired:
    """Differences to plain fine-tuning over the seeds that both have."""

    differences: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def half_width(self) -> float:
        """Half the width of the 95% confidence interval; a single seed has none."""
        n = len(self.differences)
        if n < 2:
            return float("nan")
        return float(stats.t.ppf(0.975, n - 1) * self.differences.std(ddof=1) / np.sqrt(n))


def paired(arm: Results, plain: Results, measure: str) -> Paired:
    seeds = sorted(arm.keys() & plain.keys())
    return Paired(np.array([arm[seed][measure] - plain[seed][measure] for seed in seeds]))


def order_of(setting: Setting) -> tuple[Any, ...]:
    methods = [*NAMES, "scores"]
    return methods.index(setting.method), setting.trade_off, setting.lr, setting.batchnorm, setting.clip, setting.seed


def collect(results: dict[Setting, dict[str, Any]]) -> dict[Task, dict[Setting, Results]]:
    """The tested runs: per task the results of each arm (a setting with seed 0) by seed, plain first.

    Runs without iterations belong to every task of the same images.
    """
    tasks: dict[Task, dict[Setting, Results]] = defaultdict(lambda: defaultdict(dict))
    tested = sorted((s for s in results if s.seed < FIRST_TUNING_SEED and s.method != "scores"), key=order_of)
    numbers = sorted({setting.iterations for setting in tested if setting.iterations})
    for setting in tested:
        for number in [setting.iterations] if setting.iterations else numbers:
            tasks[task_of(setting, number)][replace(setting, seed=0)][setting.seed] = results[setting]
    return {task: dict(arms) for task, arms in sorted(tasks.items()) if plain_of(arms) is not None}


def plain_of(arms: dict[Setting, Results]) -> Results | None:
    """The arm to which the others are compared."""
    found = [results for setting, results in arms.items() if setting.method == "plain"]
    if len(found) > 1:
        raise UserError("plain fine-tuning was tested with several settings of one task: test only the chosen one.")
    return found[0] if found else None


def has_batchnorm(setting: Setting) -> bool:
    return "folded" not in setting.network and setting.network != "squeezenet"


def point(setting: Setting) -> str:
    """What was chosen for an arm."""
    parts = []
    if setting.trade_off:
        parts += [f"trade-off {setting.trade_off:g}" + ("" if setting.bound else " unbound")]
    if setting.probe_decay:
        parts += [f"decay {setting.probe_decay:g}"]
    if setting.lr:
        parts += [f"rate {setting.lr:g}"]
    if setting.clip:
        parts += [f"clipped at {setting.clip:g}"]
    if setting.l2_sp:
        parts += [f"penalty {setting.l2_sp:g}"]
    if not setting.method.startswith("linear-probe") and has_batchnorm(setting):
        parts += [f"BatchNorm {setting.batchnorm}"]
    return ", ".join(parts)


# ----------------------------------------------------------------------------------------------------------- the tables


def comparison(task: Task, arms: dict[Setting, Results]) -> list[str]:
    plain = plain_of(arms)
    assert plain is not None
    lines = [
        f"### {task}",
        "",
        "| | chosen | seeds | test accuracy | to plain, points | seeds better / worse | NLL | to plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting, arm in arms.items():
        both = [arm[seed] for seed in sorted(arm.keys() & plain.keys())]
        if not both:
            continue
        accuracy, nll = (np.mean([r[measure] for r in both]) for measure in ("test_accuracy", "test_nll"))
        cells = [NAMES[setting.method], point(setting), str(len(both)), f"{accuracy:.1%}", "", "", f"{nll:.3f}", ""]
        if arm is not plain:
            points, nlls = (paired(arm, plain, measure) for measure in ("test_accuracy", "test_nll"))
            better, worse = int((points.differences > 0).sum()), int((points.differences < 0).sum())
            cells[4], cells[5] = interval(points, 100, 1), f"{better} / {worse}"
            cells[7] = interval(nlls, 1, 3)
        lines.append(row(cells))
    return [*lines, ""]


def rivals(tasks: dict[Task, dict[Setting, Results]]) -> list[str]:
    """The recommended recipe minus each other method, paired by seed; then the settings in which it is not the best.

    The recipe is Co-Tuning after a probe, or Co-Tuning where that was not run.
    """
    others = ("plain", "linear-probe-lbfgs", "lp-ft", "l2-sp", "co-tuning")
    head = row(["setting", *(f"to {NAMES[method]}" for method in others)])
    tables: dict[str, list[str]] = {"accuracy, points": [], "NLL": []}
    behind: list[str] = []
    for task, arms in tasks.items():
        methods = {setting.method: arm for setting, arm in arms.items()}
        recipe = next((method for method in RECIPES if method in methods), None)
        if recipe is None:
            continue
        for (what, lines), measure, scale, digits in zip(
            tables.items(), ("test_accuracy", "test_nll"), (100, 1), (1, 3), strict=True
        ):
            pairs = {
                method: paired(methods[recipe], arm, measure)
                for method, arm in methods.items()
                if method != recipe and methods[recipe].keys() & arm.keys()
            }
            cells = (interval(pairs[method], scale, digits) if method in pairs else "" for method in others)
            lines.append(row([str(task), *cells]))
            sign = 1 if measure == "test_accuracy" else -1
            for method, pair in pairs.items():
                if sign * pair.mean < 0:
                    seeds = len(pair.differences)
                    behind.append(
                        f"- {task}, {what}: {interval(pair, scale, digits)} to {NAMES[method]}"
                        f" ({seeds} seed{'s' if seeds > 1 else ''})."
                    )
    lines = []
    for what, rows in tables.items():
        lines += [f"### The recommended recipe minus the others: {what}", "", head, "|---" * (len(others) + 1) + "|"]
        lines += [*rows, ""]
    return [*lines, "### Where the recommended recipe is not the best", "", *behind, ""]


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def interval(values: Paired, scale: float, digits: int) -> str:
    if np.isnan(values.half_width):
        return f"{values.mean * scale:+.{digits}f}"
    return f"{values.mean * scale:+.{digits}f} ± {values.half_width * scale:.{digits}f}"


def validated(result: dict[str, Any]) -> str:
    nll = result["validation_nll"]
    return f"{result['validation_accuracy']:.1%}, {'infinite' if nll is None else f'{nll:.2f}'}"


def collapse(results: dict[Setting, dict[str, Any]]) -> list[str]:
    """Plain fine-tuning beside the default trade-off with and without its bound, unclipped, by network and rate."""
    columns = ("plain", "trade-off 2.3 unbound", "trade-off 2.3 bound")
    cells: dict[tuple[str, float], dict[str, str]] = defaultdict(dict)
    for setting, result in results.items():
        if setting.seed < FIRST_TUNING_SEED or setting.clip or setting.method not in ("plain", "co-tuning"):
            continue
        if setting.method == "co-tuning" and setting.trade_off != 2.3:
            continue
        kind = f"BatchNorm {setting.batchnorm}" if has_batchnorm(setting) else f"no BatchNorm ({setting.network})"
        column = "plain" if setting.method == "plain" else f"trade-off 2.3 {'bound' if setting.bound else 'unbound'}"
        cells[kind, setting.lr][column] = validated(result)
    whole = {key: value for key, value in sorted(cells.items()) if {columns[0], columns[2]} <= value.keys()}
    lines = ["### The collapse: validation accuracy and NLL of the default", ""]
    lines += [row(["network", "rate", *columns]), "|---|---|---|---|---|"]
    for (kind, lr), value in whole.items():
        lines.append(row([kind, f"{lr:g}", *(value.get(column, "not run") for column in columns)]))
    return [*lines, ""] if whole else []


def grid(results: dict[Setting, dict[str, Any]]) -> list[str]:
    """Every point that was tried, by the mean over its validation seeds; the best of each method in bold."""
    seeds: dict[Setting, list[dict[str, Any]]] = defaultdict(list)
    for setting in sorted(results, key=order_of):
        if setting.seed >= FIRST_TUNING_SEED and setting.method != "scores":
            seeds[replace(setting, seed=FIRST_TUNING_SEED)].append(results[setting])
    tried: dict[tuple[Task, str], dict[Setting, dict[str, Any]]] = defaultdict(dict)
    for setting, found in seeds.items():
        task = task_of(setting)._replace(iterations=0)
        accuracies, nlls = ([result[f"validation_{name}"] for result in found] for name in ("accuracy", "nll"))
        nll = None if None in nlls else float(np.mean(nlls))
        tried[task, setting.method][setting] = {"validation_accuracy": np.mean(accuracies), "validation_nll": nll}
    lines = ["### The grid: validation accuracy and NLL of each point", "", row(["", "method", "point", "validation"])]
    lines += ["|---|---|---|---|"]
    for (task, method), points in sorted(tried.items(), key=lambda item: (item[0][0], list(NAMES).index(item[0][1]))):
        best = best_of(points)
        for setting, result in points.items():
            strong = "**" if setting == best else ""
            lines.append(row([str(task), NAMES[method], point(setting), strong + validated(result) + strong]))
    return [*lines, ""] if tried else []


def best_of(points: dict[Setting, dict[str, Any]]) -> Setting:
    """The highest validation accuracy; the lower NLL breaks ties, and an infinite NLL is the worst."""

    def merit(setting: Setting) -> tuple[float, float]:
        nll = points[setting]["validation_nll"]
        return points[setting]["validation_accuracy"], -np.inf if nll is None else -nll

    return max(points, key=merit)


def prediction(results: dict[Setting, dict[str, Any]], tasks: dict[Task, dict[Setting, Results]]) -> list[str]:
    """Each score's mean over the seeds in each task, the gains there, and their correlations over the tasks."""
    scores: dict[Task, list[dict[str, Any]]] = defaultdict(list)
    for setting, result in results.items():
        if setting.method == "scores":
            scores[task_of(setting)].append(result)
    means: dict[Task, list[float]] = {}
    gains: dict[Task, dict[tuple[str, str], tuple[float, float]]] = {}  # in accuracy, and in NLL (higher is better)
    for task, arms in tasks.items():
        own = scores.get(task._replace(iterations=0))
        methods = {setting.method: arm for setting, arm in arms.items()}
        if own:
            means[task] = [float(np.mean([result[name] for result in own])) for name in SCORES]
            gains[task] = {
                (method, base): (
                    paired(methods[method], methods[base], "test_accuracy").mean,
                    -paired(methods[method], methods[base], "test_nll").mean,
                )
                for method, base in GAINS
                if methods.keys() >= {method, base} and methods[method].keys() & methods[base].keys()
            }
    if len([task for task in means if gains[task]]) < 3:
        return []
    lines = ["### What the scores say beforehand", "", row(["setting", *SCORES]), "|---" * (len(SCORES) + 1) + "|"]
    lines += [row([str(task), *(f"{value:.3f}" for value in values)]) for task, values in means.items()]
    lines += ["", row(["rank correlation with the gain", "settings", *SCORES]), "|---" * (len(SCORES) + 2) + "|"]
    for pair in GAINS:
        own_tasks = [task for task in means if pair in gains[task]]
        if len(own_tasks) < 3:
            continue
        for place, what in enumerate(("accuracy", "NLL")):
            gained = [gains[task][pair][place] for task in own_tasks]
            columns = zip(*(means[task] for task in own_tasks), strict=True)
            correlations = (stats.spearmanr(column, gained).statistic for column in columns)
            name = f"{NAMES[pair[0]]} over {NAMES[pair[1]]}, {what}"
            lines.append(row([name, str(len(own_tasks)), *(f"{c:+.2f}" for c in correlations)]))
    return [*lines, ""]


# ------------------------------------------------------------------------------------------------------------- the page


def draw(tasks: dict[Task, dict[Setting, Results]], path: Path) -> None:
    """Draw a point per seed and a bar for the mean's interval; right of the line is better than plain."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cotuning_kernels"  # the same bytes from the same results
    from matplotlib import pyplot

    rows = [[setting for setting in arms if setting.method != "plain"] for arms in tasks.values()]
    heights = [len(names) + 1.0 for names in rows]
    figure, axes = pyplot.subplots(
        len(tasks), 1, figsize=(8, 0.4 * sum(heights)), sharex=True, squeeze=False, height_ratios=heights,
        layout="constrained",
    )  # fmt: skip
    for axis, (task, arms), settings in zip(axes[:, 0], tasks.items(), rows, strict=True):
        plain = plain_of(arms)
        assert plain is not None
        for place, setting in enumerate(settings):
            points = paired(arms[setting], plain, "test_accuracy")
            axis.scatter(100 * points.differences, [place] * len(points.differences), s=12, color="tab:blue", alpha=0.5)
            axis.errorbar(100 * points.mean, place, xerr=100 * points.half_width, fmt="D", color="black", capsize=4)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(settings)), [NAMES[setting.method] for setting in settings])
        axis.set_ylim(len(settings) - 0.5, -0.5)
        axis.set_title(str(task), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("test accuracy minus that of plain fine-tuning with the same seed, points")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_page(page: Path, tables: Iterable[str]) -> None:
    """Put the tables between their two marks; the hand-written text around them stays."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page} has no place for the tables, expected the line {BEGIN.strip()} before {END.strip()}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    page.write_text(before + BEGIN + "\n".join(["", *tables]) + END + after)


def main(arguments: list[str] | None = None) -> int:
    return exit_code("experiment_tables", lambda: write_tables(arguments))


def write_tables(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the .jsonl files; gets the figure")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results: dict[Setting, dict[str, Any]] = {}
    for file in sorted(options.results.glob("*.jsonl")):
        results |= read_results(file)
    tasks = {task: arms for task, arms in collect(results).items() if len(arms) > 1}
    if not tasks:  # stop before the page loses its tables
        raise UserError(
            f"{options.results} has no .jsonl file with runs of {NAMES['plain']} fine-tuning and of another method: "
            "give the folder that examples/experiments.py wrote them to."
        )
    lines = [line for task, arms in tasks.items() for line in comparison(task, arms)]
    write_page(options.page, [*lines, *rivals(tasks), *collapse(results), *prediction(results, tasks), *grid(results)])
    draw(tasks, options.results / "differences.svg")


if __name__ == "__main__":
    sys.exit(main())
