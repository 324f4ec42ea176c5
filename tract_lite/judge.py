"""Records to judgements: sample reasonings, read the score distribution after each, average."""

import hashlib
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence, Unpack

from tract_lite.data.files import fingerprint
from tract_lite.data.frames import judged_frame
from tract_lite.data.places import content_of, seed_model_of
from tract_lite.data.resume import ResumableRows
from tract_lite.engines.asking import Asking
from tract_lite.engines.task import Engine, Sample, Task, asked_again, in_order
from tract_lite.judgement import Judgement
from tract_lite.rail import LOW_MASS
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, SpecSource
from tract_lite.training.settings import ADAPTER, SeedOptions

logger = logging.getLogger(__name__)

WARNING = "%d of %d judgements have less than %g of the probability on the labels: their scores are pulled down"
UNTAUGHT = "this judge never learnt to score %s (--direct-share %g): compare with gold scores first"

AnyPath = str | Path
Reasonings = Sequence[Sequence[Sequence[int]]]


class Judge:
    """Scores records with CoT-RAIL. Source: TRACT, section 3."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.spec = engine.spec
        self._asking = Asking(self.spec, engine.vocabulary)
        # Of what was warned.
        self._warned: set[str] = set()

    @classmethod
    def from_gguf(
        cls, path: AnyPath, spec: SpecSource | None = None, *, adapter: AnyPath | None = None, **options: Any
    ) -> "Judge":
        """A judge from a GGUF file, run by llama.cpp; `options` are those of `LlamaEngine`.

        A file of any instruct model will do: without a judge spec inside it is an untrained judge,
        asked in its own chat format, on `scale` (1 to 5) and by `template`. With `adapter` (by
        `export_adapter`), the file is its seed model: see `use_adapter`.
        Raises ValueError: not a GGUF file, one without a chat template (`chat` gives one), labels
            that can't be told apart, or an adapter of another seed model.
        """
        from tract_lite.engines.llama import LlamaEngine

        return cls(LlamaEngine(path, spec, adapter=adapter, **options))

    def use_adapter(self, path: AnyPath, spec: SpecSource | None = None) -> None:
        """Become the judge of another adapter on the same GGUF file, which stays loaded.
        Raises ValueError: not a GGUF judge, no adapter on this base, or one without a judge spec.
        """
        if not hasattr(self.engine, "use_adapter"):
            raise ValueError("only a judge from a GGUF file can change its adapter")
        self.engine.use_adapter(path, spec)
        self.spec = self.engine.spec
        self._asking = Asking(self.spec, self.engine.vocabulary)
        self._warned.clear()

    @classmethod
    def from_server(cls, url: str, model: str | None = None, spec: SpecSource | None = None, **options: Any) -> "Judge":
        """A judge that llama-server or vLLM runs at `url`; `model` is its name there.

        `spec` is needed where the server runs on another machine. `options`: `parallel` (samples in
        flight), `timeout` (seconds), `retries`, `api_key`, `vocabulary`.
        Raises ValueError: no spec, no such model, or the spec of another judge.
        Raises RuntimeError: nothing answers there, or it is neither llama-server nor vLLM.
        """
        from tract_lite.engines.server import ServerEngine

        return cls(ServerEngine(url, model, spec, **options))

    @classmethod
    def from_pretrained(cls, folder: AnyPath, spec: JudgeSpec | None = None, parallel: int = 16) -> "Judge":
        """A judge from a merged model folder, run by transformers in this machine's precision."""
        from tract_lite.training.seed_model import load_seed

        spec = spec or JudgeSpec.load(folder)
        model, tokenizer = load_seed(folder, load_in_4bit=False, backend="transformers")
        identity = {"fingerprint": [fingerprint(file) for file in sorted(Path(folder).glob("*.safetensors"))]}
        return cls.from_model(model, tokenizer, spec, parallel, identity)

    @classmethod
    def from_adapter(
        cls, folder: AnyPath, *, seed_model: AnyPath | None = None, precision: str | None = None, parallel: int = 16
    ) -> "Judge":
        """A judge from the folder of a trained adapter, on its seed model as it was trained.

        `folder` is what `train_adapter` returns, or its stage's folder; `seed_model` is where the
        seed model is now, if not where the training had it.
        Raises ValueError: no adapter there, or one without a judge spec.
        """
        from tract_lite.training.seed_model import free_memory, load_adapter, load_seed

        folder = Path(folder)
        folder = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
        spec = JudgeSpec.load(folder)
        free_memory()
        in_4bit = spec.method.get("load_in_4bit", True)
        seed_model = seed_model or seed_model_of(spec.base_model, folder)
        model, tokenizer = load_seed(seed_model, in_4bit, spec.max_length, precision=precision)
        identity = {"adapter": fingerprint(folder / "adapter_model.safetensors")}
        return cls.from_model(load_adapter(model, folder), tokenizer, spec, parallel, identity)

    @classmethod
    def from_seed(
        cls, seed_model: AnyPath, scale: ScoreScale, *, parallel: int = 16, **options: Unpack[SeedOptions]
    ) -> "Judge":
        """The seed model as a judge before any training, loaded as for training.
        Raises ValueError: no such model, or the scale does not fit its vocabulary.
        """
        from tract_lite.training.seed_model import open_seed_model

        model, tokenizer, spec = open_seed_model(seed_model, scale, **options)
        identity = {"seed_model": content_of(seed_model) or str(seed_model)}
        return cls.from_model(model, tokenizer, spec, parallel, identity)

    @classmethod
    def from_model(
        cls, model: Any, tokenizer: Any, spec: JudgeSpec, parallel: int = 16, identity: Mapping[str, Any] | None = None
    ) -> "Judge":
        """A judge from a loaded transformers model, with or without an adapter.

        `parallel` sequences are decoded at once; `identity` tells the model from others.
        """
        from tract_lite.engines.transformers import TransformersEngine

        return cls(TransformersEngine(model, tokenizer, spec, parallel, identity))

    @property
    def is_direct(self) -> bool:
        """Whether the judge was trained on scores alone: then it reads them without a reasoning."""
        return self.spec.method.get("direct_share") == 1

    def score(self, record: Record, n_cot: int | None = None, seed: int = 0) -> Judgement:
        """Judge one record; `n_cot` as for `score_many`.
        Raises ValueError: it can't be judged.
        """
        judgement = next(self.score_many([record], n_cot, seed))
        if judgement.error:
            raise ValueError(judgement.error)
        return judgement

    def score_many(
        self,
        records: Iterable[Record],
        n_cot: int | None = None,
        seed: int = 0,
        *,
        gate: float | None = None,
        reasonings: Reasonings | None = None,
        resume: AnyPath | ResumableRows | None = None,
    ) -> Iterator[Judgement]:
        """Judge records as they come, one judgement each, in input order.

        `n_cot`: reasonings of each; None: one, or 0 for a judge that is `is_direct`. With 0 the
        score is read straight after the prompt, and there is no `feedback`. With a `gate` that is
        done first, and reasonings are written where the `doubt` of the direct judgement, in units
        of the score, is above it: see `choose_gate`.

        A record that can't be judged gives a judgement with `error`. With `reasonings` (for each
        record, the ids of its reasonings) nothing is sampled: their scores are read. An error of
        iterating `records` comes after the judgements before it, one of the engine at once.

        `resume` names a JSONL file: judgements are added to it as they come, and records that have
        theirs there are not judged again, unless they failed.
        Raises ValueError: `resume` holds something else, or rows of another judge or settings; or a
            `gate` has nothing to choose.
        """
        n_cot = self._reasonings(n_cot, gate)
        if gate is not None and (n_cot < 1 or reasonings is not None):
            raise ValueError("a gate chooses between a direct score and reasonings\ntake an n_cot of 1 or more")
        if resume is None:
            return in_order(self._judged(records, n_cot, seed, gate, reasonings))
        if reasonings is not None:
            raise ValueError("give resume or reasonings, not both")
        rows = resume if isinstance(resume, ResumableRows) else ResumableRows(resume)
        rows.claim(self.how(n_cot, seed, gate), self.engine.shape)
        filled = rows.fill(records, lambda some: (j.to_row() for j in self.score_many(some, n_cot, seed, gate=gate)))
        return map(Judgement.from_row, filled)

    def score_frame(
        self, frame: Any, n_cot: int | None = None, seed: int = 0, *, gate: float | None = None, **options: Any
    ) -> Any:
        """A pandas DataFrame with our columns beside its own, named as in the tables of `judge`.

        Rows, order and index stay. `options` are those of `records_from`; `rubric` may also be
        several criteria, or the path of a rubric's file, and a row may have several answers.
        Raises ValueError: a row is unusable (`skip_bad` leaves it without a judgement).
        """
        options.setdefault("scale", self.spec.units or self.spec.scale)
        return judged_frame(frame, lambda some: self.score_many(some, n_cot, seed, gate=gate), **options)

    def as_completed(
        self, records: Iterable[Record], n_cot: int | None = None, seed: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """As `score_many`: each judgement as soon as it is there, with its record's place."""
        return self._judged(records, self._reasonings(n_cot), seed, None, None)

    def how(self, n_cot: int | None = None, seed: int = 0, gate: float | None = None) -> dict[str, Any]:
        """What makes judgements what they are: model, spec, number of reasonings, seed, gate."""
        n_cot = self._reasonings(n_cot, gate)
        # A seed model may be moved: it stays what it is.
        spec = hashlib.sha256(replace(self.spec, base_model="").to_json().encode("utf-8")).hexdigest()
        return {**self.engine.identity, "spec_sha256": spec, "n_cot": n_cot, "seed": seed, "gate": gate}

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _reasonings(self, n_cot: int | None, gate: float | None = None) -> int:
        """How many reasonings an item gets, where nobody says so as the judge has learnt it."""
        if n_cot is None:
            return 0 if self.is_direct and gate is None else 1
        return n_cot

    def _judged(
        self, records: Iterable[Record], n_cot: int, seed: int, gate: float | None, reasonings: Reasonings | None
    ) -> Iterator[tuple[int, Judgement]]:
        # The name and the scale of each record that was asked for.
        asked_for: dict[int, tuple[str | None, ScoreScale]] = {}
        # What is asked directly, with what is asked then of an item that does not pass the gate.
        direct: dict[int, Task | None] = {}
        broken: list[Exception] = []

        def asked() -> Iterator[Task | Exception]:
            try:
                for place, record in enumerate(records):
                    scale = self._asking.scale_of(record)
                    asked_for[place] = getattr(record, "id", None), scale
                    off.update(self._asking.off_scale(record, scale))
                    task = self._asking.task(record, n_cot, seed, None if reasonings is None else reasonings[place])
                    if isinstance(task, Task) and (gate is not None or not task.seeds):
                        direct[place] = task if task.seeds else None
                        task = Task.direct(task.prompt, task.tokens)
                    yield task
            except Exception as error:
                broken.append(error)

        def again(place: int, answer: list[Sample] | Exception) -> Task | None:
            if gate is None or isinstance(answer, Exception) or place not in direct:
                return None
            judgement = self._asking.judgement(*asked_for[place], answer, True)
            return None if judgement.doubt <= gate else direct.pop(place)

        self._warn_of_untaught(direct=n_cot == 0 or gate is not None, reasoned=n_cot > 0)
        count = low = 0
        off = Counter[str]()
        try:
            for place, answer in asked_again(self.engine, asked(), again):
                judgement = self._asking.judgement(*asked_for.pop(place), answer, place in direct)
                direct.pop(place, None)
                count += 1
                low += judgement.mass < LOW_MASS
                yield place, judgement
        finally:
            if low:
                logger.warning(WARNING, low, count, LOW_MASS)
            for what, number in off.items():
                logger.warning("%d of %d items: %s (%s)", number, count, what, self.spec.units or self.spec.scale)
        if broken:
            raise broken[0]

    def _warn_of_untaught(self, *, direct: bool, reasoned: bool) -> None:
        """Say once if a trained judge is asked in a way that it was not trained for."""
        if "raft_weight" not in self.spec.method:
            return
        share = self.spec.method.get("direct_share") or 0
        ways = [("without a reasoning", direct and share == 0), ("after a reasoning", reasoned and share == 1)]
        for way, asked in ways:
            if asked and way not in self._warned:
                self._warned.add(way)
                logger.warning(UNTAUGHT, way, share)
