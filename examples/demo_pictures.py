"""The demo's own picture; the package draws the other two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

COLOURS = ("#8a8a8a", "#c8553d", "#3b6ea8")


class Curves(Protocol):
    """The curves of one way of fine-tuning: both terms of the loss at each iteration, in nats."""

    name: str
    target_terms: list[float]
    source_terms: list[float]


def plot_training(arms: Sequence[Curves], path: Path, drop_at: int, lowest_source_term: float) -> None:
    """Draw both heads' terms over the iterations: raw values faint, the running mean strong.

    A cross entropy cannot fall below the entropy of its labels. ``lowest_source_term`` is that of the translated ones.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("Target head", "Source head, against the translated labels")
    for axes, title, attribute in zip(panels, titles, ("target_terms", "source_terms"), strict=True):
        for arm, colour in zip(arms, COLOURS, strict=False):
            terms = getattr(arm, attribute)
            iterations = range(1, len(terms) + 1)
            axes.plot(iterations, terms, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(iterations, running_mean(terms), color=colour, linewidth=2, label=arm.name)
        axes.axvline(drop_at + 0.5, color="#bbbbbb", linestyle=":", linewidth=1)
        axes.text(
            drop_at + 0.5,
            0.99,
            " rate / 10",
            color="#8a8a8a",
            fontsize=8,
            va="top",
            transform=axes.get_xaxis_transform(),
        )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    panels[1].axhline(lowest_source_term, color="#8a8a8a", linestyle="--", linewidth=1, label="entropy of the labels")
    panels[1].legend(frameon=False)
    panels[0].set_ylabel("cross entropy (nats)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def running_mean(values: Sequence[float], width: int = 9) -> np.ndarray:
    """The mean over up to ``width`` neighbours; fewer at the ends, so that the curve keeps its length."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
