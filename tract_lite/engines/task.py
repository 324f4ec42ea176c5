"""What an engine is, what it is asked and what it answers: llama.cpp, transformers, servers."""

import hashlib
from collections import deque
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Callable, Iterable, Iterator, Protocol, Self, Sequence, TypeVar

import numpy as np

from tract_lite.data.resume import MOST_WAITING
from tract_lite.rail import LabelReading
from tract_lite.scale import ScoreTokens
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary


@dataclass(frozen=True)
class Task:
    """One item for an engine: a prompt, and one seed for each reasoning to sample.

    With `reasonings` (ids, one sequence per seed) nothing is sampled: their scores are read. That
    of an empty one is read straight after the prompt and the marker. `tokens` spell the item's own
    scale, where it is not the spec's.
    """

    prompt: Sequence[int]
    seeds: Sequence[int]
    reasonings: Sequence[Sequence[int]] | None = None
    tokens: ScoreTokens | None = None

    @classmethod
    def direct(cls, prompt: Sequence[int], tokens: ScoreTokens | None = None) -> Self:
        """The task of scoring without a reasoning."""
        return cls(prompt, [0], [[]], tokens)

    def ending(self, spec: JudgeSpec) -> ScoreTokens:
        """How the labels of the item's scale are spelled."""
        return self.tokens or spec.tokens


@dataclass(frozen=True)
class Sample:
    """One reasoning and the log-probabilities (K,) of the labels after it.

    `truncated`: the reasoning was stopped by the length limit, not by the judge itself. Where only
    top log-probabilities are known, `missing_mass` is what they leave of 1. The score lies within
    `error_bound` of the exact one. `end_mass`: see `LabelReading`.
    """

    reasoning: list[int]
    truncated: bool
    label_log_probabilities: np.ndarray
    missing_mass: float = 0.0
    error_bound: float = 0.0
    end_mass: float = 1.0

    @classmethod
    def of(cls, reasoning: Sequence[int], truncated: bool, found: LabelReading) -> Self:
        """The sample of a reasoning and of all that was read after it."""
        bounds = found.missing_mass, found.error_bound, found.end_mass
        return cls(list(reasoning), truncated, found.log_probabilities, *bounds)


# Second tasks, which write, wait until there are so many: together they fill an engine.
SECOND_TOGETHER = 64

# Each task's answer, or the exception that says why there is none, with its index in the input.
Answers = Iterator[tuple[int, list[Sample] | Exception]]
Answer = TypeVar("Answer")


class Engine(Protocol):
    """A model that answers tasks: `LlamaEngine`, `TransformersEngine` or `ServerEngine`.

    `identity` tells which model it is, as far as that is known; `shape` what the rounding of a run
    hangs on. Both are kept with its results.
    """

    spec: JudgeSpec
    vocabulary: Vocabulary
    identity: dict[str, Any]
    shape: dict[str, Any]

    def run(self, tasks: Iterable[Task]) -> Answers:
        """The answers, as they are completed."""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def room_for(task: Task, spec: JudgeSpec, context_length: int) -> int:
    """How many tokens a reasoning may have. Raises ValueError: the task does not fit as it is."""
    # The label and the end token count as well, as in training.
    ending = task.ending(spec)
    room = context_length - len(task.prompt) - len(ending.marker) - ending.longest - 1
    given = max(map(len, task.reasonings or ()), default=0)
    # What is to be written needs room for a token.
    if max(given, task.reasonings is None) > room:
        what = f"{'prompt and reasoning' if given else 'prompt'} of {len(task.prompt) + given} tokens"
        raise ValueError(f"{what} does not fit in the context of {context_length} tokens")
    return min(room, spec.sampling.max_new_tokens)


def sample_seed(seed: int, record_key: str, number: int) -> int:
    """A 32-bit seed that depends on the run's seed, the record and the sample's number alone."""
    text = f"{seed}/{record_key}/{number}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


def answers_of(engine: Engine, asked: Iterable[Task | Exception]) -> Answers:
    """The engine's answers with their place in what is asked, as they are completed.

    An exception in place of a task is its own answer.
    """
    numbered = enumerate(asked)
    for place, first in numbered:
        if not isinstance(first, Exception):
            yield from _answers_of(engine, chain([(place, first)], numbered))
        else:
            yield place, first


def _answers_of(engine: Engine, asked: Iterable[tuple[int, Task | Exception]]) -> Answers:
    refused: deque[tuple[int, Exception]] = deque()
    # By the engine's numbers, which count the tasks alone.
    places: dict[int, int] = {}

    def tasks() -> Iterator[Task]:
        numbers = count()
        for place, task in asked:
            if isinstance(task, Exception):
                refused.append((place, task))
                if len(refused) >= MOST_WAITING:
                    return
            else:
                places[next(numbers)] = place
                yield task

    for number, answer in engine.run(tasks()):
        while refused:
            yield refused.popleft()
        yield places.pop(number), answer
    yield from refused
    yield from ((place, RuntimeError("the engine gave no answer")) for place in places.values())


def in_order(answers: Iterable[tuple[int, Answer]]) -> Iterator[Answer]:
    """What has places from 0 on, in the order of these."""
    ready: dict[int, Answer] = {}
    following = 0
    for place, answer in answers:
        ready[place] = answer
        while following in ready:
            yield ready.pop(following)
            following += 1


def asked_again(
    engine: Engine, asked: Iterable[Task | Exception], again: Callable[[int, list[Sample] | Exception], Task | None]
) -> Answers:
    """As `answers_of`, but where `again` gives a second task for an answer, that one's instead.

    Second tasks are asked many together, before those of `asked` that are still to come.
    """
    numbered, places = enumerate(asked), dict[int, int]()
    second, ready = deque[tuple[int, Task]](), deque[tuple[int, Task | Exception]]()

    def tasks() -> Iterator[Task | Exception]:
        for number in count():
            if not ready and len(second) < SECOND_TOGETHER and (first := next(numbered, None)):
                ready.append(first)
            elif not ready:
                ready.extend(second)
                second.clear()
            if not ready:
                return
            places[number], task = ready.popleft()
            yield task

    while True:
        for number, answer in answers_of(engine, tasks()):
            place = places.pop(number)
            if (task := again(place, answer)) is None:
                yield place, answer
            else:
                second.append((place, task))
        if not second:
            return
