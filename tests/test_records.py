import csv
import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from tract_lite.data.formats import record_to_row
from tract_lite.data.records import BadRows, read_records, records_from, split_records, write_records
from tract_lite.record import Annotation, Record, Rubric
from tract_lite.scale import ScoreScale

ROOT = Path(__file__).parents[1]
VICUNA = ROOT.parent / "shared" / "data" / "vicuna_eval.json"
needs_data = pytest.mark.skipif(not VICUNA.is_file(), reason="no real data here")
BENCHMARK = [
    {
        "instruction": f"###Task Description: judge {n}.\n###Feedback: ",
        "gpt4_feedback": [f"So {n}.", "Or so.", "Or not."],
        "gpt4_score": [1 + n, 2, 5],
    }
    for n in range(4)
]
ONE_TO_FIVE = ScoreScale.integers(1, 5)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, rows):
    path.write_text(json.dumps(rows))


def columns_of(rows):
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    columns = {name: [row.get(name) for row in rows] for name in columns_of(rows)}
    pq.write_table(pa.table(columns), path)


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def read(tmp_path):
    """Write rows, or a text as it is, and read them back."""

    def write_and_read(content, suffix="jsonl", **options):
        path = tmp_path / f"data.{suffix}"
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8", newline="")
        else:
            WRITERS[suffix](path, content)
        return read_records(path, **options)

    return write_and_read


def run_python(code, *, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


# The three row shapes


def check_benchmark(path, rows):
    records = read_records(path, scale=ONE_TO_FIVE)
    assert [record.prompt for record in records] == [row["instruction"] for row in rows]
    assert all(record.prompt.endswith("###Feedback: ") for record in records)
    assert [record.id for record in records] == [str(n) for n in range(len(rows))]
    for record, row in zip(records, rows):
        assert record.score == pytest.approx(sum(row["gpt4_score"]) / 3)
        assert record.annotations == tuple(zip(row["gpt4_feedback"], row["gpt4_score"]))
        assert all(isinstance(annotation, Annotation) for annotation in record.annotations)
    assert sum(len(record.pairs()) for record in records) == 3 * len(rows)


def test_a_benchmark_item_is_one_record_with_the_mean_score_and_its_prompt_untouched(tmp_path):
    write_json(tmp_path / "benchmark.json", BENCHMARK)
    check_benchmark(tmp_path / "benchmark.json", BENCHMARK)


@needs_data
def test_so_is_an_item_of_a_real_benchmark():
    rows = json.loads(VICUNA.read_text(encoding="utf-8"))
    assert len(rows) == 320
    check_benchmark(VICUNA, rows)


def test_a_feedback_collection_row_is_read_from_its_original_columns(read):
    row = {
        "instruction": "###Task Description: ...",
        "input": "",
        "output": "Short. [RESULT] 2",
        "orig_instruction": "Explain rain.",
        "orig_response": "Water falls.",
        "orig_reference_answer": "Vapour condenses.",
        "orig_criteria": "Is it complete?",
        "orig_score1_description": "Nothing.",
        "orig_score5_description": "Everything.",
        "orig_feedback": "Too short.",
        "orig_score": "2",
    }
    expected = Record(
        instruction="Explain rain.",
        response="Water falls.",
        reference="Vapour condenses.",
        rubric=Rubric("Is it complete?", {"1": "Nothing.", "5": "Everything."}),
        feedback="Too short.",
        score=2.0,
        id="0",
    )
    assert read([row]) == [expected]


@pytest.mark.parametrize("output", ["Says [RESULT] twice.\n[RESULT] 4", "Says [RESULT] twice."])
def test_feedback_missing_from_the_collection_is_its_output_without_the_score(read, output):
    row = {"orig_response": "r", "orig_feedback": None, "output": output}
    assert read([row])[0].feedback == "Says [RESULT] twice."


@pytest.mark.parametrize(
    "row",
    [
        {"criteria": "Is it true?", "description_1": "no", "description_5": "yes"},
        {"rubric": "Is it true?", "score1_description": "no", "score5_description": "yes"},
        {"rubric": {"criteria": "Is it true?", "descriptions": {"1": "no", "3": None, "5": "yes"}}},
        {"rubric": {"criteria": "Is it true?", "descriptions": {"1": "no"}}, "description_5": "yes"},
    ],
)
def test_every_spelling_of_a_rubric_gives_the_same_rubric(read, row):
    [record] = read([row | {"response": "r"}])
    assert record.rubric == Rubric("Is it true?", {"1": "no", "5": "yes"})


def test_both_names_of_the_reference_are_known_and_nothing_else_is_needed(read):
    a, b, c = read(
        [{"response": "r", "reference": "best"}, {"response": "r", "reference_answer": "best"}, {"prompt": " p "}]
    )
    assert a.reference == b.reference == "best"
    assert c == Record(prompt=" p ", id="2")


# Values


@pytest.mark.parametrize(
    "value, score",
    [
        (4, 4.0),
        (4.5, 4.5),
        ("4", 4.0),
        (" 4.5 ", 4.5),
        ("4e0", 4.0),
        (None, None),
        ("", None),
        (float("nan"), None),
        ("NaN", None),
    ],
)
def test_scores_are_numbers_or_absent(read, value, score):
    assert read([{"response": "r", "score": value}])[0].score == score


@pytest.mark.parametrize("value", [True, False, "four", "4 by 5", float("inf"), "-inf", [True], {"value": 4}, 10**400])
def test_a_score_that_is_no_finite_number_is_a_bad_row(read, value):
    with pytest.raises(BadRows, match="line 1: score must be a finite number"):
        read([{"response": "r", "score": value}])


def test_empty_optional_columns_are_absent(read):
    empty = dict.fromkeys(("rubric", "reference", "feedback", "prompt", "id", "criteria"), "")
    nan = dict.fromkeys(empty, float("nan"))
    assert read([{"response": "r"} | empty, {"response": "r"} | nan]) == [
        Record(response="r", id="0"),
        Record(response="r", id="1"),
    ]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"instruction": "i", "respones": "r"}, "neither a prompt nor a response; its columns: .*ones"),
        ({"response": ["r"]}, "response must be text"),
        ({"response": "r", "rubric": {"criteria": "c", "descriptions": ["no"]}}, "descriptions must"),
        ({"response": "r", "feedback_ids": [1, "2"]}, "feedback_ids must"),
        ({"response": "r", "score": 6}, "score 6 is outside the scale"),
        ({"instruction": "p", "gpt4_feedback": ["a", "b"], "gpt4_score": [3]}, "of one length"),
        ({"instruction": "p", "gpt4_feedback": "a", "gpt4_score": "3"}, "of one length"),
        ({"instruction": "p", "gpt4_feedback": ["a", ""], "gpt4_score": [3, 4]}, "gaps"),
        ({"instruction": "p", "gpt4_feedback": ["a"], "gpt4_score": [None]}, "gaps"),
        ({"instruction": "p", "gpt4_feedback": ["a", "b"], "gpt4_score": [5, 6]}, "outside the scale"),
        ({"gpt4_feedback": ["a"], "gpt4_score": [3]}, "neither a prompt"),
        (["response", "r"], "a row must have named columns"),
        (None, "a row must have named columns"),
    ],
)
def test_an_unusable_row_says_what_is_wrong_with_it(read, row, reason):
    with pytest.raises(BadRows, match=f"line 1: .*{reason}"):
        read([row], scale=ONE_TO_FIVE)


def test_the_ends_of_the_scale_belong_to_it(read):
    rows = [{"response": "r", "score": score} for score in (1, 2.5, 5)]
    assert [record.score for record in read(rows, scale=ONE_TO_FIVE)] == [1, 2.5, 5]


def test_ids_are_unique_and_a_repeated_one_gets_a_number(read):
    rows = [{"response": "r", "id": name} for name in ("a", 7, "a", "7", None)]
    assert [record.id for record in read(rows)] == ["a", "7", "a#2", "7#2", "4"]


# Bad rows


def test_bad_rows_are_reported_together_by_their_line(read):
    text = '\n{"response": "r"}\n\n{"score": 1}\nnot JSON\n{"response": "r", "score": "x"}\n'
    with pytest.raises(BadRows, match="unusable rows: 3 of 4; .*--skip-bad") as caught:
        read(text)
    assert [fault.split(":")[0] for fault in caught.value.rows] == ["line 4", "line 5", "line 6"]
    assert all(fault in str(caught.value) for fault in caught.value.rows)


def test_the_message_shows_one_fault_of_each_kind_and_the_error_holds_all_rows(read):
    rows = [{"response": "r", "score": n} for n in range(6, 16)] + [{"response": "r", "score": "good"}, {"score": 1}]
    with pytest.raises(BadRows, match="unusable rows: 24 of 25; .*--skip-bad") as caught:
        read([*rows, {"response": "r"}, *rows], scale=ONE_TO_FIVE)
    assert len(caught.value.rows) == 24 and "line 3: score 8 is outside the scale 1-5" in caught.value.rows[2]
    _, *faults = str(caught.value).splitlines()
    assert [fault.split(":")[0].strip() for fault in faults] == [
        f"line {n} and {m} more" for n, m in ((1, 19), (11, 1), (12, 1))
    ]


def test_the_message_shows_twenty_kinds_at_most(read):
    with pytest.raises(BadRows, match="unusable rows: 25 of 25") as caught:
        read([{chr(ord("a") + number): 1} for number in range(25)])
    assert len(caught.value.rows) == 25
    assert "line 20:" in str(caught.value) and "line 21:" not in str(caught.value)


def test_skipped_rows_are_counted_and_handed_over(read, caplog):
    rejected = []
    with caplog.at_level(logging.WARNING):
        records = read([{}, {"response": "r"}, {}], skip_bad=True, rejected=rejected)
    assert [record.id for record in records] == ["1"]
    assert [fault.split(":")[0] for fault in rejected] == ["line 1", "line 3"]
    assert "unusable rows left out: 2" in caplog.text


@pytest.mark.parametrize("content", ["", "\n\n", [{}], "{"])
def test_a_file_without_a_usable_row_is_an_error_even_if_bad_rows_are_skipped(read, content):
    with pytest.raises(ValueError, match="no usable row"):
        read(content, skip_bad=True)


def test_deeply_nested_json_is_a_bad_row_not_a_crash(read):
    with pytest.raises(BadRows, match="line 1: not JSON"):
        read("[" * 100_000)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_columns_may_be_separated_as_spreadsheets_do(tmp_path, separator):
    file = tmp_path / "rows.csv"
    lines = [["response", "criteria", "score"], ['"a, b; c"', "Is it clear?", "3"]]
    file.write_text("\n".join(separator.join(line) for line in lines))
    (record,) = read_records(file)
    assert (record.response, record.score) == ("a, b; c", 3)


def test_csv_rows_are_named_by_the_line_they_start_on(read):
    text = 'response,score\r\n"two\r\nlines",1\r\n\r\n"two\r\nmore",x\r\nr,1,2\r\nr,1\r\n'
    with pytest.raises(BadRows) as caught:
        read(text, "csv")
    assert [fault.split(":")[0] for fault in caught.value.rows] == ["line 5", "line 7"]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_rows_without_lines_are_numbered_from_one(read, suffix):
    with pytest.raises(BadRows, match="row 2: score"):
        read([{"response": "r", "score": None}, {"response": "", "score": "x"}], suffix)


def test_an_empty_response_is_an_item_and_a_row_with_nothing_in_it_is_counted(read, caplog):
    rows = [{"instruction": "i", "response": text} for text in ("", "  ", None)]
    assert [record.response for record in read(rows)] == ["", "  ", ""]
    assert read([{"response": ""}]) == [Record(response="", id="0")]
    records = read([{"instruction": " ", "response": ""}, {"instruction": "i", "response": "r"}])
    assert [record.id for record in records] == ["1"] and "rows with nothing in them left out: 1" in caplog.text
    assert read([record_to_row(Record("i", "", id="a"))]) == [Record("i", "", id="a")]


# Sources and formats


words = st.text(st.characters(exclude_categories=["Cs"]))
rows_of_text = st.lists(
    st.fixed_dictionaries(
        {
            "instruction": words,
            "response": words.filter(bool),
            "criteria": words,
            "description_1": words,
            "reference": words,
            "feedback": words,
            "prompt": words,
            "score": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_text)
def test_every_file_format_gives_the_same_records(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    read_back = []
    for suffix, write in WRITERS.items():
        write(folder / f"data.{suffix}", rows)
        read_back.append(read_records(folder / f"data.{suffix}"))
    assert all(records == read_back[0] for records in read_back)
    assert [record.response for record in read_back[0]] == [row["response"] for row in rows]
    assert [record.score for record in read_back[0]] == [row["score"] for row in rows]


def test_nested_columns_survive_parquet(read):
    rubric = {"criteria": "c", "descriptions": {"1": "no", "5": "yes"}}
    assert read(BENCHMARK, "parquet") == read(BENCHMARK) == records_from(BENCHMARK)
    assert read([{"response": "r", "rubric": rubric}], "parquet")[0].rubric == Rubric(**rubric)


@needs_data
def test_a_real_benchmark_survives_parquet(read):
    rows = json.loads(VICUNA.read_text(encoding="utf-8"))[:20]
    assert read(rows, "parquet") == read_records(VICUNA)[:20]


def test_an_object_that_holds_one_list_is_read_as_that_list(read):
    assert read('{"version": 1, "rows": [{"response": "r"}]}', "json")[0].response == "r"
    with pytest.raises(ValueError, match="one list"):
        read('{"a": [{"response": "r"}], "b": []}', "json")


def test_a_byte_order_mark_and_windows_lines_change_nothing(read):
    assert read('\ufeff{"response": "r"}\r\n')[0].response == "r"
    assert read("\ufeffresponse\r\nr\r\n", "csv")[0].response == "r"
    assert read('\ufeff[{"response": "r"}]', "json")[0].response == "r"


def test_a_csv_field_may_be_large(read):
    text = "x" * 300_000
    assert read([{"response": text}], "csv")[0].response == text


def test_the_format_can_be_named_where_the_suffix_misleads(tmp_path):
    path = tmp_path / "data.txt"
    write_jsonl(path, [{"response": "r"}])
    assert read_records(path, format="jsonl") == [Record(response="r", id="0")]
    with pytest.raises(ValueError, match="format must be jsonl, .*csv, .*parquet or hub, got 'txt'"):
        read_records(path)


def test_a_dash_reads_jsonl_from_standard_input():
    code = "from tract_lite.data import records; print(ascii(records.read_records('-')[0].response))"
    result = run_python(code, stdin='{"response": "café"}\n', PYTHONIOENCODING="latin-1")
    assert result.stdout == "'caf\\xe9'\n", result.stderr


def test_a_missing_file_is_reported_as_such(tmp_path):
    for path in (tmp_path / "none.jsonl", "none.json", "data/none.csv", "./none", "none"):
        with pytest.raises(FileNotFoundError, match="no file .*none"):
            read_records(path)


@pytest.mark.parametrize(
    "suffix, content",
    [
        ("json", b'[{"response": "r"}'),
        ("json", b"3"),
        ("json", b"[" * 100_000),
        ("parquet", b"response"),
        ("jsonl", b'{"response": "\xff"}'),
        ("csv", b"response\nK\xc3\xa4se\n\xff\n"),
        ("csv", b'response\n"r\nr\n'),
    ],
)
def test_an_unreadable_file_is_named_with_a_way_out(tmp_path, suffix, content):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=f"can't read .*data.{suffix} as {suffix}: .*(name another|must be a list|--encoding|is not closed)",
    ):
        read_records(path, skip_bad=True)


def test_a_split_of_a_file_is_refused(read):
    with pytest.raises(ValueError, match="split_records"):
        read([{"response": "r"}], split="train")


def test_a_hub_data_set_is_read_by_its_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", [{"response": "a", "score": 1}])
    write_parquet(tmp_path / "set" / "test.parquet", [{"response": "b", "score": None}])
    assert read_records(tmp_path / "set", format="hub") == [Record(response="a", score=1, id="0")]
    assert read_records(tmp_path / "set", "hub", "test") == [Record(response="b", id="0")]
    with pytest.raises(ValueError, match="can't read .* as hub: .*dev"):
        read_records(tmp_path / "set", "hub", "dev")


def test_a_hub_data_set_that_cannot_be_reached_is_an_error_with_words():
    code = "from tract_lite.data.records import read_records; read_records('nobody/no-such-data')"
    result = run_python(code, HF_HUB_OFFLINE="1")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ValueError: can't read nobody/no-such-data as hub:"), result.stderr


# Records and splits


def test_pairs_are_one_training_record_per_annotation():
    pairs = (Annotation("low", 3.0), Annotation("high", 4.0))
    item = Record(prompt="p", score=3.5, id="a", annotations=pairs, feedback_ids=(7, 8))
    low, high = item.pairs()
    assert low == Record(prompt="p", score=3.0, feedback="low", id="a/0", gold_scores=(3.0, 4.0))
    assert high == Record(prompt="p", score=4.0, feedback="high", id="a/1", gold_scores=(3.0, 4.0))
    assert low.pairs() == [low]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_record_written_as_a_row_reads_back_the_same(read, suffix):
    full = Record("i", "r", Rubric("c", {"1": "no", "5": "yes"}), "best", 4.0, "good", id="a", feedback_ids=(7, 8))
    bare = Record(prompt="p", score=0.0, id="b")
    assert read([record_to_row(full), record_to_row(bare)], suffix) == [full, bare]
    item = records_from(BENCHMARK)[0]
    assert read([record_to_row(item)], suffix) == [dataclasses.replace(item, annotations=())]


def test_records_that_are_written_read_back_the_same(tmp_path):
    records = [
        Record("i", "r", Rubric("c", {"1": "no"}), score=4.0, id="a", feedback_ids=(7,)),
        Record(prompt="p", id="b"),
    ]
    write_records(tmp_path / "records.jsonl", iter(records))
    assert read_records(tmp_path / "records.jsonl") == records


# Rows in memory


def test_dicts_are_read_as_a_file_of_them_would_be(read):
    rows = [
        {"response": "r", "criteria": "c", "description_1": "no", "score": 3, "id": "x"},
        {"prompt": "p", "score": None, "feedback": ""},
        {"orig_response": "r", "output": "Short. [RESULT] 2", "orig_score": "2"},
        *BENCHMARK,
    ]
    assert records_from(rows) == records_from(iter(rows)) == read(rows)


def test_a_data_frame_is_read_as_its_file_would_be(read, tmp_path):
    rows = [
        {"response": "a", "criteria": "c", "score": 3, "id": 7, "reference": "best"},
        {"response": "b", "criteria": "c", "score": None, "id": 8, "reference": None},
    ]
    frame = pd.DataFrame(rows)
    assert frame["score"].isna().any() and frame["id"].dtype == np.int64
    assert records_from(frame) == read(rows)
    assert [record.id for record in records_from(frame)] == ["7", "8"]
    for kind in ("parquet", "csv"):
        write = getattr(frame, f"to_{kind}")
        write(tmp_path / f"frame.{kind}", index=False)
        assert records_from(getattr(pd, f"read_{kind}")(tmp_path / f"frame.{kind}")) == read(rows)


def test_the_named_index_of_a_data_frame_is_a_column():
    frame = pd.DataFrame({"question": ["q"], "response": ["r"], "id": ["x"]}).set_index(["id", "question"])
    assert records_from(frame) == [Record("q", "r", id="x")]


@pytest.mark.parametrize("missing", [None, math.nan, np.nan, pd.NA, pd.NaT])
def test_a_missing_cell_is_absent_in_a_data_frame_and_in_dicts(missing):
    full = {"response": "r", "score": 2, "id": "a", "feedback": "f", "reference": "best", "feedback_ids": [7]}
    full |= {"rubric": {"criteria": "c", "descriptions": {"1": "no"}}}
    lacking = {**dict.fromkeys(full, missing), "response": "other"}
    expected = [
        Record("", "r", Rubric("c", {"1": "no"}), "best", 2.0, "f", id="a", feedback_ids=(7,)),
        Record(response="other", id="1"),
    ]
    assert records_from([full, lacking]) == expected
    assert records_from(pd.DataFrame([full, lacking])) == expected
    assert records_from(pd.DataFrame([full, lacking]).convert_dtypes()) == expected


def test_whole_numbers_stay_whole_beside_missing_cells():
    frame = pd.DataFrame(
        {"response": ["a", "b"], "id": pd.array([3, None], "Int64"), "score": pd.array([4, None], "Int8")}
    )
    assert [(record.id, record.score) for record in records_from(frame)] == [("3", 4.0), ("1", None)]


def test_cells_may_be_numbers_and_lists_of_numpy(tmp_path):
    write_parquet(tmp_path / "benchmark.parquet", BENCHMARK)
    frame = pd.read_parquet(tmp_path / "benchmark.parquet")
    assert isinstance(frame["gpt4_score"][0], np.ndarray)
    assert records_from(frame) == records_from(BENCHMARK)
    row = {"prompt": "p", "id": np.int64(5), "score": np.float32(2.5), "feedback_ids": np.array([7, 8])}
    assert records_from([row]) == [Record(prompt="p", id="5", score=2.5, feedback_ids=(7, 8))]
    rubric = {"criteria": "c", "descriptions": {"1": "no", "5": None}}
    assert records_from(pd.DataFrame([{"response": "r", "rubric": rubric}]))[0].rubric == Rubric("c", {"1": "no"})


def test_bad_rows_in_memory_are_named_by_their_place(caplog):
    rows = [{"response": "r", "score": 9}, {"response": "r"}, "text"]
    with pytest.raises(BadRows, match="the rows given: unusable rows: 2") as caught:
        records_from(rows, scale=ONE_TO_FIVE)
    assert [fault.split(":")[0] for fault in caught.value.rows] == ["row 1", "row 3"]
    rejected = []
    assert [r.id for r in records_from(rows, scale=ONE_TO_FIVE, skip_bad=True, rejected=rejected)] == ["1"]
    assert rejected == caught.value.rows and "unusable rows left out: 2" in caplog.text
    with pytest.raises(ValueError, match="the rows given has no usable row"):
        records_from([])


def test_the_key_depends_on_what_the_judge_reads_and_on_nothing_else():
    item = Record("i", "r", Rubric("c", {"1": "no", "5": "yes"}), "best")
    same = Record("i", "r", Rubric("c", {"5": "yes", "1": "no"}), "best", 3.0, "f", id="x")
    others = [
        Record("i2", "r", item.rubric, "best"),
        Record("i", "r2", item.rubric, "best"),
        Record("i", "r", Rubric("c"), "best"),
        Record("i", "r", item.rubric),
        Record("ir", ""),
        Record("i", "r", prompt="p"),
        Record(prompt="p2"),
    ]
    assert item.key == same.key
    assert len({item.key, *(other.key for other in others)}) == len(others) + 1
    assert Record("i", "r", prompt="p").key == Record(prompt="p").key


def test_the_key_is_pinned_because_seeds_and_splits_hang_on_it():
    assert Record("i", "r", Rubric("c")).key == "fb542f6ea6af4bbc"


def test_a_lone_surrogate_is_kept_and_has_a_key(read):
    [record] = read(r'{"response": "half \ud83d"}')
    assert record.response == "half \ud83d"
    assert len(record.key) == 16


@settings(max_examples=100)
@given(prompts=st.lists(st.sampled_from("abcdefghij"), max_size=30), fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_split_keeps_prompts_whole_and_records_in_order(prompts, fraction, seed):
    records = [Record(prompt=prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    rest, held_out = split_records(records, fraction, seed)
    keys = {record.key for record in records}
    held_keys = {record.key for record in held_out}
    assert not held_keys & {record.key for record in rest}
    assert sorted(rest + held_out, key=lambda record: int(record.id)) == records
    assert [r.id for r in rest] == sorted((r.id for r in rest), key=int)
    if len(keys) > 1 and fraction:
        assert 1 <= len(held_keys) < len(keys)
        assert abs(len(held_keys) - fraction * len(keys)) <= 1
    else:
        assert not held_out


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_the_file():
    records = [Record(prompt=str(n)) for n in range(100)]
    _, held_out = split_records(records, 0.2)
    _, from_reversed = split_records(records[::-1], 0.2)
    assert held_out == from_reversed[::-1] and len(held_out) == 20
    assert held_out != split_records(records, 0.2, seed=1)[1]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_between_zero_and_one(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split_records([Record(prompt="p")], fraction)


def test_reading_records_needs_no_heavy_package():
    heavy = {"torch", "transformers", "datasets", "pandas", "pyarrow", "scipy"}
    code = f"import sys, tract_lite.data.records; print(sorted({heavy} & sys.modules.keys()))"
    assert run_python(code).stdout == "[]\n"
