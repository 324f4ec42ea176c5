"""Which column is read as what, and what is said of it."""

import logging

import pytest

from tract_lite.data.columns import parse_columns
from tract_lite.data.names import ALIASES
from tract_lite.data.records import BadRows, records_from
from tract_lite.record import Record, Rubric

ROW = {"instruction": "i", "response": "r", "criteria": "c", "score": 3}


def said(caplog) -> list[str]:
    """What was logged of the columns."""
    return [record.getMessage() for record in caplog.records if "read:" in record.getMessage()]


# Names


@pytest.mark.parametrize(
    "name, field",
    [
        ("question", "instruction"),
        ("User_Input", "instruction"),
        ("userInput", "instruction"),
        ("inputs.question", "instruction"),
        ("Answer", "response"),
        (" Model output ", "response"),
        ("actual-output", "response"),
        ("response.value", "response"),
        ("data/response", "response"),
        ("RESPONSE", "response"),
        ("Expected Output", "reference"),
        ("reference_outputs.answer", "reference"),
        ("Rating (1-5)", "score"),
        ("Score [0-100]", "score"),
        ("human_score", "score"),
        ("annotations.rating", "score"),
        ("Rationale", "feedback"),
        ("Evaluation Criteria", "criteria"),
        ("item_id", "id"),
    ],
)
def test_near_names_and_aliases_are_understood_and_said_once(name, field, caplog):
    row = {name: "4" if field == "score" else "text"} | ({} if field == "response" else {"response": "r"})
    records = records_from([row] * 3)
    value = getattr(records[0], field) if field != "criteria" else records[0].rubric.criteria
    assert value == (4.0 if field == "score" else "text")
    [line] = said(caplog)
    assert f"{name} as {field}" in line and caplog.records[0].levelno == logging.WARNING


def test_every_alias_stands_for_one_field():
    names = [alias for aliases in ALIASES.values() for alias in aliases.split()]
    assert len(names) == len(set(names)) and ALIASES.keys() <= set(names)


@pytest.mark.parametrize(
    "name",
    ["score.confidence", "response.model", "user.id", "meta.label", "Score (ms)", "1", "text", "responses", "task"],
)
def test_a_name_that_says_something_else_is_named_and_not_read(name, caplog):
    [record] = records_from([ROW | {name: "9"}])
    assert record == Record("i", "r", Rubric("c"), score=3.0, id="0")
    assert f"not read: {name}" in said(caplog)[0]


def test_a_column_of_its_own_name_goes_before_an_alias_which_is_named(caplog):
    [record] = records_from([ROW | {"Response": "x", "answer": "y", "rating": 1}])
    assert (record.response, record.score) == ("r", 3)
    assert "not read: Response, answer, rating" in said(caplog)[0]


@pytest.mark.parametrize(
    "row, choice",
    [
        ({"score": 0.9, "human_score": 4}, "score or human_score may be the score"),
        ({"response": None, "output": "o"}, "response is blank and output is not"),
        ({"response": "r", "instruction": " ", "question": "q"}, "instruction is blank and question is not"),
    ],
)
def test_a_choice_that_could_be_wrong_is_left_to_the_user(row, choice):
    with pytest.raises(BadRows, match=f"{choice}: --columns"):
        records_from([{"instruction": "i", "response": "r"} | row])


def test_of_two_aliases_the_filled_one_is_read():
    rows = [{"question": "a", "answer": "x", "output": None}, {"question": "b", "answer": None, "output": "y"}]
    assert [record.response for record in records_from(rows)] == ["x", "y"]


def test_pairs_of_responses_are_refused():
    row = {"orig_instruction": "i", "orig_response_A": "a", "orig_response_B": "b", "output": "A is better."}
    with pytest.raises(BadRows, match="neither a prompt nor a response"):
        records_from([row])


def test_what_exports_nest_is_read_and_named(caplog):
    row = {
        "inputs": {"question": "q"},
        "outputs": {"answer": "a", "tokens": 7},
        "score_rubric": {"criteria": "c", "1": "no"},
    }
    assert records_from([row]) == [Record("q", "a", Rubric("c", {"1": "no"}), id="0")]
    assert "inputs.question as instruction, outputs.answer as response" in said(caplog)[0]
    assert "not read: outputs.tokens" in said(caplog)[0]


def test_a_choice_can_be_pasted_into_a_shell():
    with pytest.raises(BadRows, match=r"--columns 'score=Score \(1-5\)' chooses one"):
        records_from([{"response": "r", "Score (1-5)": 4, "Score [0-9]": 8}])


def test_of_many_names_the_first_are_shown():
    with pytest.raises(BadRows) as caught:
        records_from([{f"column {number}": 1 for number in range(200)}])
    assert "column 14, 185 more; wanted" in str(caught.value) and len(str(caught.value)) < 600


def test_two_columns_that_may_be_one_field_are_refused_once_with_the_choice():
    rows = [{"answer": "a", "output": "b", "question": "q"}] * 30
    with pytest.raises(BadRows, match="row 1 and 29 more: answer or output may be the response") as caught:
        records_from(rows)
    assert len(str(caught.value).splitlines()) == 2 and "--columns response=answer" in str(caught.value)
    assert records_from(rows, columns={"response": "output"})[0].response == "b"


def test_blank_columns_are_no_text_that_is_left_out(caplog):
    with caplog.at_level(logging.INFO):
        records_from([ROW | {"Notes": " ", "tags": [], "other": None}])
    assert said(caplog) == ["the rows given: read: instruction, response, criteria, score"]
    assert caplog.records[0].levelno == logging.INFO


def test_what_is_absent_is_said(caplog):
    with caplog.at_level(logging.INFO):
        records_from([{"response": "r", "criteria": "c"}])
    assert said(caplog) == ["the rows given: read: response, criteria; not there: instruction, score"]


def test_a_close_name_is_asked_about(caplog):
    records_from([{"instruction": "i", "response": "r", "refrence": "best", "scroe": 3}])
    assert "refrence (did you mean reference?), scroe (did you mean score?)" in said(caplog)[0]
    with pytest.raises(BadRows, match=r"did you mean --columns response=respones\?"):
        records_from([{"instruction": "i", "respones": "r"}])


def test_without_a_response_the_wanted_columns_are_named_once():
    with pytest.raises(BadRows) as caught:
        records_from([{"Frage": "i", "Antwort": "r", "Note": 3}] * 40)
    summary, fault = str(caught.value).splitlines()
    assert "40 of 40" in summary and "--skip-bad" not in summary
    assert "row 1 and 39 more" in fault and "its columns: Frage, Antwort, Note" in fault
    assert "wanted: response" in fault and "--columns response=NAME names it" in fault


# Chosen columns


def test_chosen_columns_are_read_before_all_others():
    rows = [{"Frage": "i", "Antwort": "r", "Kriterium": "c", "Note": "3,5", "score": 1, "Stufe 1": "no"}]
    given = parse_columns(["instruction=Frage", "response = Antwort", "criteria=kriterium", "score=Note"])
    [record] = records_from(rows, columns=given | {"description_1": "Stufe 1"})
    assert record == Record("i", "r", Rubric("c", {"1": "no"}), score=3.5, id="0")


def test_a_field_can_be_left_unread(caplog):
    [record] = records_from([ROW | {"reference": "best"}], columns={"reference": "", "score": ""})
    assert record == Record("i", "r", Rubric("c"), id="0")
    assert "not read: score, reference" in said(caplog)[0]


def test_the_input_beside_an_instruction_is_a_part_of_it(caplog):
    rows = [{"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}, {"input": "i", "output": "r"}]
    assert [record.instruction for record in records_from(rows)] == ["Translate.\n\nGuten Tag", "i"]
    [record] = records_from([{"question": "q", "context": "long", "answer": "r"}], columns={"input": "context"})
    assert record.instruction == "q\n\nlong"


@pytest.mark.parametrize(
    "columns, fault",
    [
        ({"response": "Antwort", "instruction": "Antwort"}, "Antwort can't fill two fields"),
        ({"resposne": "a"}, r"no field 'resposne' \(did you mean response\?\); there are instruction, input"),
        ({"response": "Antwrot"}, r"no column 'Antwrot' for response \(did you mean Antwort\?\); its columns: Antwort"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(columns, fault):
    with pytest.raises(ValueError, match=fault):
        records_from([{"Antwort": "r"}], columns=columns)


def test_a_choice_is_a_pair():
    assert parse_columns(["score=My = column", "id="]) == {"score": "My = column", "id": ""}
    with pytest.raises(ValueError, match="FIELD=COLUMN, such as response=Answer, got 'response'"):
        parse_columns(["response"])


# A ready prompt, or an instruction


def test_a_prompt_beside_a_response_is_its_instruction_which_is_said(caplog):
    rows = [
        {"prompt": "How?", "response": "So.", "helpfulness": 4},
        {"prompt": "Why?", "response": "", "helpfulness": 1},
    ]
    records = records_from(rows, columns={"score": "helpfulness"})
    assert [(r.instruction, r.response, r.prompt) for r in records] == [("How?", "So.", None), ("Why?", "", None)]
    assert "prompt as instruction" in said(caplog)[0]


def test_a_prompt_alone_is_ready():
    assert records_from([{"prompt": " Judge this: x. ", "score": 2}]) == [
        Record(prompt=" Judge this: x. ", score=2, id="0")
    ]


def test_a_prompt_beside_instruction_and_response_is_named_and_not_read(caplog):
    [record] = records_from([ROW | {"prompt": "Judge r by c."}])
    assert (record.prompt, record.instruction, record.response) == (None, "i", "r")
    assert "not read: prompt" in said(caplog)[0]


@pytest.mark.parametrize(
    "beside",
    [
        {"criteria": "Is it sound?"},
        {"instruction": "How?"},
        {"reference": "best"},
        {"score1_description": "bad"},
        {"chosen": "One answer.", "rejected": "Another one."},
        {"responses": ["a", "b"]},
        {"Student essay": "A long text."},
    ],
)
def test_a_prompt_is_refused_where_something_would_not_be_asked(beside, caplog):
    row = {"prompt": "Judge this: x.", **beside}
    names = ", ".join(beside)
    with pytest.raises(BadRows, match=f"a prompt beside {names}, and no response: .*response=NAME, .*prompt=prompt"):
        records_from([row])
    assert records_from([row], columns={"prompt": "prompt"})[0] == Record(prompt="Judge this: x.", id="0")
    assert f"not read: {names}" in said(caplog)[-1]


@pytest.mark.parametrize("beside", [{"chosen": "Paris", "rejected": "London"}, {"回答": "巴黎。"}, {"response_1": 4}])
def test_a_short_answer_beside_a_prompt_is_an_answer_too(beside):
    with pytest.raises(BadRows, match="a prompt beside .*, and no response"):
        records_from([{"prompt": "Capital of France?", **beside}])


def test_a_blank_response_beside_a_prompt_stays_one(caplog):
    rows = [{"prompt": "p1", "instruction": "", "response": "r"}, {"prompt": "p2", "instruction": "", "response": ""}]
    assert [(r.instruction, r.response) for r in records_from(rows)] == [("p1", "r"), ("p2", "")]
    assert "prompt as instruction" in said(caplog)[0]


def test_marks_and_numbers_may_stand_beside_a_ready_prompt(caplog):
    [record] = records_from([{"prompt": "Judge this: x.", "category": "math", "tokens": 12, "score": 2}])
    assert record == Record(prompt="Judge this: x.", score=2, id="0")
    assert "not read: category, tokens" in said(caplog)[0]


def test_a_response_beside_a_prompt_that_is_said_to_be_ready_is_refused_unless_it_is_left_out():
    row = {"prompt": "Judge this: x.", "response": "So."}
    with pytest.raises(BadRows, match="would not be asked: --columns response= leaves it out"):
        records_from([row], columns={"prompt": "prompt"})
    assert records_from([row], columns={"prompt": "prompt", "response": ""})[0].prompt == "Judge this: x."


def test_a_rubric_for_the_file_is_refused_where_a_ready_prompt_would_not_ask_it():
    with pytest.raises(BadRows, match="--criteria or --rubric would not be asked"):
        records_from([{"prompt": "Judge this: x."}], rubric=Rubric("c"))


def test_a_prompt_beside_an_alias_of_the_instruction_is_refused_with_the_choice():
    row = {"question": "q", "prompt": "p", "response": "r"}
    with pytest.raises(BadRows, match="question or prompt may be the instruction: --columns instruction=question"):
        records_from([row])
    assert records_from([row], columns={"instruction": "question", "prompt": ""})[0].instruction == "q"


def test_rows_of_both_kinds_may_stand_in_one_table():
    rows = [
        {"prompt": "p", "instruction": None, "response": None},
        {"prompt": None, "instruction": "i", "response": "r"},
    ]
    assert records_from(rows) == [Record(prompt="p", id="0"), Record("i", "r", id="1")]


# Ids


def test_repeated_ids_lose_no_row_and_a_made_up_one_is_no_other(caplog):
    names = ["a", None, "a", "1", "a#2", "a", None, "row 7", ""]
    records = records_from([{"response": str(n), "id": name} for n, name in enumerate(names)])
    assert [record.response for record in records] == list("012345678")
    ids = [record.id for record in records]
    assert len(set(ids)) == len(names)
    assert (ids[0], ids[3], ids[4], ids[7]) == ("a", "1", "a#2", "row 7")
    assert ids[1] == "row 2" and ids[8] == "8"
    assert "ids that several records have: 1; the first: 'a'" in caplog.text
    records = records_from([{"response": "r", "id": name} for name in (None, "0", "row 1")])
    assert [record.id for record in records] == ["row 1#2", "0", "row 1"]
