"""A row to a record: plain, of the Feedback Collection, or of a Prometheus benchmark."""

import math
import re
from dataclasses import asdict, replace
from reprlib import repr as shorten
from statistics import fmean
from typing import Any, Mapping

from tract_lite.record import Annotation, Record, Rubric
from tract_lite.scale import ScoreScale

Row = Mapping[str, Any]


def record_to_row(record: Record) -> dict[str, Any]:
    """A plain row that `to_record` reads back as this one, without its annotations."""
    row = asdict(replace(record, annotations=()))
    return {name: value for name, value in row.items() if value not in (None, "", ())}


def to_record(row: Any, position: str, scale: ScoreScale | None = None) -> Record:
    """The record of a row, with `position` for a missing id. Raises ValueError: what is wrong."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must have named columns, got {shorten(row)}")
    if {"gpt4_feedback", "gpt4_score"} <= row.keys():
        record = _from_benchmark(row)
    elif "orig_response" in row:
        record = _from_feedback_collection(row)
    else:
        record = _from_plain(row)
    if not record.prompt and not record.response:
        raise ValueError(f"neither a prompt nor a response; its columns: {', '.join(row)}")
    for score in (record.score, *(annotation.score for annotation in record.annotations)):
        if scale and score is not None and not scale.contains(score):
            raise ValueError(f"score {score:g} is outside the scale {scale.values}")
    return replace(record, id=_text(row, "id") or position)


def _from_plain(row: Row) -> Record:
    return Record(
        instruction=_text(row, "instruction") or "",
        response=_text(row, "response") or "",
        rubric=_rubric(row),
        reference=_text(row, "reference") or _text(row, "reference_answer"),
        score=_number(row, "score"),
        feedback=_text(row, "feedback"),
        prompt=_text(row, "prompt"),
        feedback_ids=_feedback_ids(row),
    )


def _from_feedback_collection(row: Row) -> Record:
    record = _from_plain({name.removeprefix("orig_"): row[name] for name in row if name.startswith("orig_")})
    if record.feedback:
        return record
    output = _text(row, "output") or ""
    return replace(record, feedback=re.sub(r"\s*\[RESULT\]\s*[\d.]+\s*$", "", output) or None)


def _from_benchmark(row: Row) -> Record:
    columns = row["gpt4_feedback"], row["gpt4_score"]
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        raise ValueError("gpt4_feedback and gpt4_score must be lists of one length")
    pairs = [{"gpt4_feedback": feedback, "gpt4_score": score} for feedback, score in zip(*columns)]
    read = [(_text(pair, "gpt4_feedback"), _number(pair, "gpt4_score")) for pair in pairs]
    annotations = tuple(Annotation(text, score) for text, score in read if text is not None and score is not None)
    if len(annotations) < len(read):
        raise ValueError("gpt4_feedback and gpt4_score must not have gaps")
    score = fmean(annotation.score for annotation in annotations) if annotations else None
    return Record(prompt=_text(row, "instruction"), score=score, annotations=annotations)


def _rubric(row: Row) -> Rubric | None:
    given = row.get("rubric")
    rubric = given if isinstance(given, dict) else {"criteria": given}
    nested = rubric.get("descriptions") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"descriptions must map labels to texts, got {shorten(nested)}")
    matches = (re.fullmatch(r"score(.+)_description|description_(.+)", name) for name in row)
    texts = nested | {match[1] or match[2]: row[match[0]] for match in matches if match}
    criteria = _text(rubric, "criteria") or _text(row, "criteria") or ""
    descriptions = {label: text for label in texts if (text := _text(texts, label))}
    return Rubric(criteria, descriptions) if criteria or descriptions else None


def _feedback_ids(row: Row) -> tuple[int, ...] | None:
    ids = row.get("feedback_ids") or []
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise ValueError(f"feedback_ids must be a list of token ids, got {shorten(ids)}")
    return tuple(ids) or None


def _text(row: Row, column: str) -> str | None:
    """The text of a column, None where it is absent or empty; numbers are spelled out."""
    value = row.get(column)
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{column} must be text, got {shorten(value)}")
    return str(value)


def _number(row: Row, column: str) -> float | None:
    """The finite number in a column, None where it is absent, empty or NaN."""
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        number = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"{column} must be a finite number, got {shorten(value)}")
    return None if math.isnan(number) else number
