"""How llama-server and vLLM write a reasoning and tell the top log-probabilities after it, by id.

A server counts the prompt's tokens in its repetition penalty, the judge generated ones alone: none
is asked for. Samplers that are not in the judge's settings are switched off.
"""

from abc import ABC, abstractmethod
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import chain
from typing import Any, Iterator, Sequence

from tract_lite.engines.http import Connection, NoLogProbabilities, Refused
from tract_lite.prompt import cut_reasoning
from tract_lite.rail import TopReading, read_top_log_probabilities
from tract_lite.scale import ANCHOR
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary, Vocabulary

LLAMA_SERVER_TOP = 100
# The most that vLLM gives unless it is told otherwise.
TOP = 20


class ServerProtocol(ABC):
    """A server that continues ids, asked at `page`, each time with `settings` as well.

    `advice`: what it must be for this to work.
    """

    page: str
    settings: dict[str, Any]
    advice: str

    def __init__(self, http: Connection, model: str, spec: JudgeSpec, vocabulary: Vocabulary | None):
        self._http, self._model, self._spec = http, model, spec
        self.vocabulary = self._own_vocabulary() if vocabulary is None else vocabulary

    def write(self, prompt: list[int], room: int, seed: int) -> tuple[list[int], bool]:
        """A reasoning of at most `room` tokens, and whether it was complete."""
        sampling = self._spec.sampling
        options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        # The one seed left out would mean a random one.
        options |= {"stop": [self._spec.marker], "seed": seed % 0xFFFFFFFF}
        with usable(self._http, self.advice):
            ids, ended = self._write(prompt, room, options)
        reasoning, complete = cut_reasoning(ids, self._spec, self.vocabulary)
        # The server may have stopped at an end token that the spec does not name.
        return (reasoning[:-1], True) if ended and not complete else (reasoning, complete)

    def read(self, ids: list[int], tokens: Sequence[int]) -> TopReading:
        """What the top tokens after these ids tell of some tokens."""
        with usable(self._http, self.advice):
            return read_top_log_probabilities(self._top(ids, tokens), tokens)

    def _ask(self, ids: list[int], **options: Any) -> dict[str, Any]:
        return self._http.post(self.page, {"prompt": ids, "model": self._model, **self.settings, **options})

    @abstractmethod
    def _own_vocabulary(self) -> Vocabulary:
        """The vocabulary where none is given."""

    @abstractmethod
    def _write(self, prompt: list[int], room: int, options: dict[str, Any]) -> tuple[list[int], bool]:
        """The ids that the server generates, and whether it stopped at an end."""

    @abstractmethod
    def _top(self, ids: list[int], asked: Sequence[int]) -> list[tuple[int, float]]:
        """The top tokens after these ids with their log-probabilities; some of them are `asked`."""


class LlamaServer(ServerProtocol):
    """llama-server's own. Raises ValueError: the spec's ids spell something else there."""

    page = "/completion"
    advice = "llama-server of 2025 or newer is needed"
    settings = {"mirostat": 0, "dynatemp_range": 0, "min_keep": 0}

    def __init__(self, http: Connection, model: str, spec: JudgeSpec, vocabulary: Vocabulary | None):
        super().__init__(http, model, spec, vocabulary)
        ids, expected = [*spec.marker_ids, *chain(*spec.label_ids)], "".join([spec.marker, *spec.scale.labels])
        found = _detokenize(http, model, ids)
        if "".join(found.split()) != "".join(expected.split()):
            spelled = f"ids {ids} spell {found!r} there, not {expected!r}"
            raise ValueError(f"{http} does not run the judge of this spec: {spelled}")

    def _own_vocabulary(self) -> Vocabulary:
        return ServerVocabulary(self._http, self._model, self._spec.eos_id)

    def _write(self, prompt: list[int], room: int, options: dict[str, Any]) -> tuple[list[int], bool]:
        options |= {"n_predict": room, "return_tokens": True, "samplers": ["temperature", "top_p"]}
        answer = self._complete(prompt, **options)
        return list(answer["tokens"]), answer["stop_type"] == "eos"

    def _top(self, ids: list[int], asked: Sequence[int]) -> list[tuple[int, float]]:
        # After a token that is no whole character the server gives no log-probabilities, so it is
        # made to answer with one of those asked; what it reports is without that bias.
        options = {"samplers": ["temperature"], "temperature": 0, "logit_bias": [[asked[0], 1e6]]}
        answer = self._complete(ids, n_predict=1, n_probs=LLAMA_SERVER_TOP, post_sampling_probs=False, **options)
        [position] = answer["completion_probabilities"]
        return [(entry["id"], entry["logprob"]) for entry in position["top_logprobs"]]

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        answer = self._ask(ids, **options)
        if answer["truncated"] or answer["tokens_evaluated"] != len(ids):
            raise RuntimeError(f"{self._http} cut a text of {len(ids)} tokens: start it with a longer context (-c)")
        return answer


class VLLM(ServerProtocol):
    """vLLM's completions. Raises ValueError: no vocabulary is given."""

    page = "/v1/completions"
    advice = f"vLLM 0.10.2 or newer is needed, with --max-logprobs {TOP} or more and --logprobs-mode raw_logprobs"
    settings = {"return_token_ids": True, "top_k": -1, "min_p": 0}
    settings |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}

    def _own_vocabulary(self) -> Vocabulary:
        needed = "give vocabulary=, the folder of the judge's tokenizer or its GGUF"
        raise ValueError(f"vLLM's tokenizer takes a user's text for special tokens: {needed}")

    def _write(self, prompt: list[int], room: int, options: dict[str, Any]) -> tuple[list[int], bool]:
        ends = [self._spec.eos_id, *(piece for piece in self._spec.chat if isinstance(piece, int))]
        options |= {"max_tokens": room, "stop_token_ids": ends, "include_stop_str_in_output": True}
        choice = self._complete(prompt, **options)
        return list(choice["token_ids"]), choice["finish_reason"] == "stop"

    def _top(self, ids: list[int], asked: Sequence[int]) -> list[tuple[int, float]]:
        choice = self._complete(ids, max_tokens=1, temperature=0, logprobs=TOP, return_tokens_as_token_ids=True)
        [position] = choice["logprobs"]["top_logprobs"]
        return [(_token_id(name), value) for name, value in position.items()]

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        [choice] = self._ask(ids, **options)["choices"]
        if choice["prompt_token_ids"] != ids:
            raise ValueError("it read another prompt than it was given")
        return choice


class ServerVocabulary(GGUFVocabulary):
    """What judging asks of a GGUF's vocabulary, `encode` and `decode`, by llama-server's tokenizer.

    Special tokens show in the text of `decode`.
    """

    def __init__(self, http: Connection, model: str, eos_id: int):
        self._http, self._model, self.eos_id = http, model, eos_id
        self._piece = cache(lambda token: _detokenize(http, model, [token]))
        # As in a SentencePiece vocabulary, where llama.cpp puts a space before any text.
        self._doubles_first_space = _detokenize(http, model, self._tokenize(ANCHOR)).startswith(" ")

    def decode(self, ids: Sequence[int]) -> str:
        text = "".join(map(self._piece, ids))
        if "\ufffd" in text:
            # Of a character in several tokens, the server gives none of them alone.
            text = _detokenize(self._http, self._model, ids)
        return text.removeprefix(" ") if self._doubles_first_space else text

    def _tokenize(self, text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": False, "model": self._model}
        with usable(self._http, LlamaServer.advice):
            return list(self._http.post("/tokenize", body)["tokens"])

    @cached_property
    def _space_id(self) -> int:
        return self._tokenize("\n ")[-1]


def _detokenize(http: Connection, model: str, ids: Sequence[int]) -> str:
    with usable(http, LlamaServer.advice):
        return str(http.post("/detokenize", {"tokens": list(ids), "model": model})["content"])


@contextmanager
def usable(http: Connection, advice: str) -> Iterator[None]:
    """Where a server is asked and its answer taken apart: what that lacks is the server's fault.

    A refusal stays what it is, but a server that gives no log-probabilities is of no use either.
    """
    try:
        yield
    except NoLogProbabilities as error:
        raise RuntimeError(f"{error}: {advice}") from error
    except Refused:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else error
        raise RuntimeError(f"the answer of {http} is of no use ({why}): {advice}") from error


def _token_id(name: str) -> int:
    """The id in "token_id:5"; the text "5" is none."""
    if not name.startswith("token_id:"):
        raise ValueError(f"{name!r} is no token id")
    return int(name.removeprefix("token_id:"))
