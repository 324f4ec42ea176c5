import json

import numpy as np
import pytest
from matplotlib.image import imread

from tract_lite.data.jsonl import append_rows
from tract_lite.metrics import evaluate
from tract_lite.report.page import write_report

GOLDS = [1.0, 2.0, 3.0, 4.0, 5.0] * 4
SCORES = [1.5, 1.8, 3.4, 3.6, 4.9] * 4


def write_stage(run, name, validation=()):
    (run / name).mkdir(exist_ok=True)
    log = [{"step": step, "ce": 2 / step, "raft": 1 / step} for step in (1, 2, 3)]
    log += [{"step": step, "eval_rmse": rmse} for step, rmse in enumerate(validation, 1)]
    content = {"log": [*log, {"step": 3, "train_runtime": 9.0}]}
    (run / name / "stage.json").write_text(json.dumps(content))


def write_judgements(run, golds=GOLDS, scores=SCORES):
    (run / "judged").mkdir()
    append_rows(
        run / "judged" / "judge-q8_0.jsonl",
        [{"id": str(n), "score": score, "gold": gold} for n, (score, gold) in enumerate(zip(scores, golds))],
    )


def write_metrics(run):
    figures = {"stage 1": evaluate(SCORES[::-1], GOLDS), "stage 2": evaluate(SCORES, GOLDS)}
    (run / "metrics.json").write_text(
        json.dumps(
            {
                "rows": figures,
                "counts": {"training": 7, "dropped": {"no reasoning": 2}},
                "parity": {"judge-q8_0.gguf": "20 records: 0 prompts with other ids"},
            }
        )
    )


def height_and_width(run):
    return imread(run / "report.png").shape[:2]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "my_run").mkdir()
    return tmp_path / "my_run"


def test_the_page_of_a_whole_run_holds_all_its_parts(run):
    write_stage(run, "stage1")
    write_stage(run, "stage2")
    write_judgements(run)
    write_metrics(run)
    (run / "settings.json").write_text(json.dumps({"preset": "demo", "data": None}))
    path = write_report(run)
    page = path.read_text()
    assert path == run / "report.md" and page.startswith("# my_run\n")
    pearson = evaluate(SCORES, GOLDS)["pearson"]
    assert f"| stage 2 |   {pearson:.3f} |" in page and "- stage 2: pearson" in page
    assert "(report.png)" in page
    assert '- dropped: {"no reasoning": 2}' in page and "0 prompts with other ids" in page
    assert "- preset: demo\n- data: null" in page
    height, width = height_and_width(run)
    assert width > 1.5 * height and imread(run / "report.png").std() > 0.05


def test_a_stage_that_is_not_finished_is_drawn_up_to_its_last_checkpoint(run):
    write_stage(run, "stage1")
    log = json.loads((run / "stage1" / "stage.json").read_text())["log"]
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
    assert "(report.png)" in write_report(run).read_text()
    unfinished = (run / "report.png").read_bytes()
    (run / "stage1" / "stage.json").write_text(json.dumps({"log": log[:3]}))
    write_report(run)
    assert (run / "report.png").read_bytes() == unfinished


def test_of_several_judges_the_one_that_judged_most_is_drawn(run):
    write_judgements(run)
    write_report(run)
    all_of_gguf = (run / "report.png").read_bytes()
    file = run / "judged" / "judge-q8_0.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.rename(run / "judged" / "stage2.jsonl")
    file.write_text(rows[0])
    write_report(run)
    assert (run / "report.png").read_bytes() == all_of_gguf
    file.write_text("".join(rows).replace("1.5", "4.5"))
    write_report(run)
    assert (run / "report.png").read_bytes() != all_of_gguf


def test_the_figure_shows_the_validation(run):
    pictures = []
    for validation in ((), (1.0, 0.8), (1.0, 0.4)):
        write_stage(run, "stage1", validation)
        write_report(run)
        pictures.append((run / "report.png").read_bytes())
    assert len(set(pictures)) == 3


def test_a_stage_too_short_to_log_anything_is_no_hindrance(run):
    (run / "stage1").mkdir()
    (run / "stage1" / "stage.json").write_text(json.dumps({"log": [{"step": 3, "eval_rmse": 1}]}))
    write_judgements(run)
    assert "(report.png)" in write_report(run).read_text()


@pytest.mark.parametrize(
    "write", [lambda run: write_stage(run, "stage1"), lambda run: write_stage(run, "stage2"), write_judgements]
)
def test_one_part_alone_gives_a_figure_of_half_the_width(run, write):
    write(run)
    page = write_report(run).read_text()
    height, width = height_and_width(run)
    assert width < 1.5 * height
    assert "##" not in page and "|" not in page


def test_numbers_alone_give_a_page_without_a_figure(run):
    write_metrics(run)
    assert "report.png" not in write_report(run).read_text()
    assert not (run / "report.png").exists()


@pytest.mark.parametrize(
    "golds, scores", [([3.0], [3.0]), ([2.5, 3.5], [1.0, None]), (list(range(100)), np.linspace(0, 99, 100))]
)
def test_any_gold_scores_can_be_drawn(run, golds, scores):
    write_judgements(run, golds, scores)
    write_report(run)
    assert (run / "report.png").stat().st_size > 5000


def test_failed_items_and_those_without_gold_are_not_drawn(run):
    write_judgements(run, [1.0, None], [None, 2.0])
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(run)


def test_an_empty_or_missing_folder_is_refused(run):
    for folder in (run, run / "none"):
        with pytest.raises(ValueError, match="nothing to report"):
            write_report(folder)
    assert list(run.iterdir()) == []
