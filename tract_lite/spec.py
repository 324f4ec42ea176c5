"""All that makes a judge the same judge again: scale, template, chat format, marker, sampling."""

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import date
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Sequence

from tract_lite.scale import ScoreScale, ScoreTokens, find_score_tokens
from tract_lite.vocabulary import TransformersVocabulary, Vocabulary, split_specials

SPEC_FILE = "judge_spec.json"
FORMAT = 2
MARKER = "So the overall score is"
SLOT = "{prompt}"
# What a chat template is asked with. A model that can think before it answers is not to: what it
# writes is its reasoning. Some templates name the day, and a judge is to be the same on every day.
CHAT_MESSAGES = [{"role": "user", "content": SLOT}]
CHAT_OPTIONS: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}
CHAT_OPTIONS |= {"enable_thinking": False, "thinking": False}
CHAT_DATE = date(2026, 1, 1)

# What consecutive items share stands first, so that an engine can reuse its cache.
DEFAULT_TEMPLATE = files("tract_lite").joinpath("template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Sampling:
    """How a judge samples, as TRACT does for stage 2; the penalty counts generated tokens only."""

    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.03
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class JudgeSpec:
    """A judge's contract: how it is asked, how it ends, and what its score tokens are.

    `template` is a Jinja template over a record's fields. `chat` is the seed's chat format: ids of
    special tokens and plain text, one piece of which contains `{prompt}`. `label_ids` are the
    tokens of each label, `pieces` spells those of marker and labels in the seed's vocabulary.
    `max_length`: tokens of prompt, reasoning and score.

    `any_scale`: whether a record may bring a scale of its own, in place of `scale`. `units`: the
    scale whose range the values of `scale` are spread over, where these are not its own.
    """

    template: str
    scale: ScoreScale
    chat: tuple[int | str, ...]
    marker_ids: tuple[int, ...]
    label_ids: tuple[tuple[int, ...], ...]
    pieces: tuple[str, ...]
    eos_id: int
    marker: str = MARKER
    sampling: Sampling = Sampling()
    max_length: int = 3000
    base_model: str = ""
    method: dict[str, Any] = field(default_factory=dict)
    any_scale: bool = False
    units: ScoreScale | None = None

    @property
    def tokens(self) -> ScoreTokens:
        """How `scale` is spelled."""
        return ScoreTokens(self.marker_ids, self.label_ids, self.scale.values)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises ValueError: in this vocabulary the spec's ids spell something else."""
        ids = (*self.marker_ids, *chain(*self.label_ids))
        found = tuple(vocabulary.pieces(ids)) if max(ids) < len(vocabulary) else ()
        if found != self.pieces:
            spelled = f"ids {ids} spell {found or 'nothing'}, expected {self.pieces}"
            raise ValueError(f"this vocabulary is not the one the judge was trained with: {spelled}")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "JudgeSpec":
        """The spec that `to_json` wrote. Raises ValueError: it is none, or of a newer format."""
        try:
            data = json.loads(text)
            if data.pop("format") > FORMAT:
                raise ValueError("it was written by a newer tract-lite: upgrade to read it")
            data["scale"] = ScoreScale(**data["scale"])
            data["sampling"] = Sampling(**data["sampling"])
            data["units"] = ScoreScale(**units) if (units := data.get("units")) else None
            # The first format knew labels of one token alone.
            labels = ([ids] if isinstance(ids, int) else ids for ids in data["label_ids"])
            data["label_ids"] = tuple(map(tuple, labels))
            for name in ("chat", "marker_ids", "pieces"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a readable judge spec: {error}") from error

    def save(self, folder: str | Path) -> None:
        # A path may hold what UTF-8 can't: it then stands there as JSON escapes it.
        (Path(folder) / SPEC_FILE).write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, path: str | Path) -> "JudgeSpec":
        """Read a spec from its file or from the folder that holds it."""
        path = Path(path, SPEC_FILE) if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise ValueError(f"no judge spec at {path}: is this a tract-lite judge?")
        return cls.from_json(path.read_text(encoding="utf-8"))


# A spec, or the path of one: its file, the folder that holds it, or a judge's GGUF file.
SpecSource = JudgeSpec | str | Path


def make_spec(
    tokenizer: Any, scale: ScoreScale, *, template: str = DEFAULT_TEMPLATE, marker: str = MARKER, **fields: Any
) -> JudgeSpec:
    """A judge's spec for the vocabulary and the chat format of a transformers tokenizer.

    `fields` are further fields of `JudgeSpec`.
    Raises ValueError: the labels of `scale` can't be told apart here, or the chat template fails.
    """
    vocabulary = TransformersVocabulary(tokenizer)
    chat = chat_pieces(tokenizer, vocabulary)
    return spec_for(vocabulary, chat, scale, template=template, marker=marker, **fields)


def spec_for(
    vocabulary: Vocabulary, chat: Sequence[int | str], scale: ScoreScale, *, marker: str = MARKER, **fields: Any
) -> JudgeSpec:
    """As `make_spec`, for any vocabulary and a chat format that was found."""
    tokens = find_score_tokens(vocabulary, marker, scale)
    pieces = tuple(vocabulary.pieces([*tokens.marker, *chain(*tokens.labels)]))
    fields |= {"pieces": pieces, "eos_id": vocabulary.eos_id}
    fields |= {"chat": tuple(chat), "marker_ids": tokens.marker, "label_ids": tokens.labels}
    return JudgeSpec(scale=scale, marker=marker, **fields)


def chat_pieces(tokenizer: Any, vocabulary: TransformersVocabulary) -> list[int | str]:
    """The tokenizer's chat format around one user message, as special ids and text.

    A tokenizer without a chat template gets its start token, if any, and the bare prompt.
    """
    if not tokenizer.chat_template:
        start = tokenizer("")["input_ids"]
        return [i for i in start if i != vocabulary.eos_id or i == tokenizer.bos_token_id] + [SLOT]
    options = {**CHAT_OPTIONS, "strftime_now": chat_date}
    return split_chat(tokenizer.apply_chat_template(CHAT_MESSAGES, tokenize=False, **options), vocabulary)


def split_chat(text: str, vocabulary: Vocabulary) -> list[int | str]:
    """A rendered chat format as special ids and text. Raises ValueError: not with one `SLOT`."""
    if text.count(SLOT) != 1:
        raise ValueError("the chat template does not repeat the user's message once and unchanged")
    return split_specials(text, vocabulary.specials)


def chat_date(format: str) -> str:
    """The day, always the same, for chat templates that ask for it."""
    return CHAT_DATE.strftime(format)


def read_template(path: str | Path) -> str:
    """A prompt's template.
    Raises ValueError: no such file, no Jinja in UTF-8, or it does not ask for the response.
    """
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import SandboxedEnvironment

    text = read_template_text(path)
    try:
        asked = meta.find_undeclared_variables(SandboxedEnvironment().parse(text))
    except TemplateSyntaxError as error:
        raise ValueError(f"the template {path}, line {error.lineno}: {error.message}") from error
    if "response" not in asked:
        raise ValueError(f"the template {path} never asks for {{{{ response }}}}, the text to judge")
    return text


def read_template_text(path: str | Path) -> str:
    """The text of any template's file. Raises ValueError: no such file, or not in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the template {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the template {path} is not in UTF-8 ({error.reason}): save it so") from error
