"""From a record to the ids of its prompt, and from generated ids back to a reasoning.

This module owns every fixed phrase. Ids are joined, never re-tokenised: prompt, reasoning, marker
and label are encoded apart in training and in judging alike.
"""

import re
from functools import lru_cache
from typing import Sequence

from jinja2 import StrictUndefined, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale, ScoreTokens, find_score_tokens
from tract_lite.spec import SLOT, JudgeSpec
from tract_lite.vocabulary import Vocabulary

_TAIL = re.compile(r"(\[RESULT\]|So the overall score is)\s*:?\s*\S{0,12}\s*$", re.IGNORECASE)
_compiled = lru_cache(maxsize=16)(SandboxedEnvironment(trim_blocks=True, undefined=StrictUndefined).from_string)


def scale_of(record: Record, spec: JudgeSpec) -> ScoreScale:
    """The scale that a record is judged on: its own, or else the judge's, which may have other
    labels for the same units.
    Raises ValueError: it has its own, and the judge was made for one scale.
    """
    if record.scale in (None, spec.scale, spec.units):
        return spec.scale
    if not spec.any_scale:
        own = spec.units or spec.scale
        fault = f"the item asks for the scale {record.scale}, and this judge answers on {own} alone"
        raise ValueError(f"{fault}\nleave the item's scale out, or take a judge of many scales")
    return record.scale


class Endings:
    """How the judgement of each record ends: its scale, and how that is spelled."""

    def __init__(self, spec: JudgeSpec, vocabulary: Vocabulary):
        self._spec, self._vocabulary = spec, vocabulary
        self._tokens = {spec.scale: spec.tokens}

    def of(self, record: Record) -> ScoreTokens:
        """Raises ValueError: the record's scale is not the judge's, or can't be spelled here."""
        scale = scale_of(record, self._spec)
        if scale not in self._tokens:
            self._tokens[scale] = find_score_tokens(self._vocabulary, self._spec.marker, scale)
        return self._tokens[scale]


def render(record: Record, spec: JudgeSpec) -> str:
    """A record's ready prompt, or the template filled. Raises ValueError: it lacks a field."""
    scale = scale_of(record, spec)
    if record.prompt is not None:
        return record.prompt
    try:
        shown = {name: getattr(record, name) for name in ("instruction", "response", "reference")}
        shown |= {"rubric": _in_units(record.rubric, scale, spec), "labels": scale.labels, "scores": scale.named}
        return _compiled(spec.template).render(shown, marker=spec.marker)
    except UndefinedError as error:
        if record.rubric is None:
            advice = '--columns criteria=NAME names its column, --criteria "TEXT" is one for all items'
            raise ValueError(f"the item has no criteria, and no ready prompt\n{advice}") from error
        raise ValueError(f"no ready prompt, and the template asks for {error}") from error


def _in_units(rubric: Rubric | None, scale: ScoreScale, spec: JudgeSpec) -> Rubric | None:
    """The rubric with the judge's labels, where its user's are of other units."""
    if rubric is None or spec.units is None or scale != spec.scale:
        return rubric
    described: dict[str, str] = {}
    for label, description in rubric.descriptions.items():
        if label in spec.units.labels:
            value = spec.units.values[spec.units.labels.index(label)]
            label = spec.scale.labels[spec.scale.nearest(value)]
        described[label] = f"{described[label]} / {description}" if label in described else description
    return Rubric(rubric.criteria, described)


def prompt_ids(record: Record, spec: JudgeSpec, vocabulary: Vocabulary) -> list[int]:
    """The ids of a record's prompt in the seed's chat format."""
    ids: list[int] = []
    for piece in spec.chat:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids.extend(vocabulary.encode(piece.replace(SLOT, render(record, spec))))
    return ids


def reasoning_text(feedback: str) -> str:
    """An annotator's feedback without the score that it ends with, if it does."""
    text = feedback.strip()
    while (shorter := _TAIL.sub("", text).strip()) != text:
        text = shorter
    return text


class Reasoning:
    """A reasoning while it is written: tells when it ends and where to cut it.

    It ends with the marker, found by its ids or by its text (a model may spell it with other
    tokens), or with the end token or another special token of the chat format.
    """

    def __init__(self, spec: JudgeSpec, vocabulary: Vocabulary):
        self._spec, self._vocabulary = spec, vocabulary
        self._ends = {spec.eos_id, *(piece for piece in spec.chat if isinstance(piece, int))}
        # Up to where its text is complete: a space before the label may be a token of its own.
        self._marker = list(spec.marker_ids)
        while spec.marker in vocabulary.decode(self._marker[:-1]):
            del self._marker[-1]
        self.ids: list[int] = []

    def add(self, token: int) -> bool:
        """Take the next token; True where the reasoning is complete, with `ids` already cut."""
        if token in self._ends:
            return True
        self.ids.append(token)
        cut = self._marker_start()
        if cut is None:
            return False
        del self.ids[cut:]
        return True

    def _marker_start(self) -> int | None:
        if self.ids[-len(self._marker) :] == self._marker:
            return len(self.ids) - len(self._marker)
        # At worst each of its bytes is a token.
        start = max(0, len(self.ids) - len(self._spec.marker.encode()) - 4)
        if self._spec.marker not in self._vocabulary.decode(self.ids[start:]):
            return None
        while self._spec.marker in self._vocabulary.decode(self.ids[start + 1 :]):
            start += 1
        return start


def cut_reasoning(ids: Sequence[int], spec: JudgeSpec, vocabulary: Vocabulary) -> tuple[list[int], bool]:
    """The reasoning in generated ids, and whether it was complete (not cut off by a limit)."""
    reasoning = Reasoning(spec, vocabulary)
    complete = any(reasoning.add(token) for token in ids)
    return reasoning.ids, complete
