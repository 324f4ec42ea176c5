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
        """The scale that a text names: "1-5", "-2-2" or, with labels, "bad=0,ok=0.5,good=1".
        Raises ValueError: it names none.
        """
        if "=" in text:
            return cls._of_labels(text)
        ends = re.fullmatch(r"\s*([+-]?\d+)\s*-\s*([+-]?\d+)\s*", text)
        if not ends or int(ends[1]) >= int(ends[2]):
            raise ValueError(f"the scale {text!r} can't be read: give its lowest and highest score, as in 1-5")
        return cls.integers(int(ends[1]), int(ends[2]))

    @classmethod
    def _of_labels(cls, text: str) -> "ScoreScale":
        pairs = [pair.rpartition("=") for pair in text.split(",")]
        try:
            return cls(tuple(label.strip() for label, _, _ in pairs), tuple(float(value) for _, _, value in pairs))
        except ValueError as error:
            raise ValueError(f"the scale {text!r} can't be read: give label=value, with commas ({error})") from error

    def __str__(self) -> str:
        """As `parse` reads it."""
        low, high = int(self.values[0]), int(self.values[-1])
        if low < high and self == ScoreScale.integers(low, high):
            return f"{low}-{high}"
        return ",".join(f"{label}={value:g}" for label, value in zip(self.labels, self.values))

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
    fitting = [str(one) for one in common if _score_tokens(vocabulary, marker, one)]
    fits = f"the scales {', '.join(fitting)} fit" if fitting else "no usual scale fits, so choose another seed model"
    anchor = len(vocabulary.encode(ANCHOR))
    encoded = {label: vocabulary.encode(f"{ANCHOR} {label}")[anchor:] for label in scale.labels}
    # A space before the label may be a token, and is not the label's.
    counts = {label: sum(bool(vocabulary.decode([i]).strip()) for i in ids) for label, ids in encoded.items()}
    several = [label for label, count in counts.items() if count > 1]
    fault = f"the labels {scale} are not told apart by one token each in this vocabulary"
    if several:
        share = f" ({len(several)} of {len(counts)} labels take several)" if len(several) > 1 else ""
        fault = f"the label {several[0]} takes {counts[several[0]]} tokens in this vocabulary{share}"
    raise ValueError(f"{fault}\neach label must be one token of its own: {fits}")


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
