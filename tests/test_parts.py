"""Several criteria and several answers: judged part by part, written as one row, gone on with."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from test_command_line import make_judge

from tract_lite import Judge, Judgement, Record
from tract_lite.__main__ import main
from tract_lite.data.criteria import Criterion
from tract_lite.data.jsonl import read_rows
from tract_lite.data.parts import judged_parts, parts_of, whole_rows
from tract_lite.data.records import table_from
from tract_lite.data.table import read_columns, read_judged
from tract_lite.record import Rubric

FIVE = {str(number): float(number) for number in range(1, 6)}
TEN = {str(number): float(number) for number in range(11)}
CRITERIA = {"clear": "Is it clear?", "kind": {"criteria": "Is it kind?", "weight": 3}}
TWO = [Criterion("clear", Rubric("Is it clear?")), Criterion("kind", Rubric("Is it kind?"), 3.0)]
PAIRS = [
    {"question": "How are you?", "response_a": "The answer is clear.", "response_b": "It is wrong.", "preferred": "a"},
    {"question": "Why is it so?", "response_a": "It is short.", "response_b": "", "preferred": "b"},
    {"question": "And how?", "response_a": "Step by step.", "response_b": "Step by step.", "preferred": "tie"},
]
SINGLE = [{"id": f"n{n}", "response": row["response_a"], "score": n + 1, "clear": n + 2} for n, row in enumerate(PAIRS)]


def judgement(record: Record, values: dict[str, float] = FIVE) -> Judgement:
    """One that hangs on what is judged alone."""
    random = np.random.default_rng(int(record.key, 16) % 2**32)
    shares = random.dirichlet(np.ones(len(values)))[None] * 0.98
    return Judgement.from_probabilities(record.id, shares, values, feedback=[f"of {record.id}"])


def wholes(rows: list[dict[str, Any]], criteria: Any = (), **scales: dict[str, float]) -> list[dict[str, Any]]:
    parts = parts_of(table_from(rows, gold_needed=False), criteria)

    def judged(records):
        return [judgement(record, scales.get(record.id.rpartition("/")[2], FIVE)) for record in records]

    return whole_rows(json.loads(json.dumps([row for _, row in judged_parts(parts, judged)])))


def test_a_row_with_one_answer_and_no_named_criteria_is_its_record_as_ever():
    table = table_from(SINGLE)
    assert parts_of(table) == [(record, None, None) for record in table.records]


def test_the_mean_is_weighted_and_its_doubt_that_of_independent_judgements():
    [whole, *_] = wholes(SINGLE, TWO)
    scores, stds, doubts = ([whole[f"{name}_{c}"] for c in ("clear", "kind")] for name in ("score", "std", "doubt"))
    assert whole["id"] == "n0" and whole["feedback_kind"] == "of n0/kind"
    assert whole["score"] == pytest.approx(0.25 * scores[0] + 0.75 * scores[1])
    for name, each in (("std", stds), ("doubt", doubts)):
        assert whole[name] == pytest.approx(math.hypot(0.25 * each[0], 0.75 * each[1]))


def test_the_spread_of_simulated_means_is_the_std_of_the_mean():
    parts = parts_of(table_from(SINGLE[:1]), TWO)
    judged = [judgement(part.record) for part in parts]
    random = np.random.default_rng(0)
    drawn = [
        random.choice(list(FIVE.values()), 200_000, p=np.array(list(one.probabilities.values())) / one.mass)
        for one in judged
    ]
    [whole] = wholes(SINGLE[:1], TWO)
    assert np.std(0.25 * drawn[0] + 0.75 * drawn[1]) == pytest.approx(whole["std"], rel=0.01)


def test_criteria_on_several_scales_are_averaged_by_their_places_on_these():
    [whole, *_] = wholes(SINGLE, TWO, clear=TEN)
    assert whole["score"] == pytest.approx(0.25 * whole["score_clear"] / 10 + 0.75 * (whole["score_kind"] - 1) / 4)
    assert whole["std"] == pytest.approx(math.hypot(0.25 * whole["std_clear"] / 10, 0.75 * whole["std_kind"] / 4))


def test_gold_scores_are_of_the_row_or_of_a_criterion_whose_name_a_column_has():
    golds = wholes(SINGLE, TWO)
    assert [row["gold"] for row in golds] == [1, 2, 3] and [row["gold_clear"] for row in golds] == [2, 3, 4]
    both = [{"response": "r", "clear": 1, "Kind": "5"}]
    assert wholes(both, TWO)[0]["gold"] == pytest.approx(0.25 * 1 + 0.75 * 5)
    assert wholes([{"response": "r", "clear": 1}], TWO)[0]["gold"] is None


def test_answers_are_compared_as_their_distributions_are():
    first, blank, same = wholes(PAIRS)
    a, b = (judgement(part.record) for part in parts_of(table_from(PAIRS, gold_needed=False))[:2])
    assert first["a_above_b"] == pytest.approx(a.probability_above(b))
    assert (first["score_a"], first["score_b"], first["gold_preferred"]) == (a.score, b.score, "a")
    assert (first["winner"] == "a") == (first["a_above_b"] > 0.55)
    assert (same["a_above_b"], same["winner"]) == (pytest.approx(0.5), "tie")
    assert blank["score_a"] and blank["score_b"] is blank["a_above_b"] is blank["winner"] is None
    assert blank["error"] == "b: response_b is empty"


def test_of_many_answers_the_winner_is_surely_above_each_other_one():
    words = ["The answer is clear.", "It is wrong.", "It is short.", "Step by step."]
    for order in range(4):
        texts = {f"response_{letter}": words[(place + order) % 4] for place, letter in enumerate("abcd")}
        [row] = wholes([texts])
        assert len([name for name in row if "_above_" in name]) == 6
        if row["winner"] != "tie":
            above = [row[f"{x}_above_{y}"] for x, y in ("ab", "ac", "ad") if row["winner"] == "a"]
            assert all(chance > 0.55 for chance in above)
            assert max("abcd", key=lambda letter: row[f"score_{letter}"]) == row["winner"]


def test_several_answers_are_compared_by_their_weighted_means():
    row = wholes(PAIRS, TWO)[0]
    assert row["score_a"] == pytest.approx(0.25 * row["score_a_clear"] + 0.75 * row["score_a_kind"])
    assert 0 < row["a_above_b"] < 1 and (row["a_above_b"] > 0.5) == (row["score_a"] > row["score_b"])


def test_a_mean_of_criteria_that_are_not_all_there_is_none():
    parts = parts_of(table_from(SINGLE, gold_needed=False), TWO)
    rows = [row for _, row in judged_parts(parts, lambda records: map(judgement, records))]
    [whole, *_] = whole_rows(rows[1:])
    assert whole["score"] is None and whole["score_kind"] is not None


# With a real judge


@pytest.fixture(scope="module")
def judge_file(shared_once) -> Path:
    return shared_once("command_line", make_judge) / "judge.gguf"


@pytest.fixture
def data(tmp_path) -> Path:
    pandas.DataFrame(PAIRS).to_csv(tmp_path / "pairs.csv", index=False)
    pandas.DataFrame(SINGLE).to_csv(tmp_path / "single.csv", index=False)
    (tmp_path / "criteria.json").write_text(json.dumps(CRITERIA), encoding="utf-8")
    return tmp_path


def judge(model: Path, source: Path, output: Path, *options: Any) -> list[dict[str, str]]:
    words = ["judge", model, source, "-o", output, "--n-cot", "0", "--threads", "1", "--parallel", "4", *options]
    assert main([*map(str, words)]) == 0
    if output.suffix == ".jsonl":
        return read_rows(output)
    with output.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.export
def test_a_wide_table_its_rows_and_a_frame_say_the_same(judge_file, data, capsys):
    rubric = data / "criteria.json"
    with Judge.from_gguf(judge_file, threads=1, parallel=4) as judging:
        for name, count in (("single", 6), ("pairs", 12)):
            table = judge(judge_file, data / f"{name}.csv", data / f"{name}_out.csv", "--rubric", rubric)
            rows = read_rows(data / f"{name}_out.jsonl")
            assert len(rows) == count and all(row["of"]["criterion"] in row["id"] for row in rows)
            frame = pandas.read_csv(data / f"{name}.csv", index_col=None)
            frame.index = [7] * len(frame)
            judged = judging.score_frame(frame, 0, rubric=rubric if name == "single" else CRITERIA)
            assert list(judged.columns) == list(table[0]) and list(judged.index) == [7] * len(frame)
            assert read_columns(data / f"{name}_out.csv")[0].keys() >= read_columns(data / f"{name}_out.jsonl")[
                0
            ].keys() - {"id"}
            for column in judged.columns:
                for cell, text in zip(judged[column], (row[column] for row in table)):
                    same = pytest.approx(float(text)) if isinstance(cell, float) and text else text
                    assert (("" if cell is None or cell != cell else cell) == same) or str(cell) == text, column
    printed = capsys.readouterr().out
    assert "single_out.csv: 6 judged, 0 of them failed, 0 were there already, in parts of 3 rows" in printed
    assert "12 judged, 2 of them failed" in printed and "the preferred one in" in printed


@pytest.mark.export
def test_a_frame_without_parts_gets_the_columns_of_the_table(judge_file, data):
    table = judge(judge_file, data / "single.csv", data / "out.csv", "--criteria", "Is it clear?")
    frame = pandas.read_csv(data / "single.csv").set_index("id")
    with Judge.from_gguf(judge_file, threads=1, parallel=4) as judging:
        judged = judging.score_frame(frame, 0, rubric=Rubric("Is it clear?"))
        empty = pandas.concat([frame.iloc[:1].map(lambda cell: None), frame]).reset_index(drop=True)
        gap = judging.score_frame(empty, 0, rubric=Rubric("Is it clear?"))
    assert ["id", *judged.columns] == list(table[0])
    assert judged["judge_score"].tolist() == pytest.approx([float(row["judge_score"]) for row in table])
    assert gap["judge_score"].isna().tolist() == [True, False, False, False]


@pytest.mark.export
def test_parts_that_are_there_are_not_judged_again_and_new_weights_and_criteria_are_taken(judge_file, data, capsys):
    rubric, output = data / "criteria.json", data / "out.csv"
    judge(judge_file, data / "single.csv", output, "--rubric", rubric)
    whole = read_rows(output.with_suffix(".jsonl"))
    lines = output.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    # As a call that was killed inside a row leaves it.
    output.with_suffix(".jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    output.unlink()
    capsys.readouterr()
    judge(judge_file, data / "single.csv", output, "--rubric", rubric)
    assert "3 judged, 0 of them failed, 3 were there already" in capsys.readouterr().out
    again = read_rows(output.with_suffix(".jsonl"))
    assert again[:3] == whole[:3]
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in whole], abs=1e-3)
    rubric.write_text(json.dumps({"clear": {"criteria": "Is it clear?", "weight": 7}, "kind": "Is it kind?"}))
    [first, *_] = judge(judge_file, data / "single.csv", output, "--rubric", rubric)
    assert "0 judged, 0 of them failed, 6 were there already" in capsys.readouterr().out
    expected = 7 / 8 * float(first["score_clear"]) + float(first["score_kind"]) / 8
    assert float(first["judge_score"]) == pytest.approx(expected)
    assert read_judged(output.with_suffix(".jsonl"))[0]["score"] == pytest.approx(expected)


@pytest.mark.export
def test_parts_that_are_asked_for_no_more_go_and_another_kind_of_question_is_refused(judge_file, data, capsys):
    rubric, output = data / "criteria.json", data / "out.csv"
    judge(judge_file, data / "single.csv", output, "--rubric", rubric)
    rubric.write_text(json.dumps([{"name": "kind", "criteria": "Is it kind?"}]), encoding="utf-8")
    [first, *_] = judge(judge_file, data / "single.csv", output, "--rubric", rubric)
    rows = read_rows(output.with_suffix(".jsonl"))
    assert [row["id"] for row in rows] == ["n0/kind", "n1/kind", "n2/kind"]
    assert whole_rows(rows)[0]["score"] == pytest.approx(float(first["judge_score"]))
    capsys.readouterr()
    asked = ["judge", judge_file, data / "single.csv", "-o", output, "--n-cot", "0", "--criteria", "Is it clear?"]
    assert main([*map(str, asked)]) == 2
    assert "holds judgements by several criteria or answers" in capsys.readouterr().err


def test_a_row_with_one_answer_among_rows_of_two_is_a_row_of_the_same_table():
    rows = [PAIRS[0], {"question": "How are you?", "response": "It is clear.", "score": 4}]
    two, one = wholes(rows)
    assert {"score_a", "winner"} <= two.keys() and one["gold"] == 4 and one["score"] > 0


def test_a_frame_s_options_are_known_ones():
    with pytest.raises(TypeError, match="column"):
        table_from(SINGLE, column={"response": "text"})


@pytest.mark.export
def test_evaluate_reads_means_criteria_and_preferences_from_the_rows_and_the_table(judge_file, data, capsys):
    for name, words in (("single", "by each criterion:"), ("pairs", "the winner is the preferred one in")):
        judge(judge_file, data / f"{name}.csv", data / "out.csv", "--rubric", data / "criteria.json")
        printed = []
        for suffix in ("csv", "jsonl"):
            capsys.readouterr()
            assert main(["evaluate", str(data / f"out.{suffix}")]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] and words in printed[0]
        for path in data.glob("out.*"):
            path.unlink()


@pytest.mark.export
def test_an_explanation_shows_all_parts_of_an_item_and_a_dash_writes_them(judge_file, data, capsys):
    words = [str(judge_file), str(data / "pairs.csv"), "--rubric", str(data / "criteria.json"), "--n-cot", "0"]
    assert main(["judge", *words, "--explain", "2", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("Item")] == [
        f"Item 2/{letter}/{name}" for letter in "ab" for name in ("clear", "kind")
    ]
    assert main(["judge", *words, "-o", "-", "--threads", "1"]) == 0
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [row["error"] for row in rows].count("response_b is empty") == 2 and len(rows) == 12


@pytest.mark.export
def test_a_judge_of_one_scale_refuses_that_of_a_criterion_and_judges_by_the_others(judge_file, data):
    criteria = {"clear": {"criteria": "Is it clear?", "scale": "0-3"}, "kind": "Is it kind?"}
    (data / "criteria.json").write_text(json.dumps(criteria))
    row = judge(judge_file, data / "single.csv", data / "out.csv", "--rubric", data / "criteria.json")[0]
    assert row["error"].startswith("clear: the item asks for the scale 0-3, and this judge answers on 1-5 alone")
    assert row["score_kind"] and not row["judge_score"]


@pytest.mark.export
@pytest.mark.parametrize(
    "rows, content, fault",
    [
        ([{"response_a": "x"}], CRITERIA, "response_a has no other answer beside it"),
        (SINGLE, [{"name": "a", "criteria": "x"}] * 2, "two criteria named 'a'"),
        (SINGLE, {"a": {"criteria": "x", "weight": -1}}, "the weight of 'a' is -1"),
        ([{"prompt": "Ready."}], CRITERIA, "a ready prompt is asked as it stands"),
    ],
)
def test_bad_input_is_told_before_anything_is_judged(judge_file, data, capsys, rows, content, fault):
    pandas.DataFrame(rows).to_csv(data / "bad.csv", index=False)
    (data / "criteria.json").write_text(json.dumps(content))
    words = ["judge", judge_file, data / "bad.csv", "-o", data / "bad_out.csv", "--rubric", data / "criteria.json"]
    assert main([*map(str, words)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert fault in line and not (data / "bad_out.jsonl").exists()
