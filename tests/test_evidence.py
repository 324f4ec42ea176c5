"""The grid of evidence: its cells, measured on a tiny task, and the page made of them."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    names = ("evidence", "evidence_page", "evidence_tasks", "example")
    evidence, page, tasks, example = map(importlib.import_module, names)
    monkeypatch.setattr(example, "PRETRAINING_ITEMS", 200)
    return evidence, page, tasks


def make_cell(row, seed, errors, machine="one"):
    rmse = math.sqrt(sum(error**2 for error in errors) / len(errors))
    figures = {"pearson": 0.5, "rmse": rmse, "intervals": {"pearson": [0.4, 0.6], "rmse": [rmse - 0.1, rmse + 0.1]}}
    readings = dict.fromkeys(("RAIL", "most likely", "sampled"), figures)
    cell = {"row": row, "seed": seed, "machine": machine, "minutes": 1.0, "tokens": 9.0, "best": None, "trained on": 8}
    return {**cell, "figures": readings, "errors": list(errors)}


@pytest.mark.long
@pytest.mark.training
@pytest.mark.export
def test_cells_of_a_tiny_grid_are_measured_once_and_shown(recipes, tmp_path, monkeypatch):
    evidence, page, tasks = recipes
    whole = tasks.example_task((24, 6), 60, quick=True)
    settings = replace(whole.settings, max_steps=2)
    rows = {name: whole.rows[name] for name in ("RAFT, no reasoning", tasks.STAGE_1, tasks.TRACT)}
    rows["mixed reasonings"] = tasks.EXAMPLE_ROWS["mixed reasonings"]
    rows["shown"] = tasks.Row(tasks.SHOWN, {"max_steps": 1})
    monkeypatch.setattr(evidence, "AGREES", 1.0)
    task = replace(whole, settings=settings, rows=rows)
    evidence.measure(task, [1], list(rows), tmp_path / "out", tmp_path / "cells")
    files = sorted((tmp_path / "cells" / "quick").glob("*.json"))
    cells = {cell["row"]: cell for cell in (json.loads(file.read_text()) for file in files)}
    assert set(cells) == set(rows)
    golds = [record.score for record in task.test]
    for name, cell in cells.items():
        assert len(cell["errors"]) == len(golds) and cell["settings"]["seed"] == 1
        assert math.sqrt(np.square(cell["errors"]).mean()) == pytest.approx(cell["figures"]["RAIL"]["rmse"], abs=2e-3)
        assert cell["trained on"] <= len(task.training)
        assert (cell["tokens"] == 0) == (name == "RAFT, no reasoning")
    own = evidence.Grid(task, 1, tmp_path / "out" / "quick" / "seed1")
    gold = {record.id: record.feedback for record in task.training}
    mixed = own.reasoned(rows["mixed reasonings"].learns_from, task.training)
    kept = sum(record.feedback == gold[record.id] for record in mixed)
    assert len(task.training) // 2 == kept < len(mixed)
    monkeypatch.setattr(evidence, "Grid", None)
    evidence.measure(task, [1], list(rows), tmp_path / "out", tmp_path / "cells")


def test_the_score_is_shown_to_the_writer_alone(recipes):
    evidence, _, tasks = recipes
    record = tasks.Record("Say hello.", "Hi.", tasks.example.RUBRIC, score=3.5, id="a")
    shown = evidence.show_score(record)
    assert "3.5" in shown.rubric.criteria and shown.key != record.key and shown.id == "a"


def test_intervals_over_seeds_are_student_t_and_pairs_are_of_one_machine(recipes):
    from scipy import stats

    _, page, _ = recipes
    draw = np.random.default_rng(0)
    ours = {seed: make_cell("a", seed, draw.normal(size=50)) for seed in range(5)}
    others = {seed: make_cell("b", seed, draw.normal(size=50) * 1.2) for seed in range(5)}
    rmse = [cell["figures"]["RAIL"]["rmse"] for cell in ours.values()]
    mean, low, high = page.over_seeds(ours, "rmse")
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(rmse)))
    gaps = [page._rmse(ours[seed]) - page._rmse(others[seed]) for seed in range(5)]
    expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert page.higher_by(ours, others) == pytest.approx((np.mean(gaps), expected.low, expected.high))
    for cell in others.values():
        cell["machine"] = "another"
    assert page.higher_by(ours, others) is None


def test_one_seed_is_paired_by_its_items(recipes):
    _, page, _ = recipes
    draw = np.random.default_rng(1)
    errors = draw.normal(size=400)
    one, other = {1: make_cell("a", 1, errors * 1.1)}, {1: make_cell("b", 1, errors)}
    gap, low, high = page.higher_by(one, other)
    assert gap == pytest.approx(0.1 * np.sqrt(np.square(errors).mean()))
    # What makes an item hard for both does not count.
    assert 0 < low < gap < high < gap * 1.2


def test_a_row_without_cells_says_so_and_the_page_holds_every_figure(recipes, tmp_path):
    _, page, tasks = recipes
    folder = tmp_path / "evidence" / "example"
    folder.mkdir(parents=True)
    for row, factor in ((tasks.TRACT, 1.0), (tasks.STAGE_1, 2.0), ("raft_weight 10", 0.5), ("TRACT, n_cot 4", 0.9)):
        for seed in (1, 2):
            cell = make_cell(row, seed, np.array([0.5, -0.5, 0.2]) * factor + 0.01 * seed)
            (folder / f"{row}-{seed}.json").write_text(json.dumps({**cell, "best": 0.3}))
    text = page.write_page(tmp_path / "evidence", tmp_path / "evidence.md").read_text()
    assert f"| {tasks.STAGE_1} | annotators | 8 | 2 |" in text and "| mixed reasonings |" in text
    assert text.count("not run") == len(tasks.EXAMPLE_ROWS) - 4 and text.count("Not measured yet.") == 2
    for setting in ("raft_weight", "n_cot"):
        assert f"](evidence/example/{setting}.svg)" in text and (folder / f"{setting}.svg").exists()
    assert "here, by the paired intervals: stage 1 agree" in text


def test_the_page_in_docs_is_made_of_the_cells_in_docs(recipes, tmp_path):
    _, page, _ = recipes
    docs = ROOT / "docs"
    for file in (docs / "evidence").rglob("*.json"):
        copied = tmp_path / file.relative_to(docs)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    text = page.write_page(tmp_path / "evidence", tmp_path / "evidence.md").read_text()
    assert text == (docs / "evidence.md").read_text()
