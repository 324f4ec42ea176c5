"""Servers as engines: many requests in flight to llama-server or vLLM.

The server samples the reasonings and tells the top log-probabilities after each; what it leaves out
bounds the error of the score.
"""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Callable, Iterable, Iterator, Sequence

from tract_lite.engines.http import Connection, NoLogProbabilities, Unavailable
from tract_lite.engines.llama_cpp import load_model, quiet_llama, spec_at
from tract_lite.engines.protocols import VLLM, LlamaServer, ServerProtocol
from tract_lite.engines.task import Sample, Task, room_for
from tract_lite.spec import SPEC_FILE, JudgeSpec, SpecSource
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary, Vocabulary

# After so many failures in a row the server is taken for dead.
GIVE_UP_AFTER = 3
PROBE_SECONDS = 10.0

logger = logging.getLogger(__name__)


class ServerEngine:
    """Answers tasks with the server at `url`, up to `parallel` samples at once.

    `model`: its name there, or the path of the judge served. `spec`: a spec, or the path of one, of
    a judge's folder or of a GGUF; None: it is read from `model`, or from the file that the server
    runs if that lies on this machine. `vocabulary` (a path, or one that is loaded) is read from the
    same place unless given; llama-server's own can be used over HTTP. `timeout`: seconds that an
    answer may take. `retries`: how often a request is sent again when the server is busy or away.
    `back_off`: see `http.Connection`.

    Raises:
        ValueError: no spec, no vocabulary, or those of another judge; no such model.
        RuntimeError: nothing answers at `url`, or it is neither llama-server nor vLLM.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        spec: SpecSource | None = None,
        *,
        parallel: int = 16,
        timeout: float = 120.0,
        retries: int = 4,
        back_off: float = 0.5,
        api_key: str | None = None,
        vocabulary: Vocabulary | str | Path | None = None,
    ):
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        self._parallel = parallel
        self._http = Connection(url, timeout=timeout, retries=retries, back_off=back_off, api_key=api_key)
        try:
            served = _find(self._http, model)
            near = [spec if isinstance(spec, (str, Path)) else None, model, served.path]
            self.spec = _choose_spec(spec, near, url)
            vocabulary = _choose_vocabulary(vocabulary, near)
            if vocabulary is not None:
                self.spec.check_vocabulary(vocabulary)
            self._protocol = served.protocol(self._http, served.name, self.spec, vocabulary)
        except BaseException:
            self._http.close()
            raise
        self.vocabulary = self._protocol.vocabulary
        self.identity = {"served_model": served.name}
        self.shape = {"server": url, "parallel": parallel}
        longest = self.spec.max_length
        self.context_length = min(longest, served.context_length or longest)
        if (penalty := self.spec.sampling.repetition_penalty) != 1:
            logger.warning(
                "servers count the prompt in a repetition penalty and this judge does "
                "not: its penalty of %g is left out",
                penalty,
            )

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        """The answer of each task with its index in the input, as they are completed.

        A task that does not fit in the context, or that the server refuses or fails at, is answered
        with the error. Tasks are taken from the input as samples are completed.

        Raises:
            RuntimeError: the server is gone, or does not give what judging needs.
        """
        failed: list[tuple[int, Exception]] = []
        for index, answer in self._answers(tasks):
            if isinstance(answer, Unavailable):
                failed.append((index, answer))
                if len(failed) == GIVE_UP_AFTER:
                    raise RuntimeError(f"{answer}; finished items are kept, run again to go on") from answer
                continue
            if not isinstance(answer, Exception):
                yield from failed
                failed = []
            yield index, answer
        yield from failed

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> ServerEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _answers(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        done: SimpleQueue[tuple[int, int, Sample | Exception]] = SimpleQueue()
        items: dict[int, list[Any]] = {}
        jobs = self._jobs(tasks, items)
        in_flight = 0
        while True:
            for index, number, job in islice(jobs, self._parallel - in_flight):
                # A daemon, so that nobody who gives up waits for what is in flight.
                Thread(target=_work, args=(done, index, number, job), daemon=True).start()
                in_flight += 1
            if not in_flight:
                return
            index, number, answer = done.get()
            in_flight -= 1
            if index not in items:
                continue
            if isinstance(answer, Exception):
                if not isinstance(answer, (ValueError, Unavailable)):
                    raise answer
                del items[index]
                yield index, answer
                continue
            items[index][number] = answer
            if all(items[index]):
                yield index, items.pop(index)

    def _jobs(
        self, tasks: Iterable[Task], items: dict[int, list[Any]]
    ) -> Iterator[tuple[int, int, Callable[[], Sample]]]:
        for index, task in enumerate(tasks):
            items[index] = [None] * len(task.seeds)
            for number in range(len(items[index])):
                if index in items:
                    yield index, number, partial(self._sample, task, number)

    def _sample(self, task: Task, number: int) -> Sample:
        room = room_for(task, self.spec, self.context_length)
        prompt = list(task.prompt)
        try:
            if task.reasonings is None:
                reasoning, complete = self._protocol.write(prompt, room, task.seeds[number])
            else:
                reasoning, complete = list(task.reasonings[number]), True
            found = self._protocol.read(prompt, reasoning)
        except NoLogProbabilities as error:
            raise RuntimeError(f"{error}: {self._protocol.advice}") from error
        return Sample(reasoning, not complete, found.label_log_probabilities, found.missing_mass, found.error_bound)


def _work(done: SimpleQueue, index: int, number: int, job: Callable[[], Sample]) -> None:
    try:
        done.put((index, number, job()))
    except Exception as error:
        done.put((index, number, error))


@dataclass(frozen=True)
class _Served:
    """A model that a server offers; `path` is where the server has it from."""

    protocol: Callable[..., ServerProtocol]
    name: str
    path: str | None
    context_length: int | None


def _find(http: Connection, model: str | None) -> _Served:
    """Look which kind of server it is, and which of its models is meant."""
    cards = (http.get("/v1/models", PROBE_SECONDS) or {}).get("data")
    if not isinstance(cards, list) or not cards or not all(isinstance(card, dict) and card.get("id") for card in cards):
        raise RuntimeError(
            f"the server at {http.url} offers no models at /v1/models: give the address of llama-server or vLLM"
        )
    names = [card["id"] for card in cards]
    meant = [card for card in cards if model in (card["id"], *(card.get("aliases") or ()))]
    if not meant and model and not Path(model).exists():
        raise ValueError(f"the server at {http.url} serves {', '.join(names)}, not {model}")
    card = (meant or cards)[0]
    name, owner = card["id"], card.get("owned_by")
    props = http.get("/props", model=name) or {}
    if settings := props.get("default_generation_settings"):
        return _Served(LlamaServer, name, props.get("model_path"), settings.get("n_ctx"))
    if owner == "vllm":
        return _Served(VLLM, name, card.get("root"), card.get("max_model_len"))
    raise RuntimeError(
        f"the server at {http.url} is neither llama-server nor vLLM, which alone take token ids: "
        "judge with the GGUF file itself, or serve it with llama-server"
    )


def _choose_spec(spec: SpecSource | None, near: Sequence[str | Path | None], url: str) -> JudgeSpec:
    if isinstance(spec, JudgeSpec):
        return spec
    found = _first(spec_at, near if spec is None else [spec])
    if found is None:
        where = f"comes with the server at {url}" if spec is None else f"is found at {spec}"
        raise ValueError(
            f"no judge spec {where}: give spec=, the path of a {SPEC_FILE}, of the judge's folder or of its GGUF"
        )
    return found


def _choose_vocabulary(
    vocabulary: Vocabulary | str | Path | None, near: Sequence[str | Path | None]
) -> Vocabulary | None:
    if vocabulary is not None and not isinstance(vocabulary, (str, Path)):
        return vocabulary
    found = _first(_vocabulary_at, near if vocabulary is None else [vocabulary])
    if found is None and vocabulary is not None:
        raise ValueError(f"no vocabulary at {vocabulary}: give a GGUF or a tokenizer's folder")
    return found


def _first(read: Callable[[Path], Any], places: Sequence[str | Path | None]) -> Any:
    """What is read at the first place on this machine that has it; None where no place has."""
    there = (Path(place) for place in places if place and os.access(place, os.R_OK))
    return next((found for found in map(read, there) if found is not None), None)


def _vocabulary_at(path: Path) -> Vocabulary | None:
    if path.suffix == ".json" or path.is_dir() and not (path / "tokenizer_config.json").is_file():
        return None
    if path.is_dir():
        from transformers import AutoTokenizer

        return TransformersVocabulary(AutoTokenizer.from_pretrained(path))
    model = load_model(path, vocab_only=True)
    vocabulary = GGUFVocabulary(model)
    weakref.finalize(vocabulary, quiet_llama().llama_model_free, model)
    return vocabulary
