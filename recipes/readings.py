"""The ways of reading the same judge, each compared with the gold scores."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
from tqdm.auto import tqdm

from tract_lite import Judge, Judgement, Record, ScoreScale, evaluate


def judge_all(judge: Judge, records: Sequence[Record], name: str) -> list[Judgement]:
    """All judgements, with a progress bar."""
    return list(tqdm(judge.score_many(records), f"judging: {name}", len(records)))


def readings(name: str, judged: Sequence[Judgement], golds: Sequence[float]) -> dict[str, Any]:
    """Agreement with the gold scores of the most likely label and of the CoT-RAIL score."""
    return {
        f"{name}, most likely label": evaluate([j.mode for j in judged], golds),
        f"{name}, CoT-RAIL": evaluate([j.score for j in judged], golds),
    }


def sample_labels(judged: Sequence[Judgement], scale: ScoreScale) -> list[float | None]:
    """A label for each judgement, drawn from its distribution over the labels."""
    draw = np.random.default_rng(0)
    return [None if j.error else draw.choice(scale.values, p=[
        j.probabilities[label] / j.mass for label in scale.labels]) for j in judged]
