"""The command line: what each verb prints and leaves, and how it fails."""

import csv
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow.parquet import read_table
from servers import FakeVLLM, fake_server, free_port
from stages import make_records, small_seed_model
from tiny import load_tokenizer, make_llama, make_sentences, make_spm
from transformers import AutoTokenizer

from tract_lite import Judge, __version__, read_records, write_records
from tract_lite.__main__ import main
from tract_lite.data.jsonl import read_rows, write_rows
from tract_lite.engines.llama import MAX_PARALLEL
from tract_lite.engines.llama_cpp import SPEC_KEY
from tract_lite.export.gguf import export_gguf
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, Sampling, make_spec
from tract_lite.vocabulary import TransformersVocabulary

pytestmark = pytest.mark.export

ROOT = Path(__file__).parents[1]
ROWS = [{"response": text, "criteria": "Is it clear?", "score": n % 5 + 1} for n, text in enumerate(make_sentences(6))]


def make_judge(folder):
    """A model folder, and the judge made from it."""
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
    export_gguf(folder / "model", folder / "judge.gguf", "f32", check=False)


@pytest.fixture(scope="module")
def folder(shared_once):
    return shared_once("command_line", make_judge)


@pytest.fixture
def data(tmp_path):
    """The rows as CSV, the last one without a gold score."""
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows([*ROWS[:-1], ROWS[-1] | {"score": ""}])
    return path


COMMAND = [sys.executable, "-m", "tract_lite"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


def call(*arguments, stdin="", **options):
    fixed = {"cwd": ROOT, "encoding": "utf-8", "env": ENVIRONMENT}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=stdin, **fixed | streams | options)


def judge(folder, source, output, *options, stdin=""):
    done = call("judge", folder / "judge.gguf", source, "-o", output, "--threads", 1, *options, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done, read_rows(output.with_suffix(".jsonl"))


def test_a_file_is_judged_row_by_row_with_progress(folder, data, tmp_path):
    done, rows = judge(folder, data, tmp_path / "out.jsonl", "--n-cot", 2)
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row.get("gold") for row in rows] == [1, 2, 3, 4, 5, None]
    assert all(len(row["scores"]) == len(row["feedback"]) == 2 for row in rows)
    assert all(row["error"] is None and row["probabilities"].keys() == set("12345") for row in rows)
    assert "6 judged, 0 of them failed, 0 were there already" in done.stdout
    assert "6/6" in done.stderr and "item/s" in done.stderr


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The input as JSONL, and the output of one call that judged all of it."""
    folder_of_run = tmp_path_factory.mktemp("whole")
    write_rows(folder_of_run / "data.jsonl", ({**row, "id": f"item {n}"} for n, row in enumerate(ROWS)))
    judge(folder, folder_of_run / "data.jsonl", folder_of_run / "out.jsonl", "--n-cot", 2)
    return folder_of_run


def stopped_copy(whole, tmp_path, rows=3) -> Path:
    """The output as if the call had been killed while it wrote the row after `rows`."""
    output = tmp_path / "out.jsonl"
    lines = (whole / "out.jsonl").read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:rows]) + lines[rows][:40])
    shutil.copy(whole / "out.run.json", tmp_path)
    return output


def test_a_second_call_judges_only_what_is_missing(folder, whole, tmp_path):
    output = stopped_copy(whole, tmp_path)
    expected = read_rows(whole / "out.jsonl")
    done, rows = judge(folder, whole / "data.jsonl", output, "--n-cot", 2)
    assert "3 judged, 0 of them failed, 3 were there already" in done.stdout
    assert rows[:3] == expected[:3]
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    assert [row["feedback"] for row in rows] == [row["feedback"] for row in expected]
    before = output.read_bytes(), (tmp_path / "out.run.json").read_bytes()
    done, _ = judge(folder, whole / "data.jsonl", output, "--n-cot", 2)
    assert "0 judged, 0 of them failed, 6 were there already" in done.stdout
    assert (output.read_bytes(), (tmp_path / "out.run.json").read_bytes()) == before


def test_what_judged_the_rows_stands_beside_them(folder, whole, tmp_path):
    output = stopped_copy(whole, tmp_path)
    renamed = tmp_path / "renamed.gguf"
    shutil.copy(folder / "judge.gguf", renamed)
    data, same = whole / "data.jsonl", ("--n-cot", 2, "--threads", 1)
    assert call("judge", renamed, data, "-o", output, *same, "--parallel", 3).returncode == 0
    run = json.loads((tmp_path / "out.run.json").read_text())
    spec = JudgeSpec.load(folder / "model")
    assert len(run["fingerprint"]) == 64 and run["adapter"] is None
    assert run["spec_sha256"] == hashlib.sha256(spec.to_json().encode()).hexdigest()
    assert (run["n_cot"], run["seed"]) == (2, 0)
    assert [shape["parallel"] for shape in run["shapes"]] == [MAX_PARALLEL, 3]
    first, second = run["shapes"]
    assert first | {"parallel": 3, "model": "renamed.gguf"} == second and first["threads"] == 1
    assert first["model"] == "judge.gguf" and first["tract_lite"] == __version__


@pytest.mark.parametrize(
    "options, words",
    [
        (("--n-cot", 1), "n_cot: 2 there, 1 now"),
        (("--n-cot", 2, "--seed", 7), "or these again: seed: 0 there, 7 now"),
        (("--n-cot", 1, "--seed", 7), "n_cot: 2 there, 1 now; seed: 0 there, 7 now"),
        (("--n-cot", 2, "--spec", "{spec}"), "spec: another content"),
        (("--n-cot", 2, "{other}"), "fingerprint: another content"),
    ],
)
def test_rows_of_another_judge_are_not_mixed(folder, whole, tmp_path, options, words):
    output = stopped_copy(whole, tmp_path)
    other = tmp_path / "other.gguf"
    retrained = bytearray((folder / "judge.gguf").read_bytes())
    retrained[-2000:] = bytes(2000)
    other.write_bytes(retrained)
    spec = JudgeSpec.load(folder / "model").to_json().replace('tokens": 12', 'tokens": 11')
    (tmp_path / "spec.json").write_text(spec)
    options = [str(option).format(spec=tmp_path / "spec.json", other=other) for option in options]
    model = options.pop() if options[-1].endswith(".gguf") else folder / "judge.gguf"
    before = output.read_bytes(), (tmp_path / "out.run.json").read_bytes()
    done = call("judge", model, whole / "data.jsonl", "-o", output, *options)
    assert done.returncode == 2 and words in only_error(done)
    assert (output.read_bytes(), (tmp_path / "out.run.json").read_bytes()) == before


def test_rows_of_unknown_origin_and_of_another_input_are_not_mixed(folder, whole, tmp_path):
    output = stopped_copy(whole, tmp_path)
    write_rows(tmp_path / "data.jsonl", [ROWS[3] | {"id": "item 0"}])
    done = call("judge", folder / "judge.gguf", tmp_path / "data.jsonl", "-o", output, "--n-cot", 2)
    assert done.returncode == 2 and "another item with the id 'item 0'" in only_error(done)
    (tmp_path / "out.run.json").write_text("[1]")
    done = call("judge", folder / "judge.gguf", whole / "data.jsonl", "-o", output, "--n-cot", 2)
    assert done.returncode == 2 and "out.run.json is damaged" in only_error(done)
    (tmp_path / "out.run.json").unlink()
    done = call("judge", folder / "judge.gguf", whole / "data.jsonl", "-o", output, "--n-cot", 2)
    assert done.returncode == 2 and "out.run.json, which says how" in only_error(done)


def only_error(done) -> str:
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_failed_items_are_judged_again_and_the_table_keeps_the_order_of_the_input(folder, tmp_path):
    rows = [{"id": f"i{n}", "response": "so " * (120 if n % 2 else 3), "criteria": "c", "score": n} for n in range(4)]
    write_rows(tmp_path / "data.jsonl", rows)
    table = tmp_path / "out.csv"
    options = ("-o", table, "--threads", 1, "--context-length")
    done = call("judge", folder / "judge.gguf", tmp_path / "data.jsonl", *options, 60)
    assert done.returncode == 0 and "4 judged, 2 of them failed, 0 were" in done.stdout
    first = read_rows(tmp_path / "out.jsonl")
    assert ["does not fit" in str(row["error"]) for row in first] == [False, True] * 2
    with table.open(encoding="utf-8", newline="") as file:
        [fine, failed, *_] = csv.DictReader(file)
    assert failed["judge_score"] == failed["p_1"] == "" and "does not fit" in failed["error"]
    assert float(failed["doubt"]) == 4 > float(fine["doubt"]) > 0

    done = call("judge", folder / "judge.gguf", tmp_path / "data.jsonl", *options, 300)
    assert done.returncode == 0 and "2 judged, 0 of them failed, 2 were there" in done.stdout
    second = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in second] == ["i0", "i2", "i1", "i3"]
    assert second[:2] == first[::2] and all(row["error"] is None for row in second)
    with table.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == ["i0", "i1", "i2", "i3"]
    assert [float(row["gold"]) for row in found] == [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.csv", "out.jsonl", "out.run.json"}


def test_a_table_holds_the_figures_of_the_rows(folder, whole, tmp_path):
    for name in ("out.jsonl", "out.run.json"):
        shutil.copy(whole / name, tmp_path)
    for suffix in ("csv", "parquet"):
        done, rows = judge(folder, whole / "data.jsonl", tmp_path / f"out.{suffix}", "--n-cot", 2)
        assert "0 judged" in done.stdout
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    table = read_table(tmp_path / "out.parquet")
    assert table.column_names == list(written[0])
    figures = ["std", "spread", "doubt", "mode", "mass", *(f"p_{n}" for n in range(1, 6)), "error_bound", "truncated"]
    own = ["judge_score", "normalised_score", *figures, "error", "gold", "feedback"]
    assert table.column_names == [*read_rows(whole / "data.jsonl")[0], *own]
    for row, text, cells in zip(rows, written, table.to_pylist(), strict=True):
        assert cells["id"] == text["id"] == row["id"] and cells["error"] is None
        for name in ("normalised_score", "std", "spread", "doubt", "mode", "mass", "error_bound", "gold"):
            assert cells[name] == float(text[name]) == row[name]
        assert cells["judge_score"] == float(text["judge_score"]) == row["score"]
        assert cells["score"] == float(text["score"]) == row["gold"]
        for label, share in row["probabilities"].items():
            assert cells[f"p_{label}"] == float(text[f"p_{label}"]) == share
        assert cells["truncated"] is row["truncated"] and text["truncated"] == str(row["truncated"])
        assert cells["feedback"] == text["feedback"] == "\n\n".join(row["feedback"])


def test_hostile_ids_and_texts_come_through_to_every_table(folder, tmp_path):
    ids = ['a,b\n"c"', "half \ud83d", "null \0", "=1+1", "\u202eabc"]
    write_rows(tmp_path / "data.jsonl", ({"id": i, "response": i, "criteria": i} for i in ids))
    for suffix in ("csv", "parquet"):
        _, rows = judge(folder, tmp_path / "data.jsonl", tmp_path / f"out.{suffix}")
    assert [row["id"] for row in rows] == ids
    shown = [i.replace("\ud83d", "\\ud83d") for i in ids]
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == shown
    assert read_table(tmp_path / "out.parquet")["id"].to_pylist() == shown


def test_a_table_keeps_the_columns_of_the_input_and_names_its_own_apart(folder, tmp_path):
    rows = [
        {"Model": "a", "score": "3/5", "answer": ROWS[0]["response"], "feedback": "good", "judge_score": 1, "id": "x"},
        {"Model": None, "score": "", "answer": ROWS[1]["response"], "feedback": "", "judge_score": 2, "id": "x"},
    ]
    write_rows(tmp_path / "data.jsonl", ({**row, "tags": ["t"]} for row in rows))
    done = call("judge", folder / "judge.gguf", tmp_path / "data.jsonl", "-o", tmp_path / "out.csv", "--criteria", "c")
    assert done.returncode == 0 and "1 of 2 have no gold score" in done.stdout, done.stderr
    assert "answer as response" in done.stderr and "not read: Model, judge_score, tags" in done.stderr
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    own = ["Model", "score", "answer", "feedback", "judge_score", "id", "tags"]
    assert list(found[0])[:9] == [*own, "judge_id", "judge_judge_score"] and list(found[0])[-1] == "judge_feedback"
    assert [row["judge_id"] for row in found] == ["x", "x#2"]
    assert [(row["score"], row["feedback"], row["tags"]) for row in found] == [
        ("3/5", "good", '["t"]'),
        ("", "", '["t"]'),
    ]
    assert main(["evaluate", str(tmp_path / "out.csv")]) == 0


def test_gold_scores_that_are_given_later_are_taken(folder, tmp_path):
    for golds, there in (([None, 1], 0), ([3, 1], 2), ([3, 5], 2)):
        write_rows(tmp_path / "data.jsonl", [row | {"score": gold} for row, gold in zip(ROWS, golds)])
        done, rows = judge(folder, tmp_path / "data.jsonl", tmp_path / "out.csv")
        assert f"{there} were there already" in done.stdout
        assert {row["id"]: row.get("gold") for row in rows} == {"0": golds[0], "1": golds[1]}
        with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
            assert [row["gold"] for row in csv.DictReader(file)] == [str(float(g)) if g else "" for g in golds]


def run_verb(capsys, *arguments) -> str:
    """What a verb prints."""
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_scores_without_reasonings_go_wherever_others_go(folder, data, tmp_path, capsys):
    command = ("judge", folder / "judge.gguf", data, "--n-cot", 0, "--threads", 1)
    for suffix in ("csv", "parquet"):
        assert "6 judged, 0 of them failed" in run_verb(capsys, *command, "-o", tmp_path / f"{suffix}.{suffix}")
        assert "5 of them with a judgement" in run_verb(capsys, "evaluate", tmp_path / f"{suffix}.{suffix}")
        assert "0 judged" in run_verb(capsys, *command, "-o", tmp_path / f"{suffix}.{suffix}")
    rows = read_rows(tmp_path / "csv.jsonl")
    assert rows == read_rows(tmp_path / "parquet.jsonl")
    assert all(row["feedback"] == row["feedback_ids"] == [] and len(row["scores"]) == 1 for row in rows)
    assert json.loads((tmp_path / "csv.run.json").read_text())["n_cot"] == 0
    assert read_table(tmp_path / "parquet.parquet")["feedback"].to_pylist() == [""] * 6
    assert "Reasoning\n  (none: " in run_verb(capsys, *command, "--explain")


def test_a_gate_is_found_and_used_by_verbs(folder, data, tmp_path, capsys):
    model, same = folder / "judge.gguf", ("--threads", 1, "--seed", 3)
    *table, found = run_verb(capsys, "gate", model, data, *same, "--share", 0.5).splitlines()
    ways = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert ways[0] == ["", "reasoned", "tokens", "pearson", "rmse"]
    assert [name for name, *_ in ways[2:]] == ["direct", found, "always reasoning"]
    assert [tokens for _, _, tokens, *_ in ways[2::2]] == ["0.000", "1.000"] and 0.1 < float(ways[3][2]) <= 0.5
    output, gate = tmp_path / "out.jsonl", found.removeprefix("--gate ")
    done = run_verb(capsys, "judge", model, data, "-o", output, *same, "--gate", gate)
    rows = read_rows(output)
    count = sum(bool(row["feedback"]) for row in rows)
    assert f"; {count} of 6 with reasonings; 1 of 6 have no gold score" in done
    assert f"{count / 6:.3f}" == ways[3][1] and json.loads((tmp_path / "out.run.json").read_text())["gate"] == float(
        gate
    )
    printed = run_verb(capsys, "judge", model, data, "-o", "-", *same, "--gate", gate)
    assert [json.loads(line) for line in printed.splitlines()] == rows
    first = run_verb(capsys, "judge", model, data, "--explain", *same, "--gate", gate)
    assert ("(none: " in first) == (rows[0]["feedback"] == [])
    # Without gold scores it can only be told what it costs.
    write_rows(tmp_path / "bare.jsonl", ({**row, "score": None} for row in ROWS))
    bare = run_verb(capsys, "gate", model, tmp_path / "bare.jsonl", *same)
    assert "rmse" not in bare and "| tokens |" in bare


def test_a_dash_writes_rows_to_standard_output_as_they_come(folder, data, tmp_path):
    _, rows = judge(folder, data, tmp_path / "out.jsonl")
    done = call("judge", folder / "judge.gguf", data, "-o", "-", "--threads", 1)
    assert done.returncode == 0 and [json.loads(line) for line in done.stdout.splitlines()] == rows
    text = "".join(json.dumps({"Antwort": row["response"]}) + "\n" for row in ROWS)
    how = ("--columns", "response=Antwort", "--criteria", "Is it clear?", "--threads", 1)
    done = call("judge", folder / "judge.gguf", "-", "-o", "-", *how, stdin=text)
    assert [json.loads(line)["score"] for line in done.stdout.splitlines()] == [row["score"] for row in rows]


def test_what_is_off_the_scale_of_the_judge_is_counted(folder, tmp_path):
    rows = [ROWS[n] | {"score": 20 * n, "description_Met": "It is."} for n in range(4)]
    write_rows(tmp_path / "data.jsonl", rows)
    done = call("judge", folder / "judge.gguf", tmp_path / "data.jsonl", "-o", tmp_path / "out.jsonl", "--threads", 1)
    assert done.returncode == 0
    assert "4 of 4 items: the gold score is outside the judge's scale (1-5)" in done.stderr
    assert "4 of 4 items: the rubric describes labels that are not on the judge's scale (1-5)" in done.stderr


def test_one_item_is_explained_and_nothing_is_written(folder, whole, tmp_path):
    command = ("judge", folder / "judge.gguf", whole / "data.jsonl", "--n-cot", 2, "--threads", 1)
    done = call(*command, "--explain")
    assert done.returncode == 0, done.stderr
    expected = read_rows(whole / "out.jsonl")
    assert f"score {expected[0]['score']:.2f}" in done.stdout
    assert "Item item 0" in done.stdout and "Reasoning 2 of 2" in done.stdout
    assert ROWS[0]["response"][:30] in done.stdout and "  5 0." in done.stdout
    done = call(*command, "--explain", "item 4", "-o", tmp_path / "out.jsonl")
    assert f"score {expected[4]['score']:.2f}" in done.stdout
    done = call(*command, "--explain", "item 9")
    assert done.returncode == 2 and "no item with the id 'item 9'" in only_error(done)
    done = call(*command, "--explain", "--context-length", 20)
    assert done.returncode == 1 and "not judged: prompt of" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_explanation_can_be_printed_where_there_is_no_unicode(folder, whole):
    command = ("judge", folder / "judge.gguf", whole / "data.jsonl", "--explain", "--threads", 1)
    ascii_only = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    assert call(*command, env=ascii_only).returncode == 0


# As many take a second or more: time enough to stop a call half-way.
MANY = 800


def start(folder, data, output, **options) -> subprocess.Popen:
    """A call that is judging: some of its rows are there, and many are not."""
    enough = (output.stat().st_size if output.exists() else 0) + 2000
    command = ["judge", folder / "judge.gguf", data, "-o", output, "--threads", 1, "--parallel", 2]
    process = subprocess.Popen(
        [*COMMAND, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=ENVIRONMENT,
        **options,
    )
    while not output.exists() or output.stat().st_size < enough:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return process


@pytest.fixture
def many(tmp_path):
    """Input that takes a while."""
    path = tmp_path / "many.jsonl"
    write_rows(path, ({"response": text, "criteria": "c"} for text in make_sentences(MANY)))
    return path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_call_that_is_stopped_leaves_whole_rows_and_goes_on_without_judging_twice(folder, many, tmp_path, number):
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        process = start(folder, many, output)
        process.send_signal(number)
        _, log = process.communicate()
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert output.read_bytes().endswith(b"}\n")
            assert log.splitlines()[-1].startswith("error: stopped") and "Traceback" not in log
    before = read_rows(output)
    assert 0 < len(before) < MANY
    _, rows = judge(folder, many, output)
    assert rows[: len(before)] == before
    assert [row["id"] for row in rows] == [str(n) for n in range(MANY)]


def test_a_full_disk_leaves_whole_rows_and_a_later_call_goes_on(folder, many, tmp_path):
    """A limit on the size of files stands for the disk."""
    output = tmp_path / "out.csv"
    command = ("judge", folder / "judge.gguf", many, "-o", output, "--threads", 1)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = call(*command, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: [Errno")
    rows = tmp_path / "out.jsonl"
    assert 0 < len(read_rows(rows)) < MANY and rows.read_bytes().endswith(b"}\n")
    assert not output.exists()
    assert call(*command).returncode == 0
    assert [row["id"] for row in read_rows(rows)] == [str(n) for n in range(MANY)]
    assert len(output.read_text().splitlines()) > MANY


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_standard_output_that_takes_nothing_is_one_line_and_the_rows_are_there(folder, data, tmp_path, target):
    if target == "/dev/full":
        stdout = open(target, "w")
    else:
        reading, stdout = os.pipe()
        os.close(reading)
    output = tmp_path / "out.jsonl"
    done = call("judge", folder / "judge.gguf", data, "-o", output, "--threads", 1, stdout=stdout)
    assert done.returncode == 1 and len(read_rows(output)) == 6
    assert done.stderr.splitlines()[-1].startswith("error: standard output takes no more")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_closed_streams_do_not_stop_the_judging(folder, data, tmp_path):
    output = tmp_path / "out.jsonl"

    def close():
        os.close(1)
        os.close(2)

    done = call("judge", folder / "judge.gguf", data, "-o", output, "--threads", 1, preexec_fn=close)
    assert done.returncode == 0 and len(read_rows(output)) == 6


def test_where_nothing_could_be_judged_the_call_fails_and_the_rows_say_why(folder, data, tmp_path):
    output = tmp_path / "out.jsonl"
    done = call("judge", folder / "judge.gguf", data, "-o", output, "--context-length", 16)
    assert done.returncode == 1 and done.stdout == ""
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: none of the 6 items could be judged; the first: prompt of")
    assert all("does not fit" in row["error"] for row in read_rows(output))


def test_a_judge_behind_a_server_fills_a_file(folder, data, tmp_path, capsys):
    output = tmp_path / "out.csv"
    with fake_server(FakeVLLM(folder / "model", "not here")) as url:
        options = ("-o", output, "--spec", folder / "model", "--parallel", 3, "--timeout", 60)
        done = call("judge", url, data, *options, "--server-model", "judge")
        assert done.returncode == 0, done.stderr
        # The same judge by the name that it has there, asked for or not.
        assert main(list(map(str, ("judge", url, data, *options)))) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert all(row["error_bound"] > 0 for row in rows)
    run = json.loads((tmp_path / "out.run.json").read_text())
    assert run["served_model"] == "judge" and "fingerprint" not in run
    assert run["shapes"] == [{"server": url, "parallel": 3, "tract_lite": __version__}]
    assert "6 were there already" in capsys.readouterr().out


def hang(path, body, key):
    time.sleep(60)
    return 200, {}


def gone_after_a_while(folder):
    served = FakeVLLM(folder / "model", "not here")
    answers = iter(range(8))
    return lambda *request: served(*request) if next(answers, None) is not None else (500, {})


def lie(folder, **told):
    """A server whose log-probabilities can't be some."""
    served = FakeVLLM(folder / "model", "not here")

    def answer(path, body, key):
        status, content = served(path, body, key)
        if body and body.get("logprobs"):
            content["choices"][0]["logprobs"] = told["logprobs"]
        return status, content

    return answer


@pytest.mark.parametrize(
    "behaviour, words",
    [
        (lambda folder: hang, "did not answer within"),
        (lambda folder: lambda *_: (500, {"error": "on fire"}), "answered HTTP 500: on fire"),
        (lambda folder: lambda *_: (200, {}), "offers no models"),
        (gone_after_a_while, "answered HTTP 500"),
        (lambda folder: lie(folder, logprobs=None), "--max-logprobs"),
        (lambda folder: lie(folder, logprobs={"top_logprobs": [{"token_id:5": 0.7}]}), "0.7 is no log-probability"),
    ],
)
def test_a_server_that_fails_is_one_line_and_exit_code_1(folder, data, tmp_path, capfd, behaviour, words):
    output = tmp_path / "out.csv"
    with fake_server(behaviour(folder)) as url:
        options = ("--spec", folder / "model", "--timeout", 1, "--parallel", 4)
        assert main(list(map(str, ("judge", url, data, "-o", output, *options)))) == 1
    error = capfd.readouterr().err
    message = error.splitlines()[-1]
    assert "Traceback" not in error and message.startswith("error: ") and words in message
    assert all(row["error"] is None for row in read_rows(tmp_path / "out.jsonl"))
    assert not output.exists()


def test_no_server_is_one_line_and_exit_code_1(data, tmp_path):
    done = call("judge", f"http://127.0.0.1:{free_port()}", data, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 1 and "can't be reached" in only_error(done)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.9])
def test_a_truncated_model_is_one_line_and_exit_code_2(folder, data, tmp_path, share):
    whole = (folder / "judge.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    done = call("judge", tmp_path / "cut.gguf", data, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 2 and "llama.cpp can't read" in only_error(done)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


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
    assert rows[0]["error"] is None and "--columns criteria=NAME" in rows[1]["error"]
    assert "does not fit" in rows[2]["error"] and rows[2]["score"] is None
    assert "3 judged, 2 of them failed" in done.stdout
    assert "unusable rows left out: 1" in done.stderr


def test_standard_input_is_gone_on_with_and_can_be_explained(folder, tmp_path):
    lines = [json.dumps({**row, "id": f"item {n}"}) + "\n" for n, row in enumerate(ROWS)]
    done, first = judge(folder, "-", tmp_path / "out.jsonl", stdin="".join(lines[:3]))
    assert "3 judged" in done.stdout
    done, rows = judge(folder, "-", tmp_path / "out.jsonl", stdin="".join(lines))
    assert "3 judged, 0 of them failed, 3 were there already" in done.stdout
    assert rows[:3] == first and [row["gold"] for row in rows] == [row["score"] for row in ROWS]
    done = call("judge", folder / "judge.gguf", "-", "--explain", "item 1", stdin="".join(lines))
    assert done.returncode == 0 and f"score {rows[1]['score']:.2f}" in done.stdout
    done = call("judge", folder / "judge.gguf", "-", "-o", tmp_path / "other.jsonl", stdin="")
    assert done.returncode == 2 and "- has no usable row" in only_error(done)
    assert not (tmp_path / "other.jsonl").exists()


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


def test_a_spec_may_be_a_file_a_folder_or_in_another_judge_s_gguf(folder, data, tmp_path):
    """A file with the weights alone is judged by the spec of the file beside it."""
    bare = shutil.copytree(folder / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("judge_spec.json"))
    whole = (folder / "judge.gguf").read_bytes()
    (tmp_path / "judge.gguf").write_bytes(whole.replace(SPEC_KEY.encode(), SPEC_KEY.replace("judge", "other").encode()))
    done = call("judge", tmp_path / "judge.gguf", data, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 2 and "judge.gguf holds no judge spec" in only_error(done)
    found = []
    for name in ("model/judge_spec.json", "model", "judge.gguf"):
        output = tmp_path / f"{Path(name).stem}.jsonl"
        found.append(judge(tmp_path, data, output, "--spec", folder / name)[1])
    assert found[0] == found[1] == found[2] and len(found[0]) == 6
    for path in (bare, tmp_path / "judge.gguf"):
        done = call("judge", tmp_path / "judge.gguf", data, "-o", tmp_path / "out.jsonl", "--spec", path)
        assert done.returncode == 2 and f"{path} holds no judge spec" in only_error(done)


def test_export_writes_files_that_judge(folder, data, tmp_path, capsys):
    exported = tmp_path / "judge.gguf"
    assert main(["export", str(folder / "model"), "-o", str(exported), "--quantization", "q8_0"]) == 0
    assert capsys.readouterr().out == f"{exported}: 0.1 MiB\n"
    _, rows = judge(tmp_path, data, tmp_path / "out.jsonl")
    assert len(rows) == 6


def test_evaluate_measures_items_with_gold_and_counts_the_others(tmp_path, capsys):
    rows = [
        {"id": "a", "score": 1.5, "gold": 1},
        {"id": "b", "score": 2.5, "gold": 2},
        {"id": "c", "score": None, "gold": 3},
        {"id": "d", "score": 3.0},
    ]
    write_rows(tmp_path / "out.jsonl", rows)
    assert main(["evaluate", str(tmp_path / "out.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "pearson" in shown and "1.000 [1.00, 1.00]" in shown and "always the mean gold score" in shown
    assert "3 items with a gold score, 2 of them with a judgement; 1 without" in shown
    # The same as in a process of its own.
    assert call("evaluate", tmp_path / "out.jsonl").stdout == shown


def test_evaluate_reads_the_last_row_of_each_item(tmp_path, capsys):
    """A stopped call may leave earlier rows of an item; each row without an id is an item."""
    earlier = [{"id": "a", "score": None, "error": "no", "gold": 1}, {"id": "b", "score": 9.0, "gold": 2}]
    rows = [{"id": "b", "score": 2.5, "gold": 2}, {"id": "a", "score": 1.5, "gold": 1}]
    others = [{"id": None, "score": 4.5, "gold": 4}, {"score": 5.5, "gold": 5}, {"id": None, "score": 3.5, "gold": 3}]
    for name, content in {"tidy": rows + others, "later": earlier + rows + others}.items():
        write_rows(tmp_path / f"{name}.jsonl", content)
        assert main(["evaluate", str(tmp_path / f"{name}.jsonl")]) == 0
    shown = capsys.readouterr().out.splitlines()
    [tidy, later] = [line.split("|")[2:] for line in shown if line.startswith(("| tidy", "| later"))]
    assert tidy == later and tidy[1].split()[0] == "1.000"
    assert (
        shown.count("5 items with a gold score, 5 of them with a judgement; 0 without a gold score are left out") == 2
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_evaluate_reads_the_table_as_it_reads_the_rows(folder, whole, tmp_path, capsys, suffix):
    for name in ("out.jsonl", "out.run.json"):
        shutil.copy(whole / name, tmp_path)
    judge(folder, whole / "data.jsonl", tmp_path / f"out.{suffix}", "--n-cot", 2)
    printed = []
    for name in ("out.jsonl", f"out.{suffix}"):
        assert main(["evaluate", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_evaluate_prints_no_difference_of_scores_on_other_scales(tmp_path, capsys, caplog):
    values = {str(n): float(n) for n in range(1, 6)}
    rows = [{"id": str(n), "score": 1 + n / 2, "gold": 25.0 * n, "values": values} for n in range(5)]
    write_rows(tmp_path / "out.jsonl", rows)
    assert main(["evaluate", str(tmp_path / "out.jsonl")]) == 0
    shown = capsys.readouterr().out
    header, _, figures, *_ = shown.splitlines()
    found = dict(zip(header.split("|"), map(str.strip, figures.split("|"))))
    found = {name.strip(): cell for name, cell in found.items()}
    assert found["pearson"] == "1.000 [1.00, 1.00]" and found["rmse"] == found["mae"] == found["better by"] == "-"
    assert "nan" not in shown and "so that its error has no unit" in shown
    assert "5 of 5 gold scores are outside the judge's scale (1 to 5)" in caplog.text


@pytest.mark.parametrize("text", ["id,points\na,1\n", "id,score\na,1\n"])
def test_evaluate_refuses_a_table_without_scores_or_without_gold_scores(tmp_path, capsys, text):
    (tmp_path / "out.csv").write_text(text)
    assert main(["evaluate", str(tmp_path / "out.csv")]) == 2
    assert re.search("no column score or judge_score|has a gold score", capsys.readouterr().err)


def test_evaluate_takes_what_judge_has_written(whole, capsys):
    assert main(["evaluate", str(whole / "out.jsonl")]) == 0
    assert "6 items with a gold score, 6 of them with a judgement" in capsys.readouterr().out


def test_report_prints_where_the_page_is(tmp_path):
    (tmp_path / "judged").mkdir()
    write_rows(tmp_path / "judged" / "judge-f16.jsonl", [{"score": 1.0, "gold": 2.0}])
    done = call("report", tmp_path)
    assert done.stdout == f"{tmp_path / 'report.html'}\n" and (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("judge", "{judge}", "none.csv", "-o", "{out}"), "no file none.csv"),
        (("judge", "{judge}", "{data}", "-o", "none/out.jsonl"), "no folder none"),
        (("judge", "none.gguf", "{data}", "-o", "{out}"), "none.gguf"),
        (("judge", "{data}", "{data}", "-o", "{out}"), "is not a GGUF file"),
        (("judge", "{judge}", "{data}", "-o", "{data}"), "data.csv is the input"),
        (("judge", "{judge}", "{plain}", "-o", "{plain_csv}"), "plain.jsonl is the input"),
        (("judge", "{judge}", "{data}", "-o", "{table}"), "table.csv is there without"),
        (("judge", "{judge}", "{data}", "-o", "{notes}"), "notes.jsonl is not JSONL"),
        (("judge", "{judge}", "{data}", "-o", "out.txt"), "must end in .jsonl, .csv or .parquet"),
        (("judge", "{judge}", "{data}"), "name the output with -o"),
        (("judge", "{folder}", "{data}", "-o", "{out}"), "is a folder, and MODEL is a GGUF file: `tract-lite export`"),
        (("judge", "{judge}", "{folder}", "-o", "{out}"), "model is a folder: name a file in it"),
        (("judge", "{text}", "{data}", "-o", "{out}"), "text.gguf is not a GGUF file"),
        (
            ("judge", "{judge}", "{data}", "-o", "{out}", "--server-model", "x"),
            "--server-model is for the URL of a server",
        ),
        (("judge", "http://localhost:1", "{data}", "-o", "{out}", "--threads", "2"), "--threads is for a GGUF file"),
        (("judge", "http://", "{data}", "-o", "{out}"), "is no server's address"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--parallel", "0"), "--parallel must be at"),
        (
            ("judge", "{judge}", "{data}", "-o", "{out}", "--context-length", "-5"),
            "--context-length must be at least 1",
        ),
        (("judge", "{judge}", "{data}", "-o", "{plain}"), "plain.jsonl holds other rows than these"),
        (("judge", "{judge}", "{plain}", "-o", "{out}"), "unusable rows: 2 of 2: line 1 and 1 more: neither"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--n-cot", "-1"), "--n-cot must be at least 0"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--n-cot", "0", "--gate", "1"), "between a direct score"),
        (("gate", "{judge}", "{data}", "--n-cot", "0"), "a gate needs --n-cot of 1 or more"),
        (("gate", "{judge}", "{data}", "--share", "35"), "and a --share of the tokens from 0 to 1"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--spec", "none.json"), "no judge spec at none.json"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--spec", "none.gguf"), "none.gguf"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--spec", "{text}"), "text.gguf is not a GGUF file"),
        (("judge", "{judge}", "{data}", "-o", "{out}", "--adapter", "{judge}"), "judge.gguf .*is no LoRA adapter"),
        (("judge", "{judge}", "{data}", "--explain", "--timeout", "5"), "--timeout is for the URL of a server"),
        (("train", "{data}", "-o", "{stage}", "--preset", "quick"), "name the model to train with --seed-model"),
        (("train", "none.csv", "-o", "{stage}", "--seed-model", "{folder}"), "no file none.csv"),
        (("train", "{data}", "-o", "{stage}", "--seed-model", "{folder}", "--scale", "five"), "the scale 'five' can't"),
        (("train", "{data}", "-o", "{stage}", "--seed-model", "{folder}", "--scale", "1-3"), "outside the scale"),
        (("reason", "none", "{data}", "-o", "{out}"), "no judge spec at none"),
        (("reason", "{folder}", "none.csv", "-o", "{out}"), "no file none.csv"),
        (("merge", "none", "-o", "{stage}"), "no judge spec at none"),
        (("export", "none", "-o", "{out}"), "none is not a model folder"),
        (("evaluate", "none.jsonl"), "no file none.jsonl"),
        (("evaluate", "{plain}"), "none of the 2 rows"),
        (("report", "none"), "nothing to report"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    folder, data, tmp_path, capfd, monkeypatch, arguments, words
):
    plain = tmp_path / "plain.jsonl"
    write_rows(plain, [{"id": "a"}, {"id": "b"}])
    (tmp_path / "notes.jsonl").write_text("some notes\n")
    (tmp_path / "text.gguf").write_text("some notes\n" * 99)
    (tmp_path / "table.csv").write_text("a,b\n")
    names = {
        "judge": folder / "judge.gguf",
        "folder": folder / "model",
        "plain_csv": tmp_path / "plain.csv",
        **{path.stem: path for path in tmp_path.iterdir()},
        "data": data,
        "plain": plain,
        "out": tmp_path / "out.jsonl",
        "stage": tmp_path / "stage",
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(ROOT)
    # Not in a process of its own, which would take its time to start, forty times.
    assert main([argument.format(**names) for argument in arguments]) == 2
    shown, error = capfd.readouterr()
    [line] = error.splitlines()
    assert shown == "" and line.startswith("error: ") and re.search(words, line)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_error_ends_the_process_with_its_code(data, tmp_path):
    done = call("judge", "none.gguf", data, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 2 and done.stdout == "" and "no file none.gguf" in only_error(done)


def test_a_run_folder_in_place_of_its_judge_names_the_file_that_lies_in_it(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    arguments = ["judge", str(run), str(data), "-o", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2 and "`tract-lite export` makes a GGUF" in capsys.readouterr().err
    for name in ("judge-f16.gguf", "judge-q4_k_m.gguf", "adapter.gguf"):
        (run / name).write_bytes(b"GGUF")
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith(f"judge with {run / 'judge-q4_k_m.gguf'}")


@pytest.mark.parametrize(
    "module, package, arguments",
    [
        ("llama_cpp", "llama-cpp-python", ("judge", "{judge}", "{data}", "-o", "{out}.jsonl")),
        ("llama_cpp", "llama-cpp-python", ("judge", "{judge}", "{data}", "--explain")),
        ("pyarrow", "pyarrow", ("judge", "{judge}", "{data}", "-o", "{out}.parquet")),
        ("torch", "torch", ("train", "{data}", "-o", "{out}", "--seed-model", "x")),
    ],
)
def test_a_package_that_is_not_installed_is_named_as_pip_knows_it(folder, data, tmp_path, module, package, arguments):
    names = {"judge": folder / "judge.gguf", "data": data, "out": tmp_path / "out"}
    given = [argument.format(**names) for argument in arguments]
    code = f"import sys; sys.modules[{module!r}] = None; from tract_lite.__main__ import main; sys.exit(main({given}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert only_error(done).endswith(f": pip install {package}")
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


def test_what_fails_at_run_time_is_one_line_and_exit_code_1(folder, tmp_path, capfd, monkeypatch):
    for name in ("convert_hf_to_gguf.py", "gguf.py"):
        (tmp_path / name).write_text("raise SystemExit('no such architecture')")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert main(["export", str(folder / "model"), "-o", str(tmp_path / "judge.gguf")]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "no such architecture" in line


def test_a_call_without_a_verb_shows_the_usage():
    done = call()
    assert done.returncode == 2 and done.stderr.startswith("usage: tract-lite")


# Training, verb by verb


@pytest.fixture(scope="module")
def trained(shared_once):
    """A stage that `train` has made, with the rows it was trained on."""

    def make(folder):
        seed_model = small_seed_model(shared_once)
        records = make_records(16)
        write_records(folder / "data.jsonl", records)
        write_records(folder / "validation.jsonl", make_records(4, seed=1))
        (folder / "template.jinja").write_text("{{ response }}\n")
        files = (folder / "data.jsonl", "-o", folder / "stage", "--seed-model", seed_model)
        options = ("--validation", folder / "validation.jsonl", "--template", folder / "template.jinja", *SIZES)
        assert main(["train", *map(str, (*files, *options))]) == 0

    return shared_once("trained_by_verb", make)


SIZES = "--preset quick --epochs 40 --max-items 12 --max-length 128 --max-new-tokens 40".split()


@pytest.mark.training
def test_train_leaves_an_adapter_and_says_where(trained, shared_once, tmp_path, capsys):
    stage = json.loads((trained / "stage" / "stage.json").read_text())
    assert (stage["records"], stage["validation"], stage["settings"]["epochs"]) == (12, 4, 40)
    spec = JudgeSpec.load(trained / "stage" / "adapter")
    assert (spec.max_length, spec.sampling.max_new_tokens, spec.template) == (128, 40, "{{ response }}\n")
    with Judge.from_adapter(trained / "stage") as judge:
        [judgement] = judge.score_many(make_records(1))
    assert judgement.error is None and len(judgement.feedback_ids[0]) <= 40


@pytest.mark.training
def test_train_takes_a_stage_that_is_there_and_refuses_one_of_other_settings(trained, shared_once, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    files = (copy / "data.jsonl", "-o", copy / "stage", "--seed-model", small_seed_model(shared_once))
    same = ("--validation", copy / "validation.jsonl", "--template", copy / "template.jinja", *SIZES)
    weights = (copy / "stage" / "adapter" / "adapter_model.safetensors").stat()
    assert main(["train", *map(str, (*files, *same))]) == 0
    assert capsys.readouterr().out == f"{copy / 'stage' / 'adapter'}\n"
    assert (copy / "stage" / "adapter" / "adapter_model.safetensors").stat() == weights
    assert main(["train", *map(str, (*files, *same, "--max-new-tokens", 41))]) == 2
    assert re.search("other settings.*max_new_tokens: 40 there, 41 now", capsys.readouterr().err)


@pytest.mark.training
def test_reason_writes_a_reasoning_for_each_record_and_goes_on(trained, tmp_path, capsys):
    command = ["reason", str(trained / "stage"), str(trained / "data.jsonl"), "-o", str(tmp_path / "own.jsonl")]
    assert main([*command, "--parallel", "4"]) == 0
    kept = read_records(tmp_path / "own.jsonl")
    rejected = read_rows(tmp_path / "own.rejected.jsonl")
    line = f"{tmp_path / 'own.jsonl'}: {len(kept)} reasonings, {len(rejected)} rejected"
    shown = capsys.readouterr().out
    assert shown.startswith(line) and kept and len(kept) + len(rejected) == 16
    given = {record.id: record for record in make_records(16)}
    assert all(record.score == given[record.id].score and record.key == given[record.id].key for record in kept)
    vocabulary = TransformersVocabulary(load_tokenizer("spm"))
    for record in kept:
        # What bytes that are no letter become is up to the library.
        pieces = zip(record.feedback_ids, vocabulary.pieces(record.feedback_ids))
        words = [vocabulary.decode([token]).strip() for token, piece in pieces if not piece.startswith("<0x")]
        assert len(words) > 3 and re.search(".*".join(map(re.escape, words)), record.feedback, re.DOTALL)
    before = (tmp_path / "own.jsonl").read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().out == shown and (tmp_path / "own.jsonl").read_bytes() == before
    assert main([*command, "--seed", "1"]) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


@pytest.mark.training
@pytest.mark.usefixtures("float32_cpu")
@pytest.mark.parametrize("options", [(), ("--base", "16bit")])
def test_merge_writes_a_judge_s_folder_that_scores_as_the_adapter_does(trained, tmp_path, capsys, options):
    merged = tmp_path / "merged"
    assert main(["merge", str(trained / "stage" / "adapter"), "-o", str(merged), *options]) == 0
    assert capsys.readouterr().out == f"{merged}\n"
    assert JudgeSpec.load(merged) == JudgeSpec.load(trained / "stage" / "adapter")
    records, reasonings = make_records(3), [[[7, 8]]] * 3
    with Judge.from_pretrained(merged) as judge:
        scores = [judgement.score for judgement in judge.score_many(records, reasonings=reasonings)]
    if not options:
        with Judge.from_adapter(trained / "stage") as judge:
            expected = [judgement.score for judgement in judge.score_many(records, reasonings=reasonings)]
        assert scores == pytest.approx(expected, abs=0.02)
    assert all(map(math.isfinite, scores))
