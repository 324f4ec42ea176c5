"""The recipe that compares three ways of one scale, with a few items and steps."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.training, pytest.mark.export]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    monkeypatch.setattr(importlib.import_module("example"), "PRETRAINING_ITEMS", 200)
    return importlib.import_module("compare_scales")


@pytest.mark.long
def test_each_way_is_trained_and_measured_once(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipe, "QUICK", (24, 6, 60))
    asked = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    recipe.main(asked)
    table = capsys.readouterr().out
    figures = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/figures.json")}
    assert sorted(figures) == ["way1-seed1", "way2-seed1", "way3-seed1"]
    assert all(f"| {way} |" in table for way in recipe.WAYS)
    # Nothing is done again.
    monkeypatch.setattr(recipe, "train_adapter", None)
    recipe.main(asked)
    assert capsys.readouterr().out == table


def test_scores_of_the_example_go_from_0_to_10_and_its_best_judge_knows_their_mean(recipe):
    items = recipe.example.make_items(400, 5, recipe.POINTS)
    scores = [item.record.score for item in items]
    assert set(scores) == set(range(11))
    errors = [item.record.score - item.mean for item in items]
    assert abs(sum(errors) / len(errors)) < 0.25 and all(0 <= item.mean <= 10 for item in items)
