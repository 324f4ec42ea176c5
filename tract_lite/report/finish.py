"""The end of a run: its judges judge the held-out items, and what they are worth is kept."""

import logging
import math
import textwrap
from contextlib import ExitStack
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from tract_lite.data.jsonl import read_json, read_rows, write_json
from tract_lite.data.resume import name_of
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.record import Record
from tract_lite.report.card import write_model_card
from tract_lite.report.contents import contents_of_run
from tract_lite.report.page import write_pages
from tract_lite.report.rows import (
    TRAINING_MEAN,
    measured_rows,
    readings,
    score_row,
    scores_alone,
    short_table,
    training_means,
)
from tract_lite.run import JUDGED, METRICS, PARITY, TRAINING, Run
from tract_lite.scale import ScoreScale
from tract_lite.training.quiet import progress, quieter

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """A judge that a run is measured by: how it is opened, how many of the held-out items it judges
    at most (None: all), with how many reasonings each (None: its own way), and whether it is one
    that others are to be better than, such as the untrained seed model. Of neighbours that `open`
    in the same way, the first one opens for all."""

    open: Callable[[], Judge]
    items: int | None = None
    n_cot: int | None = None
    is_baseline: bool = False


def finish_run(
    run: Run,
    held_out: Sequence[Record],
    judges: Mapping[str, Measured],
    *,
    scale: ScoreScale,
    cards: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Judge the held-out items with each judge, compare with the gold scores, write the report.

    `judges`: by the name of its rows. `scale`: that of the items which bring none of their own, in
    units of their gold scores. Judgements are kept one by one in the folder `judged`, and those
    that are there are taken as they are, whoever wrote them. A row more is what always guessing the
    mean of the training records gives. `cards`: further folders that get the model card. Prints the
    table and the verdict; returns the metrics.
    """
    if not (run / METRICS).exists():
        predictions = dict(_given_rows(run, held_out, judges))
        predictions |= _guesses(run, held_out, scale)
        baselines = [name for name in (TRAINING_MEAN,) if name in predictions]
        chosen = _chosen(judges, len(held_out))
        for name, judged in _judged(run, held_out, judges, chosen):
            predictions |= {f"{name}, {reading}": scores for reading, scores in readings(judged).items()}
            baselines += [score_row(name, predictions)] * judges[name].is_baseline
        golds = [math.nan if record.score is None else record.score for record in held_out]
        scales = [record.scale or scale for record in held_out]
        ends = [(min(one.values), max(one.values)) for one in scales]
        several = ends if len(set(ends)) > 1 else None
        rows = measured_rows(predictions, golds, several, baselines)
        metrics: dict[str, Any] = {"rows": rows, "parity": read_json(run / PARITY), "counts": run.counts}
        metrics |= {"judge": chosen, "scale": None if several else ends[0]}
        write_json(run / METRICS, metrics)
    metrics = read_json(run / METRICS)
    for folder in (run.folder, *filter(Path.is_dir, map(Path, cards))):
        write_model_card(run.folder, folder)
    contents = contents_of_run(run)
    page = write_pages(contents, run)
    print(f"\n{short_table(scores_alone(metrics['rows']))}")
    print(*contents["notes"], "", *textwrap.wrap(contents["verdict"], 100), "", sep="\n")
    for file in run.gguf_files():
        print(f"judge:  {file}")
    print(f"report: {page}\nall:    {run.folder}/")
    return metrics


def _judged(
    run: Run, held_out: Sequence[Record], judges: Mapping[str, Measured], chosen: str | None
) -> Iterator[tuple[str, list[Judgement]]]:
    """What each judge says of its items; one is opened where some of that is missing."""
    for open_judge, group in groupby(judges.items(), key=lambda named: named[1].open):
        with ExitStack() as opened:
            judge = cache(lambda: opened.enter_context(open_judge()))  # noqa: B023
            for name, one in group:
                path, records = run / JUDGED / f"{name}.jsonl", held_out[: one.items]
                there = {row["id"]: row for row in read_rows(path) if row["error"] is None}
                if len(there) >= len(records):
                    yield name, [Judgement.from_row(there[name_of(record)]) for record in records]
                    continue
                path.parent.mkdir(exist_ok=True)
                with progress(f"opening: {name}"):
                    judge()
                # What is odd about judgements is said of those that the verdict is about.
                with quieter("judge", logging.NOTSET if name == chosen else logging.ERROR):
                    said = _with_bar(name, judge().score_many(records, one.n_cot, resume=path), len(records))
                yield name, said


def _with_bar(name: str, judged: Iterable[Judgement], count: int) -> list[Judgement]:
    """The judgements, with a bar while they are made, and a line when they are there."""
    judgements = []
    with progress(f"judging: {name}", count) as bar:
        for judgement in judged:
            judgements.append(judgement)
            bar.update()
    done = sum(judgement.error is None for judgement in judgements)
    logger.info("%s: %d of %d held-out items judged", name, done, count)
    return judgements


def _given_rows(
    run: Run, held_out: Sequence[Record], judges: Mapping[str, Any]
) -> Iterator[tuple[str, list[float | None]]]:
    """What others have said of the held-out items, such as the best that any judge could say."""
    for path in sorted((run / JUDGED).glob("*.jsonl")):
        if path.stem not in judges:
            scores = {row["id"]: row["score"] for row in read_rows(path)}
            yield path.stem, [scores.get(name_of(record)) for record in held_out]


def _guesses(run: Run, held_out: Sequence[Record], scale: ScoreScale) -> dict[str, list[float | None]]:
    """The mean of the training records' gold scores for each item."""
    training = run.records(TRAINING)
    if not any(record.score is not None for record in training):
        return {}
    mean = training_means(training, scale)
    return {TRAINING_MEAN: [mean(record.scale) for record in held_out]}


def _chosen(judges: Mapping[str, Measured], count: int) -> str | None:
    """The judge that the verdict is about: of those with the most items the last one."""
    trained = {name: min(one.items or count, count) for name, one in judges.items() if not one.is_baseline}
    return max(reversed(trained), key=trained.__getitem__, default=None)
