"""Files as spreadsheets, exports and data frames leave them."""

import codecs
import csv
import gzip
import io
import json
import random

import openpyxl
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from tract_lite.data.files import read_rows
from tract_lite.data.records import BadRows, read_records
from tract_lite.record import Record, Rubric

TEXT = "instruction,response,criteria,score\nÜber was?,Käse – 5 €,Is it clear?,4\nWhy?,Because.,Is it clear?,2\n"
RECORDS = [
    Record("Über was?", "Käse – 5 €", Rubric("Is it clear?"), score=4.0, id="0"),
    Record("Why?", "Because.", Rubric("Is it clear?"), score=2.0, id="1"),
]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file in it, or say --format hub"):
        read_records(tmp_path)


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_is_read_in_each_encoding_of_a_spreadsheet(tmp_path, encoding, newline):
    content = TEXT.replace("\n", newline).encode(encoding)
    assert read_records(write(tmp_path / "table.csv", content)) == RECORDS
    assert read_records(write(tmp_path / "table.csv.gz", gzip.compress(content))) == RECORDS


def test_what_is_not_utf_8_is_said_with_its_line(tmp_path, caplog):
    read_records(write(tmp_path / "table.csv", TEXT.encode("cp1252")))
    assert "line 2 is not UTF-8 (byte 0xdc): read as Excel's cp1252; --encoding names another" in caplog.text


def test_an_encoding_can_be_named(tmp_path):
    path = write(tmp_path / "table.csv", "response,score\nПривет,3\n".encode("cp1251"))
    assert read_records(path, encoding="cp1251")[0].response == "Привет"
    with pytest.raises(ValueError, match="no encoding 'cp9'"):
        read_records(path, encoding="cp9")
    with pytest.raises(ValueError, match="can't read .*table.csv as utf-8: --encoding names"):
        read_records(path, encoding="utf-8")


@pytest.mark.parametrize(
    "name, content",
    [
        ("damaged.csv", "response\nKäse\n".encode() + b"K\xe4se\n"),
        ("latin.jsonl", '{"response": "a"}\n{"response": "Käse"}\n'.encode("latin-1")),
        ("latin.json", '[{"response": "a"},\n {"response": "Käse"}]'.encode("latin-1")),
    ],
)
def test_damaged_utf_8_and_json_that_is_none_are_refused_with_line_and_cure(tmp_path, name, content):
    line = content[: content.index(b"\xe4")].count(b"\n") + 1
    with pytest.raises(ValueError, match=f"line {line} is not UTF-8 .*0xe4.*: save the file in UTF-8, or .*--encoding"):
        read_records(write(tmp_path / name, content))


# Dialects


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("announced", [False, True])
def test_columns_are_separated_as_the_first_line_says(tmp_path, separator, announced):
    rows = [["response", "rating, 1-5", "criteria"], ['say "a, b; c|d"', "3", "clear?\tvery"]]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows(rows)
    content = f"sep={separator}\r\n" * announced + text.getvalue()
    [record] = read_records(write(tmp_path / "table.csv", content), columns={"score": "rating, 1-5"})
    assert (record.response, record.score, record.rubric.criteria) == ('say "a, b; c|d"', 3, "clear?\tvery")


def test_a_blank_after_the_comma_belongs_to_neither_name_nor_text(tmp_path):
    text = 'instruction, response, score\ni, "a, b", 3\n'
    [record] = read_records(write(tmp_path / "table.csv", text))
    assert (record.instruction, record.response, record.score) == ("i", "a, b", 3)


@pytest.mark.parametrize("name", ["table.tsv", "TABLE.TSV", "table.tsv.gz"])
def test_tabs_alone_separate_a_tsv(tmp_path, name):
    content = b"response\tscore\na, b; c\t3\n"
    content = gzip.compress(content) if name.endswith("gz") else content
    assert read_records(write(tmp_path / name, content)) == [Record(response="a, b; c", score=3, id="0")]


def test_lines_of_the_announcement_and_of_empty_rows_are_counted(tmp_path, caplog):
    text = "sep=;\nresponse;score\na;1\n;\n\nb;x\n"
    path = write(tmp_path / "table.csv", text)
    with pytest.raises(BadRows, match="unusable rows: 1 of 2.*\n.*line 6: score"):
        read_records(path)
    assert [record.response for record in read_records(path, skip_bad=True)] == ["a"]
    assert "rows with nothing in them left out: 1" in caplog.text


# Damage


@pytest.mark.parametrize(
    "text, place",
    [
        ("response,criteria,score\nGood but it\ncrashes,4\nr,c,2\n", "line 2: .*\n.*line 3"),
        ("response,criteria,score\nr,c,2\nr\n", "line 3"),
        ("response,criteria,score\nr,c,2\ngood, but,c,3\n", "line 3"),
    ],
)
def test_a_row_of_fewer_or_more_values_than_columns_is_bad(tmp_path, text, place):
    with pytest.raises(BadRows, match=f"{place}: . values? for 3 columns: .*needs quotes around it"):
        read_records(write(tmp_path / "table.csv", text))
    assert len(read_records(tmp_path / "table.csv", skip_bad=True)) == 1


def test_a_quote_that_is_never_closed_is_an_error_even_where_bad_rows_are_left_out(tmp_path):
    text = 'response,score\nr,1\n"open,2\nr,3\nr,4\n'
    with pytest.raises(ValueError, match="opens in the row of line 3 is not closed"):
        read_records(write(tmp_path / "table.csv", text), skip_bad=True)


def test_a_quote_in_the_middle_spoils_its_own_row_alone(tmp_path):
    text = 'response,score\nr,1\n"so "called" answer",2\ns,3\n'
    with pytest.raises(BadRows, match="unusable rows: 1 of 3.*\n.*line 3: .*double the quotes"):
        read_records(write(tmp_path / "table.csv", text))
    assert [r.response for r in read_records(tmp_path / "table.csv", skip_bad=True)] == ["r", "s"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("twice.csv", b"response,score,score\nr,1,2\n"),
        ("blank.csv", b"response, score,score \nr,1,2\n"),
        ("twice.json", b'[{"response": "r", "score": 1, "score": 2}]'),
    ],
)
def test_a_column_name_that_stands_twice_is_an_error(tmp_path, name, content):
    with pytest.raises(ValueError, match="two columns are named score"):
        read_records(write(tmp_path / name, content))


def test_a_name_that_stands_twice_in_a_line_of_json_makes_it_a_bad_row(tmp_path):
    text = '{"response": "r"}\n{"response": "a", "response": "b"}\n'
    with pytest.raises(BadRows, match="line 2: two columns are named response"):
        read_records(write(tmp_path / "rows.jsonl", text))


def test_two_columns_of_one_name_in_parquet_and_in_a_frame_are_an_error(tmp_path):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    from tract_lite import records_from

    write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["response"] * 2), tmp_path / "t.parquet"
    )
    with pytest.raises(ValueError, match="two columns are named response"):
        read_records(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="two columns of one name"):
        records_from(pd.DataFrame([["a", "b"]], columns=["response", "response"]))


def test_columns_without_a_name_are_named_by_their_place_if_they_hold_something(tmp_path, caplog):
    frame = pd.DataFrame({"response": ["r"], "score": [3]})
    frame.to_csv(tmp_path / "frame.csv")
    [record] = read_records(tmp_path / "frame.csv")
    assert (record.response, record.score) == ("r", 3) and "not read: column 1" in caplog.text
    caplog.clear()
    read_records(write(tmp_path / "padded.csv", "response,instruction,score,,\nr,i,3,,\n"))
    assert "not read" not in caplog.text


# JSON


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize("layout", ["lines", "list", "pretty"])
def test_json_is_read_in_either_layout_whatever_its_name(tmp_path, name, layout):
    rows = [{"response": "a", "score": 1}, {"response": "b\u2028c", "score": 2}]
    texts = {
        "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "list": json.dumps(rows),
        "pretty": json.dumps(rows, indent=2),
    }
    content = codecs.encode(texts[layout], "utf-8")
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert [(r.response, r.score) for r in read_records(path)] == [("a", 1), ("b\u2028c", 2)]


def test_an_object_that_is_a_row_is_one(tmp_path):
    rows = [
        {"response": "r", "contexts": ["a", "b"]},
        {"id": 1, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
    ]
    for row in rows:
        assert [record.response for record in read_records(write(tmp_path / "row.json", json.dumps(row)))] == ["r"]
    with pytest.raises(ValueError, match='orient="records"'):
        read_records(write(tmp_path / "frame.json", pd.DataFrame({"response": ["r"]}).to_json()))


def test_what_stands_beside_the_list_of_rows_is_named(tmp_path, caplog):
    text = json.dumps({"version": 2, "data": [{"response": "r"}], "author": "me"})
    assert len(read_records(write(tmp_path / "rows.json", text))) == 1
    assert "read: data; not read: version, author" in caplog.text


# Spreadsheets


def workbook(path, *sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_spreadsheet_is_read_as_its_table(tmp_path, caplog):
    rows = [["Instruction", "Response ", "Criteria", "Rating (1-5)", None]]
    rows += [["i", "a\nb", "c", 4, None], [None] * 5, ["i", None, "c", "3,5", None], ["j", "r", "c", "N/A"]]
    path = workbook(tmp_path / "book.xlsx", ("Empty", []), ("Data", rows), ("More", [["response"], ["x"]]))
    records = read_records(path)
    assert [(r.instruction, r.response, r.score) for r in records] == [
        ("i", "a\nb", 4),
        ("i", "", 3.5),
        ("j", "r", None),
    ]
    assert "the sheet Data is read, not: More" in caplog.text
    assert "rows with nothing in them left out: 1" in caplog.text


def test_a_bad_row_of_a_spreadsheet_has_its_number(tmp_path):
    path = workbook(tmp_path / "book.xlsx", ("Data", [["response", "score"], ["a", 1], ["b", "good"]]))
    with pytest.raises(BadRows, match="row 3: score must be a finite number, got 'good'"):
        read_records(path)


@pytest.mark.parametrize(
    "name, advice", [("b.csv", "name it .xlsx"), ("b.xls", "save it as one"), ("b.ods", "save it as one")]
)
def test_a_spreadsheet_of_another_name_is_told_what_to_do(tmp_path, name, advice):
    book = workbook(tmp_path / "b.xlsx", ("Data", [["response"], ["r"]]))
    book.rename(tmp_path / name)
    with pytest.raises(ValueError, match=advice):
        read_records(tmp_path / name)


def test_a_visible_sheet_of_known_columns_is_read_before_others(tmp_path):
    about, data = [["About this file"], ["It has essays."]], [[None, None], ["question", "answer"], ["q", "a"]]
    path = workbook(tmp_path / "book.xlsx", ("Hidden", data), ("Read me", about), ("Data", data))
    book = openpyxl.load_workbook(path)
    book["Hidden"].sheet_state = "hidden"
    book["Data"]["B3"] = "of Data"
    book.save(path)
    assert [record.response for record in read_records(path)] == ["of Data"]


def test_a_formula_without_its_value_is_refused_with_its_place(tmp_path):
    path = workbook(tmp_path / "book.xlsx", ("Data", [["response", "score"], ["r", "=1+1"]]))
    with pytest.raises(ValueError, match="the cell B2 of Data is a formula without its value: open and save"):
        read_records(path)


def test_merged_cells_give_each_row_their_text_which_is_said(tmp_path, caplog):
    rows = [["instruction", "response"], ["How?", "a"], [None, "b"], [None, "c"]]
    path = workbook(tmp_path / "book.xlsx", ("Data", rows))
    book = openpyxl.load_workbook(path)
    book["Data"].merge_cells("A2:A4")
    book.save(path)
    assert [record.instruction for record in read_records(path)] == ["How?"] * 3
    assert "merged cells, read as if each had the text: A2:A4" in caplog.text


def test_what_is_no_workbook_is_refused_in_words(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="it is no workbook that openpyxl can read .*: save it again as .xlsx"):
        read_records(tmp_path / "b.xlsx")


# Headers


@pytest.mark.parametrize(
    "text, fault",
    [
        ("response,score\nr,1\nresponse,score\ns,2\n", "line 3: the header stands here again"),
        (
            'response,score\nr,1\n"{""ImportId"":""Q1""}",x\ns,2\n',
            "line 2 and 1 more: a line of the header of Qualtrics",
        ),
        (
            "Results of May\nresponse,score\nr,1\ns,2\n",
            "line 2 and 2 more: 2 values for 1 column: the first line must be",
        ),
    ],
)
def test_a_line_that_belongs_to_a_header_is_no_item(tmp_path, text, fault):
    with pytest.raises(BadRows, match=fault):
        read_records(write(tmp_path / "table.csv", text))


def test_blank_lines_before_the_header_are_none_of_it(tmp_path):
    path = write(tmp_path / "table.csv", "\n \r\nsep=;\nresponse;score\nr;x\n")
    with pytest.raises(BadRows, match="line 5: score"):
        read_records(path)


# Nothing is lost


def damaged(rows: list[list[str]], draw: random.Random) -> tuple[str, bytes, int]:
    """A table with something wrong; its encoding, its bytes and how many rows stand in it."""
    header, *body = [list(row) for row in rows]
    for _ in range(draw.randrange(1, 4)):
        place, row = draw.randrange(len(header)), draw.choice(body)
        kind = draw.choice(["rename", "drop", "double", "case", "empty", "cut", "long", "blank row", "word"])
        if kind == "rename":
            header[place] = draw.choice(["answer", "question", "notes", "respones", "prompt", "Rating (1-5)", "id"])
        elif kind == "drop" and len(header) > 1:
            for line in (header, *body):
                del line[place : place + 1]
        elif kind == "double":
            for line in (header, *body):
                line.append(line[place] if place < len(line) else "")
        elif kind == "case":
            header[place] = f" {header[place].upper()}"
        elif kind == "empty" and place < len(row):
            row[place] = draw.choice(["", "  ", "N/A"])
        elif kind == "cut":
            del row[-1:]
        elif kind == "long":
            row.append("more")
        elif kind == "blank row":
            row[:] = [""] * len(header)
        elif kind == "word" and place < len(row):
            row[place] = "good"
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=draw.choice(",;\t")).writerows([header, *body])
    encoding = draw.choice(["utf-8", "utf-8-sig", "utf-16", "cp1252"])
    return encoding, text.getvalue().encode(encoding), sum(1 for row in body if row)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**9), gold_needed=st.booleans())
def test_every_row_of_a_damaged_table_is_read_refused_or_reported(tmp_path_factory, seed, gold_needed):
    draw = random.Random(seed)
    rows = [["id", "instruction", "response", "criteria", "score", "remark"]]
    rows += [[f"x{n}", f"i{n}", f"r{n} ä", f"c{n}", str(n % 5 + 1), f"note {n}"] for n in range(6)]
    _, content, count = damaged(rows, draw)
    path = write(tmp_path_factory.mktemp("damage") / "table.csv", content)
    placed = [row for _, row in read_or_none(path)]
    rejected: list[str] = []
    log = Log()
    with log:
        try:
            records = read_records(path, skip_bad=True, rejected=rejected, gold_needed=gold_needed)
        except ValueError as error:
            # The whole file is refused, and says why.
            assert "two columns" in str(error) or "no usable row" in str(error)
            return
    empty = sum(isinstance(row, dict) and not any(cell.strip() for cell in row.values()) for row in placed)
    assert len(placed) == count == len(records) + len(rejected) + empty
    assert not empty or f"rows with nothing in them left out: {empty}" in log.text
    # What stands in a record, or in a column that is named, is not left out without a word.
    asked = "\n".join(f"{r.instruction} {r.response} {r.prompt} {r.rubric} {r.reference} {r.feedback}" for r in records)
    for place, row in zip(places(path), placed):
        if isinstance(row, dict) and not any(fault.startswith(f"{place}:") for fault in rejected):
            for name, cell in row.items():
                known = cell.strip() in asked or name in log.text
                assert known or not cell.strip(), (name, cell, log.text)


def read_or_none(path):
    try:
        return list(read_rows(str(path)))
    except ValueError:
        return []


def places(path):
    return [place for place, _ in read_or_none(path)]


class Log:
    """What the package logs inside."""

    def __enter__(self):
        import logging

        self._handler = logging.StreamHandler(stream := io.StringIO())
        self._stream, self._logger = stream, logging.getLogger("tract_lite")
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self._handler)

    def __exit__(self, *_):
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._level)

    @property
    def text(self):
        return self._stream.getvalue()
