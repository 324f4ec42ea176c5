"""How a server that takes and gives text alone is asked: OpenAI's completions."""

from __future__ import annotations

import logging
from itertools import groupby
from typing import Any, Sequence

from tract_lite.rail import TopReading, read_top_log_probabilities
from tract_lite.scale import ANCHOR
from tract_lite.server_http import Connection, NoLogProbabilities
from tract_lite.server_protocols import TOP, usable
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary, split_specials

# As many as OpenAI gives.
FEWEST_TOP = 5

logger = logging.getLogger(__name__)


class TextServer:
    """Special tokens are spelled, and read out of the text again by the server; labels are found by
    their text. So a text that spells a special token is refused, and scores are approximate.

    `extras` are further fields of each request, for this server.

    Raises:
        ValueError: no vocabulary is given.
        RuntimeError: the server gives no log-probabilities.
    """

    advice = "start it with log-probabilities on (llama_cpp.server: --logits_all true)"

    def __init__(self, http: Connection, model: str, spec: JudgeSpec, vocabulary: Vocabulary | None,
                 **extras: Any):
        if vocabulary is None:
            raise ValueError("a server that takes text alone needs vocabulary=, the folder of the "
                             "judge's tokenizer or its GGUF")
        self._http, self._spec, self.vocabulary = http, spec, vocabulary
        self._fixed = {"model": model, **extras}
        chat = [piece for piece in spec.chat if isinstance(piece, int)]
        self._specials = {**vocabulary.specials, **dict(zip(vocabulary.pieces(chat), chat))}
        self._names = {token: name for name, token in self._specials.items()}
        self._marker = self._text(spec.marker_ids)
        self._labels = [self._text([*spec.marker_ids, token]).removeprefix(self._marker)
                        for token in spec.label_ids]
        self._top, read = self._probe()
        self._adds_start = read > len(vocabulary.encode(ANCHOR))
        self._told = False
        logger.warning("the server at %s takes text and names tokens by their text: scores are "
                       "approximate", http.url)

    def write(self, prompt: list[int], room: int, seed: int) -> tuple[list[int], bool]:
        sampling, marker = self._spec.sampling, self._spec.marker
        choice = self._complete(
            prompt, self._spelled(prompt), max_tokens=room, stop=[marker], top_p=sampling.top_p,
            # The one seed left out would mean a random one to llama.cpp.
            temperature=sampling.temperature, seed=seed % 0xFFFFFFFF)
        with usable(self._http, self.advice):
            text, complete = choice["text"].split(marker)[0], choice["finish_reason"] != "length"
        # The marker brings its space along.
        text = text.removesuffix(self._marker.partition(marker)[0])
        return self.vocabulary.encode(text), complete

    def read(self, prompt: list[int], reasoning: list[int]) -> TopReading:
        text = self._spelled(prompt) + self._text(reasoning) + self._marker
        choice = self._complete(prompt, text, max_tokens=1, temperature=0, logprobs=self._top)
        with usable(self._http, self.advice):
            positions = choice["logprobs"]["top_logprobs"]
            if positions:
                return read_top_log_probabilities(positions[0].items(), self._labels,
                                                  self._spec.scale.values, distinct=False)
        raise ValueError("the judge would rather have ended than give a score, and of that this "
                         "server tells no log-probabilities")

    def _probe(self) -> tuple[int, int]:
        """How many log-probabilities it gives, and how many tokens it reads in a single word."""
        for top in (TOP, FEWEST_TOP):
            try:
                answer = self._ask(ANCHOR, max_tokens=1, logprobs=top)
            except NoLogProbabilities as error:
                refusal = error
                continue
            with usable(self._http, self.advice):
                if answer["choices"][0]["logprobs"]["top_logprobs"] is None:
                    raise ValueError("there are no log-probabilities")
                return top, int(answer["usage"]["prompt_tokens"])
        raise RuntimeError(f"{refusal}: {self.advice}")

    def _ask(self, text: str, **options: Any) -> dict[str, Any]:
        return self._http.post("/v1/completions", {"prompt": text, **self._fixed, **options})

    def _complete(self, prompt: list[int], text: str, **options: Any) -> dict[str, Any]:
        """The completion of a text that holds the prompt's special tokens and no other ones."""
        parts = split_specials(text, self._specials)
        specials = [part for part in parts if isinstance(part, int)]
        if specials != [token for token in prompt if token in self._names]:
            raise ValueError("a text spells a special token, and this server would take it for "
                             "one: judge it with the GGUF, or a server that takes token ids")
        if self._adds_start and specials[:1] == parts[:1]:
            text = text.removeprefix(self._names[specials[0]])
        answer = self._ask(text, **options)
        with usable(self._http, self.advice):
            choice, read = answer["choices"][0], int(answer["usage"]["prompt_tokens"])
        plain = [part for part in parts if isinstance(part, str)]
        length = len(specials) + sum(len(self.vocabulary.encode(part)) for part in plain)
        # Some tokenizers put a space before each part, which others leave out.
        if read < length - len(plain):
            raise ValueError(f"the server at {self._http.url} read {read} tokens of a text of "
                             f"{length}: start it with a longer context")
        if read > length and not self._told:
            self._told = True
            logger.warning("the server at %s reads a text of %d tokens as %d", self._http.url,
                           length, read)
        return choice

    def _spelled(self, ids: Sequence[int]) -> str:
        """The text of a prompt, special tokens by their names."""
        runs = groupby(ids, lambda token: token in self._names)
        return "".join("".join(map(self._names.get, run)) if special
                       else self.vocabulary.decode(list(run)) for special, run in runs)

    def _text(self, ids: Sequence[int]) -> str:
        """The text of ids that follow others: with their first space, if they have one."""
        before = self.vocabulary.encode(ANCHOR)
        whole = self.vocabulary.decode([*before, *ids])
        return whole.removeprefix(self.vocabulary.decode(before))
