"""From a record to the ids of its prompt, and from generated ids back to a reasoning.

This module owns every fixed phrase. Ids are joined, never re-tokenised: prompt, reasoning, marker
and label are encoded apart in training and in judging alike.
"""

import re
from functools import lru_cache
from typing import Sequence

from jinja2 import StrictUndefined, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from tract_lite.record import Record
from tract_lite.spec import SLOT, JudgeSpec
from tract_lite.vocabulary import Vocabulary

_TAIL = re.compile(r"(\[RESULT\]|So the overall score is)\s*:?\s*\S{0,12}\s*$", re.IGNORECASE)
_compiled = lru_cache(maxsize=16)(SandboxedEnvironment(trim_blocks=True, undefined=StrictUndefined).from_string)


def render(record: Record, spec: JudgeSpec) -> str:
    """A record's ready prompt, or the template filled. Raises ValueError: it lacks a field."""
    if record.prompt is not None:
        return record.prompt
    try:
        shown = {name: getattr(record, name) for name in ("instruction", "response", "rubric", "reference")}
        return _compiled(spec.template).render(shown, marker=spec.marker, labels=spec.scale.labels)
    except UndefinedError as error:
        missing = "a rubric (column criteria or rubric)" if record.rubric is None else error
        raise ValueError(f"no ready prompt, and the template asks for {missing}") from error


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
