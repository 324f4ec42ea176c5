"""Rubrics in the shapes that people publish."""

import json

import pytest

from tract_lite.data.criteria import named_criteria, read_criteria, read_rubric
from tract_lite.data.records import read_records, records_from
from tract_lite.data.rubrics import described_label, parse_rubric
from tract_lite.record import Rubric

WHOLE = Rubric("Is it true?", {"1": "no", "5": "yes"})
OBJECTS = [
    {"criteria": "Is it true?", "score1_description": "no", "score5_description": "yes"},
    {"criteria": "Is it true?", "descriptions": {"1": "no", "5": "yes"}},
    {"Criterion": "Is it true?", "levels": {"1": "no", "3": None, "5": "yes"}},
    {"criteria": "Is it true?", "1": "no", "5": "yes"},
    {"description": "Is it true?", "Score 1": "no", "score_5": "yes"},
    {"criteria": "Is it true?", "description_1": "no", "Description 5": "yes"},
    {"criteria": "Is it true?", "levels": [{"score": 1, "description": "no"}, {"score": 5, "description": "yes"}]},
    {"criteria": "Is it true?", "scores": [{"label": "1.0", "text": "no"}, {"label": 5.0, "text": "yes"}]},
    {"criteria": "Is it true?", "score_descriptions": {"score1_description": "no", "5.0": "yes"}},
]


@pytest.mark.parametrize("given", OBJECTS)
def test_every_shape_of_an_object_is_the_same_rubric_as_an_object_as_json_and_as_python_prints_it(given):
    for cell in (given, json.dumps(given), f"  {json.dumps(given, indent=2)}\n", repr(given)):
        assert parse_rubric(cell) == (WHOLE, [])
    [record] = records_from([{"response": "r", "rubric": repr(given)}])
    assert record.rubric == WHOLE


@pytest.mark.parametrize(
    "row",
    [
        {"criteria": "Is it true?", "Score1 Description": "no", "SCORE5_DESCRIPTION": "yes"},
        {"rubric": "Is it true?", "score_1_description": "no", "score 5 description": "yes"},
        {"rubric.criteria": "Is it true?", "rubric.descriptions.1": "no", "rubric.descriptions.5": "yes"},
        {"rubric.criteria": "Is it true?", "rubric.score1_description": "no", "rubric.score5_description": "yes"},
        {"criteria": json.dumps(OBJECTS[0])},
        {"score_rubric.criteria": "Is it true?", "score_rubric.score1_description": "no", "score_rubric.5": "yes"},
        {"rubric": {"evaluation_criteria": "Is it true?", "1": "no", "5": "yes"}},
        {"rubric": {"descriptions": {"1": "no"}}, "criteria": "Is it true?", "description_5": "yes"},
    ],
)
def test_columns_of_levels_are_read_whatever_their_case_and_blanks(row):
    [record] = records_from([row | {"response": "r"}])
    assert record.rubric == WHOLE


def test_a_list_of_levels_is_a_rubric_without_criteria():
    levels = [{"value": "Met", "meaning": "It is there."}, {"value": "Not met", "meaning": "It is not."}]
    assert parse_rubric(levels) == (Rubric("", {"Met": "It is there.", "Not met": "It is not."}), [])


@pytest.mark.parametrize(
    "text", ["[Clarity] Is it clear?", "{instruction} is followed.", "1: no, 5: yes", "Is it {x}?"]
)
def test_prose_that_begins_like_an_object_is_prose(text):
    assert parse_rubric(text) == (Rubric(text), [])


@pytest.mark.parametrize(
    "blank", [None, "", "  ", {}, [], "{}", {"criteria": " "}, {"descriptions": None}, float("nan")]
)
def test_a_blank_rubric_is_none(blank):
    assert parse_rubric(blank) == (None, [])


@pytest.mark.parametrize(
    "cell, fault",
    [
        ('{"criteria": "Is it', "looks like an object and can't be read as JSON"),
        ("{'criteria': open('x')}", "looks like an object and can't be read as JSON"),
        ({"criteria": ["a", "b"]}, "criteria must be text"),
        ({"criteria": "c", "descriptions": ["no", "yes"]}, "descriptions must map labels to texts"),
        ({"criteria": "c", "levels": [{"score": 1}]}, "levels: a level needs a description"),
        ({"criteria": "c", "1": ["no"]}, "the description of 1 must be text"),
        ({"criteria": "c", "1": "no", "score1_description": "nope"}, "describes 1 twice"),
        (
            {"criteria": "c", "levels": [{"score": 1, "text": "a"}, {"score": 1, "text": "b"}]},
            "describes a label twice",
        ),
        ([{"criteria": "Factual", "points": 5}], "a level needs a score"),
        ({"poor": "no", "good": "yes"}, "neither criteria nor descriptions; its keys: poor, good"),
        ({"criteria": "c", "scores": {"min": 1, "max": 5}}, "scores must map labels to texts"),
        (True, "rubric must be text"),
    ],
)
def test_what_can_not_be_read_is_refused(cell, fault):
    with pytest.raises(ValueError, match=fault):
        parse_rubric(cell)


def test_unknown_keys_are_named_once_for_the_file(caplog):
    rubric = {"criteria": "c", "weight": 3, "Remarks": "none", "empty": None}
    assert parse_rubric(rubric) == (Rubric("c"), ["weight", "Remarks"])
    records_from([{"response": "r", "instruction": "i", "score": 1, "rubric": rubric}] * 3)
    assert caplog.text.count("not read: rubric.weight, rubric.Remarks") == 1


@pytest.mark.parametrize(
    "row",
    [
        {"score_1_description": "a", "score1_description": "b"},
        {"criteria": {"1": "a"}, "rubric": {"1": "b"}},
        {"rubric": {"criteria": "c", "1": "a"}, "description_1": "b"},
    ],
)
def test_two_texts_for_one_label_are_refused(row):
    with pytest.raises(ValueError, match="the rubric describes 1 twice"):
        records_from([row | {"response": "r"}])


def test_a_range_is_no_label():
    given = {"criteria": "c", "1-2": "a", "3": "m", "4 - Good": "b"}
    assert parse_rubric(given) == (Rubric("c", {"3": "m", "4": "b"}), ["1-2"])


def test_the_surest_key_holds_the_criteria_and_the_others_are_named():
    assert parse_rubric({"description": "About.", "criteria": "Is it?"}) == (Rubric("Is it?"), ["description"])
    levels = [{"score": 1, "description": "no", "example": "x"}]
    assert parse_rubric({"criteria": "c", "levels": levels}) == (Rubric("c", {"1": "no"}), ["levels.example"])
    assert parse_rubric({"rubric": {"criteria": "c", "1 - Poor": "no"}}) == (Rubric("c", {"1": "no"}), [])


def test_a_column_that_describes_a_word_is_said(caplog):
    records_from([{"response": "r", "instruction": "i", "criteria": "c", "score": 1, "description_en": "text"}])
    assert "description_en as the description of en" in caplog.text


def test_labels_keep_their_case_and_lose_a_decimal_of_zero():
    assert described_label("description_Not met") == "Not met"
    assert described_label("score1.0_description") == "1"
    assert described_label("score_1") is None and described_label("score_1", inside=True) == "1"
    assert described_label("description") is None


# One rubric for a whole file


def test_a_rubric_file_is_an_object_or_a_text(tmp_path):
    (tmp_path / "rubric.json").write_text(json.dumps(OBJECTS[3]), encoding="utf-8")
    (tmp_path / "rubric.txt").write_text("\ufeffIst es wahr? \u00dcberall?\n", encoding="utf-8")
    assert read_rubric(tmp_path / "rubric.json") == WHOLE
    assert read_rubric(tmp_path / "rubric.txt").criteria.strip() == "Ist es wahr? \u00dcberall?"


@pytest.mark.parametrize(
    "content, fault",
    [
        (b'{"criteria": "c", "weight": 2}', "keys that no rubric has: weight"),
        (b" \n", "holds no rubric"),
        (b'{"criteria": ', "can't be read as JSON"),
        (b"\xff\xfe\xfa", "is not a text in UTF-8"),
    ],
)
def test_a_rubric_file_that_holds_something_else_is_refused(tmp_path, content, fault):
    (tmp_path / "rubric.json").write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_rubric(tmp_path / "rubric.json")


def test_the_rubric_of_a_file_takes_the_place_of_its_rows_which_is_said(tmp_path, caplog):
    (tmp_path / "data.csv").write_text("response,criteria,description_1\nr,own,none\ns,,\n")
    records = read_records(tmp_path / "data.csv", rubric=WHOLE)
    assert [record.rubric for record in records] == [WHOLE, WHOLE]
    assert "not read: criteria, description_1" in caplog.text


# Several criteria in one file


NAMED = [
    {"criteria": {"clear": "Is it clear?", "true": {"criteria": "Is it true?", "1": "no", "5": "yes", "weight": 2}}},
    {
        "clear": "Is it clear?",
        "true": {"criteria": "Is it true?", "descriptions": {"1": "no", "5": "yes"}, "weight": 2},
    },
    [{"name": "clear", "description": "Is it clear?"}, {"name": "true", **OBJECTS[1], "Weight": 2.0}],
    {"rubric": [{"name": " clear ", "criteria": "Is it clear?"}, {"name": "true", **OBJECTS[6], "weight": 2}]},
]


@pytest.mark.parametrize("content", NAMED)
def test_named_criteria_are_read_in_every_shape(content, tmp_path):
    (tmp_path / "criteria.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_criteria(tmp_path / "criteria.json") == [
        ("clear", Rubric("Is it clear?"), 1, None),
        ("true", WHOLE, 2, None),
    ]


@pytest.mark.parametrize("content", [*OBJECTS, "Is it true?", [{"score": 1, "name": "bad", "text": "no"}], {"a": "b"}])
def test_a_single_rubric_is_no_list_of_criteria(content):
    assert named_criteria(content, "the file") == []


def test_a_criterion_may_have_its_own_scale():
    found = named_criteria([{"name": "n", "criteria": "c", "scale": "0-10"}], "the file")
    assert found[0].scale.labels[-1] == "10"


@pytest.mark.parametrize(
    "text, fault",
    [
        ('[{"name": "a", "criteria": "x"}, {"name": "A", "criteria": "y"}]', "two criteria named 'a'"),
        ('{"criteria": {"a": "x", "a": "y"}}', "has 'a' twice"),
        ('[{"name": "a", "criteria": "x", "weight": -1}]', "the weight of 'a' is -1"),
        ('[{"name": "a", "criteria": "x", "weight": "much"}]', "the weight of 'a' is 'much'"),
        ('[{"name": "a", "criteria": "x", "weight": NaN}]', "the weight of 'a' is nan"),
        ('[{"name": "a", "criteria": "x", "weight": 0}]', "all weights are 0"),
        ('[{"name": "a", "criteria": "x"}, {"criteria": "y"}]', "criterion 2 has no name"),
        ('[{"name": "a", "criteria": " "}]', "the criterion 'a' is empty"),
        ('[{"name": "a", "criteria": "x", "weigth": 2}]', "'a' has keys that no rubric has: weigth"),
        ('{"criteria": {"a": "x", "b": "y"}, "weights": {"a": 1}}', "keys beside its criteria: weights"),
    ],
)
def test_criteria_that_can_not_be_read_are_two_lines_at_most(text, fault, tmp_path):
    (tmp_path / "criteria.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=fault) as caught:
        read_criteria(tmp_path / "criteria.json")
    assert len(str(caught.value).splitlines()) <= 2


def test_where_one_rubric_is_needed_several_are_refused_and_yaml_is_everywhere(tmp_path):
    (tmp_path / "criteria.json").write_text(json.dumps(NAMED[0]), encoding="utf-8")
    with pytest.raises(ValueError, match="has named criteria \\(clear, true\\)"):
        read_rubric(tmp_path / "criteria.json")
    (tmp_path / "criteria.yaml").write_text("criteria: Is it true?", encoding="utf-8")
    with pytest.raises(ValueError, match="a rubric is read as JSON or as plain text"):
        read_criteria(tmp_path / "criteria.yaml")
