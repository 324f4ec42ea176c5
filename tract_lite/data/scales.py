"""The scales of records: one that a cell names, one that is proposed, whether there are several."""

import logging
import math
from collections import Counter
from datetime import date
from functools import lru_cache
from reprlib import repr as shorten
from typing import Any, Iterable, Mapping

from tract_lite.record import Record
from tract_lite.scale import ScoreScale, numbers_in

logger = logging.getLogger(__name__)

# Where nothing tells another one.
DEFAULT_SCALE = ScoreScale.integers(1, 5)
# What a user names in place of a scale, to have one proposed.
AUTO = "auto"
# Of described labels, a line names so many.
MOST_SHOWN = 12
# Up to this share of gold scores off the labels that rubrics describe, they are taken for mistakes.
STRAY_SHARE = 0.1

_parse = lru_cache(maxsize=1024)(ScoreScale.parse)


def named_scale(text: str | None) -> ScoreScale | None:
    """The scale that a user names; None for "auto", or for nothing.
    Raises ValueError: it can't be read.
    """
    return ScoreScale.parse(text) if text and text.strip().lower() != AUTO else None


def read_scale(cell: Any) -> ScoreScale | None:
    """The scale that a cell names, None for a blank one: a text, or an object of labels and values.
    Raises ValueError: it names none.
    """
    if cell is None or cell != cell or isinstance(cell, str) and not cell.strip():
        return None
    if isinstance(cell, date):
        raise ValueError("scale is a date, which a spreadsheet made of it: format its column as text")
    if isinstance(cell, Mapping):
        try:
            return ScoreScale(tuple(map(str, cell)), tuple(map(float, cell.values())))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the scale {shorten(dict(cell))} can't be read: {error}") from error
    if not isinstance(cell, str):
        raise ValueError(f"scale must be a text such as 1-5, got {shorten(cell)}")
    return _parse(cell.strip())


def scale_cell(scale: ScoreScale) -> str | dict[str, float]:
    """What `read_scale` reads as this scale: a text, unless that would lose something."""
    try:
        if _parse(str(scale)) == scale:
            return str(scale)
    except ValueError:
        pass
    return dict(zip(scale.labels, scale.values))


def golds_of(record: Record) -> list[float]:
    """All gold scores of a record, whoever gave them."""
    given = (*record.gold_scores, *(annotation.score for annotation in record.annotations), record.score)
    return [score for score in given if score is not None]


def propose_scale(records: Iterable[Record]) -> ScoreScale:
    """The scale of the records that bring none of their own, from their gold scores and rubrics.

    Where nothing tells, it is the most frequent one of the others, or else 1-5. A line in the log
    says which, and why.
    Raises ValueError: rubrics describe several scales, or a few gold scores are off theirs.
    """
    own, golds = Counter[ScoreScale](), list[float]()
    described: dict[str, None] = {}
    spans: dict[tuple[str, str], None] = {}
    for record in records:
        if record.scale is not None:
            own[record.scale] += 1
            continue
        golds += golds_of(record)
        levels = record.rubric.descriptions if record.rubric else {}
        described |= dict.fromkeys(levels)
        if len(numbers := numbers_in(levels)) > 2:
            spans[str(numbers[0]), str(numbers[-1])] = None
    _check_spans([*spans], golds)
    scale, reason = DEFAULT_SCALE, "nothing in the data tells another"
    try:
        scale = ScoreScale.proposed(golds, described)
        reason = _evidence(scale, golds, described)
    except ValueError:
        if own:
            [(scale, _)] = own.most_common(1)
            reason = f"the items' own{f', the most frequent of {len(own)}' if len(own) > 1 else ''}"
    logger.warning("scale: %s (%s); --scale names another", scale, reason)
    return scale


def _check_spans(spans: list[tuple[str, str]], golds: list[float]) -> None:
    """Raises ValueError: rubrics lead from one number to another in several ways, or in one that a
    few gold scores are off.
    """
    named = [f"{low}-{high}" for low, high in spans]
    if len(named) > 1:
        raise ValueError(
            f"the rubrics describe several scales: {', '.join(named[:MOST_SHOWN])}\n"
            "--scale names one for all items, a column `scale` names each item's"
        )
    low, high = map(float, spans[0]) if spans else (-math.inf, math.inf)
    strays = [gold for gold in golds if not low <= gold <= high]
    if 0 < len(strays) <= STRAY_SHARE * len(golds):
        raise ValueError(
            f"{len(strays)} of {len(golds)} gold scores, such as {strays[0]:g}, are off {named[0]}, which the rubrics "
            f"describe\n--scale {named[0]} --skip-bad leaves them out, --scale may name another"
        )


def brings_others(records: Iterable[Record], scale: ScoreScale, units: ScoreScale | None = None) -> bool:
    """Whether some record brings a scale of its own that is not the judge's.
    Raises ValueError: one does, and the judge answers with the labels of another scale than its
        `units`.
    """
    others = any(record.scale not in (None, scale, units) for record in records)
    if others and units is not None:
        raise ValueError(
            "some items have a scale of their own, and --remap is of one scale\n"
            "leave --remap out, or the items' scales with --columns scale="
        )
    return others


def _evidence(scale: ScoreScale, golds: list[float], described: Iterable[str]) -> str:
    """What a scale was proposed from."""
    parts = []
    if golds:
        between = sum(gold not in scale.values for gold in golds)
        parts.append(f"gold scores from {min(golds):g} to {max(golds):g}")
        parts += [f"{between} of {len(golds)} between two labels"] if between else []
    if names := sorted(described, key=lambda name: (len(name), name)):
        more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
        parts.append(f"rubrics describe {', '.join(names[:MOST_SHOWN])}{more}")
    return "; ".join(parts)
