"""Tables and figure of docs/results.md from the lines that examples/experiments.py wrote.

    python examples/experiment_tables.py     # needs scipy and matplotlib

Every comparison is paired: a method's result minus that of plain fine-tuning with the same seed, so the difficulty of a
seed's images cancels. Intervals are 95% intervals of Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from command_line import UserError, exit_code
from experiments import PROJECT, RESULTS, Setting, read_results
from scipy import stats

PAGE = PROJECT / "docs" / "results.md"
BEGIN, END = "<!-- tables: written by examples/experiment_tables.py -->\n", "<!-- end of the tables -->\n"
NAMES = {
    "plain": "plain",
    "linear-probe": "linear probe",
    "l2-sp": "L2-SP",
    "co-tuning": "Co-Tuning",
    "co-tuning-reverse": "Co-Tuning, reverse",
}
CHOSEN = "Co-Tuning, chosen on validation"

Results = dict[int, dict[str, Any]]  # by seed


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


def collect(results: dict[Setting, dict[str, Any]]) -> dict[Setting, dict[str, Results]]:
    """Per task (a setting without its method and seed) the results of each arm by seed, plain first."""
    tasks: dict[Setting, dict[str, Results]] = defaultdict(lambda: defaultdict(dict))
    for setting, result in sorted(results.items(), key=lambda item: order_of(item[0])):
        task = replace(setting, method="", trade_off=0.0, warm_up=0.0, temperature=1.0, seed=0)
        tasks[task][arm_name(setting)][setting.seed] = result
    for arms in tasks.values():
        tuned = [name for name in arms if name == NAMES["plain"] or name.startswith(NAMES["co-tuning"] + ", trade-off")]
        if len(tuned) > 2:
            arms[CHOSEN] = chosen_on_validation([arms[name] for name in tuned])
    return {task: dict(arms) for task, arms in tasks.items()}


def order_of(setting: Setting) -> tuple[Any, ...]:
    return list(NAMES).index(setting.method), setting.trade_off, setting.warm_up, setting.temperature, setting.seed


def arm_name(setting: Setting) -> str:
    name = NAMES[setting.method]
    if setting.method.startswith("co-tuning"):
        name += f", trade-off {setting.trade_off:g}"
    if setting.warm_up:
        name += f", warm-up {setting.warm_up:.0%}"
    if setting.temperature != 1:
        name += f", temperature {setting.temperature:g}"
    return name


def chosen_on_validation(arms: list[Results]) -> Results:
    """For each seed the arm with the best validation accuracy, plain included; a lower NLL breaks ties."""
    seeds = set.intersection(*(set(arm) for arm in arms))
    return {
        seed: max((arm[seed] for arm in arms), key=lambda r: (r["validation_accuracy"], -r["validation_nll"]))
        for seed in sorted(seeds)
    }


# ------------------------------------------------------------------------------------------------------------- the page


def title_of(task: Setting) -> str:
    return (
        f"{task.data}, {task.network}, {task.images_per_class} images a class, {task.iterations} iterations, "
        f"rate {task.lr:g}"
    )


def table(task: Setting, arms: dict[str, Results]) -> list[str]:
    plain = arms[NAMES["plain"]]
    lines = [
        f"### {title_of(task)}",
        "",
        "| | seeds | test accuracy | to plain, points | seeds better / worse | NLL | to plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        both = [arm[seed] for seed in sorted(arm.keys() & plain.keys())]
        if not both:
            continue
        accuracy, nll = (np.mean([r[measure] for r in both]) for measure in ("test_accuracy", "test_nll"))
        cells = [name, str(len(both)), f"{accuracy:.1%}", "", "", f"{nll:.3f}", ""]
        if name != NAMES["plain"]:
            points, nlls = (paired(arm, plain, measure) for measure in ("test_accuracy", "test_nll"))
            better, worse = int((points.differences > 0).sum()), int((points.differences < 0).sum())
            cells[3], cells[4] = interval(points, 100, 1), f"{better} / {worse}"
            cells[6] = interval(nlls, 1, 3)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def interval(values: Paired, scale: float, digits: int) -> str:
    if np.isnan(values.half_width):
        return f"{values.mean * scale:+.{digits}f}"
    return f"{values.mean * scale:+.{digits}f} ± {values.half_width * scale:.{digits}f}"


def draw(tasks: dict[Setting, dict[str, Results]], path: Path) -> None:
    """Draw a point per seed and a bar for the mean's interval; right of the line is better than plain."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cotuning_kernels"  # the same bytes from the same results
    from matplotlib import pyplot

    rows = [[name for name in arms if name != NAMES["plain"]] for arms in tasks.values()]
    heights = [len(names) + 1.0 for names in rows]
    figure, axes = pyplot.subplots(
        len(tasks), 1, figsize=(8, 0.5 * sum(heights)), sharex=True, squeeze=False, height_ratios=heights,
        layout="constrained",
    )  # fmt: skip
    for axis, (task, arms), names in zip(axes[:, 0], tasks.items(), rows, strict=True):
        for place, name in enumerate(names):
            points = paired(arms[name], arms[NAMES["plain"]], "test_accuracy")
            axis.scatter(100 * points.differences, [place] * len(points.differences), s=12, color="tab:blue", alpha=0.5)
            axis.errorbar(100 * points.mean, place, xerr=100 * points.half_width, fmt="D", color="black", capsize=4)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(title_of(task), fontsize=9, loc="left")
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
    tasks = {task: arms for task, arms in collect(results).items() if NAMES["plain"] in arms and len(arms) > 1}
    if not tasks:  # stop before the page loses its tables
        raise UserError(
            f"{options.results} has no .jsonl file with runs of {NAMES['plain']} fine-tuning and of another method: "
            "give the folder that examples/experiments.py wrote them to."
        )
    write_page(options.page, [line for task, arms in tasks.items() for line in table(task, arms)])
    draw(tasks, options.results / "differences.svg")


if __name__ == "__main__":
    sys.exit(main())
