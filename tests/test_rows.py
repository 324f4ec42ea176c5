"""Rows of a table: what guessing the mean gives, and by how much each row is better."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tract_lite import Judgement, Record, ScoreScale, compare_judges, evaluate
from tract_lite.report.rows import (
    MODE,
    RAIL,
    SAMPLED,
    TRAINING_MEAN,
    measured_rows,
    readings,
    scores_alone,
    short_table,
    training_means,
)

ONE, TEN = ScoreScale.integers(1, 5), ScoreScale.integers(0, 10)
RANDOM = np.random.default_rng(5)
GOLDS = RANDOM.integers(1, 6, 80).astype(float).tolist()
GOOD, POOR = ((GOLDS + RANDOM.normal(scale=scale, size=80)).tolist() for scale in (0.4, 1.5))


def records(*golds: float, scale: ScoreScale | None = None) -> list[Record]:
    return [Record("Do it.", str(gold), score=gold, scale=scale) for gold in golds]


def test_the_mean_of_the_training_is_that_of_the_records_on_the_same_scale() -> None:
    mean = training_means([*records(1, 2, 3), *records(9, 10, scale=TEN)], ONE)
    assert mean(None) == mean(ONE) == 2 and mean(TEN) == 9.5


def test_on_a_scale_that_the_training_lacks_the_guess_is_the_mean_place_on_the_others() -> None:
    mean = training_means([*records(1, 3), *records(10, scale=TEN)], ONE)
    assert mean(ScoreScale.integers(0, 100)) == pytest.approx(100 * (0 + 0.5 + 1) / 3)
    with pytest.raises(ValueError, match="no training record has a gold score"):
        training_means([Record("Do it.", "a")], ONE)


def test_each_row_is_compared_with_the_baselines_and_a_baseline_with_those_before_it() -> None:
    scores = {"mean": [3.0] * 80, "seed": POOR, "judge": GOOD}
    rows = measured_rows(scores, GOLDS, None, ["mean", "seed"])
    assert "better_by" not in rows["mean"] and list(rows["seed"]["better_by"]) == ["mean"]
    assert list(rows["judge"]["better_by"]) == ["mean", "seed"]
    gained = rows["judge"]["better_by"]["seed"]
    compared = compare_judges(GOOD, POOR, GOLDS)
    for name in ("rmse", "mae"):
        low, high = compared["intervals"][name]
        assert gained[name] == pytest.approx(-compared["differences"][name])
        assert gained["intervals"][name] == pytest.approx((-high, -low))
    assert {name: rows["judge"][name] for name in evaluate(GOOD, GOLDS)} == evaluate(GOOD, GOLDS)


def test_a_row_of_the_first_items_alone_is_compared_on_these() -> None:
    rows = measured_rows({"mean": [3.0] * 80, "file": GOOD[:30]}, GOLDS, None, ["mean"])
    assert rows["file"]["count"] == rows["file"]["better_by"]["mean"]["count"] == 30
    assert rows["file"]["coverage"] == 1
    expected = evaluate([3.0] * 30, GOLDS[:30])["rmse"] - evaluate(GOOD[:30], GOLDS[:30])["rmse"]
    assert rows["file"]["better_by"]["mean"]["rmse"] == pytest.approx(expected)


def test_of_several_scales_all_rows_are_on_one_measure_though_the_first_items_are_on_one_scale() -> None:
    ends = [(1.0, 5.0)] * 2 + [(0.0, 10.0)] * 2
    rows = measured_rows({"mean": [3.0, 3.0, 5.0, 5.0], "file": [1.0, 4.0]}, [1.0, 5.0, 0.0, 10.0], ends, ["mean"])
    assert rows["file"]["scales"] == rows["mean"]["scales"] == 2
    assert rows["file"]["mae"] == pytest.approx(0.125) and rows["mean"]["mae"] == pytest.approx(0.5)
    assert rows["file"]["better_by"]["mean"]["mae"] == pytest.approx(0.375)


def test_a_baseline_that_shares_no_judged_item_is_no_comparison() -> None:
    rows = measured_rows({"mean": [None, 3.0], "judge": [2.0, None]}, [1.0, 2.0], None, ["mean"])
    assert "better_by" not in rows["judge"]


def test_the_short_table_shows_items_intervals_and_the_gain_within_110_columns() -> None:
    scores = {TRAINING_MEAN: [3.0] * 80, "judge-q4_k_m.gguf, CoT-RAIL": GOOD[:40]}
    rows = measured_rows(scores, GOLDS, None, [TRAINING_MEAN])
    table = short_table(rows)
    header, _, guess, judge, *_ = table.splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["n", "pearson", "rmse", "mae", "better by"]
    row = rows["judge-q4_k_m.gguf, CoT-RAIL"]
    low, high = row["intervals"]["rmse"]
    assert f"| {row['rmse']:.3f} [{low:.2f}, {high:.2f}] |" in judge and "| 40 |" in judge
    gained = row["better_by"][TRAINING_MEAN]
    assert f"{gained['rmse']:.3f} [" in judge and "nan" not in guess
    assert max(map(len, table.splitlines())) <= 110
    assert "lower the rmse is than that of always the training mean" in table


def test_a_table_without_baselines_has_no_gain() -> None:
    assert "better by" not in short_table(measured_rows({"judge": GOOD}, GOLDS))


def test_readings_of_one_judgement_are_told_apart_and_the_score_alone_is_picked() -> None:
    values = {"1": 1.0, "5": 5.0}
    sure = Judgement.from_probabilities("a", np.array([[0.75, 0.25]]), values)
    empty = Judgement.from_probabilities("b", np.array([[0.0, 0.0]]), values)
    found = readings([sure, empty])
    assert found[RAIL][0] == pytest.approx(2.0) and found[MODE][0] == 1 and found[SAMPLED][0] in (1, 5)
    assert found[SAMPLED][1] is None and math.isfinite(found[RAIL][1] or 0.0)
    rows = {f"judge, {reading}": {} for reading in (SAMPLED, MODE, RAIL)} | {"true mean": {}}
    assert list(scores_alone(rows)) == [f"judge, {RAIL}", "true mean"]
