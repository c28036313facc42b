"""Plots of a relationship, and of how reliable a classifier's confidence is.

A function imports matplotlib when it draws, and uses none of its global state, so it needs no display.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cotuning_kernels.calibration import Reliability

__all__ = ["plot_reliability", "relationship_heat_map", "save_figure"]

_BLUE, _RED, _GREY = "#3b6ea8", "#c8553d", "#8a8a8a"


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'cotuning-kernels[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the picture; the ending of ``path`` chooses the format (.png, .pdf, .svg)."""
    figure.savefig(path, dpi=150)


def relationship_heat_map(
    matrix: Tensor,
    target_names: Sequence[str],
    source_names: Sequence[str],
    *,
    top_k: int,
    max_columns: int,
    title: str,
) -> Figure:
    """``matrix`` float64 ``(rows, N_s)`` on the CPU; see :meth:`cotuning_kernels.Relationship.plot`."""
    rows = similarity_order(matrix)
    matrix = matrix[rows]
    columns = _columns_that_matter(matrix, top_k, max_columns)
    shown = matrix[:, columns]
    elsewhere = (matrix.sum(dim=1) - shown.sum(dim=1)).clamp(min=0)

    num_rows, num_columns = shown.shape
    cell = 0.34 if num_rows <= 60 else 0.17
    font = 8 if num_rows <= 60 else 6
    longest = max(len(_label(source_names[s])) for s in columns)
    width, height = 3.6 + cell * num_columns, 1.4 + 0.06 * longest + 0.85 * cell * num_rows
    figure = _new_figure(min(40, max(6, width)), min(40, max(3, height)))
    figure.suptitle(title, fontsize=12)
    axes, rest = figure.subplots(1, 2, sharey=True, width_ratios=[max(num_columns, 6), 2.5])
    # The square root of a probability makes small shares visible.
    brightest = float(shown.max()) or 1.0
    image = axes.imshow(shown.sqrt().numpy(), cmap="GnBu", vmin=0, vmax=brightest**0.5, aspect="auto")
    axes.set_yticks(range(num_rows), [_label(target_names[t]) for t in rows], fontsize=font)
    names = [_label(source_names[s]) for s in columns]
    axes.set_xticks(range(num_columns), names, fontsize=font, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("source class")
    axes.set_ylabel("target class")
    _tidy_cells(axes, num_rows, num_columns)
    if num_rows * num_columns <= 1500:
        _write_percentages(axes, shown, brightest)
    for row in (matrix == 0).all(dim=1).nonzero()[:, 0].tolist():
        middle = (num_columns - 1) / 2
        axes.text(middle, row, "no source supervision", ha="center", va="center", fontsize=font, color=_GREY)

    rest.barh(range(num_rows), elsewhere.tolist(), height=0.7, color="#cfd4da")
    for row, share in enumerate(elsewhere.tolist()):
        if share > 0:
            rest.text(0.04, row, f"{share:.0%}", va="center", fontsize=font - 1, color="#333333")
    rest.set(xlim=(0, 1), xticks=[], xlabel=f"{matrix.shape[1] - num_columns} others")
    rest.tick_params(which="both", length=0)
    rest.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=[axes, rest], label="p(source class | target class)", aspect=30, pad=0.01)
    levels = [level for level in (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1) if level <= brightest]
    bar.set_ticks([level**0.5 for level in levels], labels=[f"{level:.0%}" for level in levels])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def similarity_order(matrix: Tensor) -> list[int]:
    """An order of the rows that puts similar ones next to each other; rows of zeros come last.

    After each row comes the most similar one of the remaining rows, by the Bhattacharyya coefficient
    ``sum_s sqrt(p_s q_s)``. Groups whose rows are more alike than rows of different groups stay together.
    """
    supervised = (matrix != 0).any(dim=1)
    index = supervised.nonzero()[:, 0]
    root = matrix[index].sqrt()
    similarity = root @ root.T
    order: list[int] = []
    following = 0
    for _ in index:
        order.append(following)
        similarity[:, following] = -1  # taken
        following = int(similarity[following].argmax())
    return [*index[order].tolist(), *(~supervised).nonzero()[:, 0].tolist()]


def plot_reliability(
    before: Reliability,
    after: Reliability | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    titles: Sequence[str] = ("before calibration", "after calibration"),
) -> Figure:
    """A reliability diagram: accuracy against confidence, and the number of predictions in each bin.

    Args:
        before, after: from :func:`cotuning_kernels.calibration.reliability`; one panel each.
        path: where to write the picture (.png, .pdf, .svg), or ``None`` to only return it.
        titles: one per panel.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: fewer titles than panels.
    """
    panels = [before] if after is None else [before, after]
    if len(titles) < len(panels):
        raise ValueError(f"titles is {titles!r:.80}, expected {len(panels)}: one a panel")
    figure = _new_figure(0.6 + 3.6 * len(panels), 4.6)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for column, (title, panel) in enumerate(zip(titles, panels, strict=False)):
        _draw_reliability(grid[0, column], grid[1, column], title, panel)
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share of\npredictions")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    if path is not None:
        save_figure(figure, path)
    return figure


def _columns_that_matter(matrix: Tensor, top_k: int, max_columns: int) -> list[int]:
    """The union of each row's ``top_k`` columns, in the order of the row that each belongs to most."""
    top = matrix.topk(min(top_k, matrix.shape[1]), dim=1)
    chosen = top.indices[top.values > 0].unique()
    if len(chosen) == 0:  # no class is supervised; an empty picture would say less
        chosen = torch.arange(min(top_k, matrix.shape[1]))
    peak, owner = matrix[:, chosen].max(dim=0)
    if len(chosen) > max_columns:
        keep = peak.topk(max_columns).indices
        chosen, peak, owner = chosen[keep], peak[keep], owner[keep]
    return [s for _, _, s in sorted(zip(owner.tolist(), (-peak).tolist(), chosen.tolist(), strict=True))]


def _label(text: str, longest: int = 30) -> str:
    """The text cut to ``longest`` characters, without dollar signs, which matplotlib would read as mathematics.

    A class name that comes from a folder may have bytes that are not UTF-8, as surrogates. matplotlib refuses those, so
    they become replacement characters.
    """
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    if len(text) > longest:
        text = text[: longest - 1].rstrip(" ,") + "…"
    return text.replace("$", r"\$")


def _tidy_cells(axes: Axes, num_rows: int, num_columns: int) -> None:
    """White lines between the cells instead of a frame."""
    axes.set_xticks([c - 0.5 for c in range(1, num_columns)], minor=True)
    axes.set_yticks([r - 0.5 for r in range(1, num_rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _write_percentages(axes: Axes, values: Tensor, brightest: float) -> None:
    for row, column in (values >= 0.005).nonzero().tolist():
        value = float(values[row, column])
        color = "white" if value > 0.4 * brightest else "#333333"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color)


def _draw_reliability(axes: Axes, histogram: Axes, title: str, reliability: Reliability) -> None:
    bins = len(reliability.count)
    width = 1 / bins
    middles = [(index + 0.5) * width for index in range(bins)]
    used = [index for index in range(bins) if reliability.count[index] > 0]
    x = [middles[index] for index in used]
    accuracy = [float(reliability.accuracy[index]) for index in used]
    confidence = [float(reliability.confidence[index]) for index in used]
    axes.bar(x, accuracy, width * 0.94, color=_BLUE, label="accuracy")
    # The gap between accuracy and confidence is hatched, so that it shows on the blue bar too.
    low = [min(a, c) for a, c in zip(accuracy, confidence, strict=True)]
    gap = [abs(a - c) for a, c in zip(accuracy, confidence, strict=True)]
    axes.bar(
        x, gap, width * 0.94, bottom=low, facecolor=(0.78, 0.33, 0.24, 0.3), edgecolor=_RED, hatch="///", linewidth=0.8,
        label="gap between confidence and accuracy",
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=_GREY, label="perfectly calibrated")
    axes.set_title(title, fontsize=11)
    axes.text(
        0.04, 0.96, f"ECE {reliability.expected_calibration_error:.1%}\naccuracy {reliability.mean_accuracy:.1%}\n"
        f"confidence {reliability.mean_confidence:.1%}", transform=axes.transAxes, va="top", fontsize=9,
    )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1))
    total = float(reliability.count.sum())
    histogram.bar(middles, [float(count) / total for count in reliability.count], width * 0.94, color=_GREY)
    histogram.set_xlabel("confidence")
    for each in (axes, histogram):
        each.spines[["top", "right"]].set_visible(False)
