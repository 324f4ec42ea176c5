import json

import pytest

from tract_lite.jsonl import append_rows, read_rows, write_json, write_rows


def test_rows_are_read_back_in_order_over_several_calls(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "text": "line\nbreak\u2028 naïve"}, {"id": "b", "score": None}, {}]
    append_rows(path, rows[:1])
    append_rows(path, iter(rows[1:]))
    assert read_rows(path) == rows
    assert len(path.read_bytes().splitlines()) == 3


def test_a_row_is_in_the_file_before_the_next_one_is_made(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows():
        for number in range(3):
            yield {"id": number}
            assert read_rows(path)[-1] == {"id": number}

    append_rows(path, rows())


def test_an_unfinished_last_line_is_not_read_and_is_cut_before_rows_are_added(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "te', encoding="utf-8")
    assert read_rows(path) == [{"id": 1}]
    assert path.read_text().endswith("te")
    append_rows(path, [{"id": 3}])
    assert path.read_text() == '{"id": 1}\n{"id": 3}\n'


def test_a_whole_file_is_replaced_at_once_and_kept_if_a_row_fails(tmp_path):
    path = tmp_path / "rows.jsonl"

    def failing():
        yield {"id": 2}
        raise RuntimeError("no more")

    write_rows(path, [{"id": 1}])
    with pytest.raises(RuntimeError):
        write_rows(path, failing())
    assert read_rows(path) == [{"id": 1}]
    write_rows(path, [{"id": 3}, {"id": 4}])
    assert read_rows(path) == [{"id": 3}, {"id": 4}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_lone_surrogate_survives(tmp_path):
    append_rows(tmp_path / "rows.jsonl", [{"text": "half \ud83d"}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"text": "half \ud83d"}]


@pytest.mark.parametrize(
    "content",
    [
        "id,score\n1,2\n",
        "some notes",
        json.dumps([{"id": 1}]) + "\n",
        "\n",
        b"\xff\n",
    ],
)
def test_what_is_no_jsonl_is_refused_by_name(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="rows.jsonl is not JSONL"):
        read_rows(path)


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "counts.json"
    write_json(path, {"kept": 1})
    with pytest.raises(TypeError):
        write_json(path, {"kept": object()})
    assert json.loads(path.read_text()) == {"kept": 1}
    write_json(path, {"kept": 2})
    assert json.loads(path.read_text()) == {"kept": 2}
    assert list(tmp_path.iterdir()) == [path]
