"""What llama.cpp ends the process with is told in words."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hybrids import make_hybrid
from tiny import make_plain_judge

from tract_lite.__main__ import main
from tract_lite.engines import trial
from tract_lite.engines.trial import check_runs
from tract_lite.export.converter import llama_cpp_source
from tract_lite.judge import Judge
from tract_lite.record import Record

pytestmark = pytest.mark.export

KEY = b"tract_lite.judge_spec"
# By where llama.cpp ends: while it reads the file's numbers, and while it decodes.
BROKEN = {
    "llama.block_count": ("plain_judge", [0], "n_layer_all > 0"),
    "qwen35.rope.dimension_sections": ("hybrid-qwen3.5", [11, 11, 10, 0], "sect_dims <= ne0"),
}


@pytest.fixture
def judges(shared_once):
    """The folders of two judges, by name."""
    make: dict[str, Any] = {"plain_judge": make_plain_judge, "hybrid-qwen3.5": lambda out: make_hybrid(out, "qwen3.5")}
    return {name: shared_once(name, function) for name, function in make.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_source()))
    monkeypatch.setenv("TRACT_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_ran", set())


def without_spec(judge: Path, out: Path) -> Path:
    """A judge's GGUF file as others write them, with the spec under no name that is known."""
    content = (judge / "judge.gguf").read_bytes()
    assert content.count(KEY) == 1
    out.write_bytes(content.replace(KEY, KEY.upper()))
    return out


def write_field(path: Path, name: str, values: list[int]) -> None:
    """Write other numbers into a GGUF file."""
    gguf_py = str(llama_cpp_source() / "gguf-py")
    if gguf_py not in sys.path:
        sys.path.append(gguf_py)
    import gguf

    field = gguf.GGUFReader(path, "r+").fields[name]
    for place, value in zip(field.data, values, strict=True):
        field.parts[place][:] = value


@pytest.fixture(params=BROKEN)
def broken(request, judges, tmp_path):
    """A GGUF file that llama.cpp breaks on, the folder it came from, and the broken assertion."""
    name, values, assertion = BROKEN[request.param]
    path = without_spec(judges[name], tmp_path / "broken.gguf")
    write_field(path, request.param, values)
    return path, judges[name] / "model", assertion


def test_a_model_that_ends_the_process_is_refused_in_two_lines(broken):
    path, spec, assertion = broken
    for ask in (lambda: check_runs(path), lambda: Judge.from_gguf(path, spec)):
        with pytest.raises(ValueError) as refusal:
            ask()
        cause, advice = str(refusal.value).split("\n")
        assert re.match(rf"llama.cpp ends the process with {path}: [\w-]+\.cpp:\d+: GGML_ASSERT", cause)
        assert assertion in cause and advice.startswith("take another model")


def test_the_command_line_ends_with_its_own_code(broken, tmp_path, capsys):
    path, spec, assertion = broken
    rows = tmp_path / "rows.csv"
    rows.write_text("response\nIt is clear.\n")
    for options in ([], ["--spec", str(spec)]):
        assert main(["judge", str(path), str(rows), "-o", str(tmp_path / "out.csv"), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: llama.cpp ends the process") and assertion in error


def test_what_runs_is_tried_once(judges, tmp_path, monkeypatch):
    judge, asked, run = judges["hybrid-qwen3.5"], [], trial.run_python
    monkeypatch.setattr(trial, "run_python", lambda arguments: asked.append(arguments) or run(arguments))
    path = without_spec(judge, tmp_path / "other.gguf")
    records = [Record(prompt="The answer")]
    scores = []
    for file in (judge / "judge.gguf", path, shutil.copy2(path, tmp_path / "copy.gguf")):
        with Judge.from_gguf(file, judge / "model", threads=1) as opened:
            scores += [judgement.score for judgement in opened.score_many(records)]
        assert len(asked) == 1 + (file.name != "judge.gguf")
    assert len(set(scores)) == 1
    # Another content under the same name.
    write_field(path, "qwen35.rope.dimension_sections", [11, 11, 10, 0])
    with pytest.raises(ValueError, match="ends the process"):
        check_runs(path)


def test_what_llama_cpp_refuses_in_words_is_left_to_who_loads_it(judges, tmp_path):
    path = without_spec(judges["plain_judge"], tmp_path / "torn.gguf")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    check_runs(path)
    assert not (tmp_path / "cache" / "runs").exists()
    with pytest.raises(ValueError, match="can't read .*not within the file bounds"):
        Judge.from_gguf(path, judges["plain_judge"] / "model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        check_runs(judges["plain_judge"] / "model" / "config.json")


@pytest.mark.parametrize("folder", ["a file", "a folder of somebody else's"])
def test_a_cache_folder_that_can_not_be_written_stops_nobody(judges, tmp_path, monkeypatch, folder):
    place = tmp_path / "no cache"
    if folder == "a file":
        place.write_text("")
    else:
        place.mkdir()
        (place / "runs").write_text("")
    monkeypatch.setenv("TRACT_LITE_CACHE", str(place))
    asked, run = [], trial.run_python
    monkeypatch.setattr(trial, "run_python", lambda arguments: asked.append(arguments) or run(arguments))
    for _ in range(2):
        check_runs(judges["plain_judge"] / "judge.gguf")
    assert len(asked) == 1
