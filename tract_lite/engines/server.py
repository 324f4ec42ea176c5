"""Servers as engines: many requests in flight to llama-server or vLLM.

The server samples the reasonings and tells the top log-probabilities after each; what it leaves out
bounds the error of the score.
"""

import logging
import os
import weakref
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Callable, Iterable, Iterator, Sequence

from tract_lite.engines.http import Connection, Unavailable
from tract_lite.engines.llama_cpp import load_model, quiet_llama, spec_at
from tract_lite.engines.protocols import VLLM, LlamaServer, ServerProtocol
from tract_lite.engines.task import Answers, Engine, Sample, Task, room_for
from tract_lite.engines.untrained import check_unasked, untrained_spec_at
from tract_lite.rail import LabelReading
from tract_lite.scale import ScoreScale
from tract_lite.spec import SPEC_FILE, SpecSource
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary, Vocabulary

# After so many failures in a row the server is taken for dead.
GIVE_UP_AFTER = 3
PROBE_SECONDS = 10.0
PENALTY = "servers count the prompt in a repetition penalty and this judge does not: its penalty of %g is left out"

logger = logging.getLogger(__name__)


class ServerEngine(Engine):
    """Answers tasks with the server at `url`, up to `parallel` samples at once.

    `model`: its name there, or the path of the judge served. `spec`: a spec, or the path of one, of
    a judge's folder or of a GGUF; None: it is read from `model`, or from the file that the server
    runs if that lies on this machine. `vocabulary` (a path, or one that is loaded) is read from the
    same place unless given; llama-server's own can be used over HTTP. `timeout`: seconds that an
    answer may take. `retries`: how often a request is sent again when the server is busy or away.
    `back_off`: see `http.Connection`. `scale`, `template` and `chat` are for a GGUF file without a
    spec: see `untrained_spec`.
    Raises ValueError: no spec, no vocabulary, or those of another judge; no such model.
    Raises RuntimeError: nothing answers at `url`, or it is neither llama-server nor vLLM.
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
        scale: ScoreScale | None = None,
        template: str | None = None,
        chat: str | None = None,
    ):
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        self._parallel = parallel
        self._http = Connection(url, timeout=timeout, retries=retries, back_off=back_off, api_key=api_key)
        try:
            protocol, name, path, length = _find(self._http, model)
            near = [spec if isinstance(spec, (str, Path)) else None, model, path]
            asked: dict[str, Any] = {"scale": scale, "template": template, "chat": chat}
            self.spec = _chosen(spec, near, spec_at)
            if self.spec is not None:
                check_unasked(f"the judge at {self._http}", **asked)
            else:
                self.spec = _chosen(spec, near, lambda place: untrained_spec_at(place, **asked))
            if self.spec is None:
                where = f"comes with {self._http}" if spec is None else f"is found at {spec}"
                raise ValueError(f"no judge spec {where}: give spec=, a {SPEC_FILE}, the judge's folder or its GGUF")
            found = _chosen(vocabulary, near, _vocabulary_at)
            if found is not None:
                self.spec.check_vocabulary(found)
            elif vocabulary is not None:
                raise ValueError(f"no vocabulary at {vocabulary}: give a GGUF or a tokenizer's folder")
            self._protocol = protocol(self._http, name, self.spec, found)
        except BaseException:
            self._http.close()
            raise
        self.vocabulary = self._protocol.vocabulary
        self.identity = {"served_model": name}
        self.shape = {"server": url, "parallel": parallel}
        self.context_length = min(self.spec.max_length, length or self.spec.max_length)
        if (penalty := self.spec.sampling.repetition_penalty) != 1:
            logger.warning(PENALTY, penalty)

    def run(self, tasks: Iterable[Task]) -> Answers:
        """The answers of tasks with their index in the input, as they are completed.

        A task that does not fit in the context, or that the server refuses or fails at, is answered
        with the error. Tasks are taken from the input as samples are completed.
        Raises RuntimeError: the server is gone, or does not give what judging needs.
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

    def _answers(self, tasks: Iterable[Task]) -> Answers:
        done: SimpleQueue[tuple[int, int, Sample | Exception]] = SimpleQueue()
        items: dict[int, list[Any]] = {}
        jobs = self._jobs(tasks, items)
        in_flight = 0
        while True:
            for job in islice(jobs, self._parallel - in_flight):
                # A daemon, so that nobody who gives up waits for what is in flight.
                Thread(target=self._work, args=(done, *job), daemon=True).start()
                in_flight += 1
            if not in_flight:
                return
            index, number, answer = done.get()
            in_flight -= 1
            if index not in items:
                continue
            if isinstance(answer, (ValueError, Unavailable)):
                del items[index]
                yield index, answer
            elif isinstance(answer, Exception):
                raise answer
            else:
                items[index][number] = answer
                if all(items[index]):
                    yield index, items.pop(index)

    def _jobs(self, tasks: Iterable[Task], items: dict[int, list[Any]]) -> Iterator[tuple[int, int, Task]]:
        """The samples of all tasks, without those of an item that has failed."""
        for index, task in enumerate(tasks):
            items[index] = [None] * len(task.seeds)
            for number in range(len(task.seeds)):
                if index in items:
                    yield index, number, task

    def _work(self, done: SimpleQueue, index: int, number: int, task: Task) -> None:
        try:
            done.put((index, number, self._sample(task, number)))
        except Exception as error:
            done.put((index, number, error))

    def _sample(self, task: Task, number: int) -> Sample:
        room, prompt, complete = room_for(task, self.spec, self.context_length), list(task.prompt), True
        if task.reasonings is None:
            reasoning, complete = self._protocol.write(prompt, room, task.seeds[number])
        else:
            reasoning = list(task.reasonings[number])
        ending = task.ending(self.spec)
        reading, before = LabelReading(ending, self.spec.eos_id), [*prompt, *reasoning, *ending.marker]
        while reading.wanted:
            node = reading.wanted[-1]
            reading.add(node, self._protocol.read([*before, *node], reading.asked(node)))
        return Sample.of(reasoning, not complete, reading)


def _find(http: Connection, model: str | None) -> tuple[type[ServerProtocol], str, str | None, int | None]:
    """Which kind of server it is, with the name, path and context length of the model meant."""
    cards = (http.get("/v1/models", PROBE_SECONDS) or {}).get("data")
    if not isinstance(cards, list) or not cards or not all(isinstance(card, dict) and card.get("id") for card in cards):
        raise RuntimeError(f"{http} offers no models at /v1/models: give the address of llama-server or vLLM")
    meant = [card for card in cards if model in (card["id"], *(card.get("aliases") or ()))]
    if not meant and model and not Path(model).exists():
        raise ValueError(f"{http} serves {', '.join(card['id'] for card in cards)}, not {model}")
    card = (meant or cards)[0]
    name = card["id"]
    props = http.get("/props", model=name) or {}
    if settings := props.get("default_generation_settings"):
        return LlamaServer, name, props.get("model_path"), settings.get("n_ctx")
    if card.get("owned_by") == "vllm":
        return VLLM, name, card.get("root"), card.get("max_model_len")
    advice = "judge with the GGUF file itself, or serve it with llama-server"
    raise RuntimeError(f"{http} is neither llama-server nor vLLM, which alone take token ids: {advice}")


def _chosen(given: Any, near: Sequence[str | Path | None], read: Callable[[Path], Any]) -> Any:
    """What is given, or is read at the path given, or else at the first place near that has it."""
    if given is not None and not isinstance(given, (str, Path)):
        return given
    places = [Path(place) for place in (near if given is None else [given]) if place]
    found = (read(place) for place in places if os.access(place, os.R_OK))
    return next((value for value in found if value is not None), None)


def _vocabulary_at(path: Path) -> Vocabulary | None:
    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        return TransformersVocabulary(AutoTokenizer.from_pretrained(path))
    if path.is_dir() or path.suffix == ".json":
        return None
    model = load_model(path, vocab_only=True)
    vocabulary = GGUFVocabulary(model)
    weakref.finalize(vocabulary, quiet_llama().llama_model_free, model)
    return vocabulary
