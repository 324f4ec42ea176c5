"""What a run trains on, is validated on and is measured with: no prompt in two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tract_lite import Record, ScoreScale, apart, read_splits
from tract_lite.data.jsonl import write_rows

SCALE = ScoreScale.integers(1, 5)
SIZES = {"max_items": 1000, "max_held_out": 100, "max_validation": 100}


def write_items(path: Path, count: int, **more: Any) -> str:
    rows = [
        {"id": f"{path.stem}-{n}", "response": f"{path.stem} {n}", "score": 1 + n % 5, **more} for n in range(count)
    ]
    write_rows(path, rows)
    return str(path)


def keys(records: list[Record]) -> set[str]:
    return {record.key for record in records}


def test_a_twentieth_of_what_is_not_held_out_is_for_validation(tmp_path: Path) -> None:
    splits = read_splits(write_items(tmp_path / "data.jsonl", 500), scale=SCALE, **SIZES)
    parts = splits.training, splits.validation, splits.held_out
    assert [len(part) for part in parts] == [380, 20, 100]
    assert len(set.union(*map(keys, parts))) == 500
    assert splits.counts == {"items": 500, "bad_rows": 0, "without_score": 0, "pairs": 500, "held_out_pairs": 100}


def test_the_same_data_are_split_the_same_way(tmp_path: Path) -> None:
    data = write_items(tmp_path / "data.jsonl", 100)
    few = {**SIZES, "max_items": 30}
    assert read_splits(data, scale=SCALE, **few) == read_splits(data, scale=SCALE, **few)


def test_a_validation_of_fewer_than_twenty_records_is_none(tmp_path: Path) -> None:
    splits = read_splits(write_items(tmp_path / "data.jsonl", 300), scale=SCALE, **SIZES)
    assert (len(splits.training), splits.validation, len(splits.held_out)) == (225, [], 75)


def test_no_part_has_more_than_is_said(tmp_path: Path) -> None:
    sizes = {"max_items": 600, "max_held_out": 40, "max_validation": 25}
    splits = read_splits(write_items(tmp_path / "data.jsonl", 900), scale=SCALE, **sizes)
    assert len(splits.training) + len(splits.validation) == 600
    assert len(splits.validation) == 25 and len(splits.held_out) == 40


def test_held_out_items_of_a_file_of_their_own_are_not_trained_on(tmp_path: Path) -> None:
    data = write_items(tmp_path / "data.jsonl", 50)
    own = tmp_path / "own.jsonl"
    rows = [{"id": "x", "response": "data 7", "score": 2}, {"id": "y", "response": "new", "score": 3},
            {"id": "z", "response": "without a score"}]  # fmt: skip
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = read_splits(data, str(own), scale=SCALE, **SIZES)
    assert [item.id for item in splits.held_out] == ["x", "y"]
    assert len(splits.training) == 49 and not keys(splits.training) & keys(splits.held_out)


def test_each_annotator_gives_a_training_record_and_a_held_out_item_has_their_mean(tmp_path: Path) -> None:
    rows = [
        {
            "instruction": f"### Instruction: task {n}",
            "gpt4_score": [3, 4, 5],
            "gpt4_feedback": [f"Because. [RESULT] {score}" for score in (3, 4, 5)],
        }
        for n in range(20)
    ]
    (tmp_path / "benchmark.json").write_text(json.dumps(rows))
    splits = read_splits(str(tmp_path / "benchmark.json"), scale=SCALE, **SIZES)
    assert len(splits.held_out) == 5 and len(splits.training) == 3 * 15
    assert all(item.score == 4 and not item.annotations for item in splits.held_out)
    assert {record.score for record in splits.training} == {3, 4, 5}
    assert (splits.counts["items"], splits.counts["pairs"], splits.counts["held_out_pairs"]) == (20, 60, 15)


def test_rows_that_can_not_be_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_items(path, 30)
    path.write_text(path.read_text() + '{"response": "no score"}\n{"response": "far", "score": 9}\n')
    with pytest.raises(ValueError, match="unusable rows: 1"):
        read_splits(str(path), scale=SCALE, **SIZES)
    counts = read_splits(str(path), scale=SCALE, skip_bad=True, **SIZES).counts
    assert (counts["items"], counts["bad_rows"], counts["without_score"]) == (31, 1, 1)


@pytest.mark.parametrize("count", [1, 5])
def test_data_with_too_few_scores_to_hold_some_out_are_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "data.jsonl"
    write_items(path, count)
    path.write_text(path.read_text().replace('"score"', '"points"', count - (count > 1)))
    with pytest.raises(ValueError, match="with a score are too few to hold some out"):
        read_splits(str(path), scale=SCALE, **SIZES)


def test_few_held_out_items_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_splits(write_items(tmp_path / "data.jsonl", 40), scale=SCALE, **SIZES)
    assert "only 10 items are held out: the figures of this run say little" in caplog.text
    read_splits(write_items(tmp_path / "more.jsonl", 200), scale=SCALE, **SIZES)
    assert "only 50 items are held out: the figures of this run are rough" in caplog.text


@pytest.mark.parametrize("count, held_out", [(40, 10), (200, 50), (400, 100), (900, 100), (1500, 150)])
def test_a_tenth_is_held_out_and_a_hundred_items_where_the_data_allow_it(tmp_path, count, held_out):
    path = write_items(tmp_path / "data.jsonl", count)
    splits = read_splits(path, scale=SCALE, **{**SIZES, "max_items": 2000, "max_held_out": 1000})
    assert len(splits.held_out) == held_out
    prompts = [record.key for record in [*splits.training, *splits.validation, *splits.held_out]]
    assert len(set(prompts)) == len(prompts) == count


def test_apart_takes_the_records_whose_prompts_others_have() -> None:
    mine = [Record(response="a", feedback="x"), Record(response="b"), Record(response="a", feedback="y")]
    assert apart(mine, [Record(response="a", score=3.0)]) == ([mine[1]], [mine[0], mine[2]])
    assert apart(mine, []) == (mine, [])
