"""A score scale: its labels, their values, and the token that spells each label."""

import math
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple

from tract_lite.vocabulary import Vocabulary

# Any text before the marker; a letter, so that no tokenizer merges it with the marker's space.
ANCHOR = "x"


@dataclass(frozen=True)
class ScoreScale:
    """The labels a judge may end with and the number each one stands for.
    Raises ValueError: fewer than two labels, or labels or values that repeat or don't pair up.
    """

    labels: tuple[str, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if len(self.labels) < 2 or len(self.labels) != len(self.values):
            counts = f"{len(self.labels)} labels and {len(self.values)} values"
            raise ValueError(f"a scale needs two labels or more and one value each, got {counts}")
        if len(set(self.labels)) < len(self.labels) or len(set(self.values)) < len(self.values):
            raise ValueError(f"labels and values must not repeat: {self.labels}, {self.values}")
        if any(label != label.strip() or not label for label in self.labels):
            raise ValueError(f"labels must have text and no space at their ends: {self.labels}")
        if not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"values must be finite: {self.values}")

    @classmethod
    def integers(cls, low: int, high: int) -> "ScoreScale":
        """The scale of the whole numbers from `low` to `high`, both included."""
        numbers = range(low, high + 1)
        return cls(tuple(map(str, numbers)), tuple(map(float, numbers)))

    @classmethod
    def parse(cls, text: str) -> "ScoreScale":
        """The scale that a text names: "1-5" or "-2-2". Raises ValueError: it names none."""
        ends = re.fullmatch(r"\s*([+-]?\d+)\s*-\s*([+-]?\d+)\s*", text)
        if not ends or int(ends[1]) >= int(ends[2]):
            raise ValueError(f"the scale {text!r} can't be read: give its lowest and highest score, as in 1-5")
        return cls.integers(int(ends[1]), int(ends[2]))

    def contains(self, score: float) -> bool:
        """Whether a score, perhaps between two labels, lies on the scale."""
        return min(self.values) <= score <= max(self.values)

    def nearest(self, score: float) -> int:
        """The index of the label whose value is nearest to `score` (the lower one of two)."""
        return min(range(len(self.values)), key=lambda k: (abs(self.values[k] - score), k))


class ScoreTokens(NamedTuple):
    """The ids that lead to a score (`marker`) and the one id of each label (`labels`)."""

    marker: tuple[int, ...]
    labels: tuple[int, ...]


def find_score_tokens(vocabulary: Vocabulary, marker: str, scale: ScoreScale) -> ScoreTokens:
    """Encode marker and label together, in context, and tell where the label begins.

    Most vocabularies put a space token before the digit, GPT-2's merges the two: what all labels
    share belongs to the marker, what is left must be one token.
    Raises ValueError: a label takes several tokens or two labels share one; names scales that fit.
    """
    if tokens := _score_tokens(vocabulary, marker, scale):
        return tokens
    common = (ScoreScale.integers(*ends) for ends in ((1, 10), (0, 9), (1, 5), (1, 3)))
    fitting = [f"{s.labels[0]} to {s.labels[-1]}" for s in common if _score_tokens(vocabulary, marker, s)]
    anchor = len(vocabulary.encode(ANCHOR))
    pieces = {label: vocabulary.pieces(vocabulary.encode(f"{ANCHOR} {label}")[anchor:]) for label in scale.labels}
    fits = f"scales that fit: {', '.join(fitting) or 'none of the common ones'}"
    raise ValueError(f"each label must be one token of its own in this vocabulary, found {pieces}; {fits}")


def _score_tokens(vocabulary: Vocabulary, marker: str, scale: ScoreScale) -> ScoreTokens | None:
    anchor = vocabulary.encode(ANCHOR)
    spelled = [vocabulary.encode(f"{ANCHOR} {marker} {label}") for label in scale.labels]
    shared = commonprefix(spelled)
    if shared[: len(anchor)] != anchor or any(len(ids) != len(shared) + 1 for ids in spelled):
        return None
    labels = tuple(ids[-1] for ids in spelled)
    if vocabulary.decode(shared).strip() != f"{ANCHOR} {marker}" or len(set(labels)) < len(labels):
        return None
    return ScoreTokens(tuple(shared[len(anchor) :]), labels)
