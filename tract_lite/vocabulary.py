"""One view of a vocabulary, whether transformers or llama.cpp holds it.

Text given to `encode` is text: special tokens written in it are encoded as characters. Special
tokens enter a sequence by id alone (see `split_specials`).
"""

import ctypes
import re
import unicodedata
from functools import cached_property
from typing import Any, Protocol, Sequence

SPM_SPACE = "\u2581"


class Vocabulary(Protocol):
    eos_id: int

    def __len__(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each token, the same in both libraries."""

    @property
    def specials(self) -> dict[str, int]: ...


def clean_text(text: str) -> str:
    """The text in NFC, which llama.cpp does not see to, with U+FFFD for lone surrogates."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


def split_specials(text: str, specials: dict[str, int]) -> list[int | str]:
    """A chat template's text (never a record's) as ids of special tokens and plain text."""
    if not specials:
        return [text] if text else []
    longest_first = map(re.escape, sorted(specials, key=len, reverse=True))
    parts = re.split(f"({'|'.join(longest_first)})", text)
    return [specials.get(part, part) for part in parts if part]


class TransformersVocabulary:
    """A vocabulary read by transformers."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_token_id
        if self.eos_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        # Nothing is said of long texts: whether they fit is checked elsewhere.
        told = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(clean_text(text), **told)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(ids))

    @cached_property
    def specials(self) -> dict[str, int]:
        return {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}


class GGUFVocabulary:
    """A vocabulary read by llama.cpp from a loaded model (a `llama_model` pointer)."""

    def __init__(self, model: Any):
        import llama_cpp

        self._llama = llama_cpp
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.eos_id = llama_cpp.llama_vocab_eos(self._vocab)
        is_spm = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_SPM
        first = self._tokenize("a")[:1] if is_spm else []
        # transformers adds no second space to a text that begins with one; llama.cpp does.
        self._doubles_first_space = bool(first) and self.pieces(first)[0].startswith(SPM_SPACE)

    def __len__(self) -> int:
        return self._llama.llama_vocab_n_tokens(self._vocab)

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8")
        ids = (self._llama.llama_token * (len(data) + 8))()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        if count < 0:
            raise RuntimeError(f"llama.cpp could not tokenise a text of {len(data)} bytes")
        return ids[:count]

    def encode(self, text: str) -> list[int]:
        text = clean_text(text)
        if self._doubles_first_space and text.startswith((" ", SPM_SPACE)):
            return self._tokenize(text[1:]) if text[1:] else [self._space_id]
        return self._tokenize(text)

    @cached_property
    def _space_id(self) -> int:
        return self.pieces(range(len(self))).index(SPM_SPACE)

    def decode(self, ids: Sequence[int]) -> str:
        array = (self._llama.llama_token * len(ids))(*ids)
        size = 16 * len(ids) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._llama.llama_detokenize(self._vocab, array, len(ids), buffer, size, True, False)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._llama.llama_vocab_get_text(self._vocab, i).decode("utf-8", "replace") for i in ids]

    @cached_property
    def specials(self) -> dict[str, int]:
        ids = [i for i in range(len(self)) if self._llama.llama_vocab_is_control(self._vocab, i)]
        return dict(zip(self.pieces(ids), ids))
