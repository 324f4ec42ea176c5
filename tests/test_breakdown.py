"""Figures of where a judge errs, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tract_lite import Judgement, Record, Rubric
from tract_lite.report.breakdown import by_criteria, by_gold, by_std, calibration, lengths, worst
from tract_lite.report.items import Item, numbers_of

VALUES = {"1": 1.0, "2": 2.0, "3": 3.0}


def item(gold: float, shares: list[float], criteria: str | None = None, **fields: object) -> Item:
    judgement = Judgement.from_probabilities("a", np.array([shares]), VALUES, **fields)
    record = Record("Do it.", "Done.", Rubric(criteria), score=gold) if criteria else None
    return Item(gold, judgement, record)


def test_labels_of_one_probability_are_counted_by_how_often_they_are_right() -> None:
    found = calibration([item(1, [0.75, 0.25, 0.0]), item(2, [0.72, 0.28, 0.0])])
    [high] = [row for row in found if row["from"] == 0.7]
    assert high == {"from": 0.7, "to": 0.8, "predicted": pytest.approx(0.735), "observed": 0.5, "count": 2}
    [low] = [row for row in found if row["from"] == 0.2]
    assert low["predicted"] == pytest.approx(0.265) and low["observed"] == 0.5
    assert [row["count"] for row in found] == [2, 2, 2] and found[0]["observed"] == 0


def test_probabilities_count_as_shares_of_the_labels_and_certainty_is_in_the_last_bin() -> None:
    [none, sure] = calibration([item(3, [0.0, 0.0, 0.5])])
    assert (sure["from"], sure["predicted"], sure["observed"]) == (0.9, 1.0, 1.0) and none["count"] == 2


def test_a_gold_score_between_two_labels_counts_for_both() -> None:
    found = calibration([item(1.25, [0.6, 0.4, 0.0])])
    assert [(row["predicted"], row["observed"]) for row in found] == [(0.0, 0.0), (0.4, 0.25), (0.6, 0.75)]


def test_gold_scores_off_the_scale_and_items_without_labels_say_nothing_of_calibration() -> None:
    assert calibration([item(9, [0.5, 0.5, 0.0]), Item(1.0, Judgement("b", score=1.0))]) == []


def test_doubt_is_measured_in_bins_of_about_one_size() -> None:
    sure, unsure = item(3, [0.0, 0.0, 1.0]), item(3, [0.5, 0.0, 0.5])
    numbers = numbers_of([unsure] * 5 + [sure] * 6)
    low, high = by_std(numbers)
    assert (low["count"], low["std"], low["mae"]) == (6, 0.0, 0.0)
    assert (high["count"], high["std"], high["mae"], high["rmse"]) == (5, 1.0, 1.0, 1.0)
    assert by_std(numbers_of([sure] * 9)) == []


def test_errors_are_told_for_each_gold_score_or_for_parts_of_their_range() -> None:
    one, three = by_gold(numbers_of([item(1, [1.0, 0.0, 0.0]), item(3, [0.0, 1.0, 0.0]), item(3, [0.0, 0.0, 1.0])]))
    assert (one["from"], one["to"], one["count"], one["mae"]) == (1, 1, 1, 0)
    assert (three["count"], three["score"], three["mae"]) == (2, 2.5, 0.5)
    many = by_gold(numbers_of([item(1 + n / 50, [0.0, 1.0, 0.0]) for n in range(101)]))
    assert sum(row["count"] for row in many) == 101 and (many[0]["from"], many[-1]["to"]) == (1, 3)
    assert len(many) == 6 and all(row["from"] <= row["gold"] <= row["to"] for row in many)


def test_criteria_are_compared_where_there_are_several_and_rare_ones_stand_together() -> None:
    right, wrong = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    items = [item(1, right, "kind")] * 4 + [item(1, wrong, "true")] * 3 + [item(1, wrong, "a"), item(1, right, "b")]
    found = by_criteria(items, numbers_of(items))
    assert [(row["criteria"], row["count"], row["mae"]) for row in found] == [
        ("kind", 4, 0.0),
        ("true", 3, 1.0),
        ("2 others", 2, 0.5),
    ]
    assert by_criteria(items[:4], numbers_of(items[:4])) == []


def test_reasonings_are_measured_in_tokens_and_those_cut_off_by_their_error() -> None:
    whole = item(1, [1.0, 0.0, 0.0], feedback=["Fine it is."], feedback_ids=[[1, 2, 3, 4]])
    cut = item(1, [0.0, 1.0, 0.0], feedback=["So"], feedback_ids=[[1] * 8], truncated=True)
    direct = item(1, [0.0, 0.0, 1.0])
    items = [whole, whole, cut, direct]
    found = lengths(items, numbers_of(items))
    expected = {"unit": "tokens", "count": 3, "median": 4, "longest": 8, "cut_off": 1}
    assert found == {**expected, "mae_cut_off": 1.0, "mae_whole": 0.0}
    assert lengths([direct], numbers_of([direct])) == {}
    words = item(1, [1.0, 0.0, 0.0], feedback=["Fine it is."])
    assert lengths([words], numbers_of([words]))["longest"] == 3


def test_the_worst_are_those_farthest_off_on_their_scale() -> None:
    ten = {str(n): float(n) for n in range(11)}
    near = Item(5.0, Judgement("near", score=4.0, values=ten))
    far = Item(1.0, Judgement("far", score=1.5, values=VALUES))
    items = [near, far]
    assert [one.judgement.id for one in worst(items, numbers_of(items))] == ["far", "near"]
