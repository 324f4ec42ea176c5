"""How llama-server and vLLM write a reasoning and tell the top log-probabilities after it, by id.

A server counts the prompt's tokens in its repetition penalty, the judge generated ones alone: none
is asked for. Samplers that are not in the judge's settings are switched off.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, Iterator, Protocol, Sequence

from tract_lite.engines.http import Connection
from tract_lite.prompt import cut_reasoning
from tract_lite.rail import TopReading, read_top_log_probabilities
from tract_lite.scale import ANCHOR
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import SPM_SPACE, Vocabulary, clean_text

LLAMA_SERVER_TOP = 100
# The most that vLLM gives unless it is told otherwise.
TOP = 20


class ServerProtocol(Protocol):
    vocabulary: Vocabulary
    # What a server must be for this to work.
    advice: str

    def write(self, prompt: list[int], room: int, seed: int) -> tuple[list[int], bool]:
        """A reasoning of at most `room` tokens, and whether it was complete."""

    def read(self, prompt: list[int], reasoning: list[int]) -> TopReading:
        """The labels after prompt, reasoning and marker."""


class LlamaServer:
    """llama-server's own protocol.

    Raises:
        ValueError: the spec's ids spell something else in the server's vocabulary.
    """

    advice = "llama-server of 2025 or newer is needed"

    def __init__(self, http: Connection, model: str, spec: JudgeSpec, vocabulary: Vocabulary | None):
        self._http, self._model, self._spec = http, model, spec
        if vocabulary is None:
            vocabulary = ServerVocabulary(http, model, spec.eos_id)
        self.vocabulary = vocabulary
        ids = [*spec.marker_ids, *spec.label_ids]
        answer = http.post("/detokenize", {"tokens": ids, "model": model})
        expected = "".join([spec.marker, *spec.scale.labels])
        with usable(http, self.advice):
            found = str(answer["content"])
        if "".join(found.split()) != "".join(expected.split()):
            raise ValueError(
                f"the server at {http.url} does not run the judge of this spec: ids "
                f"{ids} spell {found!r} there, not {expected!r}"
            )

    def write(self, prompt: list[int], room: int, seed: int) -> tuple[list[int], bool]:
        sampling = self._spec.sampling
        answer = self._complete(
            prompt,
            n_predict=room,
            stop=[self._spec.marker],
            return_tokens=True,
            samplers=["temperature", "top_p"],
            temperature=sampling.temperature,
            # The one seed left out would mean a random one.
            top_p=sampling.top_p,
            seed=seed % 0xFFFFFFFF,
        )
        with usable(self._http, self.advice):
            ids, ended = list(answer["tokens"]), answer["stop_type"] == "eos"
        return _cut(ids, ended, self._spec, self.vocabulary)

    def read(self, prompt: list[int], reasoning: list[int]) -> TopReading:
        # After a token that is no whole character the server gives no log-probabilities, so it is
        # made to answer with a label; what it reports is without that bias.
        answer = self._complete(
            [*prompt, *reasoning, *self._spec.marker_ids],
            n_predict=1,
            n_probs=LLAMA_SERVER_TOP,
            post_sampling_probs=False,
            samplers=["temperature"],
            temperature=0,
            logit_bias=[[self._spec.label_ids[0], 1e6]],
        )
        with usable(self._http, self.advice):
            [position] = answer["completion_probabilities"]
            top = [(entry["id"], entry["logprob"]) for entry in position["top_logprobs"]]
            return read_top_log_probabilities(top, self._spec.label_ids, self._spec.scale.values)

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        body = {"prompt": ids, "model": self._model, "mirostat": 0, "dynatemp_range": 0, "min_keep": 0, **options}
        answer = self._http.post("/completion", body)
        with usable(self._http, self.advice):
            cut = answer["truncated"] or answer["tokens_evaluated"] != len(ids)
        if cut:
            raise RuntimeError(
                f"the server at {self._http.url} cut a text of {len(ids)} tokens: start it with a longer context (-c)"
            )
        return answer


class VLLM:
    """vLLM's completions.

    Raises:
        ValueError: no vocabulary is given.
    """

    advice = f"vLLM 0.10.2 or newer is needed, with --max-logprobs {TOP} or more and --logprobs-mode raw_logprobs"

    def __init__(self, http: Connection, model: str, spec: JudgeSpec, vocabulary: Vocabulary | None):
        if vocabulary is None:
            raise ValueError(
                "vLLM's tokenizer takes a user's text for special tokens: give "
                "vocabulary=, the folder of the judge's tokenizer or its GGUF"
            )
        self._http, self._model, self._spec, self.vocabulary = http, model, spec, vocabulary

    def write(self, prompt: list[int], room: int, seed: int) -> tuple[list[int], bool]:
        spec = self._spec
        ends = [spec.eos_id, *(piece for piece in spec.chat if isinstance(piece, int))]
        choice = self._complete(
            prompt,
            max_tokens=room,
            seed=seed,
            temperature=spec.sampling.temperature,
            top_p=spec.sampling.top_p,
            stop=[spec.marker],
            stop_token_ids=ends,
            include_stop_str_in_output=True,
        )
        with usable(self._http, self.advice):
            ids, ended = list(choice["token_ids"]), choice["finish_reason"] == "stop"
        return _cut(ids, ended, spec, self.vocabulary)

    def read(self, prompt: list[int], reasoning: list[int]) -> TopReading:
        choice = self._complete(
            [*prompt, *reasoning, *self._spec.marker_ids],
            max_tokens=1,
            temperature=0,
            logprobs=TOP,
            return_tokens_as_token_ids=True,
        )
        with usable(self._http, self.advice):
            [position] = choice["logprobs"]["top_logprobs"]
            top = [(_token_id(name), value) for name, value in position.items()]
            return read_top_log_probabilities(top, self._spec.label_ids, self._spec.scale.values)

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        body = {
            "prompt": ids,
            "model": self._model,
            "return_token_ids": True,
            "top_k": -1,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            **options,
        }
        answer = self._http.post("/v1/completions", body)
        with usable(self._http, self.advice):
            [choice] = answer["choices"]
            if choice["prompt_token_ids"] != ids:
                raise ValueError("it read another prompt than it was given")
        return choice


class ServerVocabulary:
    """What judging asks of a vocabulary, by llama-server's own tokenizer.

    `encode` and `decode` are those of `vocabulary.GGUFVocabulary`, but special tokens show in the
    text of `decode`.
    """

    def __init__(self, http: Connection, model: str, eos_id: int):
        self._http, self._model, self.eos_id = http, model, eos_id
        self._piece = cache(lambda token: self._detokenize([token]))
        # As in a SentencePiece vocabulary, where llama.cpp puts a space before any text.
        self._adds_space = self._detokenize(self._tokenize(ANCHOR)).startswith(" ")

    def encode(self, text: str) -> list[int]:
        text = clean_text(text)
        if self._adds_space and text.startswith((" ", SPM_SPACE)):
            text = text[1:]
            if not text:
                return [self._space_id]
        return self._tokenize(text)

    def decode(self, ids: Sequence[int]) -> str:
        text = "".join(map(self._piece, ids))
        if "\ufffd" in text:
            # Of a character in several tokens, the server gives none of them alone.
            text = self._detokenize(ids)
        return text.removeprefix(" ") if self._adds_space else text

    def _tokenize(self, text: str) -> list[int]:
        answer = self._http.post(
            "/tokenize", {"content": text, "add_special": False, "parse_special": False, "model": self._model}
        )
        with usable(self._http, LlamaServer.advice):
            return list(answer["tokens"])

    def _detokenize(self, ids: Sequence[int]) -> str:
        answer = self._http.post("/detokenize", {"tokens": list(ids), "model": self._model})
        with usable(self._http, LlamaServer.advice):
            return str(answer["content"])

    @cached_property
    def _space_id(self) -> int:
        return self._tokenize("\n ")[-1]


@contextmanager
def usable(http: Connection, advice: str) -> Iterator[None]:
    """Where the server's answer is taken apart: what it lacks or tells wrong is its fault."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else error
        raise RuntimeError(f"the answer of the server at {http.url} is of no use ({why}): {advice}") from error


def _token_id(name: str) -> int:
    """The id in "token_id:5"; the text "5" is none."""
    if not name.startswith("token_id:"):
        raise ValueError(f"{name!r} is no token id")
    return int(name.removeprefix("token_id:"))


def _cut(ids: list[int], ended: bool, spec: JudgeSpec, vocabulary: Vocabulary) -> tuple[list[int], bool]:
    """The reasoning in generated ids, and whether it was complete.

    `ended`: the server stopped at an end token, perhaps at one that the spec does not name.
    """
    reasoning, complete = cut_reasoning(ids, spec, vocabulary)
    return (reasoning[:-1], True) if ended and not complete else (reasoning, complete)
