"""Going on after a stop: a row for each record, how the rows were made, and nothing made twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable, Iterator

import pytest

from tract_lite.data.jsonl import append_row, read_json, read_rows
from tract_lite.data.resume import MOST_WAITING, ResumableRows, claim, name_of
from tract_lite.record import Record

HOW, SHAPE = {"fingerprint": "ab", "n_cot": 1, "seed": 0}, {"parallel": 4}


def make_records(texts: Iterable[str]) -> list[Record]:
    return [Record(prompt=text, id=f"id {n}") for n, text in enumerate(texts)]


def upper(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """A row for each record; records of `x` fail."""
    for record in records:
        yield {"text": record.prompt.upper(), "error": "no" if record.prompt == "x" else None}


def fill(path: Path, records: Iterable[Record], make: Any = upper) -> list[str]:
    rows = ResumableRows(path)
    rows.claim(HOW, SHAPE)
    return [row["text"] for row in rows.fill(records, make)]


def nothing(records: Iterator[Record]) -> Iterator[dict[str, Any]]:
    """For where every record has its row."""
    for record in records:
        pytest.fail(f"{record.id} is asked for again")
    yield from ()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


# Rows and their records


def test_a_row_belongs_to_the_record_of_its_id_and_content(path: Path) -> None:
    a, b = make_records("ab")
    rows = ResumableRows(path)
    assert not rows.has(a) and list(rows.rows()) == []
    rows.append(a, {"text": "A"})
    assert rows.has(a) and not rows.has(b)
    assert rows.has(replace(a, score=5.0, feedback="What it is not asked by."))
    assert rows.row("id 0") == {"text": "A", "id": "id 0", "key": a.key} == read_rows(path)[0]
    again = ResumableRows(path)
    assert again.has(a) and not again.has(b)
    with pytest.raises(ValueError, match="another item with the id 'id 0'.* choose another output"):
        again.has(replace(b, id="id 0"))


def test_a_record_without_an_id_is_known_by_its_content(path: Path) -> None:
    a, b = (Record(prompt=text) for text in "ab")
    rows = ResumableRows(path)
    rows.append(a, {"id": None})
    assert rows.has(a) and rows.has(replace(a)) and not rows.has(b)
    assert name_of(a) == a.key == read_rows(path)[0]["id"]
    assert name_of(replace(a, id="x")) == "x"


def test_what_is_no_record_has_no_row(path: Path) -> None:
    with pytest.raises(ValueError, match="not a Record: 'a'; read_records gives them"):
        ResumableRows(path).has("a")  # type: ignore[arg-type]


def test_an_unfinished_last_line_is_no_row_and_makes_way_for_the_next(path: Path) -> None:
    a, b, c = make_records("abc")
    rows = ResumableRows(path)
    for record in (a, b):
        rows.append(record, {"text": record.prompt})
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    rows = ResumableRows(path)
    assert rows.has(a) and not rows.has(b)
    rows.append(c, {"text": "c"})
    rows.append(b, {"text": "b"})
    assert [row["text"] for row in rows.rows()] == ["a", "c", "b"] == [row["text"] for row in read_rows(path)]
    assert path.read_bytes().startswith(whole.splitlines(keepends=True)[0])


def test_rows_come_in_the_order_that_is_asked_for(path: Path) -> None:
    rows = ResumableRows(path)
    for record in make_records("abcd"):
        rows.append(record, {"text": record.prompt})
    asked = ["id 2", "id 9", "id 0", "id 2"]
    assert [row["text"] for row in rows.rows(asked)] == ["c", "a", "b", "d"]
    assert [row["text"] for row in rows.rows()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "row", [{"id": "a"}, {"key": "k"}, {"id": 1, "key": "k"}, {"id": None, "key": "k"}, {"score": 3}]
)
def test_a_file_of_other_rows_is_refused_and_left_alone(path: Path, row: dict[str, Any]) -> None:
    append_row(path, row)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds other rows than these: choose another output"):
        ResumableRows(path)
    assert path.read_bytes() == before


# A failed row, and the later one that stands in its place


def test_a_failed_row_can_be_read_and_its_record_is_still_to_be_done(path: Path) -> None:
    [record] = make_records("x")
    rows = ResumableRows(path)
    rows.append(record, {"error": "too long"})
    assert not rows.has(record) and rows.row("id 0")["error"] == "too long"
    assert not ResumableRows(path).has(record)
    rows.append(record, {"error": None, "text": "X"})
    assert rows.has(record) and rows.row("id 0")["text"] == "X"
    assert [row["text"] for row in rows.rows()] == ["X"] and len(read_rows(path)) == 2


def test_a_row_that_fails_later_is_to_be_done_again(path: Path) -> None:
    [record] = make_records("x")
    rows = ResumableRows(path)
    for error in (None, "no"):
        rows.append(record, {"error": error})
    assert not rows.has(record) and not ResumableRows(path).has(record)


def test_tidying_keeps_the_last_row_of_each_id_byte_for_byte(path: Path) -> None:
    keys = [record.key for record in make_records("abc")]
    lines = [
        f'{{"id":"id 0" , "key":"{keys[0]}", "error":"no"}}\n',
        f'{{"id": "id 1", "key": "{keys[1]}", "score": 0.10, "text": "\\u00e4 ä"}}\n',
        f'{{"key": "{keys[0]}", "id": "id 0", "error": null}}\n',
        f'{{"id": "id 2", "key": "{keys[2]}"}}\n',
        f'{{"id":  "id 1", "key": "{keys[1]}", "score": 1e0}}\n',
    ]
    path.write_text("".join(lines) + '{"id": "unfin', encoding="utf-8")
    rows = ResumableRows(path)
    assert path.read_text(encoding="utf-8") == "".join(lines[2:])
    assert [rows.row(f"id {n}").get("score") for n in range(3)] == [None, 1.0, None]
    rows.append(make_records("a")[0], {"text": "new"})
    assert rows.row("id 0")["text"] == "new" and rows.row("id 2")["id"] == "id 2"
    rows.tidy()
    assert path.read_text(encoding="utf-8").startswith("".join(lines[3:]))
    assert rows.row("id 0")["text"] == "new" and [row["id"] for row in read_rows(path)] == ["id 2", "id 1", "id 0"]


def test_a_file_with_one_row_of_each_id_is_not_written_again(path: Path) -> None:
    fill(path, make_records("ab"))
    before = path.stat()
    ResumableRows(path).tidy()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# How rows were made


def test_how_the_rows_were_made_stands_beside_them_with_every_shape(path: Path, tmp_path: Path) -> None:
    run = tmp_path / "rows.run.json"
    for shape in (SHAPE, {"parallel": 8}, SHAPE):
        rows = ResumableRows(path)
        rows.claim(HOW, shape)
        rows.append(Record(prompt="a", id=str(shape)), {})
    assert read_json(run) == {**HOW, "shapes": [SHAPE, {"parallel": 8}]}


def test_rows_that_were_made_otherwise_are_refused_with_a_line_for_each_thing(path: Path, tmp_path: Path) -> None:
    fill(path, make_records("a"))
    before = (tmp_path / "rows.run.json").read_bytes()
    with pytest.raises(ValueError) as refused:
        ResumableRows(path).claim({**HOW, "n_cot": 4, "fingerprint": "cd", "adapter": "ef"}, SHAPE)
    first, *lines = str(refused.value).splitlines()
    assert first == f"{tmp_path / 'rows.run.json'} was made with other settings: choose another output, or these again:"
    assert [line.strip() for line in lines] == [
        "fingerprint: ab there, cd now",
        "n_cot: 1 there, 4 now",
        "adapter: not given there, ef now",
    ]
    assert (tmp_path / "rows.run.json").read_bytes() == before


def test_rows_of_which_nobody_knows_how_they_were_made_are_refused(path: Path, tmp_path: Path) -> None:
    fill(path, make_records("a"))
    (tmp_path / "rows.run.json").unlink()
    with pytest.raises(ValueError, match="rows.run.json, which says how they were made, is gone"):
        ResumableRows(path).claim(HOW, SHAPE)


def test_what_was_to_be_made_is_forgotten_where_no_row_was_made(path: Path, tmp_path: Path) -> None:
    ResumableRows(path).claim(HOW, SHAPE)
    other = {**HOW, "seed": 7}
    ResumableRows(path).claim(other, SHAPE)
    assert read_json(tmp_path / "rows.run.json") == {**other, "shapes": [SHAPE]}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"text"'])
def test_a_damaged_file_of_how_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "how.json").write_text(content)
    with pytest.raises(ValueError, match="how.json is damaged .*: choose another output"):
        claim(tmp_path / "how.json", HOW)
    assert (tmp_path / "how.json").read_text() == content


def test_a_claim_compares_what_json_keeps_and_leaves_what_else_is_there(tmp_path: Path) -> None:
    file = tmp_path / "how.json"
    claim(file, {"labels": ("1", "2"), "scale": {1: "a"}})
    written = file.read_bytes()
    claim(file, {"labels": ["1", "2"]})
    assert file.read_bytes() == written and json.loads(written) == {"labels": ["1", "2"], "scale": {"1": "a"}}


@pytest.mark.parametrize(
    "before, now, lines",
    [
        ({"settings": {"epochs": 1, "seed": 2}}, {"settings": {"epochs": 3, "seed": 2}}, ["epochs: 1 there, 3 now"]),
        ({"sampling": None}, {"sampling": {"top_p": 0.5}}, ["sampling: not given there, {'top_p': 0.5} now"]),
        ({"columns": ["a=b"]}, {"columns": ["a=b", "c=d"]}, ["columns: a=b there, a=b c=d now"]),
        ({"skip_bad": True}, {"skip_bad": False}, ["skip_bad: True there, False now"]),
        ({"template": "{{ response }}" * 9}, {"template": None}, ["template: another content"]),
        ({"spec_sha256": "ab" * 32}, {"spec_sha256": "cd" * 32}, ["spec: another content"]),
        # By content where it is known of both, else by name.
        ({"data": "a", "data_sha256": "1"}, {"data": "b", "data_sha256": "1"}, []),
        ({"data": "a", "data_sha256": "1"}, {"data": "a", "data_sha256": "2"}, ["data: another content"]),
        ({"data": "a", "data_sha256": None}, {"data": "b", "data_sha256": "2"}, ["data: a there, b now"]),
        ({"data": "a", "data_sha256": "1"}, {"data": "a", "data_sha256": None}, []),
    ],
)
def test_a_refusal_says_in_a_line_what_differs(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], lines: list[str]
) -> None:
    claim(tmp_path / "how.json", before)
    if not lines:
        claim(tmp_path / "how.json", now)
        return
    with pytest.raises(ValueError) as refused:
        claim(tmp_path / "how.json", now)
    assert [line.strip() for line in str(refused.value).splitlines()[1:]] == lines


# A row for each record


def test_each_record_gets_its_row_in_order_and_only_those_without_one_are_asked_for(path: Path) -> None:
    records = make_records("abcdef")
    rows = ResumableRows(path)
    for number in (4, 1):
        rows.append(records[number], {"text": "old"})
    asked = []

    def noting(missing: Iterator[Record]) -> Iterator[dict[str, Any]]:
        return upper(asked.append(record.prompt) or record for record in missing)

    assert [row["text"] for row in rows.fill(records, noting)] == ["A", "old", "C", "D", "old", "F"]
    assert asked == ["a", "c", "d", "f"]
    assert [row["text"] for row in rows.fill(records[::-1], nothing)] == ["F", "old", "D", "C", "old", "A"]


def test_a_gold_score_stands_in_the_row(path: Path) -> None:
    records = [Record(prompt="a", score=3.5, id="a"), Record(prompt="b", id="b")]
    assert fill(path, records) == ["A", "B"]
    assert [row.get("gold") for row in read_rows(path)] == [3.5, None]
    assert "gold" not in read_rows(path)[1]


def test_a_row_is_in_the_file_before_the_next_one_is_made(path: Path) -> None:
    rows = ResumableRows(path)
    for number, _ in enumerate(rows.fill(make_records("abc"), upper), 1):
        assert len(read_rows(path)) == number


def test_a_call_that_was_stopped_is_gone_on_with(path: Path) -> None:
    def stopping(missing: Iterator[Record]) -> Iterator[dict[str, Any]]:
        for row in upper(missing):
            if row["text"] == "C":
                raise KeyboardInterrupt
            yield row

    records = make_records("abcd")
    with pytest.raises(KeyboardInterrupt):
        fill(path, records, stopping)
    assert [row["text"] for row in read_rows(path)] == ["A", "B"]
    assert fill(path, records) == ["A", "B", "C", "D"]
    assert fill(path, records, nothing) == ["A", "B", "C", "D"]


def test_failed_rows_are_made_again_and_the_file_is_tidy_at_the_end(path: Path) -> None:
    def better(missing: Iterator[Record]) -> Iterator[dict[str, Any]]:
        for record in missing:
            yield {"text": f"better {record.id}", "error": None}

    records = make_records("axbx")
    assert fill(path, records) == ["A", "X", "B", "X"]
    good = [line for line in path.read_bytes().splitlines() if b'"error": null' in line]
    assert fill(path, records, better) == ["A", "better id 1", "B", "better id 3"]
    assert path.read_bytes().splitlines()[:2] == good
    assert [row["id"] for row in read_rows(path)] == ["id 0", "id 2", "id 1", "id 3"]


def test_records_of_one_content_without_an_id_have_one_row(path: Path) -> None:
    records = [Record(prompt=text) for text in "abab"]
    assert fill(path, records) == ["A", "B", "A", "B"]
    assert len(read_rows(path)) == 2
    assert fill(path, records, nothing) == ["A", "B", "A", "B"]
    assert [row["id"] for row in ResumableRows(path).fill(records, nothing)] == [None] * 4


def test_another_input_is_refused_where_it_is_reached(path: Path) -> None:
    fill(path, make_records("abc"))
    found = []
    with pytest.raises(ValueError, match="another item with the id 'id 2'"):
        for row in ResumableRows(path).fill(make_records("abz"), nothing):
            found.append(row["text"])
    assert found == ["A", "B"]


def test_records_are_taken_as_they_are_needed(path: Path) -> None:
    records = make_records("abcdefghij")
    rows = ResumableRows(path)
    for record in records[:5]:
        rows.append(record, {"text": "old"})
    taken: list[str] = []

    def reading() -> Iterator[Record]:
        for record in records:
            taken.append(record.prompt)
            yield record

    for number, row in enumerate(rows.fill(reading(), upper), 1):
        assert len(taken) == number
        assert row["text"] == ("old" if number <= 5 else taken[-1].upper())


@pytest.mark.parametrize("missing", [0, 3])
def test_however_many_rows_are_there_few_records_are_held(path: Path, missing: int) -> None:
    """`make` is asked for one record, looks ahead for another, and there is none for long."""

    def looking_ahead(wanted: Iterator[Record]) -> Iterator[dict[str, Any]]:
        yield from upper(list(wanted))

    count = 3 * MOST_WAITING
    records = make_records(["a"] * count)
    key = records[0].key
    lines = (json.dumps({"id": r.id, "key": key, "text": "old"}) for n, r in enumerate(records) if n != missing)
    path.write_text("\n".join(lines) + "\n")
    taken: list[Record] = []
    filled = ResumableRows(path).fill((taken.append(record) or record for record in records), looking_ahead)
    assert [next(filled)["text"] for _ in range(missing + 1)] == ["old"] * missing + ["A"]
    assert len(taken) <= MOST_WAITING + missing + 1
    assert [row["text"] for row in filled] == ["old"] * (count - missing - 1)
    assert len(read_rows(path)) == count
