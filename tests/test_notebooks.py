"""Both notebooks from one source, executed from start to end with a small part of the example."""

from __future__ import annotations

import html
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import install
import nbformat
import notebooks
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PLATFORMS = tuple(notebooks.PLATFORMS)
# One cell may take so long, in seconds; it is no measurement.
CELL_LIMIT = 1200
# In place of the preset's own number; a reader sets it in the same form.
MAX_ITEMS = 96


def read_notebook(platform: str) -> nbformat.NotebookNode:
    return nbformat.read(notebooks.notebook_file(platform), as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@dataclass
class Executed:
    """What the cells of a notebook showed, the last one as HTML, and the weights in its run folder
    with their times."""

    text: str
    images: int
    last: str
    folder: Path
    weights: dict[Path, int]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Executed]:
    """Colab's notebook in a clone, and then Kaggle's in the same one, which goes on there."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "tract_lite", "requirements.txt", "requirements-gpu.txt"):
        (clone / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("TMPDIR", str(clone))
        return {platform: execute(platform, clone) for platform in PLATFORMS}


def execute(platform: str, clone: Path) -> Executed:
    notebook = read_notebook(platform)
    (settings,) = [cell for cell in notebook.cells if "\nmax_items = 0 " in cell.source]
    settings.source = settings.source.replace("max_items = 0 ", f"max_items = {MAX_ITEMS} ")
    where = {"metadata": {"path": str(clone)}}
    NotebookClient(notebook, timeout=CELL_LIMIT, resources=where).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    run = clone / "runs" / "judge"
    return Executed(
        "".join(output.text for output in outputs if output.output_type == "stream"),
        sum("image/png" in output.get("data", {}) for output in outputs),
        outputs[-1].get("data", {}).get("text/html", ""),
        run,
        {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")},
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_notebook_is_what_its_source_builds(platform: str) -> None:
    assert notebooks.notebook_file(platform).read_text(encoding="utf-8") == notebooks.build(platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_notebook_is_valid_and_free_of_outputs(platform: str) -> None:
    notebook = read_notebook(platform)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_the_two_notebooks_call_the_same_things() -> None:
    lines = [
        [line for cell in code_cells(read_notebook(platform)) for line in cell.source.splitlines()]
        for platform in PLATFORMS
    ]
    colab, kaggle = ([line for line in of_one if line.lstrip().startswith("!")] for of_one in lines)
    assert colab == kaggle and len(colab) > 5


def test_kaggle_chooses_one_gpu_before_anything_else() -> None:
    first, *_ = code_cells(read_notebook("kaggle"))
    assert 'os.environ["CUDA_VISIBLE_DEVICES"] = "0"' in first.source
    assert re.findall(r"^(?:import|from) (\w+)", first.source, re.MULTILINE) == ["os"]
    assert "P100 won't do" in read_notebook("kaggle").cells[0].source


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_readme_opens_the_notebook(platform: str) -> None:
    assert notebooks.badge(platform) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.training
@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
def test_all_cells_run_and_show_what_they_promise(platform: str, executed: dict[str, Executed]) -> None:
    done = executed[platform]
    for shown in (
        "nothing to install",
        ": no GPU",
        "run folder: runs/judge",
        "this run takes about",
        "| stage 2, CoT-RAIL ",
        "| judge-q8_0.gguf, CoT-RAIL ",
        "How do I bake a loaf?",
        "MB  runs/judge/adapter.gguf",
    ):
        assert shown in done.text, shown
    # The curves, then the same with the scores of held-out items; and the report at the end.
    assert done.images == 2
    assert html.escape((done.folder / "report.html").read_text(encoding="utf-8")) in done.last
    # The judge's figures of the reader's own text, and those of the held-out item with its gold.
    assert len(re.findall(r"score \d\.\d\d   std \d\.\d\d   mass \d\.\d\d", done.text)) == 2
    assert len(re.findall(r"gold \d", done.text)) == 1
    assert "Traceback" not in done.text


@pytest.mark.training
@pytest.mark.long
def test_running_all_cells_again_goes_on(executed: dict[str, Executed]) -> None:
    first, again = (executed[platform] for platform in PLATFORMS)
    assert first.folder == again.folder and len(first.weights) >= 2
    assert first.weights == again.weights
    # What the training and the export's check say.
    for said in ("sequences, ", "scores differ by"):
        assert said in first.text and said not in again.text


@pytest.mark.training
@pytest.mark.long
def test_a_notebooks_run_keeps_what_is_large_elsewhere(executed: dict[str, Executed]) -> None:
    run = executed["colab"].folder
    assert not (run / "merged").exists()
    merged = run.parents[1] / "tract-lite" / "judge" / "merged"
    assert (merged / "README.md").read_text().startswith("---\nlicense:")
    assert (run / "README.md").read_text().startswith("---\nlicense:")


def test_the_session_has_what_the_requirements_ask_for() -> None:
    listed = install.read_requirements(ROOT / "requirements-gpu.txt")
    names = [requirement.name for requirement in listed]
    assert {"unsloth", "torch", "llama-cpp-python"} <= set(names)
    assert len(names) == len(set(names))
    assert install.is_met(Requirement("packaging")) and install.is_met(Requirement("torch>=2"))
    assert not install.is_met(Requirement("packaging<1"))
    assert not install.is_met(Requirement("no-such-distribution"))


def test_a_torch_out_of_range_is_named_and_not_replaced() -> None:
    with pytest.raises(RuntimeError, match=r"has torch 2\.\S+, and .* made for torch <1"):
        install.check_torch([Requirement("torch<1")])
    install.check_torch([Requirement("torch>=2")])


def test_an_install_is_held_to_the_torch_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself refuses: the constraint allows no other torch."""
    file = tmp_path / "requirements.txt"
    file.write_text("torch==1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(install.subprocess.CalledProcessError):
        install.install(file)
    file.write_text("torch\n")
    install.install(file)
