"""What an engine is, what it is asked and what it answers: llama.cpp, transformers, servers."""

import hashlib
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Iterable, Iterator, Protocol, Self, Sequence

import numpy as np

from tract_lite.data.resume import MOST_WAITING
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary


@dataclass(frozen=True)
class Task:
    """One item for an engine: a prompt, and one seed for each reasoning to sample.

    With `reasonings` (ids, one sequence per seed) nothing is sampled: their scores are read.
    """

    prompt: Sequence[int]
    seeds: Sequence[int]
    reasonings: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Sample:
    """One reasoning and the log-probabilities (K,) of the labels after it.

    `truncated`: the reasoning was stopped by the length limit, not by the judge itself. Where only
    top log-probabilities are known, `missing_mass` is what they leave of 1, and `error_bound` how
    far the score that is read from them may lie from the exact one.
    """

    reasoning: list[int]
    truncated: bool
    label_log_probabilities: np.ndarray
    missing_mass: float = 0.0
    error_bound: float = 0.0


# Each task's answer, or the exception that says why there is none, with its index in the input.
Answers = Iterator[tuple[int, list[Sample] | Exception]]


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
    room = context_length - len(task.prompt) - len(spec.marker_ids) - 2
    given = max(map(len, task.reasonings or ()), default=0)
    if max(given, 1) > room:
        what = f"{'prompt and reasoning' if given else 'prompt'} of {len(task.prompt) + given} tokens"
        raise ValueError(f"{what} does not fit in the context of {context_length} tokens")
    return min(room, spec.sampling.max_new_tokens)


def sample_seed(seed: int, record_key: str, number: int) -> int:
    """A 32-bit seed that depends on the run's seed, the record and the sample's number alone."""
    text = f"{seed}/{record_key}/{number}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


def answers_in_order(engine: Engine, asked: Iterable[Task | Exception]) -> Iterator[list[Sample] | Exception]:
    """The engine's answers in the order of what is asked.

    An exception in place of a task is its own answer, given in its turn.
    """
    asked = iter(asked)
    for first in asked:
        if not isinstance(first, Exception):
            yield from _answers_in_order(engine, chain([first], asked))
        else:
            yield first


def _answers_in_order(engine: Engine, asked: Iterable[Task | Exception]) -> Iterator[list[Sample] | Exception]:
    ready: dict[int, list[Sample] | Exception] = {}
    # By the engine's numbers, which count the tasks alone.
    places: dict[int, int] = {}

    def tasks() -> Iterator[Task]:
        numbers = count()
        for place, task in enumerate(asked):
            if isinstance(task, Exception):
                ready[place] = task
                if len(ready) >= MOST_WAITING:
                    return
            else:
                places[next(numbers)] = place
                yield task

    following = 0
    for number, answer in engine.run(tasks()):
        ready[places.pop(number)] = answer
        while following in ready:
            yield ready.pop(following)
            following += 1
    ready |= dict.fromkeys(places.values(), RuntimeError("the engine gave no answer"))
    yield from (ready[place] for place in sorted(ready))
