"""The pictures of a page, by matplotlib: each takes an axes and plain numbers."""

import math
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from tract_lite.report.words import STAGE_TITLES

Log = Sequence[Mapping[str, float]]
Rows = Sequence[Mapping[str, Any]]

COLOURS = {"stage1": "#3b6fb6", "stage2": "#d9822b", "direct": "#3b6fb6"}
TERMS = {"ce": "cross-entropy per token", "raft": "squared error of the score"}
INK, FAINT, ITEMS = "#333333", "#d8d8d8", "#2f7f79"
# Half the width, in gaps between gold scores, over which items of one whole gold score are spread.
JITTER = 0.16
# Up to this many logged steps are marked one by one.
FEW_POINTS = 20
MOST_GROUPS = 11
# More items are drawn as a picture inside the picture.
MOST_MARKS = 2000
# A curve that reaches so many times over its median, or its least, is drawn by its logarithm.
STEEP, STEEPER = 8, 60


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose parts find their room."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03)
    return Figure(figsize=(width, height), layout=layout)


def draw_page(logs: Mapping[str, Log], golds: np.ndarray, scores: np.ndarray) -> Figure:
    """Both loss terms on the left, scores against gold on the right, or what there is of them."""
    columns = bool(logs) + bool(golds.size)
    figure = new_figure(5.2 * columns, 4.8)
    grid = figure.add_gridspec(2, columns)
    if logs:
        upper = figure.add_subplot(grid[0, 0])
        lower = figure.add_subplot(grid[1, 0], sharex=upper)
        for ax, term in zip((upper, lower), TERMS):
            draw_term(ax, term, logs)
        upper.tick_params(labelbottom=False)
        upper.set_xlabel("")
    if golds.size:
        draw_scores(figure.add_subplot(grid[:, -1]), golds, scores)
    return figure


def draw_term(ax: Axes, term: str, logs: Mapping[str, Log]) -> None:
    """A term of the loss by the step, for each stage; dashed, what validation said of it."""
    drawn: list[float] = []
    title = TERMS[term]
    for name, log in logs.items():
        colour, label = COLOURS.get(name, INK), STAGE_TITLES.get(name, name)
        steps = [(entry["step"], entry[term]) for entry in log if _is_finite(entry.get(term))]
        checks = [(entry["step"], entry["eval_rmse"] ** 2) for entry in log if _is_finite(entry.get("eval_rmse"))]
        few = "o" if len(steps) <= FEW_POINTS else ""
        if steps:
            ax.plot(*zip(*steps), color=colour, linewidth=1.8, label=label, marker=few, markersize=4)
        if checks and term == "raft":
            ax.plot(*zip(*checks), color=colour, linewidth=1.2, linestyle="--", marker="o", markersize=4)
            title = f"{TERMS[term]} (dashed: validation)"
            drawn += [value for _, value in checks]
        drawn += [value for _, value in steps]
    _set_heights(ax, drawn)
    ax.set_xlim(0, 1.03 * max((entry["step"] for log in logs.values() for entry in log), default=1))
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    ax.set_xlabel("step", color=INK)
    if len(logs) > 1 and ax.lines:
        ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    _tidy(ax)


def _set_heights(ax: Axes, drawn: Sequence[float]) -> None:
    """Limits with all that is drawn inside of them, and a logarithm where much would lie flat."""
    if not drawn:
        return
    high, least = max(drawn), min(drawn)
    low = min((value for value in drawn if value > 0), default=0.0)
    if least < 0 or not low or not (high > STEEP * np.median(drawn) or high > STEEPER * low):
        room = 0.06 * (high - min(least, 0.0)) or 0.06
        ax.set_ylim(min(least, 0.0) - room, high + room)
        return
    room = (high / low) ** 0.06
    if least == 0:
        ax.set_yscale("symlog", linthresh=low)
        ax.set_ylim(-low, high * room)
        return
    ax.set_yscale("log")
    ax.set_ylim(low / room, high * room)


def draw_scores(ax: Axes, golds: np.ndarray, scores: np.ndarray) -> None:
    """The score of each item by its gold score, (n,) each, and the mean of each whole gold."""
    levels = np.unique(golds)
    grouped = len(levels) <= MOST_GROUPS and (levels == np.rint(levels)).all()
    # The gap between two gold scores, as between the labels of a scale in steps.
    gap = float(np.diff(levels).min()) if grouped and len(levels) > 1 else 1.0
    spread = gap * np.random.default_rng(0).uniform(-JITTER, JITTER, golds.size) if grouped else 0
    low, high = min(golds.min(), scores.min()), max(golds.max(), scores.max())
    margin = 0.06 * (high - low) + JITTER * min(gap, high - low or 1)
    ends = low - margin, high + margin
    ax.plot(ends, ends, color=FAINT, linewidth=1.2, zorder=0)
    alpha = float(np.clip(60 / golds.size, 0.2, 0.6))
    many = golds.size > MOST_MARKS
    ax.scatter(golds + spread, scores, s=16, alpha=alpha, color=ITEMS, linewidths=0, rasterized=many)
    if grouped:
        means = [scores[golds == level].mean() for level in levels]
        ax.hlines(means, levels - 0.26 * gap, levels + 0.26 * gap, color=INK, linewidth=2, label="mean prediction")
        ax.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
        ax.set_xticks(levels)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_title(f"predicted score of {golds.size:,} items", loc="left", fontsize=11, color=INK)
    ax.set_xlabel("gold score", color=INK)
    _tidy(ax)


def draw_calibration(ax: Axes, rows: Rows) -> None:
    """How often a label was right by the probability that it had; larger marks are of more."""
    ax.plot((0, 1), (0, 1), color=FAINT, linewidth=1.2, zorder=0)
    predicted, observed, counts = (np.array([row[name] for row in rows]) for name in ("predicted", "observed", "count"))
    ax.plot(predicted, observed, color=ITEMS, linewidth=1.4)
    ax.scatter(predicted, observed, s=12 + 90 * counts / counts.max(), color=ITEMS, linewidths=0)
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    ax.set_title("how often a label was right", loc="left", fontsize=11, color=INK)
    ax.set_xlabel("probability that the judge gave it", color=INK)
    _tidy(ax)


def draw_doubt(ax: Axes, rows: Rows) -> None:
    """The error of items by the judge's `std`: on the line, it tells the size of the error."""
    stds, errors = (np.array([row[name] for row in rows]) for name in ("std", "rmse"))
    end = 1.08 * max(stds.max(), errors.max()) or 1.0
    ax.plot((0, end), (0, end), color=FAINT, linewidth=1.2, zorder=0)
    ax.plot(stds, errors, color=ITEMS, linewidth=1.4, marker="o", markersize=6)
    ax.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    ax.set_title("rmse by the doubt of the judge", loc="left", fontsize=11, color=INK)
    ax.set_xlabel("std of the judge", color=INK)
    _tidy(ax)


def draw_errors(ax: Axes, rows: Rows) -> None:
    """The mean absolute error by gold score."""
    names = [f"{row['from']:.3g}" if row["from"] == row["to"] else f"{row['from']:.3g}-{row['to']:.3g}" for row in rows]
    ax.bar(range(len(rows)), [row["mae"] for row in rows], color=ITEMS, width=0.7)
    ax.set_xticks(range(len(rows)), names)
    ax.set_title("mean absolute error by gold score", loc="left", fontsize=11, color=INK)
    ax.set_xlabel("gold score", color=INK)
    _tidy(ax)


def draw_lengths(ax: Axes, each: Sequence[int], unit: str) -> None:
    """How many reasonings have which length."""
    bins = min(20, max(1, max(each) - min(each) + 1))
    ax.hist(each, bins=bins, color=ITEMS, rwidth=0.9)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("number of items", loc="left", fontsize=11, color=INK)
    ax.set_xlabel(f"{unit} of the reasoning", color=INK)
    _tidy(ax)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
