"""The verdict says how far off a judge is, whether that is sure, and what to do next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tract_lite.metrics import evaluate
from tract_lite.report.rows import TRAINING_MEAN, measured_rows
from tract_lite.report.verdict import is_toy, verdict

SEED = "untrained seed model, CoT-RAIL"


def told(noise: float, count: int, *, seed_noise: float | None = None, **how: Any) -> tuple[str, dict[str, Any]]:
    """The verdict on a judge whose scores are off by some noise, and its row."""
    random = np.random.default_rng(3)
    golds = random.integers(1, 6, count).astype(float)
    scores: dict[str, Any] = {TRAINING_MEAN: [3.0] * count}
    if seed_noise is not None:
        scores[SEED] = (golds + random.normal(scale=seed_noise, size=count)).tolist()
    scores["judge"] = (golds + random.normal(scale=noise, size=count)).tolist()
    rows = measured_rows(scores, golds.tolist(), None, [name for name in scores if name != "judge"])
    return verdict(rows["judge"], rows, **{"ends": (1.0, 5.0), **how}), rows["judge"]


def test_a_judge_that_is_clearly_better_is_told_with_its_error_that_of_guessing_and_the_interval() -> None:
    text, row = told(0.5, 300, trained_on=540)
    low, high = row["better_by"][TRAINING_MEAN]["intervals"]["mae"]
    assert text.startswith(f"The judge is off by {row['mae']:#.3g} on average on a scale from 1 to 5 (always guessing")
    assert "Its 300 held-out items are enough to be sure that it is better than always guessing the" in text
    assert f"(by {low:.2g} to {high:.2g})" in text and 0 < low
    assert text.endswith("Next: train on more than these 540 items.")


@pytest.mark.parametrize(
    "how, step",
    [
        ({"trained_on": 5000, "improving": True}, "train for longer (--epochs): its last step was its best"),
        ({"trained_on": 5000}, "train a larger seed model (--seed-model)"),
    ],
)
def test_with_many_training_items_the_next_step_is_longer_training_or_a_larger_model(how: Any, step: str) -> None:
    assert told(0.5, 300, **how)[0].endswith(f"Next: {step}.")


def test_where_chance_may_explain_it_the_verdict_says_so_and_how_many_items_would_tell() -> None:
    text, row = told(1.25, 60, trained_on=2000)
    gained = row["better_by"][TRAINING_MEAN]
    low, high = gained["intervals"]["mae"]
    assert low < 0 < high and gained["mae"] > 0
    assert "Its 60 held-out items do not show that it is better than always guessing the training mean" in text
    assert "enough to be sure" not in text and "With fewer than 100 items these figures are rough." in text
    needed = int(text.partition("(about ")[2].partition(" would tell")[0].replace(",", ""))
    assert needed > 60
    # That many items of the same kind are enough, four times in five.
    assert told(1.25, 3 * needed)[1]["better_by"][TRAINING_MEAN]["intervals"]["mae"][0] > 0


def test_a_judge_worse_than_guessing_is_told_so() -> None:
    text, _ = told(4.0, 200, trained_on=2000)
    assert "It is worse than always guessing the training mean (by " in text
    assert "enough to be sure that it is better" not in text
    assert "Next: check that the gold scores are what the criteria ask for, or train" in text


def test_few_items_are_called_rough_even_where_the_judge_is_surely_better() -> None:
    assert "With fewer than 100 items these figures are rough." in told(0.2, 40)[0]
    assert "rough" not in told(0.2, 100)[0]


def test_a_toy_is_called_one_whatever_its_figures() -> None:
    text, _ = told(0.2, 300, toy=True, trained_on=600)
    assert "It is a toy: its seed model was made for this run" in text and "Next" not in text


def test_being_better_than_guessing_hides_nothing_of_the_untrained_seed_model() -> None:
    text, row = told(0.8, 150, seed_noise=0.8)
    low, high = row["better_by"][SEED]["intervals"]["mae"]
    assert low < 0 < high
    assert "sure that it is better than always guessing the training mean" in text
    assert "But they do not show that it is better than “untrained seed model” (by -" in text
    both, _ = told(0.3, 150, seed_noise=2.0)
    assert "better than always guessing the training mean (by" in both and "and “untrained seed model” (by" in both


def test_a_comparison_on_fewer_items_says_on_how_many() -> None:
    golds = [1.0 + n % 5 for n in range(300)]
    scores: dict[str, Any] = {TRAINING_MEAN: [3.0] * 300, SEED: [3.5] * 40, "judge": [gold + 0.1 for gold in golds]}
    rows = measured_rows(scores, golds, None, [TRAINING_MEAN, SEED])
    text = verdict(rows["judge"], rows, ends=(1.0, 5.0))
    assert "Its 300 held-out items are enough" in text
    assert text.count("on 40 of them)") == 1 and "“untrained seed model” (by" in text


def test_a_judge_that_judged_nothing_and_gold_scores_off_the_scale_have_no_error() -> None:
    nothing = evaluate([None, None], [1, 2])
    assert "could judge none of the held-out items" in verdict(nothing, {})
    off = evaluate([1.0, 2.0], [10, 20], (1, 5))
    assert verdict(off, {}).startswith("2 gold scores are outside the judge's scale, so that")
    assert "outside the judge's scale (1 to 5), so that" in verdict(off, {}, ends=(1, 5))


def test_errors_on_several_scales_are_shares_of_them() -> None:
    ends: list[Any] = [(0.0, 1.0), (0.0, 10.0)] * 40
    golds = [0.0, 10.0] * 40
    rows = measured_rows({TRAINING_MEAN: [0.5, 5.0] * 40, "judge": [0.1, 9.0] * 40}, golds, ends, [TRAINING_MEAN])
    first, _ = verdict(rows["judge"], rows).split(". Its 80 ")
    assert first == (
        "The judge is off by 0.100 on average, as a share of the scale of each item "
        "(always guessing the training mean: 0.500)"
    )


def test_one_item_has_no_interval_and_proves_nothing() -> None:
    text, _ = told(0.1, 1)
    assert "do not show that it is better than always guessing the training mean." in text and "nan" not in text


def test_the_settings_tell_whether_a_judge_is_a_toy() -> None:
    assert is_toy({"seed_model": None}) and is_toy({"seed_model": "toy"})
    assert not is_toy({"seed_model": "someone/Model"}) and not is_toy({})
