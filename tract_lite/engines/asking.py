"""A record to what an engine is asked, and the engine's answer to a judgement."""

from reprlib import repr as shorten
from typing import Iterator, Sequence

import numpy as np

from tract_lite.engines.task import Sample, Task, sample_seed
from tract_lite.judgement import Judgement
from tract_lite.prompt import Endings, prompt_ids, scale_of
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary


class Asking:
    """How a judge's records are asked, each on its own scale or on the judge's."""

    def __init__(self, spec: JudgeSpec, vocabulary: Vocabulary):
        self._spec, self._vocabulary, self._endings = spec, vocabulary, Endings(spec, vocabulary)

    def scale_of(self, record: Record) -> ScoreScale:
        """What a record is judged on; of one that can't be judged, the judge's own scale."""
        try:
            return scale_of(record, self._spec)
        except (ValueError, AttributeError):
            return self._spec.scale

    def off_scale(self, record: Record, scale: ScoreScale) -> Iterator[str]:
        """What of a record belongs to another scale than the one that it is judged on."""
        gold, rubric = getattr(record, "score", None), getattr(record, "rubric", None)
        if gold is not None and not scale.contains(gold):
            yield "the gold score is outside the judge's scale"
        if rubric and not rubric.descriptions.keys() <= set((self._spec.units or scale).labels):
            yield "the rubric describes labels that are not on the judge's scale"

    def task(self, record: Record, n_cot: int, seed: int, given: Sequence[Sequence[int]] | None) -> Task | Exception:
        """What to ask of the engine (no samples: a direct score), or what is wrong."""
        try:
            if not isinstance(record, Record):
                raise ValueError(f"not a Record: {shorten(record)}; read_records gives them")
            if n_cot < 0:
                raise ValueError("n_cot must be at least 0")
            if given is not None and not len(given):
                raise ValueError("no reasoning is given; n_cot=0 scores without one")
            count = n_cot if given is None else len(given)
            seeds = [sample_seed(seed, f"{record.id}/{record.key}", number) for number in range(count)]
            tokens = self._endings.of(record)
            return Task(prompt_ids(record, self._spec, self._vocabulary), seeds, given, tokens)
        except Exception as error:  # whatever one record makes fail: the others can be judged
            return error

    def judgement(
        self, name: str | None, scale: ScoreScale, answer: list[Sample] | Exception, direct: bool
    ) -> Judgement:
        values = dict(zip(scale.labels, scale.values))
        if isinstance(answer, Exception):
            kind = "" if isinstance(answer, (ValueError, RuntimeError)) else type(answer).__name__
            # A row of judgements is read in a line.
            text = ": ".join(filter(None, (kind, "; ".join(str(answer).splitlines())))) or type(answer).__name__
            return Judgement(name, error=text, values=values)
        rows = np.exp([sample.label_log_probabilities for sample in answer])
        if np.isnan(rows).any():
            return Judgement(name, error="the model's probabilities are not numbers (NaN)", values=values)
        written = [] if direct else [sample.reasoning for sample in answer]
        return Judgement.from_probabilities(
            name,
            rows,
            values,
            feedback=[self._vocabulary.decode(ids).strip() for ids in written],
            truncated=any(sample.truncated for sample in answer),
            feedback_ids=[list(ids) for ids in written],
            missing_mass=float(np.mean([sample.missing_mass for sample in answer])),
            error_bound=float(np.mean([sample.error_bound for sample in answer])),
            end_mass=float(np.mean([sample.end_mass for sample in answer])),
        )
