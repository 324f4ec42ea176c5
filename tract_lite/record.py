"""What is judged: a record with its rubric, and what annotators said of it."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Mapping, NamedTuple

from tract_lite.scale import ScoreScale


@dataclass(frozen=True)
class Rubric:
    """The criteria of a score, and what each described label stands for."""

    criteria: str
    descriptions: Mapping[str, str] = field(default_factory=dict)


class Annotation(NamedTuple):
    """One judgement of an item: a reasoning and the score it leads to."""

    feedback: str
    score: float


@dataclass(frozen=True)
class Record:
    """An item to judge or to learn from; a `prompt` is asked as it stands, without a template.

    `score` is the gold score, `feedback` the reasoning for it; `feedback_ids` are the tokens of a
    reasoning that the judge wrote itself. `scale`: the item's own, where it is not the judge's.
    `gold_scores`: those of several annotators, where `score` is one of them or their mean.
    """

    instruction: str = ""
    response: str = ""
    rubric: Rubric | None = None
    reference: str | None = None
    score: float | None = None
    feedback: str | None = None
    prompt: str | None = None
    id: str | None = None
    annotations: tuple[Annotation, ...] = ()
    feedback_ids: tuple[int, ...] | None = None
    scale: ScoreScale | None = None
    gold_scores: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """A hash (16 hex digits) of what the judge reads, the same in every run."""
        scale = [str(self.scale)] if self.scale else []
        if self.prompt is not None:
            return digest([self.prompt, *scale] if scale else self.prompt)
        rubric = self.rubric and [self.rubric.criteria, dict(self.rubric.descriptions)]
        return digest([self.instruction, self.response, rubric, self.reference, *scale])

    def pairs(self) -> "list[Record]":
        """The item's training records: one for each annotation, or itself if it has none."""
        golds = tuple(annotation.score for annotation in self.annotations) or self.gold_scores
        plain, name = replace(self, annotations=(), feedback_ids=None, gold_scores=golds), self.id or self.key
        given = enumerate(self.annotations)
        return [replace(plain, feedback=text, score=n, id=f"{name}/{place}") for place, (text, n) in given] or [self]


def digest(content: Any) -> str:
    """A hash (16 hex digits) of what JSON can hold, the same in every run."""
    # ASCII JSON spells out lone surrogates, which UTF-8 can't hold.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
