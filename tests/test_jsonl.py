import json
import subprocess
import sys
from pathlib import Path

import pytest

from tract_lite.data.jsonl import append_rows, keep_rows, read_rows, write_json, write_rows

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("size", [0, 100, 2**16 - 12, 2**16, 3 * 2**16])
def test_only_the_unfinished_line_is_cut_however_long_it_is(tmp_path, size):
    path = tmp_path / "rows.jsonl"
    whole = b'{"id": 1, "text": "%s"}\n' % (b"a" * 2**17)
    path.write_bytes(whole + b'{"id": 2' + b"b" * size)
    append_rows(path, [])
    assert path.read_bytes() == whole
    path.write_bytes(b'{"id": 2' + b"b" * size)
    append_rows(path, [{"id": 3}])
    assert path.read_bytes() == b'{"id": 3}\n'


def test_a_row_that_can_t_be_written_whole_is_taken_back(tmp_path):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "rows.jsonl"
    code = (
        "import resource, sys; from tract_lite.jsonl import append_rows\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "append_rows(sys.argv[1], ({'id': n, 'text': 'x' * 20} for n in range(9)))"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1].startswith("OSError")
    assert read_rows(path) == [{"id": n, "text": "x" * 20} for n in range(2)]
    assert path.read_bytes().endswith(b"\n")


def test_rows_that_are_kept_stay_as_they_are_and_the_others_go(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id":1 , "x": 0.10}\n{"id": 2}\n{"id": 3}\n{"id": 4')
    keep_rows(path, lambda row: row["id"] != 2)
    assert path.read_bytes() == b'{"id":1 , "x": 0.10}\n{"id": 3}\n'
    with pytest.raises(KeyError):
        keep_rows(path, lambda row: row["x"])
    assert path.read_bytes() == b'{"id":1 , "x": 0.10}\n{"id": 3}\n'
    assert list(tmp_path.iterdir()) == [path]


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


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_lone_surrogate_survives(tmp_path):
    append_rows(tmp_path / "rows.jsonl", [{"text": "half \ud83d"}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"text": "half \ud83d"}]


@pytest.mark.parametrize(
    "content", ["id,score\n1,2\n", "some notes", json.dumps([{"id": 1}]) + "\n", "\n", b"\xff\n", "[" * 100_000 + "\n"]
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
    assert json.loads(path.read_text()) == {"kept": 1} and list(tmp_path.iterdir()) == [path]
    write_json(path, {"kept": 2})
    assert json.loads(path.read_text()) == {"kept": 2}
    assert list(tmp_path.iterdir()) == [path]
