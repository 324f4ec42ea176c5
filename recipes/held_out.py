"""The held-out items: judged by each judge of a run, and compared with their gold scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

from tract_lite import Judge, Judgement, Record, ScoreScale, evaluate
from tract_lite.jsonl import append_rows, read_rows


class HeldOut:
    """The held-out items of a run. What each judge says of them is kept in `folder`, row by row."""

    def __init__(self, records: Sequence[Record], folder: Path):
        self.records, self._folder = records, folder
        self._golds = [record.score for record in records]

    def judge(self, name: str, open_judge: Callable[[], Judge],
              count: int | None = None) -> list[Judgement]:
        """The judgements of the first `count` items; where some are missing, the judge is opened.

        `name` is that of the judge's file.
        """
        path = self._folder / f"{name}.jsonl"
        todo = self.records[len(read_rows(path)) : count]
        if todo:
            path.parent.mkdir(exist_ok=True)
            with open_judge() as judge:
                judged = tqdm(judge.score_many(todo), f"judging: {name}", len(todo))
                append_rows(path, ({**judgement.to_row(), "gold": record.score}
                                   for judgement, record in zip(judged, todo)))
        return [Judgement.from_row(row) for row in read_rows(path)]

    def evaluate(self, scores: Sequence[float | None]) -> dict[str, Any]:
        """Agreement of the first items' scores with the gold scores."""
        return evaluate(scores, self._golds[: len(scores)])

    def readings(self, name: str, judged: Sequence[Judgement]) -> dict[str, Any]:
        """Agreement with the gold scores of the most likely label and of the CoT-RAIL score."""
        return {
            f"{name}, most likely label": self.evaluate([j.mode for j in judged]),
            f"{name}, CoT-RAIL": self.evaluate([j.score for j in judged]),
        }


def sample_labels(judged: Sequence[Judgement], scale: ScoreScale) -> list[float | None]:
    """A label for each judgement, drawn from its distribution over the labels."""
    draw = np.random.default_rng(0)
    return [None if j.error else draw.choice(scale.values, p=[
        j.probabilities[label] / j.mass for label in scale.labels]) for j in judged]
