"""A spec for a GGUF model that holds none: any instruct model as a judge, before it is trained.

All of it is found in the file, through llama.cpp: chat format, special tokens, score tokens.
"""

import logging
from pathlib import Path
from typing import Any

from tract_lite.data.scales import DEFAULT_SCALE
from tract_lite.engines.chat_template import render_chat
from tract_lite.engines.llama_cpp import is_gguf, load_model, metadata, quiet_llama
from tract_lite.scale import ScoreScale
from tract_lite.spec import CHAT_DATE, DEFAULT_TEMPLATE, JudgeSpec, spec_for, split_chat
from tract_lite.vocabulary import GGUFVocabulary

logger = logging.getLogger(__name__)

CHAT_ADVICE = "give a chat template of its family with --chat FILE (chat= in Python)"
WARNING = (
    "an untrained judge: %s holds no judge spec and is asked in its own chat format, on the scale %s; "
    "what its scores are worth is unknown until `tract-lite evaluate` compares them with gold scores"
)
# By the names in chat templates, the ones in GGUF files.
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "mask_token": "mask",
}


def untrained_spec(
    model: Any,
    path: str | Path,
    *,
    scale: ScoreScale | None = None,
    template: str | None = None,
    chat: str | None = None,
) -> JudgeSpec:
    """The spec by which a loaded model (a `llama_model` pointer) is asked as it is.

    It is the one that `make_spec` makes with the model's transformers tokenizer. `path` names the
    model. `scale`: of items without their own, 1 to 5 unless given. `template`: the prompt's, as in
    `JudgeSpec`. `chat`: a chat template (Jinja), by default the model's own.
    Raises ValueError: no chat template, or one that fails; the labels can't be told apart.
    """
    vocabulary, scale = GGUFVocabulary(model), scale or DEFAULT_SCALE
    chat = chat or _own_chat(model)
    if not chat:
        raise ValueError(f"{path} holds no judge spec and no chat template to ask it by\n{CHAT_ADVICE}")
    try:
        pieces = split_chat(render_chat(chat, _special_tokens(model, vocabulary)), vocabulary)
    except ValueError as error:
        raise ValueError(f"the chat template of {path} can't be used: {error}\n{CHAT_ADVICE}") from error
    vocabulary.eos_id = _end_id(model, vocabulary)
    method = {"untrained": True, "chat_date": CHAT_DATE.isoformat()}
    spec = spec_for(vocabulary, pieces, scale, template=template or DEFAULT_TEMPLATE, method=method, any_scale=True)
    logger.warning(WARNING, path, scale)
    return spec


def untrained_spec_at(path: str | Path, **asked: Any) -> JudgeSpec | None:
    """The same of a GGUF model's file, of which its vocabulary alone is read; None for other files.
    Raises ValueError: as `untrained_spec`.
    """
    if not Path(path).is_file() or not is_gguf(path):
        return None
    model = load_model(path, vocab_only=True)
    try:
        return untrained_spec(model, path, **asked)
    finally:
        quiet_llama().llama_model_free(model)


def check_unasked(where: Any, **asked: Any) -> None:
    """Raises ValueError: a judge that has its spec is asked otherwise."""
    if given := [name for name, value in asked.items() if value is not None]:
        raise ValueError(f"{where} has a judge spec, which says how it is asked\nleave {', '.join(given)} out")


def _end_id(model: Any, vocabulary: GGUFVocabulary) -> int:
    """The end token that the file names, or else the one by which llama.cpp knows a turn's end."""
    llama = quiet_llama()
    if (own := _token_id(model, vocabulary, "eos")) is not None:
        return own
    found = llama.llama_vocab_eot(llama.llama_model_get_vocab(model))
    if found < 0:
        raise ValueError("this model's file names no end token\ntake another GGUF file of this model")
    return found


def _own_chat(model: Any) -> str:
    return metadata(model, "tokenizer.chat_template") or ""


def _special_tokens(model: Any, vocabulary: GGUFVocabulary) -> dict[str, str]:
    """The special tokens that the file itself names, by the names that chat templates have."""
    found = {name: _token_id(model, vocabulary, key) for name, key in _SPECIAL_TOKENS.items()}
    return {name: vocabulary.pieces([number])[0] for name, number in found.items() if number is not None}


def _token_id(model: Any, vocabulary: GGUFVocabulary, key: str) -> int | None:
    """A special token's id in the file; None where there is none, or one beyond the vocabulary."""
    number = metadata(model, f"tokenizer.ggml.{key}_token_id")
    return int(number) if number and 0 <= int(number) < len(vocabulary) else None
