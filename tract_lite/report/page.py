"""A run folder to one page people look at: `report.md` and its figure `report.png`."""

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tract_lite.data.jsonl import read_json, read_rows
from tract_lite.metrics import NORMALISED, WITH_INTERVAL, ends_of, format_table
from tract_lite.run import FIGURE, JUDGED, METRICS, REPORT, SETTINGS, Run

STAGES = {"stage1": ("stage 1: first reasonings", "#3b6fb6"), "stage2": ("stage 2: own reasonings", "#d9822b")}
TERMS = {"ce": "cross-entropy per token", "raft": "squared error of the score"}
INK, FAINT, ITEMS = "#333333", "#d8d8d8", "#2f7f79"
# Half the width, in gaps between gold scores, over which items of one whole gold score are spread.
JITTER = 0.16
# Up to this many logged steps are marked one by one.
FEW_POINTS = 20
MOST_GROUPS = 11


def write_report(run_dir: str | Path) -> Path:
    """Write a run's page from what its folder holds; parts that are missing are left out.
    Raises ValueError: the folder holds nothing to report.
    """
    run = Run(run_dir)
    # A stage may have been too short to log its loss.
    logs = {name: log for name, log in run.logs().items() if any(TERMS.keys() <= entry.keys() for entry in log)}
    pairs = _scores_and_golds(run)
    metrics, settings = read_json(run / METRICS), read_json(run / SETTINGS)
    if not (logs or pairs or metrics or settings):
        raise ValueError(f"{run.folder} holds nothing to report: is it a run folder?")
    parts = [f"# {run.folder.resolve().name}"]
    if rows := metrics.get("rows"):
        parts += [format_table(rows), _intervals(rows)]
        parts += sorted(
            {NORMALISED.format(row["scales"]).capitalize() + "." for row in rows.values() if row.get("scales")}
        )
    if logs or pairs:
        _draw(logs, pairs).savefig(run / FIGURE, dpi=150)
        parts.append(f"![losses, and scores against gold]({FIGURE})")
    for title, values in (("Counts", metrics.get("counts")), ("Parity", metrics.get("parity")), ("Settings", settings)):
        if values:
            parts += [f"## {title}", _list(values)]
    page = run / REPORT
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _scores_and_golds(run: Run) -> list[tuple[float, float]]:
    """Gold score and score of each held-out item, from the judge that has judged most of them: the
    last one by name, a GGUF file before others. Of items on several scales, their places on these,
    from 0 to 1."""
    best: list[tuple[float, float]] = []
    for file in sorted((run / JUDGED).glob("*.jsonl"), key=lambda file: (".gguf" in file.name, file.name)):
        rows = [row for row in read_rows(file) if row.get("gold") is not None and row.get("score") is not None]
        pairs = [(row["gold"], row["score"]) for row in rows]
        ends = [ends_of(row.get("values")) for row in rows]
        if len(set(ends)) > 1:
            placed = [(one, end) for one, end in zip(pairs, ends) if end is not None]
            pairs = [
                ((gold - low) / (high - low), (score - low) / (high - low)) for (gold, score), (low, high) in placed
            ]
        best = pairs if len(pairs) >= len(best) else best
    return best


def _intervals(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, figures in rows.items():
        ends = figures.get("intervals", {})
        shown = [f"{figure} {ends[figure][0]:.3f} to {ends[figure][1]:.3f}" for figure in WITH_INTERVAL if ends]
        lines += [f"- {name}: {', '.join(shown)}"] if shown else []
    return "\n".join(["95 % intervals:", "", *lines]) if lines else ""


def _list(values: Mapping[str, Any]) -> str:
    """A markdown list; what is nested stands there as JSON."""
    return "\n".join(
        f"- {name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in _rounded(values).items()
    )


def _rounded(value: Any) -> Any:
    """With four digits of every figure."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _draw(logs: Mapping[str, Sequence[Mapping[str, float]]], pairs: Sequence[tuple[float, float]]) -> Figure:
    """Both loss terms on the left, scores against gold on the right, or what there is of them."""
    columns = bool(logs) + bool(pairs)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03)
    figure = Figure(figsize=(5.2 * columns, 4.8), layout=layout)
    grid = figure.add_gridspec(2, columns)
    if logs:
        upper = figure.add_subplot(grid[0, 0])
        lower = figure.add_subplot(grid[1, 0], sharex=upper)
        _draw_terms((upper, lower), logs)
    if pairs:
        _draw_scores(figure.add_subplot(grid[:, -1]), *np.array(pairs, dtype=float).T)
    return figure


def _draw_terms(axes: Sequence[Axes], logs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    for ax, (term, title) in zip(axes, TERMS.items()):
        for name, log in logs.items():
            label, colour = STAGES[name]
            steps = [(entry["step"], entry[term]) for entry in log if term in entry]
            marker = "o" if len(steps) <= FEW_POINTS else ""
            ax.plot(*zip(*steps), color=colour, linewidth=1.8, label=label, marker=marker, markersize=4)
            validated = [entry for entry in log if term == "raft" and "eval_rmse" in entry]
            checks = [(entry["step"], entry["eval_rmse"] ** 2) for entry in validated]
            if checks:
                ax.plot(*zip(*checks), color=colour, linewidth=1.2, linestyle="--", marker="o", markersize=4)
                title = f"{TERMS[term]} (dashed: validation)"
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        highest = max((float(np.max(line.get_ydata())) for line in ax.lines), default=0.0)
        ax.set_ylim(0, 1.1 * highest or 1)
        _tidy(ax)
    axes[1].set_xlim(left=0)
    axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    axes[0].tick_params(labelbottom=False)
    axes[1].set_xlabel("step", color=INK)


def _draw_scores(ax: Axes, golds: np.ndarray, scores: np.ndarray) -> None:
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
    ax.scatter(golds + spread, scores, s=16, alpha=alpha, color=ITEMS, linewidths=0)
    if grouped:
        means = [scores[golds == level].mean() for level in levels]
        ax.hlines(means, levels - 0.26 * gap, levels + 0.26 * gap, color=INK, linewidth=2, label="mean prediction")
        ax.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
        ax.set_xticks(levels)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_title(f"predicted score of {golds.size} held-out items", loc="left", fontsize=11, color=INK)
    ax.set_xlabel("gold score", color=INK)
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
