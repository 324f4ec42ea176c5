"""Which of several answers is better: chances, ties, win rates and what people prefer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from tract_lite.data.wins import agreement, share_of, win_rates, wins_in_words
from tract_lite.judgement import Judgement, mean_above
from tract_lite.scale import ScoreScale

FIVE = ScoreScale.integers(1, 5)


def judged(shares: np.ndarray, scale: ScoreScale = FIVE) -> Judgement:
    return Judgement.from_probabilities("x", np.array([shares]), dict(zip(scale.labels, scale.values)))


def by_hand(ours: list[Judgement], theirs: list[Judgement], weights: list[float]) -> float:
    """The sum over all labels of all judgements."""
    found = 0.0
    for pairs in itertools.product(*(itertools.product(a.values, b.values) for a, b in zip(ours, theirs))):
        share = math.prod(
            a.probabilities[p] / a.mass * b.probabilities[q] / b.mass for a, b, (p, q) in zip(ours, theirs, pairs)
        )
        gap = sum(w * (a.values[p] - a.values[q]) for a, w, (p, q) in zip(ours, weights, pairs))
        found += share * (0.5 if abs(gap) < 1e-9 else gap > 0)
    return found


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [2 / 3, 1 / 3], [0.2, 0.3, 0.5], [0.37, 0.05, 0.58]])
def test_the_chance_of_a_higher_mean_is_that_of_all_labels_summed_by_hand(weights):
    random = np.random.default_rng(len(weights))
    scales = [FIVE, ScoreScale.parse("0-1:0.25"), ScoreScale.integers(1, 3)]
    ours, theirs = (
        [judged(random.dirichlet(np.ones(len(s.labels))) * 0.97, s) for s, _ in zip(scales, weights)] for _ in "ab"
    )
    assert mean_above(ours, theirs, weights) == pytest.approx(by_hand(ours, theirs, weights), abs=1e-4)
    assert mean_above(ours, theirs, weights) + mean_above(theirs, ours, weights) == pytest.approx(1)


@pytest.mark.parametrize("weights", [[1 / 6, 1 / 6, 4 / 6], *([1 / n] * n for n in range(2, 13))])
def test_a_sure_win_by_every_criterion_is_one_by_their_mean(weights):
    best, worst = judged(np.eye(5)[4]), judged(np.eye(5)[0])
    assert mean_above([best] * len(weights), [worst] * len(weights), weights) == pytest.approx(1)
    assert mean_above([worst] * len(weights), [best] * len(weights), weights) == pytest.approx(0)


def test_equal_answers_are_a_coin_toss_whatever_the_weights():
    ours = [judged(np.array([0.1, 0.2, 0.3, 0.3, 0.1]))] * 3
    assert mean_above(ours, ours, [0.21, 0.34, 0.45]) == pytest.approx(0.5)


@pytest.mark.parametrize("successes, count", [(0, 5), (3, 5), (5, 5), (61, 100), (499, 1000)])
def test_the_interval_of_a_share_is_that_of_scipy(successes, count):
    theirs = binomtest(successes, count).proportion_ci(method="wilson")
    assert share_of(successes, count) == pytest.approx((successes / count, theirs.low, theirs.high))
    assert all(map(math.isnan, share_of(0, 0)))


def test_the_interval_of_a_win_rate_holds_the_true_one_as_often_as_it_says():
    random = np.random.default_rng(0)
    drawn = random.choice([1.0, 0.5, 0.0], p=[0.5, 0.1, 0.4], size=(1000, 200)).sum(axis=1)
    inside = [low <= 0.55 <= high for _, low, high in (share_of(total, 200) for total in drawn)]
    assert 0.93 <= np.mean(inside) <= 0.985


ROWS = [
    {"a_above_b": 0.9, "winner": "a", "gold_preferred": "a"},
    {"a_above_b": "0.55", "winner": "tie", "gold_preferred": "b"},
    {"a_above_b": 0.46, "winner": "tie", "gold_preferred": "tie"},
    {"a_above_b": 0.2, "winner": "b", "gold_preferred": "a"},
    {"a_above_b": 0.1, "winner": "b", "gold_preferred": None},
    {"a_above_b": None, "winner": None, "gold_preferred": "a"},
]


def test_wins_and_ties_are_counted_over_the_rows_that_could_be_compared():
    rates = win_rates(ROWS)
    row = rates["a over b"]
    assert (row["rows"], row["won"], row["tied"], row["lost"]) == (5, 1, 2, 2)
    assert row["rate"][0] == 0.4 and row["chance"] == pytest.approx((0.9 + 0.55 + 0.46 + 0.2 + 0.1) / 5)


def test_a_tie_is_an_answer_of_its_own_and_counts_half_where_people_decided():
    found = agreement(ROWS)
    assert (found["all"][0], found["all"][1][0]) == (4, 0.5)
    assert (found["decided"][0], found["decided"][1][0]) == (3, 0.5)


def test_nothing_is_said_where_nothing_is_compared():
    assert wins_in_words([{"score": 1.0}]) == ""
    assert "the preferred one in 0.500" in wins_in_words(ROWS)
    assert "preferred" not in wins_in_words([{"a_above_b": 0.9, "winner": "a"}])
