"""Records to judgements: sample reasonings, read the score distribution after each, average."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Iterable, Iterator, Protocol, Sequence

import numpy as np

from tract_lite.judgement import Judgement
from tract_lite.prompt import prompt_ids
from tract_lite.rail import LOW_MASS, expected_score
from tract_lite.records import Record
from tract_lite.sampling import Sample, Task, sample_seed
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A model that answers tasks, with the exception for one that it can't answer.

    `engine.LlamaEngine`, `torch_engine.TransformersEngine` or `server_engine.ServerEngine`.
    """

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
    def from_gguf(cls, path: str | Path, spec: JudgeSpec | None = None, *,
                  adapter: str | Path | None = None, **options: Any) -> Judge:
        """A judge from a GGUF file, run by llama.cpp; `options` are those of `LlamaEngine`.

        With `adapter` (what `export_adapter` has written), the file is the adapter's seed, which
        serves many judges: `use_adapter` goes on to the next one.

        Raises:
            ValueError: not a GGUF file, one without a judge spec and none is given, or an adapter
                of another seed.
        """
        from tract_lite.engine import LlamaEngine

        return cls(LlamaEngine(path, spec, adapter=adapter, **options))

    def use_adapter(self, path: str | Path, spec: JudgeSpec | None = None) -> None:
        """Become the judge of another adapter on the same GGUF file, which stays loaded.

        Raises:
            ValueError: not an adapter on this base, one without a judge spec, or not a GGUF judge.
        """
        if not hasattr(self.engine, "use_adapter"):
            raise ValueError("only a judge from a GGUF file can change its adapter")
        self.engine.use_adapter(path, spec)
        self.spec = self.engine.spec

    @classmethod
    def from_server(cls, url: str, model: str | None = None,
                    spec: JudgeSpec | str | Path | None = None, **options: Any) -> Judge:
        """A judge behind an OpenAI-compatible endpoint: llama-server, vLLM and others.

        `model` is its name there. `spec`, or the path of one, of the judge's folder or of its GGUF,
        is needed where the server runs on another machine. `options` are those of `ServerEngine`:
        `parallel` (samples in flight), `timeout` (seconds), `retries`, `api_key`, `vocabulary`.

        Raises:
            ValueError: no spec, no such model, or the spec of another judge.
            RuntimeError: nothing answers there, or what does is no server of completions.
        """
        from tract_lite.server_engine import ServerEngine

        return cls(ServerEngine(url, model, spec, **options))

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

        A record that can't be judged, with all its reasonings, gives a judgement with `error`. With
        `reasonings` (for each record, the ids of its reasonings) nothing is sampled: their scores
        are read. What is held in memory does not grow with the input. An error of `records` is
        raised after the judgements of all records before it, one of the engine at once.
        """
        waiting: dict[int, tuple[str | None, Exception | None]] = {}
        broken: list[Exception] = []

        def tasks() -> Iterator[Task]:
            try:
                for index, record in enumerate(records):
                    task, fault = self._task(
                        record, n_cot, seed, None if reasonings is None else reasonings[index])
                    waiting[index] = getattr(record, "id", None), fault
                    yield task
            except Exception as error:
                broken.append(error)

        ready: dict[int, Judgement] = {}
        following = low = 0
        try:
            for index, answer in self.engine.run(tasks()):
                record_id, fault = waiting.pop(index)
                ready[index] = self._judgement(record_id, fault or answer)
                while following in ready:
                    judgement = ready.pop(following)
                    following += 1
                    low += judgement.mass < LOW_MASS
                    yield judgement
            for index, (record_id, _) in waiting.items():
                ready[index] = Judgement(record_id, error="the engine gave no answer")
            yield from (ready[index] for index in sorted(ready))
        finally:
            if low:
                logger.warning("%d of %d judgements have less than %g of the probability on the "
                               "labels: their scores are pulled down", low, following, LOW_MASS)
        if broken:
            raise broken[0]

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _task(self, record: Record, n_cot: int, seed: int,
              given: Sequence[Sequence[int]] | None) -> tuple[Task, Exception | None]:
        """What to ask of the engine, and what is wrong with the record.

        A faulty record is asked as an empty task. Every engine refuses that, so that its judgement
        comes in its turn and does not have to wait in memory for the end of the input.
        """
        try:
            if not isinstance(record, Record):
                raise ValueError(f"not a Record: {shorten(record)}; read_records gives them")
            count = n_cot if given is None else len(given)
            if count < 1:
                raise ValueError("no reasoning is asked for")
            source = f"{record.id}/{record.key}"
            seeds = [sample_seed(seed, source, number) for number in range(count)]
            return Task(prompt_ids(record, self.spec, self.engine.vocabulary), seeds, given), None
        # Whatever one record makes fail: the others can be judged.
        except Exception as error:
            return Task([], []), error

    def _judgement(self, record_id: str | None, answer: list[Sample] | Exception) -> Judgement:
        if isinstance(answer, Exception):
            kind = "" if isinstance(answer, (ValueError, RuntimeError)) else type(answer).__name__
            text = ": ".join(filter(None, (kind, str(answer)))) or type(answer).__name__
            return Judgement(record_id, error=text)
        rows = np.exp([sample.label_log_probabilities for sample in answer])
        if np.isnan(rows).any():
            return Judgement(record_id, error="the model's probabilities are not numbers (NaN)")
        values = np.array(self.spec.scale.values)
        scores = expected_score(rows, values)
        mean = rows.mean(axis=0)
        mass = float(mean.sum())
        share = mean / (mass or math.nan)
        centred = values - expected_score(share, values)
        return Judgement(
            id=record_id,
            score=float(scores.mean()),
            probabilities=dict(zip(self.spec.scale.labels, mean.tolist())),
            mass=mass,
            feedback=[self.engine.vocabulary.decode(s.reasoning).strip() for s in answer],
            scores=scores.tolist(),
            std=math.sqrt(expected_score(share, centred**2)),
            mode=float(values[mean.argmax()]),
            truncated=any(sample.truncated for sample in answer),
            feedback_ids=[list(sample.reasoning) for sample in answer],
            values=dict(zip(self.spec.scale.labels, self.spec.scale.values)),
            missing_mass=float(np.mean([sample.missing_mass for sample in answer])),
            error_bound=float(np.mean([sample.error_bound for sample in answer])),
        )
