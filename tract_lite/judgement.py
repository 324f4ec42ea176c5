"""What a judge says of one record: the figures, and how a person reads them."""

import math
import re
import shutil
import textwrap
from dataclasses import asdict, dataclass, field, fields
from statistics import pstdev, stdev
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from tract_lite.rail import LOW_MASS, expected_score
from tract_lite.record import Record

# Eighths of a character.
BLOCKS = " ▏▎▍▌▋▊▉█"
WIDEST, NARROWEST = 100, 32
# Of a record's text, so much is shown.
SHOWN = 1200
# The largest difference of two weighted means is so many steps, in which distributions are added.
STEPS = 10_000
# What would steer a terminal, turn the direction of the text, or can't be written.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one record. A failed item has `error` and no score (NaN).

    `score` is the CoT-RAIL expectation: the mean of `scores`, one for each reasoning in `feedback`
    (`feedback_ids`: its tokens), or a single one that was read without any. `probabilities` are
    those of the labels (worth `values`), averaged over the reasonings; `mass` is their sum: what is
    missing from 1 lies on tokens that are no score. `mode` is the value of the most likely label.
    `truncated`: the length limit stopped one.

    `std` tells how sure the judge is: the standard deviation of `values` under `probabilities`,
    normalised. It holds the doubt after a reasoning and that between reasonings; `spread` is the
    latter alone. `doubt` also counts what is wrong with the judgement, so that sorting by it works.

    Where only the top log-probabilities are known (servers), `missing_mass` is the probability of
    the tokens that were not seen. The exact score lies within `error_bound` of `score`. `end_mass`:
    of the probability of labels that begin others, as 1 begins 10, the part on the end token.
    """

    id: str | None
    score: float = math.nan
    probabilities: dict[str, float] = field(default_factory=dict)
    mass: float = math.nan
    feedback: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    std: float = math.nan
    mode: float = math.nan
    truncated: bool = False
    error: str | None = None
    feedback_ids: list[list[int]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    missing_mass: float = 0.0
    error_bound: float = 0.0
    end_mass: float = 1.0

    @classmethod
    def from_probabilities(
        cls, name: str | None, rows: np.ndarray, values: Mapping[str, float], **fields: Any
    ) -> "Judgement":
        """The judgement of the labels' probabilities (n_cot, K); `fields` are its other fields."""
        numbers = np.array(list(values.values()))
        scores = np.asarray(expected_score(rows, numbers))
        mean = rows.mean(axis=0)
        mass = float(mean.sum())
        share = mean / (mass or math.nan)
        variance = expected_score(share, (numbers - expected_score(share, numbers)) ** 2)
        return cls(
            name,
            score=float(scores.mean()),
            probabilities=dict(zip(values, mean.tolist())),
            mass=mass,
            scores=scores.tolist(),
            std=math.sqrt(float(variance)),
            mode=float(numbers[mean.argmax()]),
            values=dict(values),
            **fields,
        )

    @property
    def spread(self) -> float:
        """The standard deviation of `scores` (by n - 1), NaN for fewer than two."""
        return stdev(self.scores) if len(self.scores) > 1 else math.nan

    @property
    def normalised_score(self) -> float:
        """The expectation with `probabilities` normalised to the labels, whatever the mass."""
        weighed = (self.values[label] * share for label, share in self.probabilities.items())
        return sum(weighed) / self.mass if self.mass > 0 else math.nan

    @property
    def doubt(self) -> float:
        """How far off the judgement may be, in units of the score, worst last.

        The standard deviation where the missing mass may be any label; at least that of a blind
        guess where a reasoning was cut off, and the whole range where the item was not judged.
        """
        if not self.values:
            return math.nan
        numbers = list(self.values.values())
        if self.error is not None:
            return max(numbers) - min(numbers)
        missing = max(0.0, 1 - self.mass)
        shares = [self.probabilities[label] + missing / len(numbers) for label in self.values]
        mean = sum(share * number for share, number in zip(shares, numbers)) / sum(shares)
        variance = sum(share * (number - mean) ** 2 for share, number in zip(shares, numbers)) / sum(shares)
        return max(math.sqrt(variance), pstdev(numbers) if self.truncated else 0.0)

    def probability_above(self, other: "Judgement") -> float:
        """P(A > B): the chance that this item deserves more than the other; ties count half.

        The sum over labels a, b of p(a) q(b) ([a > b] + [a = b] / 2) by their values, both
        distributions normalised: P(A > B) + P(B > A) = 1.
        Raises ValueError: one has no score, or they are not on the same scale.
        """
        for judgement in (self, other):
            if not judgement.mass > 0:
                reason = judgement.error or "its labels have no probability"
                raise ValueError(f"item {judgement.id!r} has no score to compare: {reason}")
        if self.values != other.values:
            raise ValueError(f"judgements on different scales can't be compared: {self.values} and {other.values}")
        value = self.values
        won = sum(
            p * q * ((value[a] > value[b]) + (value[a] == value[b]) / 2)
            for a, p in self.probabilities.items()
            for b, q in other.probabilities.items()
        )
        return won / (self.mass * other.mass)

    def to_row(self) -> dict[str, Any]:
        """The judgement as a JSON-serialisable row, None where a figure is missing."""
        row = asdict(self) | {name: getattr(self, name) for name in ("spread", "normalised_score", "doubt")}
        return {key: None if value != value else value for key, value in row.items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Judgement":
        """The judgement that `to_row` wrote; other columns are left alone."""
        filled: dict[str, Any] = {**dict.fromkeys(row, math.nan), "id": None, "error": None}
        filled |= {name: value for name, value in row.items() if value is not None}
        # Earlier versions wrote fewer fields.
        return cls(**{item.name: filled[item.name] for item in fields(cls) if item.name in filled})

    def explain(self, record: Record | None = None, width: int | None = None) -> str:
        """The judgement as a person reads it: reasonings, a bar for each label, figures, warnings.

        With its `record`, what was judged comes first. `width` is the terminal's unless given, in
        characters. What would steer a terminal is shown as U+FFFD.
        """
        width = width or min(shutil.get_terminal_size().columns, WIDEST)
        return "\n".join(self._lines(record, max(width, NARROWEST)))

    def _lines(self, record: Record | None, width: int) -> Iterator[str]:
        yield from [] if self.id is None else [f"Item {_visible(self.id)}", ""]
        asked = ("instruction", "response") if record and record.prompt is None else ("prompt",)
        for name in asked if record else ():
            yield from _section(name.capitalize(), shortened(getattr(record, name)), width)
        for number, (text, score) in enumerate(zip(self.feedback, self.scores), 1):
            several = f" {number} of {len(self.scores)}, score {score:.2f}" if len(self.scores) > 1 else ""
            yield from _section(f"Reasoning{several}", text, width)
        if self.scores and not self.feedback:
            yield from _section("Reasoning", "(none: the score was read without one)", width)
        yield from self._bars(width)
        yield from textwrap.wrap("   ".join(self._figures(record)), width)
        for warning in self._warnings():
            yield from textwrap.wrap(f"! {_visible(warning)}", width, subsequent_indent="  ")

    def _figures(self, record: Record | None) -> Iterator[str]:
        for name in ("score", "std", "spread", "mass"):
            if not math.isnan(value := getattr(self, name)):
                yield f"{name} {value:.2f}"
        if not math.isnan(self.mode):
            yield f"most likely {self.mode:g}"
        if record and record.score is not None:
            yield f"gold {record.score:g}"

    def _bars(self, width: int) -> Iterator[str]:
        numbers = {label: f"{value:g}" for label, value in self.values.items()}
        names = {label: _visible(label) + f" ({n})" * (label != n) for label, n in numbers.items()}
        column = max(map(len, names.values()), default=0)
        length = max(width - column - 9, 8)
        for label, probability in self.probabilities.items():
            eighths = round(probability * length * 8)
            bar = BLOCKS[-1] * (eighths // 8) + BLOCKS[eighths % 8].strip()
            yield f"  {names[label]:>{column}} {probability:.3f} {bar}".rstrip()
        yield from [""] if names else []

    def _warnings(self) -> Iterator[str]:
        if self.error:
            yield f"not judged: {self.error}"
        if self.truncated:
            yield "the length limit stopped a reasoning: its score stands after an unfinished text"
        if self.mass < LOW_MASS:
            normalised = f"the score is pulled down, normalised to them it is {self.normalised_score:.2f}"
            yield f"only {self.mass:.2f} of the probability lies on the labels: {normalised}"
        if self.missing_mass and self.error_bound:
            missed = f"the top log-probabilities, which miss {self.missing_mass:.2g} of the probability"
            yield f"read from {missed}: the score may be off by {self.error_bound:.2g}"


def mean_above(ours: Sequence[Judgement], theirs: Sequence[Judgement], weights: Sequence[float]) -> float:
    """P(A > B) of two weighted means, each of judgements by the same criteria; ties count half.

    All judgements are taken as independent, normalised, and added up exactly but for the rounding
    to `STEPS` of the largest difference. For a single one it is `probability_above`.
    Raises ValueError: as `probability_above`.
    """
    each = [one.probability_above(other) for one, other in zip(ours, theirs, strict=True)]
    if len(each) == 1:
        return each[0]
    reach = sum(weight * (max(one.values.values()) - min(one.values.values())) for one, weight in zip(ours, weights))
    # The rounded steps of all may add up to a little more than STEPS.
    middle = STEPS + len(each)
    gaps = np.zeros(2 * middle + 1)
    gaps[middle] = 1.0
    for one, other, weight in zip(ours, theirs, weights):
        values = np.array(list(one.values.values()))
        shares, others = (np.array([judged.probabilities[label] for label in one.values]) for judged in (one, other))
        steps = np.rint(np.subtract.outer(values, values) * weight / reach * STEPS).astype(int)
        gained = np.bincount((steps + STEPS).ravel(), np.outer(shares, others).ravel() / (one.mass * other.mass))
        places = np.flatnonzero(gained)
        gaps = sum(gained[place] * np.roll(gaps, place - STEPS) for place in places)
    # Each rounding is of half a step at most: what is no farther from 0 than all of them is a tie.
    rounding = len(each) // 2
    won, lost = gaps[middle + rounding + 1 :].sum(), gaps[: middle - rounding].sum()
    return float((1 + won - lost) / 2)


def _visible(text: str) -> str:
    return _CONTROL.sub("\ufffd", text)


def shortened(text: str) -> str:
    """A text as people are shown it: of a long one its beginning, and how long it is."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text):,} characters)"


def _section(title: str, text: str, width: int) -> Iterator[str]:
    """A title with the wrapped text below it, its line breaks kept, and an empty line."""
    yield title
    for line in text.strip().splitlines() or ["(empty)"]:
        wrapped = textwrap.wrap(_visible(line.expandtabs(4)), width - 2)
        yield from [f"  {part}" for part in wrapped] or [""]
    yield ""
