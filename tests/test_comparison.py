"""Two judged files side by side: figures, criteria, what is counted, and the words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tract_lite.__main__ import main
from tract_lite.data.jsonl import write_rows
from tract_lite.data.table import scales_in, write_table
from tract_lite.judgement import Judgement
from tract_lite.metrics import compare_judges

FIVE = {str(number): float(number) for number in range(1, 6)}
GOLDS = np.random.default_rng(0).integers(1, 6, size=60).astype(float)


def scores(noise: float, seed: int) -> np.ndarray:
    return np.clip(GOLDS + np.random.default_rng(seed).normal(scale=noise, size=GOLDS.size), 1, 5)


def write(path: Path, predicted: np.ndarray, ids: range = range(60), criteria: int = 1, **changed: Any) -> Path:
    """A judged file, JSONL or the table of its rows."""
    rows = [
        Judgement(str(n), float(predicted[n]), dict.fromkeys(FIVE, 0.2), 1.0, std=0.1, values=FIVE).to_row()
        | {"gold": float(GOLDS[n]), "key": "k"}
        | changed
        for n in ids
    ]
    given = {
        str(n): {"id": str(n), "response": "r", "criteria": f"Is it {'clear kind'.split()[n % criteria]}?"} for n in ids
    }
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    else:
        write_table(path, rows, scales_in(rows), given)
    return path


def printed(capsys, *words: Any) -> str:
    capsys.readouterr()
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_figures_are_those_of_a_paired_bootstrap_and_the_better_one_is_named(tmp_path, capsys):
    good, poor = scores(0.3, 1), scores(1.5, 2)
    a, b = write(tmp_path / "a.jsonl", good), write(tmp_path / "b.jsonl", poor)
    said, turned = printed(capsys, a, b), printed(capsys, b, a)
    compared = compare_judges(good, poor, GOLDS)
    row = next(line for line in said.splitlines() if line.startswith("| the first less"))
    for name in ("pearson", "rmse", "mae"):
        low, high = compared["intervals"][name]
        assert f"{compared['differences'][name]:.3f} [{low:.2f}, {high:.2f}]" in row
    for text in (said, turned):
        assert "pearson: a.jsonl agrees more than b.jsonl, by" in text
        assert "rmse: a.jsonl errs less than b.jsonl, by" in text
    gaps = np.abs(poor - GOLDS) - np.abs(good - GOLDS)
    closer = np.mean((gaps > 0) + (gaps == 0) / 2)
    assert f"a.jsonl is closer to the gold score on {closer * 100:.1f} % of the items, b.jsonl on" in said


def test_what_is_not_sure_is_said_in_both_directions(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", scores(0.8, 1)), write(tmp_path / "b.jsonl", scores(0.8, 2))
    assert "the items do not show which one is better: a.jsonl may be better by up to" in printed(capsys, a, b)
    same = printed(capsys, a, a)
    assert "may be better by up to 0.000" in same and "closer to the gold score on 50.0 % of the items" in same


def test_items_of_one_file_alone_failures_and_other_gold_scores_are_counted(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", scores(0.8, 1), range(50))
    b = write(tmp_path / "b.jsonl", scores(0.8, 2), range(20, 60))
    assert "items with a gold score: 30 in both files, 20 in a.jsonl alone, 10 in b.jsonl alone" in printed(
        capsys, a, b
    )
    c = write(tmp_path / "c.jsonl", scores(0.8, 2), gold=3.0)
    other = sum(gold != 3 for gold in GOLDS[:50])
    assert f"{other} of those in both have another gold score in c.jsonl: that of a.jsonl is taken" in printed(
        capsys, a, c
    )
    failed = write(tmp_path / "d.jsonl", np.append(scores(0.8, 2)[:-1], np.nan))
    assert "1 of those in both have a judgement in one alone" in printed(capsys, failed, b)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_compared_as_rows_are_and_by_their_criteria(tmp_path, capsys, suffix):
    a, b = write(tmp_path / f"a.{suffix}", scores(0.3, 1), criteria=2), write(tmp_path / "b.jsonl", scores(1.5, 2))
    said = printed(capsys, a, b)
    assert "the differences by criteria:" in said
    for number, name in enumerate(("clear", "kind")):
        mine, others = (scores(*how)[number::2] for how in ((0.3, 1), (1.5, 2)))
        row = next(line for line in said.splitlines() if line.startswith(f"| Is it {name}?"))
        assert f"{compare_judges(mine, others, GOLDS[number::2])['differences']['mae']:.3f}" in row and "| 30 |" in row


def test_the_data_name_the_criteria_of_rows(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", scores(0.3, 1)), write(tmp_path / "b.jsonl", scores(1.5, 2))
    assert "by criteria" not in printed(capsys, a, b)
    data = [{"id": str(n), "response": "r", "criteria": f"Is it {'clear kind'.split()[n % 2]}?"} for n in range(60)]
    write_rows(tmp_path / "data.jsonl", data)
    assert "| Is it kind?" in printed(capsys, a, b, "--data", tmp_path / "data.jsonl")


def test_files_without_a_common_item_are_refused_with_a_way_out(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", scores(0.8, 1), range(20))
    b = write(tmp_path / "b.jsonl", scores(0.8, 1), range(20, 60))
    assert main(["compare", str(a), str(b)]) == 2
    assert "no item with a gold score in common; items are known by their ids" in capsys.readouterr().err
    assert main(["compare", str(a), str(tmp_path / "none.jsonl")]) == 2
