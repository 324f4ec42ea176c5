import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tract_lite import Record
from tract_lite.judgement import Judgement

VALUES = {"1": 1.0, "2": 2.0, "3": 3.0}


def make(*probabilities: float, scores=(2.5,), values=VALUES, **fields) -> Judgement:
    p = dict(zip(values, probabilities))
    return Judgement(
        **{
            "id": "a",
            "score": float(np.mean(scores)),
            "probabilities": p,
            "mass": sum(probabilities),
            "feedback": ["It is short."] * len(scores),
            "scores": list(scores),
            "std": 0.75,
            "mode": 3.0,
            "values": values,
            **fields,
        }
    )


def test_the_spread_is_the_standard_deviation_between_reasonings():
    assert make(0.2, 0.3, 0.5, scores=(1.0, 2.0, 4.5)).spread == pytest.approx(np.std([1.0, 2.0, 4.5], ddof=1))
    assert math.isnan(make(0.2, 0.3, 0.5).spread)
    assert math.isnan(Judgement("a", error="no").spread)


def test_a_row_has_the_spread_and_none_for_what_is_not_known():
    row = json.loads(json.dumps(make(0.2, 0.3, 0.5, scores=(1.0, 2.0)).to_row(), allow_nan=False))
    assert row["spread"] == pytest.approx(math.sqrt(0.5)) and row["values"] == VALUES
    row = json.loads(json.dumps(Judgement("a", error="no").to_row(), allow_nan=False))
    assert row["spread"] is row["score"] is None and row["error"] == "no"


@pytest.mark.parametrize(
    "judgement", [make(0.2, 0.3, 0.5, scores=(1.0, 2.0)), make(0.2, 0.3, 0.5, feedback=[]), Judgement(None, error="no")]
)
def test_a_row_becomes_the_judgement_again(judgement):
    row = json.loads(json.dumps(judgement.to_row() | {"gold": 3.0, "key": "k"}))
    again = Judgement.from_row(row)
    assert repr(again) == repr(judgement)


def test_the_probability_of_a_higher_score_counts_ties_half():
    low, high = make(0.5, 0.3, 0.2), make(0.1, 0.2, 0.7)
    higher = 0.2 * 0.5 + 0.7 * (0.5 + 0.3)
    ties = 0.1 * 0.5 + 0.2 * 0.3 + 0.7 * 0.2
    assert high.probability_above(low) == pytest.approx(higher + ties / 2)
    assert make(1, 0, 0).probability_above(make(0, 0, 1)) == 0
    assert make(0, 0, 1).probability_above(make(0, 1, 0)) == 1


weights = st.lists(st.floats(1e-6, 1), min_size=3, max_size=3)


@given(weights, weights)
def test_the_two_probabilities_of_a_pair_sum_to_one_and_a_twin_is_even(one, other):
    a, b = make(*one), make(*other)
    assert a.probability_above(b) + b.probability_above(a) == pytest.approx(1)
    assert a.probability_above(a) == pytest.approx(0.5)
    p, q = np.array(one) / sum(one), np.array(other) / sum(other)
    pairs = product(range(3), repeat=2)
    expected = sum(p[i] * q[j] * ((i > j) + 0.5 * (i == j)) for i, j in pairs)
    assert a.probability_above(b) == pytest.approx(expected)


def test_labels_are_compared_by_their_values_and_not_by_their_text():
    values = {"poor": 0.0, "good": 1.0, "fair": 0.5}
    fair, good = make(0, 0, 1, values=values), make(0, 1, 0, values=values)
    assert good.probability_above(fair) == 1 and fair.probability_above(good) == 0


@pytest.mark.parametrize(
    "other, words",
    [
        (Judgement("b", error="too long"), "item 'b' has no score to compare: too long"),
        (make(0, 0, 0), "no probability"),
        (make(0.5, 0.5, 0, values={"1": 1.0, "2": 2.0, "4": 4.0}), "different scales"),
    ],
)
def test_judgements_that_can_t_be_compared_are_refused(other, words):
    for a, b in ((make(0.2, 0.3, 0.5), other), (other, make(0.2, 0.3, 0.5))):
        with pytest.raises(ValueError, match=words):
            a.probability_above(b)


def bars(text: str) -> dict[str, int]:
    """The length of the bar of each line that has one, in eighths."""
    lines = [line.split() for line in text.splitlines() if line.startswith("  ")]
    eighths = {block: n for n, block in enumerate(" ▏▎▍▌▋▊▉█")}
    return {line[0]: sum(map(eighths.get, line[2])) for line in lines if line[-1][0] in eighths}


def test_an_explanation_shows_the_reasoning_a_bar_for_each_label_and_the_figures():
    text = make(0.1, 0.25, 0.6).explain(width=80)
    assert "Reasoning\n  It is short.\n" in text
    assert "  1 0.100 " in text and "  3 0.600 " in text
    lengths = bars(text)
    assert lengths["2"] / lengths["1"] == pytest.approx(2.5, rel=0.05)
    assert lengths["3"] / lengths["1"] == pytest.approx(6, rel=0.05)
    assert text.endswith("score 2.50   std 0.75   mass 0.95   most likely 3")
    assert "!" not in text


def test_an_explanation_with_the_record_shows_what_was_judged():
    record = Record("Bake a loaf.", "Use flour.\n\nThen " + "wait " * 500, score=4, id="a")
    text = make(0.1, 0.25, 0.6).explain(record, 60)
    assert text.startswith("Item a\n\nInstruction\n  Bake a loaf.\n\nResponse\n  Use flour.\n\n  Then")
    assert "… (2,517 characters)" in text and text.endswith("gold 4")
    assert "Prompt\n  Ask it so." in make(1, 0, 0).explain(Record(prompt="Ask it so."), 60)


def test_that_a_score_was_read_without_a_reasoning_is_said():
    assert "Reasoning\n  (none: " in make(0.1, 0.25, 0.6, feedback=[]).explain(width=80)
    assert "Reasoning" not in Judgement("a", error="no").explain(width=80)


def test_several_reasonings_stand_with_their_scores():
    judgement = make(0.1, 0.4, 0.5, scores=(2.0, 3.0), feedback=["First.", ""])
    text = judgement.explain(width=80)
    assert "Reasoning 1 of 2, score 2.00\n  First.\n" in text
    assert "Reasoning 2 of 2, score 3.00\n  (empty)\n" in text and "spread 0.71" in text


def test_labels_that_are_words_show_their_values():
    values = {"poor": 0.0, "fair": 0.5, "very good": 1.0}
    lines = make(0.1, 0.4, 0.5, values=values, mode=1.0).explain(width=60).splitlines()
    assert [line.partition(" 0.")[0] for line in lines if "█" in line] == [
        "       poor (0)",
        "     fair (0.5)",
        "  very good (1)",
    ]


@pytest.mark.parametrize("width", [1, 32, 50, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    judgement = make(
        1e-9, 0.0, 0.8, scores=(2.0, 3.0), feedback=["word " * 60, "x" * 300], truncated=True, error_bound=0.01
    )
    record = Record("Why? " * 40, "tab\tand\n" * 30, score=2.5, id="a")
    assert max(map(len, judgement.explain(record, width).splitlines())) <= max(width, 32)


def test_the_width_is_that_of_the_terminal(monkeypatch):
    for columns, widest in ((40, 40), (1000, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = make(0.1, 0.2, 0.7, feedback=["word " * 99]).explain().splitlines()
        assert widest - 8 < max(map(len, lines)) <= widest


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"truncated": True}, "! the length limit stopped a reasoning"),
        ({"mass": 0.89}, "! only 0.89 of the probability lies on the labels"),
        (
            {"missing_mass": 0.02, "error_bound": 0.08},
            "! read from the top log-probabilities, which miss 0.02 of the probability: the score may be off by 0.08",
        ),
    ],
)
def test_what_the_reader_must_know_is_a_warning(fields, words):
    plain = make(0.2, 0.3, 0.5)
    assert "!" not in plain.explain(width=100)
    assert words in " ".join(replace(plain, **fields).explain(width=100).split())


def test_a_failed_item_is_explained_by_its_error():
    text = Judgement("a", error="the prompt does not fit").explain()
    assert text == "Item a\n\n! not judged: the prompt does not fit"


def test_text_can_t_steer_the_terminal():
    nasty = "\x1b[31mred\x07 \u202eturned\u202c \ud83d \x9b2J"
    judgement = make(0.2, 0.3, 0.5, id=nasty, feedback=[nasty], error=nasty)
    text = judgement.explain(Record(nasty, nasty), 80)
    assert not set(nasty) & set(text) - set("red turned[31m2J ")
    assert text.encode("utf-8").count("\ufffd".encode()) >= 20
    assert "e\u0301 👩\u200d🚀 می\u200cخواهم" in make(1, 0, 0, feedback=["e\u0301 👩\u200d🚀 می\u200cخواهم"]).explain(
        width=80
    )


# How far off it may be


def test_the_doubt_of_a_whole_judgement_is_its_deviation_and_what_is_missing_adds_to_it():
    values = {"1": 1.0, "3": 3.0, "5": 5.0}
    sure = Judgement.from_probabilities("a", np.array([[0.0, 1.0, 0.0]]), values)
    split = Judgement.from_probabilities("b", np.array([[0.5, 0.0, 0.5]]), values)
    assert sure.doubt == 0 and split.doubt == pytest.approx(2) == pytest.approx(split.std)
    low = Judgement.from_probabilities("c", np.array([[0.0, 0.2, 0.0]]), values)
    # 0.8 of the mass is missing: 0.8 / 3 more on each label.
    assert low.std == 0 and low.doubt == pytest.approx(math.sqrt(2 * 0.8 / 3 * 4))
    cut = replace(sure, truncated=True)
    assert cut.doubt == pytest.approx(math.sqrt(8 / 3))
    failed = Judgement("d", error="too long", values=values)
    assert failed.doubt == 4 and math.isnan(Judgement("e", error="too long").doubt)
    ranked = sorted([failed, cut, low, sure], key=lambda judgement: judgement.doubt)
    assert [judgement.id for judgement in ranked] == ["a", "c", "a", "d"]


def test_the_normalised_score_is_that_of_the_labels_alone():
    values = {"1": 1.0, "5": 5.0}
    judgement = Judgement.from_probabilities("a", np.array([[0.0, 0.2]]), values)
    assert judgement.score == pytest.approx(1) and judgement.normalised_score == pytest.approx(5)
    assert "normalised to them it is 5.00" in judgement.explain()
    assert math.isnan(Judgement.from_probabilities("b", np.array([[0.0, 0.0]]), values).normalised_score)
    assert judgement.to_row()["normalised_score"] == judgement.normalised_score
    assert Judgement.from_row(judgement.to_row()) == judgement


def test_only_what_was_asked_is_shown():
    record = Record("an instruction", "a response", prompt="a prompt")
    told = Judgement("a", 1.0).explain(record)
    assert "a prompt" in told and "instruction" not in told and "response" not in told
    assert "(empty)" in Judgement("a", 1.0).explain(Record("an instruction", ""))
