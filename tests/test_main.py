import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_llama, make_sentences, make_spm
from transformers import AutoTokenizer

from tract_lite.gguf import export_gguf
from tract_lite.jsonl import append_rows, read_rows
from tract_lite.prompt import make_spec
from tract_lite.scale import ScoreScale
from tract_lite.spec import Sampling

ROOT = Path(__file__).parents[1]
ROWS = [
    {"response": text, "criteria": "Is it clear?", "score": n % 5 + 1}
    for n, text in enumerate(make_sentences(6))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, and the judge made from it."""
    folder = tmp_path_factory.mktemp("main")
    make_llama(folder / "model", make_spm(folder / "spm", make_sentences()))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    spec = make_spec(
        tokenizer,
        ScoreScale.integers(1, 5),
        max_length=400,
        template="{{ rubric.criteria }} {{ response }}\n",
        sampling=Sampling(max_new_tokens=12),
    )
    spec.save(folder / "model")
    export_gguf(folder / "model", folder / "judge.gguf", "f32")
    return folder


@pytest.fixture
def data(tmp_path):
    """The rows as CSV, the last one without a gold score."""
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows([*ROWS[:-1], ROWS[-1] | {"score": ""}])
    return path


def call(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "tract_lite", *map(str, arguments)],
        input=stdin,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def judge(folder, source, output, *options, stdin=""):
    done = call(
        "judge", folder / "judge.gguf", source, "-o", output, "--threads", 1, *options, stdin=stdin
    )
    assert done.returncode == 0, done.stderr
    return done, read_rows(output)


def test_a_file_is_judged_row_by_row_with_progress(folder, data, tmp_path):
    done, rows = judge(folder, data, tmp_path / "out.jsonl", "--n-cot", 2)
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row.get("gold") for row in rows] == [1, 2, 3, 4, 5, None]
    assert all(len(row["scores"]) == len(row["feedback"]) == 2 for row in rows)
    assert all(row["error"] is None and row["probabilities"].keys() == set("12345") for row in rows)
    assert "6 judged, 0 of them failed, 0 were there already" in done.stdout
    assert "6/6" in done.stderr and "item/s" in done.stderr


def test_a_second_call_judges_only_what_is_missing(folder, data, tmp_path):
    _, whole = judge(folder, data, tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    append_rows(output, whole[:3])
    with output.open("a") as file:
        file.write('{"id": "3", "score": 1.')
    done, rows = judge(folder, data, output)
    assert "3 judged, 0 of them failed, 3 were there already" in done.stdout
    assert rows[:3] == whole[:3] and [row["id"] for row in rows] == [row["id"] for row in whole]
    assert [row["feedback"] for row in rows] == [row["feedback"] for row in whole]
    before = output.read_bytes()
    done, _ = judge(Path("no", "model", "is", "needed"), data, output)
    assert "0 judged" in done.stdout and output.read_bytes() == before


def test_standard_input_is_judged_and_failed_items_are_counted(folder, tmp_path):
    lines = [
        {"response": "Clear.", "criteria": "c", "id": "a"},
        {"response": "No rubric."},
        {"response": "so " * 500, "criteria": "c"},
        {"score": 3},
    ]
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    done, rows = judge(folder, "-", tmp_path / "out.jsonl", "--skip-bad", stdin=stdin)
    assert [row["id"] for row in rows] == ["a", "1", "2"]
    assert rows[0]["error"] is None and "rubric" in rows[1]["error"]
    assert "does not fit" in rows[2]["error"] and rows[2]["score"] is None
    assert "3 judged, 2 of them failed" in done.stdout
    assert "unusable rows left out: 1" in done.stderr


def test_a_given_spec_replaces_the_one_inside(folder, data, tmp_path):
    spec = json.loads((folder / "model" / "judge_spec.json").read_text())
    spec["sampling"]["max_new_tokens"] = 2
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    _, rows = judge(
        folder,
        data,
        tmp_path / "out.jsonl",
        "--spec",
        tmp_path / "spec.json",
        "--parallel",
        2,
        "--context-length",
        200,
        "--seed",
        5,
    )
    assert max(len(row["feedback_ids"][0]) for row in rows) == 2


def test_export_writes_files_that_judge(folder, data, tmp_path):
    done = call("export", folder / "model", "-o", tmp_path / "judge.gguf", "--quantization", "q8_0")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'judge.gguf'}: 0.1 MiB\n"
    _, rows = judge(tmp_path, data, tmp_path / "out.jsonl")
    assert len(rows) == 6


def test_evaluate_measures_items_with_gold_and_counts_the_others(tmp_path):
    path = tmp_path / "out.jsonl"
    append_rows(
        path,
        [
            {"id": "a", "score": 1.5, "gold": 1},
            {"id": "b", "score": 2.5, "gold": 2},
            {"id": "c", "score": None, "gold": 3},
            {"id": "d", "score": 3.0},
        ],
    )
    done = call("evaluate", path)
    assert done.returncode == 0, done.stderr
    assert "pearson" in done.stdout and "| out |   1.000 |" in done.stdout
    assert "3 items with a gold score, 2 of them with a judgement; 1 without" in done.stdout


def test_report_prints_where_the_page_is(tmp_path):
    append_rows(tmp_path / "judgements.jsonl", [{"score": 1.0, "gold": 2.0}])
    done = call("report", tmp_path)
    assert done.stdout == f"{tmp_path / 'report.md'}\n" and (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("judge", "{judge}", "none.csv", "-o", "{out}"), "no file none.csv"),
        (("judge", "{judge}", "{data}", "-o", "none/out.jsonl"), "no folder none"),
        (("judge", "none.gguf", "{data}", "-o", "{out}"), "none.gguf"),
        (("judge", "{data}", "{data}", "-o", "{out}"), "is not a GGUF file"),
        (("judge", "{judge}", "{data}", "-o", "{data}"), "is not JSONL"),
        (("judge", "{judge}", "{data}", "-o", "{plain}"), "other rows than judgements"),
        (("judge", "{judge}", "{plain}", "-o", "{out}"), "unusable rows: 2; .* line 1: neither"),
        (
            ("judge", "{judge}", "{data}", "-o", "{out}", "--n-cot", "0"),
            "--n-cot must be at least 1",
        ),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--spec", "none.json"), "no judge spec at"),
        (("export", "none", "-o", "{out}"), "none is not a model folder"),
        (("evaluate", "none.jsonl"), "no file none.jsonl"),
        (("evaluate", "{plain}"), "none of the 2 rows"),
        (("report", "none"), "nothing to report"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    folder, data, tmp_path, arguments, words
):
    plain = tmp_path / "plain.jsonl"
    append_rows(plain, [{"id": "a"}, {"id": "b"}])
    names = {
        "judge": folder / "judge.gguf",
        "data": data,
        "plain": plain,
        "out": tmp_path / "out.jsonl",
    }
    before = data.read_bytes(), plain.read_bytes()
    done = call(*(argument.format(**names) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line)
    assert (data.read_bytes(), plain.read_bytes()) == before
    assert not (tmp_path / "out.jsonl").exists()


def test_an_error_of_another_kind_is_not_hidden(folder, tmp_path, monkeypatch):
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    done = call("export", folder / "model", "-o", tmp_path / "judge.gguf")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_call_without_a_verb_shows_the_usage():
    done = call()
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m tract_lite")
