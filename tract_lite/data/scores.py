"""A cell to a gold score: numbers as people write them, fractions of the scale, labels, blanks."""

import math
import re
from datetime import date
from decimal import Decimal
from reprlib import repr as shorten
from typing import Any

from tract_lite.data.rubrics import parse_object
from tract_lite.scale import ScoreScale

# What stands where nobody gave a score, without its blanks, dots and dashes.
_NO_SCORE = {"", "?", "na", "nan", "none", "null"}
_NUMBER = r"[+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[+-]?\d+)?"
# What may follow a number: "4 - Agree", "5 (fully)", "3 stars".
_WORDS = r"(?:\s+[-\u2013\u2014:=(]*\s*|\s*[:(]\s*)[^\W\d][^\d]*"
_FRACTION = rf"({_NUMBER})\s*(?:/|out of|of)\s*({_NUMBER})(?:{_WORDS})?"


def parse_score(value: Any, scale: ScoreScale | None = None) -> float | None:
    """The number that a cell says, None for a blank, a dash, N/A and NaN.

    "3,5" is 3.5, "4 - Agree" is 4; "4/5" is 4 where the scale ends with 5, or none is
    known; a label of the scale is its value. Raises ValueError: it says something else.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _finite(value)
    if isinstance(value, date):
        raise ValueError("score is a date, which a spreadsheet made of it: format its column as text")
    if not isinstance(value, str):
        raise ValueError(f"score must be a finite number, got {shorten(value)}")
    text = value.strip().replace("\u2212", "-")
    if (by_label := _label_value(text, scale)) is not None:
        return by_label
    if re.sub(r"[\s/.#_\u2013\u2014-]+", "", text).lower() in _NO_SCORE:
        return None
    if fraction := re.fullmatch(_FRACTION, text, re.IGNORECASE):
        return _fraction(text, _number(fraction[1]), _number(fraction[2]), scale)
    if percent := re.fullmatch(rf"({_NUMBER})\s*%", text):
        return _fraction(text, _number(percent[1]), 100.0, scale)
    if number := re.fullmatch(rf"({_NUMBER})(?:{_WORDS})?", text, re.IGNORECASE):
        return _number(number[1])
    is_word = re.search(r"[^\W\d_]{2}", text) and "inf" not in text.lower()
    advice = '; words are read where they are labels, as with --scale "bad=1,good=2"' if is_word else ""
    raise ValueError(f"score must be a finite number, got {shorten(value)}{advice}")


def parse_scores(value: Any, scale: ScoreScale | None = None) -> tuple[float, ...]:
    """The numbers of a list, perhaps as JSON, of several annotators' scores, or of a single score.
    Raises ValueError: as `parse_score`.
    """
    if isinstance(value, str) and re.match(r"\s*\[.*\]\s*$", value, re.DOTALL):
        value = parse_object(value)
    cells = value if isinstance(value, (list, tuple)) else [value]
    return tuple(score for cell in cells if (score := parse_score(cell, scale)) is not None)


def _label_value(text: str, scale: ScoreScale | None) -> float | None:
    labels, values = (scale.labels, scale.values) if scale else ((), ())
    return next((v for label, v in zip(labels, values) if label.casefold() == text.casefold()), None)


def _number(text: str) -> float:
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", text):
        raise ValueError(f"score {text!r} may be a fraction or thousands: write it with a point, or without a comma")
    return _finite(text.replace(",", "."))


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"score must be a finite number, got {shorten(value)}")
    return number


def _fraction(text: str, part: float, whole: float, scale: ScoreScale | None) -> float:
    if scale and max(scale.values) != whole:
        fault = f"score {text!r} is out of {whole:g}, and the scale ends with {max(scale.values):g}"
        raise ValueError(f"{fault}: --scale names another")
    return part
