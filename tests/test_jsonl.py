import json
import subprocess
import sys
from pathlib import Path

import pytest

from tract_lite.data.jsonl import append_row, read_json, read_lines, read_rows, write_json, write_rows

ROOT = Path(__file__).parents[1]


def append_all(path, rows):
    return [append_row(path, row) for row in rows]


def test_rows_are_read_back_in_order_over_several_calls(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "text": "line\nbreak\u2028 naïve"}, {"id": "b", "score": None}, {}]
    for number, row in enumerate(rows):
        append_row(path, row)
        assert read_rows(path) == rows[: number + 1]
    assert len(path.read_bytes().splitlines()) == 3


def test_a_row_s_place_is_where_its_line_begins(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": "unfin')
    rows = [{"id": "ä"}, {"id": "b", "text": "x" * 99}, {"id": "c"}]
    places = append_all(path, rows)
    content = path.read_bytes()
    assert places[0] == 10
    assert [json.loads(content[place:].partition(b"\n")[0]) for place in places] == rows
    assert b"".join(line for line, _ in read_lines(path)) == content


def test_an_unfinished_last_line_is_not_read_and_is_cut_before_rows_are_added(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "te', encoding="utf-8")
    assert read_rows(path) == [{"id": 1}]
    assert path.read_text().endswith("te")
    append_row(path, {"id": 3})
    assert path.read_text() == '{"id": 1}\n{"id": 3}\n'


@pytest.mark.parametrize("size", [0, 100, 2**16 - 12, 2**16, 3 * 2**16])
def test_only_the_unfinished_line_is_cut_however_long_it_is(tmp_path, size):
    path = tmp_path / "rows.jsonl"
    whole = b'{"id": 1, "text": "%s"}\n' % (b"a" * 2**17)
    path.write_bytes(whole + b'{"id": 2' + b"b" * size)
    assert append_row(path, {"id": 4}) == len(whole)
    assert path.read_bytes() == whole + b'{"id": 4}\n'
    path.write_bytes(b'{"id": 2' + b"b" * size)
    append_row(path, {"id": 3})
    assert path.read_bytes() == b'{"id": 3}\n'


def test_a_row_that_can_t_be_written_whole_is_taken_back(tmp_path):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "rows.jsonl"
    code = (
        "import resource, sys; from tract_lite.data.jsonl import append_row\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for n in range(9): append_row(sys.argv[1], {'id': n, 'text': 'x' * 20})"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1].startswith("OSError")
    assert read_rows(path) == [{"id": n, "text": "x" * 20} for n in range(2)]
    assert path.read_bytes().endswith(b"\n")


def test_a_whole_file_is_replaced_at_once_and_kept_if_a_row_fails(tmp_path):
    path = tmp_path / "rows.jsonl"

    def failing():
        yield {"id": 2}
        raise RuntimeError("no more")

    write_rows(path, [{"id": 1}])
    with pytest.raises(RuntimeError):
        write_rows(path, failing())
    assert read_rows(path) == [{"id": 1}] and list(tmp_path.iterdir()) == [path]
    write_rows(path, [{"id": 3}, {"id": 4}])
    assert read_rows(path) == [{"id": 3}, {"id": 4}] and list(tmp_path.iterdir()) == [path]


def test_no_file_has_no_rows_and_no_object(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []
    assert read_json(tmp_path / "none.json") == {}


def test_a_lone_surrogate_survives(tmp_path):
    append_row(tmp_path / "rows.jsonl", {"text": "half \ud83d"})
    assert read_rows(tmp_path / "rows.jsonl") == [{"text": "half \ud83d"}]


@pytest.mark.parametrize(
    "content", ["id,score\n1,2\n", "some notes", json.dumps([{"id": 1}]) + "\n", "\n", b"\xff\n", "[" * 100_000 + "\n"]
)
def test_what_is_no_jsonl_is_refused_by_name(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="rows.jsonl is not JSONL"):
        read_rows(path)


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "settings.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="settings.json is damaged: "):
        read_json(tmp_path / "settings.json")


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "counts.json"
    write_json(path, {"kept": 1})
    with pytest.raises(TypeError):
        write_json(path, {"kept": object()})
    assert json.loads(path.read_text()) == {"kept": 1} and list(tmp_path.iterdir()) == [path]
    write_json(path, {"kept": 2})
    assert json.loads(path.read_text()) == read_json(path) == {"kept": 2}
    assert list(tmp_path.iterdir()) == [path]
