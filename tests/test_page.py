"""A run's page: what a folder holds is on it, and what is missing is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import pytest
from matplotlib.image import imread

from tract_lite import evaluate, write_report
from tract_lite.data.jsonl import read_json, write_rows
from tract_lite.report import plots

GOLDS = [1.0, 2.0, 3.0, 4.0, 5.0] * 4
SCORES = [1.5, 1.8, 3.4, 3.6, 4.9] * 4


def write_stage(run: Path, name: str, validation: Sequence[float] = ()) -> None:
    (run / name).mkdir(exist_ok=True)
    log = [{"step": step, "ce": 2 / step, "raft": 1 / step} for step in (1, 2, 3)]
    log += [{"step": step, "eval_rmse": rmse} for step, rmse in enumerate(validation, 1)]
    content = {"log": [*log, {"step": 3, "train_runtime": 9.0}]}
    (run / name / "stage.json").write_text(json.dumps(content))


def write_judgements(
    run: Path, golds: Sequence[float | None] = GOLDS, scores: Sequence[float | None] = SCORES, name: str = "judge.gguf"
) -> Path:
    (run / "judged").mkdir(exist_ok=True)
    rows = [{"id": str(n), "score": score, "gold": gold} for n, (score, gold) in enumerate(zip(scores, golds))]
    write_rows(run / "judged" / f"{name}.jsonl", rows)
    return run / "judged" / f"{name}.jsonl"


def write_metrics(run: Path) -> None:
    figures = {"stage 1": evaluate(SCORES[::-1], GOLDS), "stage 2": evaluate(SCORES, GOLDS)}
    parity = {"judge-q8_0.gguf": "20 records: 0 prompts with other ids"}
    metrics = {"rows": figures, "counts": {"training": 7, "dropped": {"no reasoning": 2}}, "parity": parity}
    (run / "metrics.json").write_text(json.dumps(metrics))


def picture(run: Path) -> bytes:
    """The figure of the page that is made anew."""
    write_report(run)
    return (run / "report.png").read_bytes()


def in_short(run: Path) -> str:
    write_report(run)
    return (run / "report.md").read_text()


def height_and_width(run: Path) -> tuple[int, int]:
    return imread(run / "report.png").shape[:2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "my_run").mkdir()
    return tmp_path / "my_run"


def test_the_page_of_a_whole_run_holds_all_its_parts(run: Path) -> None:
    write_stage(run, "stage1")
    write_stage(run, "stage2")
    write_judgements(run)
    write_metrics(run)
    (run / "settings.json").write_text(json.dumps({"preset": "demo", "data": None}))
    path = write_report(run)
    text, html = in_short(run), path.read_text()
    assert path == run / "report.html" and text.startswith("# my_run\n")
    row = evaluate(SCORES, GOLDS)
    low, high = row["intervals"]["pearson"]
    assert f"| stage 2 | 20 | {row['pearson']:.3f} [{low:.2f}, {high:.2f}] |" in " ".join(text.split())
    assert "(report.png)" in text and "(report.html)" in text
    assert '- dropped: {"no reasoning": 2}' in text and "0 prompts with other ids" in html
    assert "<dt>preset</dt><dd>demo</dd>" in html
    height, width = height_and_width(run)
    assert width > 1.5 * height and imread(run / "report.png").std() > 0.05


def test_a_stage_that_is_not_finished_is_drawn_up_to_its_last_checkpoint(run: Path) -> None:
    write_stage(run, "stage1")
    log = read_json(run / "stage1" / "stage.json")["log"]
    (run / "stage1" / "stage.json").unlink()
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(run)
    for steps in (2, 3):
        checkpoint = run / "stage1" / f"checkpoint-{steps}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log[:steps]}))
        (checkpoint / "complete.json").write_text("{}")
    (run / "stage1" / "checkpoint-4").mkdir()
    (run / "stage1" / "checkpoint-4" / "trainer_state.json").write_text('{"log')
    assert "(report.png)" in in_short(run)
    unfinished = (run / "report.png").read_bytes()
    (run / "stage1" / "stage.json").write_text(json.dumps({"log": log[:3]}))
    assert picture(run) == unfinished


def test_of_several_judges_the_one_that_judged_most_is_drawn_and_a_gguf_file_before_others(run: Path) -> None:
    write_judgements(run, name="any")
    drawn = picture(run)
    file = write_judgements(run, GOLDS[:5], SCORES[:5])
    assert picture(run) == drawn
    file.unlink()
    write_judgements(run, scores=SCORES[::-1], name="judge-q8_0.gguf")
    of_gguf = picture(run)
    assert of_gguf != drawn
    write_judgements(run, name="stage 2")
    assert picture(run) == of_gguf


def test_what_was_said_without_gold_scores_is_not_drawn(run: Path) -> None:
    write_judgements(run)
    drawn = picture(run)
    write_judgements(run, [None] * 20, SCORES[::-1], "true mean.gguf")
    assert picture(run) == drawn


def test_the_figure_shows_the_validation(run: Path) -> None:
    pictures = []
    for validation in ((), (1.0, 0.8), (1.0, 0.4)):
        write_stage(run, "stage1", validation)
        pictures.append(picture(run))
    assert len(set(pictures)) == 3


def test_a_check_behind_the_last_logged_step_is_inside_the_figure() -> None:
    log = [{"step": 1, "ce": 1.0, "raft": 1.0}, {"step": 4, "eval_rmse": 0.5}]
    upper, lower = plots.draw_page({"stage1": log}, np.empty(0), np.empty(0)).axes
    assert upper.get_xlim() == lower.get_xlim()
    assert lower.get_xlim()[0] == 0 and lower.get_xlim()[1] > 4


def heights(*logs: Sequence[dict[str, float]]) -> list[tuple[str, tuple[float, float]]]:
    """Of the picture of stages with these logs, the scale and the limits of both halves."""
    drawn = dict(zip(("stage1", "stage2"), logs))
    figure = plots.draw_page(drawn, np.empty(0), np.empty(0))
    return [(ax.get_yscale(), ax.get_ylim()) for ax in figure.axes]


@pytest.mark.parametrize("least", [0.0, 1e-4, 0.2])
@pytest.mark.parametrize("first", [1.0, 500.0])
def test_no_curve_is_cut_and_a_first_step_far_out_flattens_no_other(first: float, least: float) -> None:
    rafts = [first, 0.9, 0.7, 0.5, 0.4, least]
    log = [{"step": step, "ce": 1.0, "raft": raft} for step, raft in enumerate(rafts)]
    log.append({"step": 5, "eval_rmse": (1.3 * first) ** 0.5})
    scale, (low, high) = heights(log)[1]
    assert low < least and 1.3 * first < high
    if first > 100:
        assert scale in ("log", "symlog")
    elif least == 0.2:
        assert scale == "linear"


def test_steps_whose_loss_is_no_number_are_left_out() -> None:
    log = [{"step": 1, "ce": 1.0, "raft": float("nan")}, {"step": 2, "ce": float("inf"), "raft": 0.5}]
    assert all(np.isfinite(limits).all() for _, limits in heights(log))


def test_a_stage_too_short_to_log_anything_is_no_hindrance(run: Path) -> None:
    (run / "stage1").mkdir()
    (run / "stage1" / "stage.json").write_text(json.dumps({"log": [{"step": 3, "eval_rmse": 1}]}))
    write_judgements(run)
    assert "(report.png)" in in_short(run)


@pytest.mark.parametrize(
    "write", [lambda run: write_stage(run, "stage1"), lambda run: write_stage(run, "stage2"), write_judgements]
)
def test_one_part_alone_gives_a_figure_of_half_the_width(run: Path, write: Callable[[Path], object]) -> None:
    write(run)
    text = in_short(run)
    height, width = height_and_width(run)
    assert width < 1.5 * height
    assert "|" not in text and "The judge" not in text


def test_numbers_alone_give_a_page_without_a_figure(run: Path) -> None:
    write_metrics(run)
    assert "report.png" not in in_short(run)
    assert not (run / "report.png").exists()


@pytest.mark.parametrize(
    "golds, scores", [([3.0], [3.0]), ([2.5, 3.5], [1.0, None]), (list(range(100)), np.linspace(0, 99, 100))]
)
def test_any_gold_scores_can_be_drawn(run: Path, golds: list, scores: list) -> None:
    write_judgements(run, golds, scores)
    write_report(run)
    assert (run / "report.png").stat().st_size > 5000


def test_failed_items_and_those_without_gold_are_not_drawn(run: Path) -> None:
    write_judgements(run, [1.0, None], [None, 2.0])
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(run)


def test_an_empty_or_missing_folder_is_refused(run: Path) -> None:
    for folder in (run, run / "none"):
        with pytest.raises(ValueError, match="nothing to report"):
            write_report(folder)
    assert list(run.iterdir()) == []
