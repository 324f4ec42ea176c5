"""The wheel in an environment of its own, without torch: a judge's GGUF file is all it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny import export_judge, make_llama, vocabulary_folder

import tract_lite
from tract_lite import __version__
from tract_lite.data.jsonl import read_rows

ROOT = Path(__file__).parents[1]
# What judging, its data and its figures take.
WITHOUT_TORCH = set(
    """Judge Judgement JudgeSpec Preset Record Rubric Run RunOptions Sampling ScoreScale Splits
TrainSettings apart compare_judges errors_in_words evaluate format_table generate_cots make_spec parse_options
preset_for read_records read_splits records_from settings_of split_records write_records""".split()
)

pytestmark = pytest.mark.long


def run(*command: Any, where: Path, code: int = 0) -> str:
    # Nothing comes in from elsewhere.
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=where, env=plain, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout or done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # What an earlier build has left in the clone must not come in.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tract_lite", source / "tract_lite", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", source, "--no-deps", "-w", folder, where=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel with what judging takes."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder, where=folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", f"{wheel}[judge]", where=folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_with_its_types_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "tract_lite"
    files = [path for kind in ("*.py", "*.pyi", "*.jinja", "py.typed") for path in package.rglob(kind)]
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert {"tract_lite/py.typed", "tract_lite/__init__.pyi", "tract_lite/report/card.md.jinja"} <= names
    assert {name.partition("/")[0] for name in names} == {"tract_lite", f"tract_lite-{__version__}.dist-info"}


def test_an_environment_for_judging_has_no_torch_and_all_that_needs_none(installed: Path, tmp_path: Path) -> None:
    assert WITHOUT_TORCH < set(tract_lite.__all__)
    code = f"""
import importlib.util, tract_lite
assert not importlib.util.find_spec("torch")
for name in {sorted(WITHOUT_TORCH)}: getattr(tract_lite, name)
try:
    tract_lite.train_adapter
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run(installed / "python", "-c", code, where=tmp_path).strip() == "torch"


@pytest.mark.training
def test_the_command_judges_a_file_from_an_empty_folder(installed: Path, quick_run: Path, tmp_path: Path) -> None:
    command = [installed / "tract-lite", "judge", quick_run / "judge-q8_0.gguf"]
    (tmp_path / "texts.csv").write_text("instruction,response,criteria\nHow do I bake?,1. Use yeast.,Is it sound?\n")
    run(*command, "texts.csv", "-o", "judged.jsonl", where=tmp_path)
    (row,) = read_rows(tmp_path / "judged.jsonl")
    assert 1 <= row["score"] <= 5 and row["error"] is None and row["feedback"][0]
    assert "score " in run(*command, "texts.csv", "--explain", where=tmp_path)
    assert __version__ in run(installed / "tract-lite", "--version", where=tmp_path)


def test_any_instruct_model_judges_there(installed: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "model", vocabulary_folder("split digits"), context=400)
    export_judge("split digits", tmp_path / "model", tmp_path / "instruct.gguf")
    (tmp_path / "texts.csv").write_text("instruction,response,criteria\nHow?,Use yeast.,Is it sound?\n")
    command = [installed / "tract-lite", "judge", tmp_path / "instruct.gguf", "texts.csv", "-o", "judged.jsonl"]
    run(*command, where=tmp_path)
    (row,) = read_rows(tmp_path / "judged.jsonl")
    assert row["error"] is None and sorted(row["probabilities"]) == ["1", "2", "3", "4", "5"]


def test_what_is_not_installed_is_named(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"response": "a", "score": 1, "feedback": "b"}\n')
    command = f"{installed}/tract-lite train rows.jsonl -o stage --seed-model none --preset quick"
    assert run(*command.split(), where=tmp_path, code=2).endswith("pip install torch\n")
