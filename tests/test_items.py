"""Judged items are the same from JSONL, from a table, and from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page

from tract_lite import Judgement, Record, Rubric, write_records, write_report
from tract_lite.__main__ import main
from tract_lite.data.jsonl import write_rows
from tract_lite.data.table import scales_in, write_table
from tract_lite.report.items import judged_in_file, numbers_of

VALUES = {str(n): float(n) for n in range(1, 6)}


def judged(count: int = 30) -> tuple[list[Record], list[dict[str, Any]]]:
    """Records with gold scores, one of which could not be judged, and their rows."""
    random = np.random.default_rng(1)
    records, rows = [], []
    for n in range(count):
        gold = float(random.integers(1, 6))
        shares = random.dirichlet(np.ones(5)) * 0.9
        record = Record("Do it.", f"Done, {n}.", Rubric("Is it good?"), score=gold, id=f"item {n}")
        how: dict[str, Any] = {"feedback": [f"Reason {n}."], "feedback_ids": [[1, 2]], "truncated": n % 2 == 0}
        said = Judgement.from_probabilities(record.id, shares[None], VALUES, **how)
        rows.append((Judgement(record.id, error="too long") if n == 3 else said).to_row() | {"gold": gold})
        records.append(record)
    return records, rows


def write_both(folder: Path, suffix: str) -> tuple[Path, Path]:
    """Judgements as JSONL, and as a table beside the columns of their input."""
    records, rows = judged()
    write_rows(folder / "said.jsonl", rows)
    texts = [{"id": r.id, "prompt": r.instruction, "answer": r.response, "criteria": "Is it good?"} for r in records]
    given = {str(r.id): {**text, "score": r.score} for r, text in zip(records, texts)}
    write_table(folder / f"table.{suffix}", rows, scales_in(rows), given)
    return folder / "said.jsonl", folder / f"table.{suffix}"


def test_rows_without_an_id_keep_their_own_texts_and_a_gold_score_that_is_no_number_is_none(tmp_path: Path) -> None:
    table = tmp_path / "judged.csv"
    rows = [f"Do it.,Answer {n},Is it good?,{gold},{n + 1}.5" for n, gold in enumerate((1, "nan", 3))]
    table.write_text("instruction,response,criteria,gold,score\n" + "\n".join(rows) + "\n")
    found = judged_in_file(table)
    assert [(item.record.response, item.gold) for item in found.items if item.record] == [
        ("Answer 0", 1),
        ("Answer 2", 3),
    ]
    assert found.without_gold == 1 and main(["evaluate", str(table)]) == 0


def test_an_item_of_an_unknown_scale_is_taken_for_one_of_the_others(tmp_path: Path) -> None:
    known = Judgement("a", score=4.0, values=VALUES, probabilities=dict.fromkeys(VALUES, 0.2)).to_row() | {"gold": 4.0}
    unknown = Judgement("b", score=2.0).to_row() | {"gold": 3.0}
    write_rows(tmp_path / "said.jsonl", [known, unknown])
    numbers = numbers_of(judged_in_file(tmp_path / "said.jsonl").scored)
    assert numbers.golds.tolist() == [4.0, 3.0] and numbers.scores.tolist() == [4.0, 2.0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_tells_what_its_rows_told(tmp_path: Path, suffix: str) -> None:
    of_rows, of_table = map(judged_in_file, write_both(tmp_path, suffix))
    assert len(of_rows.items) == len(of_table.items) == 30 and len(of_table.scored) == 29
    for one, other in zip(of_rows.scored, of_table.scored):
        assert other.judgement.probabilities == pytest.approx(one.judgement.probabilities)
        for name in ("id", "score", "std", "mass", "mode", "values", "feedback", "truncated"):
            assert getattr(other.judgement, name) == getattr(one.judgement, name), name
        assert other.gold == one.gold and one.record is None
        assert other.record and (other.record.response, other.record.rubric) == (
            f"Done, {str(one.judgement.id).removeprefix('item ')}.",
            Rubric("Is it good?"),
        )


def test_the_file_that_was_judged_gives_texts_and_missing_gold_scores(tmp_path: Path) -> None:
    records, rows = judged()
    write_records(tmp_path / "data.jsonl", records)
    write_rows(tmp_path / "said.jsonl", [{**row, "gold": None} for row in rows])
    with pytest.raises(ValueError, match="none of the 30 rows of .*has a gold score\n--data names"):
        judged_in_file(tmp_path / "said.jsonl")
    found = judged_in_file(tmp_path / "said.jsonl", str(tmp_path / "data.jsonl"))
    assert [item.gold for item in found.items] == [record.score for record in records]
    assert [item.record and item.record.response for item in found.items] == [record.response for record in records]


def test_items_on_several_scales_count_by_their_places(tmp_path: Path) -> None:
    ten = {str(n): float(n) for n in range(11)}
    rows = [
        {"score": 2.0, "gold": 3, "values": VALUES, "std": 1.0},
        {"score": 5.0, "gold": 10, "values": ten, "std": 1.0},
    ]
    write_rows(tmp_path / "said.jsonl", [*rows, {"score": 1.0, "gold": 1}, {"score": 4.0, "values": ten}])
    found = judged_in_file(tmp_path / "said.jsonl")
    numbers = numbers_of(found.scored)
    assert numbers.golds.tolist() == [0.5, 1.0] and numbers.scores.tolist() == [0.25, 0.5]
    assert numbers.stds.tolist() == [0.25, 0.1] and found.without_gold == 1


# The verbs.


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_page_of_a_table_has_the_figures_of_its_rows(tmp_path: Path, suffix: str) -> None:
    rows, table = (Page(write_report(path).read_text(encoding="utf-8")) for path in write_both(tmp_path, suffix))
    assert table.figures["rows"]["table"] == rows.figures["rows"]["said"]
    assert table.figures["calibration"] == rows.figures["calibration"]
    assert "Done, 1" in table.text and "Done, 1" not in rows.text and "Reason 1" in rows.text


def test_report_writes_the_page_of_a_file_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = write_both(tmp_path, "csv")
    before = set(tmp_path.iterdir())
    assert main(["report", str(rows), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert set(tmp_path.iterdir()) - before == {tmp_path / "page.html"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("none.jsonl",), "no file"),
        (("none",), "nothing to report"),
        (("text.csv",), "no column score or judge_score"),
        (("run", "--data", "x.jsonl"), "is a run folder, which has its own data; leave --data out"),
    ],
)
def test_what_has_no_page_is_refused_in_a_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "text.csv").write_text("id,points\na,1\n")
    assert main(["report", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line and not list(tmp_path.glob("*.html"))


def test_evaluate_shows_the_mean_gold_score_beside_the_judge_and_ends_with_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = write_both(tmp_path, "csv")
    assert main(["evaluate", str(rows)]) == 0
    shown = capsys.readouterr().out
    assert "| said " in shown and "| always the mean gold score " in shown and "spearman" in shown
    verdict = " ".join(shown.rpartition("\n\n")[2].split())
    assert verdict.startswith("The judge is off by") and "always guessing the mean gold score" in verdict
    assert "30 items with a gold score, 29 of them with a judgement; 0 without" in shown
