"""What an engine is asked and what it answers; shared by llama.cpp and transformers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Sequence

import numpy as np

from tract_lite.spec import JudgeSpec


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


def room_for(task: Task, spec: JudgeSpec, context_length: int) -> int:
    """How many tokens a reasoning of the task may have in a context of that length.

    Raises:
        ValueError: the task is empty, or does not fit with the reasonings that it brings.
    """
    if not task.prompt or not task.seeds:
        raise ValueError("a task needs a prompt and a seed")
    # The label and the end token count as well, as in training.
    room = context_length - len(task.prompt) - len(spec.marker_ids) - 2
    given = max(map(len, task.reasonings)) if task.reasonings else 0
    if max(given, 1) > room:
        what = "prompt and reasoning" if given else "prompt"
        raise ValueError(f"{what} of {len(task.prompt) + given} tokens does not fit in the "
                         f"context of {context_length} tokens")
    return min(room, spec.sampling.max_new_tokens)


def sample_seed(seed: int, record_key: str, number: int) -> int:
    """A 32-bit seed that depends on the run's seed, the record and the sample's number alone."""
    text = f"{seed}/{record_key}/{number}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
