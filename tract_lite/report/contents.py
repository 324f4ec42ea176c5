"""All that a page shows, as plain data: of a run folder, or of one file of judgements.

Everything but `drawn`, which has the points of the pictures, can stand in JSON.
"""

import math
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from tract_lite.data.jsonl import read_json
from tract_lite.judgement import shortened
from tract_lite.metrics import NORMALISED, ends_of
from tract_lite.report.breakdown import by_criteria, by_gold, by_std, calibration, lengths, reasoning_lengths, worst
from tract_lite.report.items import Item, Judged, judged_in_file, judged_in_run, numbers_of
from tract_lite.report.rows import GOLD_MEAN, measured_rows, score_row
from tract_lite.report.verdict import is_toy, verdict
from tract_lite.report.words import settings_in_words, times_of, without_places
from tract_lite.run import METRICS, PARITY, SETTINGS, STAGES, Run
from tract_lite.spec import SPEC_FILE, JudgeSpec
from tract_lite.training.settings import ADAPTER

# What a stage's log must have, to be drawn.
TERMS = ("ce", "raft")
TOYS = "all judges of this table are toys"
FEWER = "judges with a smaller n have judged the first of the held-out items only"


def contents_of_run(run: Run) -> dict[str, Any]:
    """What a run folder holds for its page; what is missing there is empty.
    Raises ValueError: nothing is there.
    """
    metrics, settings, stages = read_json(run / METRICS), read_json(run / SETTINGS), run.stages()
    # A stage may have been too short to log its loss.
    logs = {name: log for name, log in run.logs().items() if any(set(TERMS) <= entry.keys() for entry in log)}
    judged = judged_in_run(run, metrics.get("judge"))
    if not (logs or judged or metrics or settings):
        raise ValueError(f"{run.folder} holds nothing to report: is it a run folder?")
    rows, counts = metrics.get("rows", {}), metrics.get("counts") or {k: v for k, v in run.counts.items() if v}
    said = ""
    own = score_row(metrics.get("judge"), rows)
    if (row := rows.get(own)) and "scale" in metrics:
        trained_on = counts.get("training_records")
        how: dict[str, Any] = {"toy": is_toy(settings), "trained_on": trained_on, "improving": _improving(run)}
        said = verdict(row, rows, ends=metrics["scale"] and tuple(metrics["scale"]), **how)
    notes = [TOYS] * bool(rows and is_toy(settings)) + notes_of(rows)
    if len({round(row["count"] / row["coverage"]) for row in rows.values() if row["coverage"]}) > 1:
        notes.append(FEWER)
    return {
        "title": run.folder.resolve().name,
        "verdict": said,
        "notes": notes,
        "rows": rows,
        **(of_items := _of_items(judged)),
        "judge_row": score_row(judged.name, rows) if judged else "",
        "drawn": {**of_items.get("drawn", {}), "curves": logs},
        "settings": settings_in_words(settings, counts, stages, _seed_model(run)),
        "all_settings": without_places(settings),
        "counts": counts,
        "parity": metrics.get("parity") or read_json(run / PARITY),
        "times": times_of(run.logs()),
    }


def contents_of_file(path: Path, data: str | None = None) -> dict[str, Any]:
    """What a file of judgements, JSONL or a table, holds for a page: as `judged_in_file`."""
    judged = judged_in_file(path, data)
    rows = rows_of(judged)
    said = {"verdict": verdict_of(judged, rows), "notes": notes_of(rows), "rows": rows}
    return {"title": path.name, **said, **_of_items(judged), "judge_row": judged.name}


def verdict_of(judged: Judged, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The verdict of a file of judgements with these rows."""
    ends = judged.scales[0] if len(judged.scales) == 1 else None
    return verdict(rows[judged.name], rows, ends=ends, items="items with a gold score")


def rows_of(judged: Judged) -> dict[str, dict[str, Any]]:
    """The figures of a file of judgements, beside those of always guessing its mean gold score."""
    golds = [item.gold for item in judged.items]
    # An item that was not judged may say nothing of its scale.
    several, ends = judged.scales, [item.ends for item in judged.items]
    known = ends if len(several) > 1 else several[0] if several else None
    means = {
        one: float(np.mean([gold for gold, own in zip(golds, ends) if own == one or len(several) < 2]))
        for one in set(ends)
    }
    guesses = [means[one] if one or len(several) < 2 else None for one in ends]
    scores = [item.judgement.score for item in judged.items]
    return measured_rows({judged.name: scores, GOLD_MEAN: guesses}, golds, known, [GOLD_MEAN])


def notes_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is to be said of rows as a whole."""
    return sorted({NORMALISED.format(row["scales"]) for row in rows.values() if row.get("scales")})


def _seed_model(run: Run) -> str | None:
    """The seed model that the judge's spec names."""
    specs = [run / stage / ADAPTER / SPEC_FILE for stage in STAGES]
    return next((JudgeSpec.load(spec.parent).base_model for spec in specs if spec.is_file()), None)


def _improving(run: Run) -> bool:
    """Whether the last step of the last stage was the best of several."""
    for stage in reversed(run.stages().values()):
        checked = [entry for entry in stage.get("log", []) if "eval_rmse" in entry]
        return len(checked) > 1 and stage.get("kept_step") == checked[-1].get("step")
    return False


def _of_items(judged: Judged | None) -> dict[str, Any]:
    """What the items of one judge tell."""
    if judged is None or not judged.scored:
        return {}
    items = judged.scored
    numbers = numbers_of(items)
    varied = len(items) > 1 and np.ptp(numbers.golds) > 0 and np.ptp(numbers.scores) > 0
    pearson = float(np.corrcoef(numbers.golds, numbers.scores)[0, 1]) if varied else math.nan
    return {
        "judge": judged.name,
        "scores": {"count": len(items), "pearson": pearson},
        "calibration": calibration(items),
        "by_std": by_std(numbers),
        "by_gold": by_gold(numbers),
        "by_criteria": by_criteria(items, numbers),
        "lengths": lengths(items, numbers),
        "worst": [_shown(item) for item in worst(items, numbers)],
        "drawn": {"golds": numbers.golds, "scores": numbers.scores, "lengths": reasoning_lengths(items)},
    }


def _shown(item: Item) -> dict[str, Any]:
    """An item as the page shows it: its texts, its reasonings, the bars of its distribution."""
    judgement, record = item.judgement, item.record
    texts: dict[str, str] = {}
    if record is not None:
        asked = {"Prompt": record.prompt}
        if record.prompt is None:
            asked = {"Instruction": record.instruction, "Response": record.response, "Reference": record.reference}
            asked["Criteria"] = record.rubric.criteria if record.rubric else None
        texts = {name: shortened(text) for name, text in asked.items() if text}
    return {
        "id": judgement.id,
        "gold": item.gold,
        "score": judgement.score,
        "std": judgement.std,
        "mass": judgement.mass,
        "truncated": judgement.truncated,
        "texts": texts,
        "feedback": list(map(shortened, judgement.feedback)),
        "ends": ends_of(judgement.values),
        "bars": [
            {"label": label, "value": judgement.values.get(label), "probability": share}
            for label, share in judgement.probabilities.items()
        ],
    }
