"""Gold scores as people write them."""

import datetime
import math
from decimal import Decimal

import pytest

from tract_lite.data.scores import parse_score
from tract_lite.scale import ScoreScale

ONE_TO_FIVE = ScoreScale.integers(1, 5)
GRADES = ScoreScale.parse("poor=0,fair=0.5,good=1")


@pytest.mark.parametrize(
    "cell, score",
    [
        (2, 2.0),
        (2.5, 2.5),
        ("2", 2.0),
        (" 2.5 ", 2.5),
        ("2e0", 2.0),
        ("2,5", 2.5),
        (",5", 0.5),
        ("0,125", 0.125),
        ("\u22121", -1.0),
        ("+3", 3.0),
        ("3/5", 3.0),
        ("3,5 / 5", 3.5),
        ("3 out of 5", 3.0),
        ("3 of 5", 3.0),
        ("3 - Agree", 3.0),
        ("3 (rather)", 3.0),
        ("3 stars", 3.0),
        ("3 out of 5 stars", 3.0),
        (Decimal("2.5"), 2.5),
    ],
)
def test_a_number_is_read_in_every_spelling(cell, score):
    assert parse_score(cell) == parse_score(cell, ONE_TO_FIVE) == score


@pytest.mark.parametrize(
    "cell",
    [None, math.nan, "", "  ", "N/A", "n/a", "NA", "n.a.", "#N/A", "NaN", "None", "null", "-", "--", "\u2014", "?"],
)
def test_a_blank_and_what_says_that_there_is_none_is_no_score(cell):
    assert parse_score(cell) is None


@pytest.mark.parametrize("cell", [True, False, math.inf, "-inf", "infinity", [4], {"value": 4}, 10**400, "1e400"])
def test_what_is_no_finite_number_is_refused(cell):
    with pytest.raises(ValueError, match="score must be a finite number, got"):
        parse_score(cell)


@pytest.mark.parametrize("cell", ["Great", "four", "\u00dcbel", "05-Apr", "met"])
def test_a_word_is_refused_with_the_way_to_give_it_a_value(cell):
    with pytest.raises(ValueError, match='got .*where they are labels, as with --scale "bad=1,good=2"'):
        parse_score(cell, ONE_TO_FIVE)


def test_a_date_that_a_spreadsheet_has_made_is_told_to_be_a_text():
    with pytest.raises(ValueError, match="score is a date, which a spreadsheet made of it: format its column as text"):
        parse_score(datetime.datetime(2026, 5, 4))


@pytest.mark.parametrize("cell", ["\u2605\u2605\u2605", "12.04.2026", "1-2", "4/", "/5"])
def test_what_may_be_anything_is_refused(cell):
    with pytest.raises(ValueError, match="finite number"):
        parse_score(cell, ONE_TO_FIVE)


@pytest.mark.parametrize("cell", ["1,000", "12,345"])
def test_what_may_be_thousands_or_a_fraction_is_refused(cell):
    with pytest.raises(ValueError, match="may be a fraction or thousands"):
        parse_score(cell)


@pytest.mark.parametrize("cell, end", [("3/10", "10"), ("80 %", "100"), ("80%", "100")])
def test_a_fraction_of_another_scale_is_refused(cell, end):
    with pytest.raises(ValueError, match=f"is out of {end}, and the scale ends with 5"):
        parse_score(cell, ONE_TO_FIVE)
    assert parse_score(cell, ScoreScale.integers(0, int(end))) == float(cell.rstrip("% ").split("/")[0])


@pytest.mark.parametrize("cell, value", [("good", 1.0), ("Good ", 1.0), ("FAIR", 0.5), ("0.5", 0.5), (0, 0.0)])
def test_labels_of_the_scale_are_their_values(cell, value):
    assert parse_score(cell, GRADES) == value
