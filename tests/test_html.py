"""The page: its numbers are its JSON's, what users wrote is text, nothing comes from outside."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page

from tract_lite import Judgement, Record, Rubric, Run, write_records, write_report
from tract_lite.data.jsonl import write_json, write_rows
from tract_lite.report.rows import COT_RAIL, MODE, TRAINING_MEAN, measured_rows, scores_alone

VALUES = {str(n): float(n) for n in range(1, 6)}
HOSTILE = '<script>alert("x")</script> & </script><img src=http://example.org/x.png onerror=alert(1)> $x^2$ 日本'
JUDGE = "judge-q8_0.gguf"


def judgements(count: int, seed: int = 0, **fields: Any) -> list[tuple[Record, Judgement]]:
    """Records with gold scores, and what a judge of some worth says of them."""
    random = np.random.default_rng(seed)
    made = []
    for n in range(count):
        gold = float(random.integers(1, 6))
        weights = np.exp(-((np.arange(1, 6) - gold - random.normal(scale=0.7)) ** 2) / random.uniform(0.3, 2))
        shares = 0.98 * weights / weights.sum()
        rubric = Rubric(f"{HOSTILE} {n % 3}" if n % 3 else "Is it kind?", {"1": "no"})
        record = Record(f"Do it {HOSTILE}", f"Done {n} {HOSTILE}", rubric, score=gold, id=f"item {n}")
        how = {"feedback": [f"I think so. {HOSTILE}"], "feedback_ids": [[5] * (n % 9 + 1)], **fields}
        made.append(
            (record, Judgement.from_probabilities(record.id, shares[None], VALUES, truncated=n % 7 == 0, **how))
        )
    return made


def write_run(folder: Path, count: int = 60) -> Path:
    """A whole run, as `finish_run` leaves it."""
    run = Run(folder)
    made = judgements(count)
    records, judged = [record for record, _ in made], [judgement for _, judgement in made]
    for name in ("stage1", "stage2"):
        (folder / name).mkdir(parents=True)
        log = [{"step": step, "ce": 2 / step, "raft": 40 / step**3} for step in range(1, 30)]
        log += [{"step": 10, "eval_rmse": 0.8}, {"step": 29, "eval_rmse": 0.7}]
        log += [{"step": 29, "train_runtime": 20.0, "seconds": 300.0}]
        stage = {"examples": 500, "kept_step": 29, "learning_rate": 1e-3, "settings": {"epochs": 2.0, "batch_size": 8}}
        write_json(folder / name / "stage.json", {**stage, "log": log})
    write_records(run / "held_out.jsonl", records)
    run.keep_judged("stage 2", judged)
    rows = [j.to_row() | {"gold": record.score} for record, j in made]
    write_rows(folder / "judged" / f"{JUDGE}.jsonl", rows)
    golds = [record.score or 0.0 for record in records]
    scores: dict[str, Any] = {TRAINING_MEAN: [3.0] * count, f"{JUDGE}, {MODE}": [one.mode for one in judged]}
    scores[f"{JUDGE}, {COT_RAIL}"] = [one.score for one in judged]
    metrics = {"rows": measured_rows(scores, golds, None, [TRAINING_MEAN]), "judge": JUDGE, "scale": [1.0, 5.0]}
    counts = {"items": 700, "training_records": 600, "held_out_items": count, "scale": "1-5"}
    write_json(folder / "metrics.json", {**metrics, "parity": {}, "counts": counts})
    write_json(folder / "settings.json", {"preset": "quick", "data": HOSTILE, "seed_model": "someone/Model"})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("pages") / "my run")


@pytest.fixture(scope="module")
def source(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def looked_up(row: dict[str, Any], name: str, key: str) -> Any:
    if key == "name":
        return name
    if key.startswith("better_by "):
        return row.get("better_by", {}).get(key.removeprefix("better_by "), {}).get("rmse")
    return row[key]


def test_every_cell_of_every_table_equals_the_json_behind_it(page: Page) -> None:
    figures = page.figures
    assert page.tables.keys() == {"rows", "readings", "by_gold", "by_criteria", "by_std", "calibration"}
    of_scores = scores_alone(figures["rows"])
    figures |= {"rows": of_scores, "readings": {n: row for n, row in figures["rows"].items() if n not in of_scores}}
    for table, shown in page.tables.items():
        behind = figures[table]
        named = behind.items() if isinstance(behind, dict) else ((str(n), row) for n, row in enumerate(behind))
        expected = [[looked_up(row, name, key) for key in page.heads[table]] for name, row in named]
        assert len(shown) == len(expected) > 1 or table == "readings"
        for cell, value in zip((c for row in shown for c in row), (v for row in expected for v in row)):
            if isinstance(value, str):
                assert cell.value == value and value.startswith(cell.text.removesuffix(" …"))
            elif value is None:
                assert cell.value == "" and cell.text in ("", "–")
            else:
                assert float(cell.value) == value
                digits = 0 if isinstance(value, int) else 3
                assert cell.text.replace(",", "") == f"{value:.{digits}f}"


def test_the_json_is_that_of_the_run(run: Path, page: Page) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    rows = json.loads(json.dumps(metrics["rows"]), parse_constant=lambda _: None)
    assert page.figures["rows"] == rows and page.figures["counts"] == metrics["counts"]
    own = metrics["rows"][f"{JUDGE}, {COT_RAIL}"]
    assert page.figures["scores"]["pearson"] == pytest.approx(own["pearson"])
    assert page.figures["scores"]["count"] == own["count"] == 60
    by_gold = page.figures["by_gold"]
    assert sum(row["count"] * row["mae"] for row in by_gold) / 60 == pytest.approx(own["mae"])
    assert math.sqrt(sum(row["count"] * row["rmse"] ** 2 for row in by_gold) / 60) == pytest.approx(own["rmse"])


def test_intervals_stand_below_their_figures(source: str, run: Path) -> None:
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    low, high = rows[f"{JUDGE}, {COT_RAIL}"]["intervals"]["rmse"]
    assert f"<small>{low:.3f} to {high:.3f}</small>" in source


def test_the_page_opens_with_the_verdict_and_ends_with_the_settings_in_words(page: Page) -> None:
    verdict = page.figures["verdict"]
    assert "enough to be sure that it is better than always guessing the training mean" in verdict
    assert page.text.index(verdict) < page.text.index("Agreement with the gold scores")
    for sentence in ("Seed model: someone/Model.", "2 epochs, batches of 8", "The training of stage 2 took 5 minutes"):
        assert sentence in page.text


@pytest.mark.parametrize("seed_model, toy", [("toy", True), ("someone/Model", False)])
def test_the_table_and_the_verdict_of_a_toy_call_it_one(tmp_path: Path, seed_model: str, toy: bool) -> None:
    run = write_run(tmp_path, 20)
    write_json(run / "settings.json", {"preset": "quick", "data": None, "seed_model": seed_model})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    for said in ("All judges of this table are toys.", "It is a toy: "):
        assert (said in text) == (said.lower() in (run / "report.md").read_text().lower()) == toy


def test_what_users_wrote_is_text_and_never_markup(page: Page, source: str) -> None:
    assert [name for name, _ in page.elements].count("script") == 2
    assert "img" not in {name for name, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # In instruction, response, criteria and reasoning of the worst ten, and in a table.
    assert page.text.count(HOSTILE) >= 35
    assert "</script><img" not in source


def test_nothing_is_loaded_from_outside(page: Page, source: str) -> None:
    for name, attributes in page.elements:
        assert name not in ("link", "iframe", "object", "embed", "base"), name
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (name, key)
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style and "url(" not in style
    policy = next(a["content"] for name, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert len(source) < 3_000_000


def test_the_script_of_the_page_is_the_one_that_a_browser_may_run(source: str) -> None:
    import base64
    import hashlib

    script = source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in source and "aria-sort" in script


def test_ids_differ_over_all_pictures_and_each_reference_finds_its_own(page: Page, source: str) -> None:
    assert len(page.ids) == len(set(page.ids))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', source))
    assert referred and referred <= set(page.ids)
    for name in ("scores", "calibration", "by_std", "by_gold", "lengths", "ce", "raft"):
        assert any(one.startswith(f"{name}-") for one in page.ids), name


def test_pictures_take_the_colours_of_the_page(source: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(pictures) == 7
    for picture in pictures:
        assert "var(--ink)" in picture
        assert not re.search(r"(?:fill|stroke): #(?!000000)", picture)


def test_many_items_make_no_large_page(tmp_path: Path) -> None:
    rows = [j.to_row() | {"gold": record.score} for record, j in judgements(2500, feedback=[], feedback_ids=[])]
    write_rows(tmp_path / "many.jsonl", rows * 2)
    text = write_report(tmp_path / "many.jsonl").read_text(encoding="utf-8")
    assert len(text) < 1_000_000 and 'href="data:image/png' in text


# Parts that are missing.


def test_the_page_of_a_file_alone_has_no_training_and_no_settings(tmp_path: Path) -> None:
    rows = [j.to_row() | {"gold": record.score} for record, j in judgements(30)]
    write_rows(tmp_path / "said.jsonl", rows)
    path = write_report(tmp_path / "said.jsonl")
    found = Page(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "said.report.html"
    assert list(found.figures["rows"]) == ["said", "always the mean gold score"]
    for words in ("Training", "How it was made", "By criteria"):
        assert words not in found.text
    assert "Where the judge is farthest off" in found.text and "its" not in found.figures["title"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["said.jsonl", "said.report.html"]


def test_a_judge_without_reasonings_has_none_on_its_page(tmp_path: Path) -> None:
    rows = [j.to_row() | {"gold": r.score} for r, j in judgements(30, feedback=[], feedback_ids=[])]
    write_rows(tmp_path / "direct.jsonl", rows)
    found = Page(write_report(tmp_path / "direct.jsonl").read_text(encoding="utf-8"))
    assert found.figures["lengths"] == {} and "easoning" not in found.text
    assert not any(one.startswith("lengths-") for one in found.ids)


def test_scores_without_a_distribution_have_a_page_without_bars_and_calibration(tmp_path: Path) -> None:
    write_rows(tmp_path / "plain.jsonl", [{"id": str(n), "score": n + 0.5, "gold": n} for n in range(4)])
    found = Page(write_report(tmp_path / "plain.jsonl").read_text(encoding="utf-8"))
    assert found.tables.keys() == {"rows", "by_gold"} and "Probabilities" not in found.text


def test_a_run_that_has_only_begun_has_a_page_of_its_curves(tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    log = [{"step": step, "ce": 1 / step, "raft": 1 / step} for step in (1, 2, 3)]
    write_json(tmp_path / "stage1" / "stage.json", {"log": log})
    found = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert found.tables == {} and any(one.startswith("raft-") for one in found.ids)
    assert found.figures["verdict"] == ""


# What is farthest off.


def test_the_worst_items_stand_with_their_texts_and_bars_the_worst_first(page: Page, run: Path) -> None:
    worst = page.figures["worst"]
    errors = [abs(item["score"] - item["gold"]) for item in worst]
    assert len(worst) == 10 and errors == sorted(errors, reverse=True)
    assert worst[0]["texts"].keys() == {"Instruction", "Response", "Criteria"}
    widths = [attributes["style"] for name, attributes in page.elements if name == "i"]
    shares = [bar["probability"] for item in worst for bar in item["bars"]]
    assert widths == [f"width: {100 * share:.2f}%" for share in shares] and len(widths) == 50
    assert f"{worst[0]['id']}: gold {worst[0]['gold']:g}, judged {worst[0]['score']:.2f}" in page.text
