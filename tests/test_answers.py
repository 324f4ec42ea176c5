"""Rows with several answers: which columns they are, and what people say of them."""

from __future__ import annotations

from typing import Any

import pytest

from tract_lite.data.answers import TIE
from tract_lite.data.records import records_from, table_from


def answers(row: dict[str, Any], **options: Any) -> dict[str, str]:
    [found] = table_from([row], gold_needed=False, **options).answers
    return {letter: record.response for letter, record in found.records.items()}


@pytest.mark.parametrize(
    "row, letters",
    [
        ({"question": "q", "response_a": "x", "response_b": "y"}, "ab"),
        ({"question": "q", "Response A": "x", "Response B": "y"}, "ab"),
        ({"question": "q", "responseA": "x", "responseB": "y"}, "ab"),
        ({"question": "q", "output_1": "x", "output_2": "y"}, "12"),
        ({"prompt": "q", "answer1": "x", "answer2": "y"}, "12"),
    ],
)
def test_answers_are_found_under_the_names_that_people_give_them(row, letters):
    table = table_from([row], gold_needed=False)
    assert answers(row) == dict(zip(letters, "xy"))
    assert {record.instruction for record in table.answers[0].records.values()} == {"q"}


def test_as_many_answers_as_there_are():
    assert answers({f"response_{letter}": letter for letter in "abcde"}) == {letter: letter for letter in "abcde"}


def test_conversations_are_answers_as_in_comparisons_of_chats():
    def talk(text):
        return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]

    row = {"question_id": 8, "model_a": "m", "model_b": "n", "winner": "model_b"}
    row |= {"conversation_a": talk("Ho"), "conversation_b": talk("He")}
    [found] = table_from([row], gold_needed=False).answers
    assert [(record.instruction, record.response) for record in found.records.values()] == [("Hi", "Ho"), ("Hi", "He")]
    assert found.preferred == "b"


def test_columns_of_any_name_are_answers_where_that_is_said(caplog):
    row = {"question": "q", "chosen": "x", "rejected": "y", "pick": "A", "note": "n"}
    columns = {"response_a": "chosen", "response_b": "rejected", "preferred": "pick"}
    [found] = table_from([row], gold_needed=False, columns=columns).answers
    assert found.preferred == "a" and found.records["b"].response == "y"
    assert "chosen as response, rejected as response, question as instruction, pick as preferred;" in caplog.text
    assert "not read: note; not there" in caplog.text


def test_a_response_beside_them_is_the_one_that_is_judged():
    row = {"question": "q", "response": "r", "response_1": "x", "response_2": "y"}
    assert table_from([row], gold_needed=False).answers == [None]
    assert records_from([row], gold_needed=False)[0].response == "r"


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"response_a": "x"}, "response_a has no other answer beside it"),
        ({"response_a": "x", "output_a": "y", "response_b": "z"}, "response_a or output_a may be one answer"),
    ],
)
def test_what_can_t_be_compared_is_refused_with_a_way_out(row, fault):
    with pytest.raises(ValueError, match=f"{fault}.*--columns"):
        table_from([row], gold_needed=False)


def test_training_takes_no_rows_of_several_answers():
    with pytest.raises(ValueError, match="did you mean --columns response=response_a"):
        records_from([{"question": "q", "response_a": "x", "response_b": "y", "score": 1}])


@pytest.mark.parametrize(
    "cell, preferred",
    [
        *[(cell, "a") for cell in ("a", "A", "response_a", "model_a", "[[A]]", "Response A")],
        *[(cell, "a") for cell in ("A>B", "[[A>>B]]", "b < a")],
        *[(cell, TIE) for cell in ("tie", "Tie (bothbad)", "draw", "same", "A=B")],
        *[(cell, None) for cell in ("", None, "c", "yes", 3, "A, not B", "a over b")],
    ],
)
def test_a_preference_is_a_letter_or_a_tie_in_many_words(cell, preferred, caplog):
    row = {"response_a": "x", "response_b": "y", "winner": cell}
    assert table_from([row], gold_needed=False).answers[0].preferred == preferred
    assert ("preferences that can't be read" in caplog.text) == (preferred is None and cell not in ("", None))


def test_numbers_name_numbered_answers():
    row = {"output_1": "x", "output_2": "y", "preferred": 2.0}
    assert table_from([row], gold_needed=False).answers[0].preferred == "2"
