"""Does one judge read the same ids and give the same scores as another?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from tract_lite.judge import Judge, Judgement
from tract_lite.prompt import prompt_ids
from tract_lite.records import Record


@dataclass(frozen=True)
class Parity:
    """How far the scores of two judges lie apart, in score units, after the same reasoning ids.

    `different_prompts`: records whose prompts have other ids in the two vocabularies.
    """

    records: int
    different_prompts: int
    mean_difference: float
    largest_difference: float

    def __str__(self) -> str:
        return (f"{self.records} records: {self.different_prompts} prompts with other ids, scores "
                f"differ by {self.mean_difference:.4f} on average, {self.largest_difference:.4f} "
                "at most")


def compare(judge: Judge, other: Judge, records: Sequence[Record],
            judgements: Sequence[Judgement]) -> Parity:
    """Let `other` read the reasonings in `judgements`, which `judge` gave, and compare the scores.

    Raises:
        ValueError: no record was judged by both.
    """
    judged = [(record, given) for record, given in zip(records, judgements) if not given.error]
    asked = [record for record, _ in judged]
    reread = other.score_many(asked, reasonings=[given.feedback_ids for _, given in judged])
    differences = [abs(again.score - given.score)
                   for again, (_, given) in zip(reread, judged) if not again.error]
    if not differences:
        raise ValueError("no record was judged by both judges")
    different_prompts = sum(
        prompt_ids(record, judge.spec, judge.engine.vocabulary)
        != prompt_ids(record, other.spec, other.engine.vocabulary)
        for record in asked
    )
    return Parity(len(differences), different_prompts,
                  float(np.mean(differences)), float(np.max(differences)))
