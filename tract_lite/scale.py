"""A score scale: its labels, their values, and the tokens that spell each label."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from itertools import pairwise
from os.path import commonprefix
from typing import Iterable, Sequence

from tract_lite.vocabulary import Vocabulary, clean_text

# Any text before the marker; a letter, so that no tokenizer merges it with the marker's space.
ANCHOR = "x"
# A scale of more labels is a mistake: 0-100 by tenths has 1,001.
MOST_LABELS = 1001
# Scales that people rate on, in the order in which they are proposed.
USUAL_SCALES = ("0-1", "1-5", "0-5", "1-10", "0-10", "0-100:10", "-1-1", "-2-2", "-5-5", "-10-10", "-100-100:10")
# Of a scale with more labels, a text names only the ends.
MOST_NAMED = 12


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
        if len(self.labels) > MOST_LABELS:
            raise ValueError(f"a scale of {len(self.labels):,} labels: {MOST_LABELS:,} at most\ntake a wider step")
        for what in (self.labels, self.values):
            if repeated := [one for one in what if what.count(one) > 1]:
                raise ValueError(f"labels and values must not repeat: {repeated[0]} does")
        for label in self.labels:
            if label != label.strip() or not label:
                raise ValueError(f"labels must have text and no space at their ends: {label!r}")
        if not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"values must be finite: {self.values}")

    @classmethod
    def integers(cls, low: int, high: int) -> "ScoreScale":
        """The scale of the whole numbers from `low` to `high`, both included."""
        return cls.steps(low, high)

    @classmethod
    def steps(cls, low: float | str, high: float | str, step: float | str = 1) -> "ScoreScale":
        """The scale of the numbers from `low` to `high`, both included, by steps.
        Raises ValueError: no such numbers, or the steps do not end at `high`.
        """
        first, last, width = (Decimal(str(number)) for number in (low, high, step))
        leads_up = first.is_finite() and last.is_finite() and width.is_finite() and first < last and width > 0
        if leads_up and (count := int((last - first) / width) + 1) > MOST_LABELS:
            raise ValueError(f"a scale of {count:,} labels: {MOST_LABELS:,} at most\ntake a wider step")
        if not leads_up or (last - first) % width:
            raise ValueError(f"no steps of {step} lead from {low} up to {high}")
        labels = tuple(_plain(first + place * width) for place in range(count))
        return cls(labels, tuple(map(float, labels)))

    @classmethod
    def parse(cls, text: str) -> "ScoreScale":
        """The scale that a text names: "1-5", "-2-2", in steps "0-5:0.5", or with labels
        "bad=0,ok=0.5,good=1".
        Raises ValueError: it names none.
        """
        if "=" in text:
            return cls._of_labels(text)
        number = r"\s*([+-]?\d+(?:\.\d+)?)\s*"
        # Spreadsheets write longer dashes and minus signs.
        ends = re.fullmatch(rf"{number}-{number}(?::{number})?", re.sub("[\u2212\u2013]", "-", text))
        try:
            if ends:
                return cls.steps(ends[1], ends[2], ends[3] or 1)
            fault = "give its lowest and highest score, as in 1-5 or 0-5:0.5, or label=value,label=value"
        except ValueError as error:
            fault = str(error)
        raise ValueError(f"the scale {text!r} can't be read: {fault}")

    @classmethod
    def _of_labels(cls, text: str) -> "ScoreScale":
        pairs = [pair.rpartition("=") for pair in text.split(",")]
        try:
            return cls(tuple(label.strip() for label, _, _ in pairs), tuple(float(value) for _, _, value in pairs))
        except ValueError as error:
            raise ValueError(f"the scale {text!r} can't be read: give label=value, with commas ({error})") from error

    @classmethod
    def proposed(cls, golds: Iterable[float], described: Iterable[str] = ()) -> "ScoreScale":
        """The scale that gold scores were given on, as far as they and rubrics tell.

        It is that of the labels which rubrics describe, where these are numbers and all scores lie
        between them; or else a usual one, or whole or wider steps, that holds all scores. Scores
        between two labels are no fault: training takes their value.
        Raises ValueError: there is neither a gold score nor a described number.
        """
        found, numbers = [float(gold) for gold in golds], numbers_in(described)
        if numbers and all(numbers[0] <= gold <= numbers[-1] for gold in found):
            step = min(after - before for before, after in pairwise(numbers))
            is_even = all((number - numbers[0]) % step == 0 for number in numbers)
            are_steps = all((Decimal(repr(gold)) - numbers[0]) % step == 0 for gold in found)
            # Between described ends, or in wide steps, there may be labels that nobody describes.
            if is_even and sum((are_steps, len(numbers) > 2, step <= 1)) > 1:
                return cls.steps(str(numbers[0]), str(numbers[-1]), str(step))
            return cls._over([*found, float(numbers[0]), float(numbers[-1])])
        if not found:
            raise ValueError("no gold scores to propose a scale from: --scale names one")
        for scale in map(cls.parse, USUAL_SCALES):
            if scale.contains(min(found)) and scale.contains(max(found)):
                return cls._over(found) if scale.values == (0, 1) else scale
        return cls._over(found)

    @classmethod
    def _over(cls, found: Sequence[float]) -> "ScoreScale":
        """Whole or wider steps over numbers; tenths, where some are fractions from 0 to 1."""
        low, high = min(found), max(found)
        if 0 <= low and high <= 1:
            # Such fractions are a share, for which two labels say little.
            return cls.steps(0, 1, 1 if all(number.is_integer() for number in found) else "0.1")
        step = 10 ** max(0, math.ceil(math.log10(max(high - low, 1) / 10)))
        start = math.floor(low / step)
        return cls.steps(start * step, max(math.ceil(high / step), start + 1) * step, step)

    def remapped(self, onto: "ScoreScale") -> "ScoreScale":
        """The labels of another scale, with values spread linearly over this one's range.

        A judge that ends with those labels then answers in the units of this scale.
        """
        low, start = min(self.values), min(onto.values)
        factor = self.width / onto.width
        return ScoreScale(onto.labels, tuple(low + factor * (value - start) for value in onto.values))

    def __str__(self) -> str:
        """As `parse` reads it."""
        try:
            first, second, last = (Decimal(self.labels[place]) for place in (0, 1, -1))
            text = f"{first:f}-{last:f}" + (f":{second - first:f}" if second - first != 1 else "")
            if ScoreScale.parse(text) == self:
                return text
        except (InvalidOperation, ValueError):
            pass
        return ",".join(f"{label}={str(value).removesuffix('.0')}" for label, value in zip(self.labels, self.values))

    @property
    def named(self) -> str:
        """The labels as a prompt names them; of many in even steps, the first and the last."""
        labels = self.labels
        # Only even steps can be guessed.
        if len(labels) > MOST_NAMED and "=" not in str(self):
            labels = (*labels[:3], "...", *labels[-2:])
        return ", ".join(labels)

    @property
    def width(self) -> float:
        """From the lowest value to the highest."""
        return max(self.values) - min(self.values)

    def contains(self, score: float) -> bool:
        """Whether a score, perhaps between two labels, lies on the scale."""
        return min(self.values) <= score <= max(self.values)

    def nearest(self, score: float) -> int:
        """The index of the label whose value is nearest to `score` (the lower one of two)."""
        return min(range(len(self.values)), key=lambda k: (abs(self.values[k] - score), k))

    def shares(self, score: float) -> dict[int, float]:
        """The one or two labels (indices) around a score of the scale, each with its share."""
        ordered = sorted(range(len(self.values)), key=self.values.__getitem__)
        below = max((k for k in ordered if self.values[k] <= score), key=self.values.__getitem__)
        above = min((k for k in ordered if self.values[k] >= score), key=self.values.__getitem__)
        if below == above:
            return {below: 1.0}
        share = (score - self.values[below]) / (self.values[above] - self.values[below])
        return {below: 1 - share, above: share}


def numbers_in(labels: Iterable[str]) -> list[Decimal]:
    """Two or more labels as numbers, in order; none where one of them is a word."""
    try:
        numbers = sorted({Decimal(label) for label in labels})
    except InvalidOperation:
        return []
    return numbers if len(numbers) > 1 and all(number.is_finite() for number in numbers) else []


def _plain(number: Decimal) -> str:
    """Without an exponent and without zeros at its end."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


Path = tuple[int, ...]


@dataclass(frozen=True)
class ScoreTokens:
    """How a scale is spelled: the ids that lead to a score (`marker`), the ids of each label
    (`labels`) and the number it stands for (`values`).

    The labels are the paths of a tree that begins behind the marker; a label may begin others, as 1
    begins 10. Its nodes are the beginnings of labels that lead on.
    """

    marker: Path
    labels: tuple[Path, ...]
    values: tuple[float, ...]

    @cached_property
    def following(self) -> dict[Path, Path]:
        """For each node, shortest first, the tokens by which it leads on; () is the first node."""
        found: dict[Path, dict[int, None]] = {}
        for label in self.labels:
            for length, token in enumerate(label):
                found.setdefault(label[:length], {})[token] = None
        return {node: tuple(found[node]) for node in sorted(found, key=len)}

    def asked(self, node: Path, end_id: int) -> Path:
        """The tokens to read after a node: those that lead on and, after a label, the end token."""
        following = self.following[node]
        return (*following, end_id) if node in self.worth else following

    @property
    def width(self) -> float:
        """From the lowest value to the highest."""
        return max(self.values) - min(self.values)

    @cached_property
    def worth(self) -> dict[Path, float]:
        """The value of each label, by its path."""
        return dict(zip(self.labels, self.values))

    def reach(self, beginning: Path, value: float) -> float:
        """How far from a value those of the labels that begin so are, at most."""
        size = len(beginning)
        return max(abs(other - value) for label, other in self.worth.items() if label[:size] == beginning)

    @property
    def is_flat(self) -> bool:
        """Whether each label is one token."""
        return len(self.following) == 1

    @property
    def longest(self) -> int:
        """Tokens of the longest label."""
        return max(map(len, self.labels))


def find_score_tokens(vocabulary: Vocabulary, marker: str, scale: ScoreScale) -> ScoreTokens:
    """Encode marker and label together, in context, and tell where the label begins.

    Most vocabularies put a space token before the digit, GPT-2's merges the two: what all labels
    share and spells no more than the marker belongs to it, what is left is the label's.
    Raises ValueError: two labels have the same tokens, or one can't be told from the marker.
    """
    anchor = vocabulary.encode(ANCHOR)
    spelled = [vocabulary.encode(f"{ANCHOR} {marker} {label}") for label in scale.labels]
    length = len(commonprefix(spelled))
    while length > len(anchor) and vocabulary.decode(spelled[0][:length]).strip() != f"{ANCHOR} {marker}":
        length -= 1
    labels = [tuple(ids[length:]) for ids in spelled]
    if spelled[0][: len(anchor)] != anchor or length <= len(anchor) or not all(labels):
        merged = _merged(vocabulary, marker, spelled, scale)
        advice = "name the labels otherwise, or take another marker"
        raise ValueError(f"the label {merged} merges with the marker's end in this vocabulary\n{advice}")
    for label, ids in zip(scale.labels, spelled):
        if _squeezed(vocabulary.decode(ids)) != _squeezed(f"{ANCHOR} {marker} {clean_text(label)}"):
            raise ValueError(f"the label {label!r} can't be spelled in this vocabulary\nname it otherwise")
    owners: dict[Path, str] = {}
    for label, path in zip(scale.labels, labels):
        if path in owners:
            collide = f"the labels {owners[path]!r} and {label!r} have the same tokens in this vocabulary"
            raise ValueError(f"{collide}\nname one of them otherwise")
        owners[path] = label
    return ScoreTokens(tuple(spelled[0][len(anchor) : length]), tuple(labels), scale.values)


def _merged(vocabulary: Vocabulary, marker: str, spelled: Sequence[Sequence[int]], scale: ScoreScale) -> str:
    """The first label whose tokens begin inside the marker."""
    for label, ids in zip(scale.labels, spelled):
        beginnings = (vocabulary.decode(ids[:length]).strip() for length in range(1, len(ids)))
        if f"{ANCHOR} {marker}" not in beginnings:
            return repr(label)
    return repr(scale.labels[0])


def _squeezed(text: str) -> str:
    return "".join(text.split())
