"""The end of a run: its judges judge the held-out items, and what they are worth is kept."""

import math
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
from tqdm.auto import tqdm

from tract_lite.data.jsonl import read_json, read_rows, write_json
from tract_lite.data.resume import name_of
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.metrics import NORMALISED, evaluate, format_table
from tract_lite.record import Record
from tract_lite.report.card import write_model_card
from tract_lite.report.page import write_report
from tract_lite.run import JUDGED, METRICS, PARITY, Run
from tract_lite.scale import ScoreScale

# The readings of a judge's distribution that a row of the table stands for.
RAIL, MODE, SAMPLED = "CoT-RAIL", "most likely label", "sampled label"


def finish_run(
    run: Run,
    held_out: Sequence[Record],
    judges: Mapping[str, tuple[Callable[[], Judge], int | None]],
    *,
    scale: ScoreScale,
    cards: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Judge the held-out items with each judge, compare with the gold scores, write the report.

    `judges`: by the name of its rows, how a judge is opened and how many items it judges at most.
    `scale`: that of the items which bring none of their own, in units of their gold scores.
    Judgements are kept one by one in the folder `judged`, and those that are there are taken as
    they are, whoever wrote them. `cards`: further folders that get the model card. Prints the
    table; returns the metrics.
    """
    if not (run / METRICS).exists():
        measure = partial(_evaluate, held_out, scale)
        rows = dict(_given_rows(run, held_out, judges, measure))
        for name, (open_judge, count) in judges.items():
            judged = _judge(run / JUDGED / f"{name}.jsonl", name, open_judge, held_out[:count])
            for reading, scores in _readings(judged).items():
                rows[f"{name}, {reading}"] = measure(scores)
        parity = read_json(run / PARITY)
        write_json(run / METRICS, {"rows": rows, "parity": parity, "counts": run.counts})
    metrics = read_json(run / METRICS)
    for folder in (run.folder, *filter(Path.is_dir, map(Path, cards))):
        write_model_card(run.folder, folder)
    print(f"\n{format_table(metrics['rows'])}\n")
    for count in {row["scales"] for row in metrics["rows"].values() if "scales" in row}:
        print(f"{NORMALISED.format(count)}\n")
    for file in run.gguf_files():
        print(f"judge:  {file}")
    print(f"report: {write_report(run.folder)}\nall:    {run.folder}/")
    return metrics


def _judge(path: Path, name: str, open_judge: Callable[[], Judge], records: Sequence[Record]) -> list[Judgement]:
    """The judgements of the records; the judge is opened where some are missing."""
    there = [row for row in read_rows(path) if row["error"] is None]
    if len(there) < len(records):
        path.parent.mkdir(exist_ok=True)
        with open_judge() as judge:
            judged = judge.score_many(records, resume=path)
            return list(tqdm(judged, f"judging: {name}", len(records)))
    by_id = {row["id"]: row for row in there}
    return [Judgement.from_row(by_id[name_of(record)]) for record in records]


def _given_rows(
    run: Run, held_out: Sequence[Record], judges: Mapping[str, Any], measure: Callable[..., dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What others have said of the held-out items, such as the best that any judge could say."""
    for path in sorted((run / JUDGED).glob("*.jsonl")):
        if path.stem not in judges:
            scores = {row["id"]: row["score"] for row in read_rows(path)}
            yield path.stem, measure([scores.get(name_of(record)) for record in held_out])


def _readings(judged: Sequence[Judgement]) -> dict[str, list[float | None]]:
    """The scores of the items by each reading of their distributions."""
    draw = np.random.default_rng(0)
    sampled = [
        draw.choice([*one.values.values()], p=[one.probabilities[label] / one.mass for label in one.values])
        if one.mass > 0
        else None
        for one in judged
    ]
    return {SAMPLED: sampled, MODE: [j.mode for j in judged], RAIL: [j.score for j in judged]}


def _evaluate(held_out: Sequence[Record], scale: ScoreScale, scores: Sequence[float | None]) -> dict[str, Any]:
    measured = held_out[: len(scores)]
    golds = [math.nan if record.score is None else record.score for record in measured]
    scales = [record.scale or scale for record in measured]
    ends = [(min(one.values), max(one.values)) for one in scales]
    return evaluate(scores, golds, ends if len(set(ends)) > 1 else None)
