"""Records to judgements: sample reasonings, read the score distribution after each, average."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Protocol, Sequence

import numpy as np

from tract_lite.prompt import prompt_ids
from tract_lite.rail import LOW_MASS, expected_score
from tract_lite.records import Record
from tract_lite.sampling import Sample, Task, sample_seed
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one record.

    `score` is the CoT-RAIL expectation, averaged over the reasonings; `scores` holds one for each.
    `probabilities` are those of the labels, averaged; `mass` is their sum, what is missing from 1
    lies on tokens that are no score. `std` is the standard deviation of the label distribution,
    `mode` the value of the most likely label. `truncated`: a reasoning was stopped by the length
    limit. A failed item has `error` and no score (NaN).
    """

    id: str | None
    score: float = math.nan
    probabilities: dict[str, float] = field(default_factory=dict)
    mass: float = math.nan
    feedback: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    std: float = math.nan
    mode: float = math.nan
    truncated: bool = False
    error: str | None = None
    feedback_ids: list[list[int]] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """The judgement as a JSON-serialisable row, None where a figure is missing."""
        row = asdict(self)
        return {key: None if value != value else value for key, value in row.items()}


class Engine(Protocol):
    """A model that answers tasks: `engine.LlamaEngine` or `torch_engine.TransformersEngine`."""

    spec: JudgeSpec
    vocabulary: Vocabulary

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]: ...
    def close(self) -> None: ...


class Judge:
    """Scores records with CoT-RAIL.

    Source: TRACT, section 3 (CoT-RAIL).
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.spec = engine.spec

    @classmethod
    def from_gguf(cls, path: str | Path, spec: JudgeSpec | None = None, **options: Any) -> Judge:
        """A judge from a GGUF file, run by llama.cpp; `options` are those of `LlamaEngine`.

        Raises:
            ValueError: not a GGUF file, or one without a judge spec and none is given.
        """
        from tract_lite.engine import LlamaEngine

        return cls(LlamaEngine(path, spec, **options))

    @classmethod
    def from_pretrained(cls, folder: str | Path, spec: JudgeSpec | None = None,
                        batch_size: int = 16) -> Judge:
        """A judge from a merged model folder, run by transformers in this machine's precision."""
        from tract_lite.seed import load_seed

        spec = spec or JudgeSpec.load(folder)
        model, tokenizer = load_seed(folder, load_in_4bit=False, backend="transformers")
        return cls.from_model(model, tokenizer, spec, batch_size)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, spec: JudgeSpec, batch_size: int = 16) -> Judge:
        """A judge from a loaded transformers model, with or without an adapter."""
        from tract_lite.torch_engine import TransformersEngine

        return cls(TransformersEngine(model, tokenizer, spec, batch_size))

    def score(self, record: Record, n_cot: int = 1, seed: int = 0) -> Judgement:
        """Judge one record.

        Raises:
            ValueError: the record can't be judged.
        """
        judgement = next(self.score_many([record], n_cot, seed))
        if judgement.error:
            raise ValueError(judgement.error)
        return judgement

    def score_many(self, records: Iterable[Record], n_cot: int = 1, seed: int = 0, *,
                   reasonings: Sequence[Sequence[Sequence[int]]] | None = None,
                   ) -> Iterator[Judgement]:
        """Judge records as they come, one judgement each, in input order.

        A record that can't be judged gives a judgement with `error`. With `reasonings` (for each
        record, the ids of its reasonings) nothing is sampled: their scores are read.
        """
        ids: list[str | None] = []
        asked: list[int] = []
        ready: dict[int, Judgement] = {}

        def tasks() -> Iterator[Task]:
            for index, record in enumerate(records):
                ids.append(record.id)
                try:
                    prompt = prompt_ids(record, self.spec, self.engine.vocabulary)
                except ValueError as error:
                    ready[index] = Judgement(record.id, error=str(error))
                    continue
                given = reasonings[index] if reasonings is not None else None
                count = n_cot if given is None else len(given)
                if count < 1:
                    ready[index] = Judgement(record.id, error="no reasoning is asked for")
                    continue
                source = f"{record.id}/{record.key}"
                asked.append(index)
                yield Task(prompt, [sample_seed(seed, source, n) for n in range(count)], given)

        following = low = 0
        for number, answer in self.engine.run(tasks()):
            index = asked[number]
            ready[index] = self._judgement(ids[index], answer)
            low += ready[index].mass < LOW_MASS
            while following in ready:
                yield ready.pop(following)
                following += 1
        yield from (ready[index] for index in sorted(ready))
        if low:
            logger.warning("%d of %d judgements have less than %g of the probability on the "
                           "labels: their scores are pulled down", low, len(ids), LOW_MASS)

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _judgement(self, record_id: str | None, answer: list[Sample] | Exception) -> Judgement:
        if isinstance(answer, Exception):
            return Judgement(record_id, error=str(answer))
        values = np.array(self.spec.scale.values)
        rows = np.exp([sample.label_log_probabilities for sample in answer])
        scores = expected_score(rows, values)
        mean = rows.mean(axis=0)
        mass = float(mean.sum())
        centred = values - expected_score(mean / mass, values)
        return Judgement(
            id=record_id,
            score=float(scores.mean()),
            probabilities=dict(zip(self.spec.scale.labels, mean.tolist())),
            mass=mass,
            feedback=[self.engine.vocabulary.decode(s.reasoning).strip() for s in answer],
            scores=scores.tolist(),
            std=math.sqrt(expected_score(mean / mass, centred**2)),
            mode=float(values[mean.argmax()]),
            truncated=any(sample.truncated for sample in answer),
            feedback_ids=[list(sample.reasoning) for sample in answer],
        )
