"""The rows of a table: judges and what they are compared with, each with its figures."""

import math
from collections import defaultdict
from statistics import fmean
from typing import Any, Callable, Iterable, Mapping, Sequence

import numpy as np

from tract_lite.judgement import Judgement
from tract_lite.metrics import Ends, better_by, evaluate, format_table
from tract_lite.record import Record
from tract_lite.scale import ScoreScale

Scores = Sequence[float | None]

# The readings of a judge's distribution that a row of the table stands for. The expected score is
# RAIL, and after reasonings CoT-RAIL.
RAIL, COT_RAIL, MODE, SAMPLED = "RAIL", "CoT-RAIL", "most likely label", "sampled label"
# What needs no judge: one score for all items.
TRAINING_MEAN, GOLD_MEAN = "always the training mean", "always the mean gold score"
SHORT = ("n", "pearson", "rmse", "mae", "better by")


def readings(judged: Sequence[Judgement]) -> dict[str, list[float | None]]:
    """The scores of the items by each reading of their distributions."""
    draw = np.random.default_rng(0)
    sampled = [
        draw.choice([*one.values.values()], p=[one.probabilities[label] / one.mass for label in one.values])
        if one.mass > 0
        else None
        for one in judged
    ]
    expected = COT_RAIL if any(one.feedback for one in judged) else RAIL
    return {SAMPLED: sampled, MODE: [j.mode for j in judged], expected: [j.score for j in judged]}


def score_row(judge: str | None, rows: Mapping[str, Any]) -> str:
    """The name of the row with a judge's own scores; empty where there is none."""
    return next((name for name in rows if name in (f"{judge}, {RAIL}", f"{judge}, {COT_RAIL}")), "")


def judge_of(row: str) -> str:
    """The judge of a row that has its own scores."""
    return row.removesuffix(f", {COT_RAIL}").removesuffix(f", {RAIL}")


def training_means(training: Iterable[Record], scale: ScoreScale) -> Callable[[ScoreScale | None], float]:
    """What gives the mean gold score of the training records on a scale (None: on `scale`).

    On a scale of which there are none, it is the score at the mean place that those of the others
    have on theirs. Raises ValueError: no record has a gold score.
    """
    golds: dict[ScoreScale, list[float]] = defaultdict(list)
    for record in training:
        if record.score is not None:
            golds[record.scale or scale].append(record.score)
    if not golds:
        raise ValueError("no training record has a gold score\nname a run folder with its training records")
    means = {one: fmean(scores) for one, scores in golds.items()}
    place = fmean((gold - min(one.values)) / one.width for one, scores in golds.items() for gold in scores)

    def mean(own: ScoreScale | None) -> float:
        own = own or scale
        return means.get(own, min(own.values) + place * own.width)

    return mean


def measured_rows(
    predictions: Mapping[str, Scores],
    golds: Sequence[float],
    ends: Ends | Sequence[Ends | None] | None = None,
    baselines: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """The figures of each row, as `evaluate` gives them; `predictions` may be of the first items.

    `better_by` has by how much a row errs less than each of the `baselines`, on the items that both
    have; a baseline is compared with those named before it.
    """
    # All rows on the same scales, though the first items may be on one of them.
    whole = {name: [*scores, *[None] * (len(golds) - len(scores))] for name, scores in predictions.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, scores in whole.items():
        rows[name] = evaluate(scores, golds, ends)
        rows[name]["coverage"] = rows[name]["count"] / len(predictions[name])
        others = baselines[: baselines.index(name)] if name in baselines else baselines
        both = [other for other in others if any(map(_are_numbers, scores, whole[other]))]
        if both:
            rows[name]["better_by"] = {other: better_by(scores, whole[other], golds, ends) for other in both}
    return rows


def _are_numbers(*scores: float | None) -> bool:
    return all(score is not None and math.isfinite(score) for score in scores)


def short_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows for a console: items, agreement and error, with what the brackets mean below."""
    guesses = [other for row in rows.values() for other in row.get("better_by", {})]
    guess = guesses[0] if guesses else None
    columns = SHORT if guess else SHORT[:-1]
    cells = {}
    for name, row in rows.items():
        compared = row.get("better_by", {}).get(guess, {})
        cells[name] = {
            "n": f"{row['count']:,}",
            "pearson": _with_interval(row, "pearson"),
            "rmse": _with_interval(row, "rmse"),
            "mae": _number(row["mae"]),
            "better by": _with_interval(compared, "rmse") if compared else "",
        }
    lines = [format_table(cells, columns), "", "in brackets: 95 % intervals over the n items that were judged"]
    if guess:
        lines[-1] += f"; better by: how much\nlower the rmse is than that of {guess}, on the same items"
    return "\n".join(lines)


def other_figures(row: Mapping[str, Any]) -> str:
    """What a short table leaves out of a row, in a line."""
    shown = [f"{name} {_with_interval(row, name)}" for name in ("spearman", "kendall", "coverage")]
    return ", ".join(shown)


def scores_alone(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows without the other readings of the same judgements."""
    return {name: row for name, row in rows.items() if not name.endswith((f", {MODE}", f", {SAMPLED}"))}


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row.get("intervals", {}).get(name) or (math.nan, math.nan)
    shown = _number(row[name])
    return shown if math.isnan(low) or math.isnan(high) else f"{shown} [{low:.2f}, {high:.2f}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
