"""Everything a judge must know to be the same judge again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tract_lite.scale import ScoreScale
from tract_lite.vocabulary import Vocabulary

SPEC_FILE = "judge_spec.json"
FORMAT = 1
MARKER = "So the overall score is"


@dataclass(frozen=True)
class Sampling:
    """How a judge samples its reasoning; the penalty counts generated tokens only.

    Source: the settings TRACT uses to write its stage-2 data.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.03
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class JudgeSpec:
    """A judge's contract: how it is asked, how it ends, and what its score tokens are.

    `template` is a Jinja template over the fields of a record. `chat` holds the seed's chat
    format: ids of special tokens and plain text, one piece of which contains `{prompt}`. The ids
    were found in the seed's vocabulary; `pieces` spells marker and labels, so that a file with
    another vocabulary is refused. `max_length` counts prompt, reasoning and score, in tokens.
    """

    template: str
    scale: ScoreScale
    chat: tuple[int | str, ...]
    marker_ids: tuple[int, ...]
    label_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    eos_id: int
    marker: str = MARKER
    sampling: Sampling = Sampling()
    max_length: int = 3000
    base_model: str = ""
    method: dict[str, Any] = field(default_factory=dict)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Refuse a vocabulary in which the spec's ids spell something else.

        Raises:
            ValueError: the ids are out of range or name other pieces.
        """
        ids = self.marker_ids + self.label_ids
        found = tuple(vocabulary.pieces(ids)) if max(ids) < len(vocabulary) else ()
        if found != self.pieces:
            raise ValueError(
                f"this vocabulary is not the one the judge was trained with: ids {ids} spell "
                f"{found or 'nothing'}, expected {self.pieces}"
            )

    def to_json(self) -> str:
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(data, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> JudgeSpec:
        """The spec that `to_json` wrote.

        Raises:
            ValueError: not a spec, of a newer format, or with unknown or missing fields.
        """
        try:
            data = json.loads(text)
            if data.pop("format") > FORMAT:
                raise ValueError("it was written by a newer tract-lite: upgrade to read it")
            data["scale"] = ScoreScale(**data["scale"])
            data["sampling"] = Sampling(**data["sampling"])
            for name in ("chat", "marker_ids", "label_ids", "pieces"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a readable judge spec: {error}") from error

    def save(self, folder: str | Path) -> None:
        (Path(folder) / SPEC_FILE).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> JudgeSpec:
        """Read a spec from its file or from the folder that holds it."""
        path = Path(path)
        path = path / SPEC_FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no judge spec at {path}: is this a tract-lite judge?")
        return cls.from_json(path.read_text(encoding="utf-8"))
