"""Writes a reasoning from logits, token by token, by the one sampling rule."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tract_lite.engines.task import Sample, Task, room_for
from tract_lite.prompt import Reasoning
from tract_lite.rail import LabelReading
from tract_lite.scale import Path
from tract_lite.spec import JudgeSpec, Sampling
from tract_lite.vocabulary import Vocabulary


class TokenSampler:
    """Draws one sequence: repetition penalty, temperature and nucleus, in this order.

    The rule is that of transformers, but the penalty counts generated tokens only. What is drawn
    hangs on the logits and the seed alone.
    """

    def __init__(self, sampling: Sampling, seed: int):
        self._sampling = sampling
        self._generator = np.random.default_rng(seed)
        self._generated: set[int] = set()

    def draw(self, logits: np.ndarray) -> int | None:
        """The next token after logits (V,); None where they are not finite."""
        logits = np.array(logits, dtype=np.float32)
        penalty = self._sampling.repetition_penalty
        seen = list(self._generated)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):
            return None
        token = likeliest
        # A nucleus of 0 is the likeliest token alone.
        if self._sampling.temperature > 0 and self._sampling.top_p > 0:
            logits -= logits[likeliest]
            token = self._draw(np.exp(logits / self._sampling.temperature))
        self._generated.add(token)
        return token

    def _draw(self, weights: np.ndarray) -> int:
        """A token of the nucleus, by rejection: nothing is sorted."""
        total = weights.sum(dtype=np.float64)
        nucleus = self._sampling.top_p * total
        # Tokens as unlikely as this lie outside, even if all of them were.
        ids = np.flatnonzero(weights > (total - nucleus) / len(weights))
        weights = weights[ids]
        cumulative = weights.cumsum(dtype=np.float64)
        while True:
            point = self._generator.random() * cumulative[-1]
            place = cumulative.searchsorted(point, side="right")
            if weights[weights > weights[place]].sum(dtype=np.float64) < nucleus:
                return int(ids[place])


class Writing(Reasoning):
    """A reasoning while it is written: to its marker, an end token, or `room` tokens at most."""

    def __init__(self, spec: JudgeSpec, vocabulary: Vocabulary, seed: int, room: int):
        super().__init__(spec, vocabulary)
        self._sampler, self._eos_id, self.room = TokenSampler(spec.sampling, seed), spec.eos_id, room
        self.done = self.truncated = False

    def write(self, logits: np.ndarray) -> int:
        """Draw the next token after logits (V,) and take it; returns it, once done the end token.

        Where none can be drawn the reasoning ends, and its score will show what is wrong.
        """
        token = self._sampler.draw(logits)
        complete = token is None or self.add(token)
        self.truncated = not complete and len(self.ids) >= self.room
        self.done = complete or self.truncated
        return self._eos_id if token is None or self.done else token


@dataclass
class Job:
    """One sample of a task: its score is read after its reasoning, which is None until written."""

    index: int
    number: int
    samples: list[Any]
    prompt: list[int]
    marker: list[int]
    writing: Writing
    reasoning: list[int] | None
    reading: LabelReading

    @property
    def ids(self) -> list[int]:
        """What the next logits are read after; of several nodes of the labels' tree, the last."""
        return self.prompt if self.reasoning is None else self.ids_at(self.reading.wanted[-1])

    def ids_at(self, node: Path) -> list[int]:
        """The ids up to a node of the labels' tree."""
        return [*self.prompt, *(self.reasoning or ()), *self.marker, *node]

    def complete(self) -> list[tuple[int, list[Sample]]]:
        """Where all is read, the task's answer, if this was the last that it lacked."""
        self.samples[self.number] = Sample.of(self.reasoning or [], self.writing.truncated, self.reading)
        return [(self.index, self.samples)] if all(self.samples) else []


def jobs_of(index: int, task: Task, spec: JudgeSpec, vocabulary: Vocabulary, context_length: int) -> list[Job]:
    """The samples of a task. Raises ValueError: it does not fit in the context."""
    room = room_for(task, spec, context_length)
    ending = task.ending(spec)
    samples, prompt, marker = [None] * len(task.seeds), list(task.prompt), list(ending.marker)
    jobs = []
    for number, seed in enumerate(task.seeds):
        given = None if task.reasonings is None else list(task.reasonings[number])
        writing, reading = Writing(spec, vocabulary, seed, room), LabelReading(ending, spec.eos_id)
        jobs.append(Job(index, number, samples, prompt, marker, writing, given, reading))
    return jobs
