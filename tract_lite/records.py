"""Judging data: rows checked, brought into one shape, split.

The columns of a row tell its shape: plain, Feedback Collection (`orig_...`), or Prometheus
benchmark (a ready prompt with lists of GPT-4 feedbacks and scores).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from reprlib import repr as shorten
from statistics import fmean
from typing import Any, Mapping, NamedTuple, Sequence

from tract_lite.scale import ScoreScale
from tract_lite.sources import read_rows

Row = Mapping[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rubric:
    """The criteria of a score, and what each described label stands for."""

    criteria: str
    descriptions: Mapping[str, str] = field(default_factory=dict)


class Annotation(NamedTuple):
    """One judgement of an item: a reasoning and the score it leads to."""

    feedback: str
    score: float


@dataclass(frozen=True)
class Record:
    """An item to judge or to learn from; a `prompt` is asked as it stands, without a template.

    `score` is the gold score, `feedback` the reasoning for it; `feedback_ids` are the tokens of a
    reasoning that the judge wrote itself.
    """

    instruction: str = ""
    response: str = ""
    rubric: Rubric | None = None
    reference: str | None = None
    score: float | None = None
    feedback: str | None = None
    prompt: str | None = None
    id: str | None = None
    annotations: tuple[Annotation, ...] = ()
    feedback_ids: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """A hash (16 hex digits) of what the judge reads, the same in every run."""
        if self.prompt is not None:
            return _digest(self.prompt)
        rubric = self.rubric and [self.rubric.criteria, dict(self.rubric.descriptions)]
        return _digest([self.instruction, self.response, rubric, self.reference])

    def pairs(self) -> list[Record]:
        """The item's training records: one for each annotation, or itself if it has none."""
        name = self.id or self.key
        return [
            replace(self, feedback=feedback, feedback_ids=None, score=score, id=f"{name}/{n}",
                    annotations=())
            for n, (feedback, score) in enumerate(self.annotations)
        ] or [self]


class BadRows(ValueError):
    """Unusable rows; `rows` has the place and the fault of each, the message the first 20."""

    def __init__(self, source: str, rows: Sequence[str]):
        shown = [*rows[:20], "..."] if len(rows) > 20 else rows
        summary = f"{source}: unusable rows: {len(rows)}; skip_bad=True or --skip-bad omits them;"
        super().__init__("\n  ".join([summary, *shown]))
        self.rows = list(rows)


def read_records(
    path_or_hub_id: str | Path, format: str = "auto", split: str | None = None, *,
    scale: ScoreScale | None = None, skip_bad: bool = False, rejected: list[str] | None = None,
) -> list[Record]:
    """Read JSONL, JSON, CSV, Parquet or a hub data set into records, each with an id of its own.

    `"-"` is JSONL from standard input; `split` belongs to hub data sets ("train" if None). A row
    without an id gets its position, from 0. With a `scale`, a score outside its range is bad.
    With `skip_bad`, bad rows are left out, counted in a warning and appended to `rejected`.

    Raises:
        FileNotFoundError: no such file, and not a hub id either.
        BadRows: some rows are unusable; names them all.
        ValueError: the source can't be read, or no row of it is usable.
    """
    source = str(path_or_hub_id)
    records: dict[str, Record] = {}
    bad = []
    for position, (place, row) in enumerate(read_rows(source, format, split)):
        try:
            record = _to_record(row, str(position), scale)
            if record.id in records:
                raise ValueError(f"the id {record.id!r} belongs to an earlier row")
            records[record.id] = record
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad and not skip_bad:
        raise BadRows(source, bad)
    if bad:
        logger.warning("%s: unusable rows left out: %d; the first: %s", source, len(bad), bad[0])
    if rejected is not None:
        rejected.extend(bad)
    if not records:
        raise ValueError(f"{source} has no usable row")
    return list(records.values())


def record_to_row(record: Record) -> dict[str, Any]:
    """A plain row that `read_records` reads back as this record, without its annotations."""
    row = asdict(replace(record, annotations=()))
    return {name: value for name, value in row.items() if value not in (None, "", ())}


def split_records(
    records: Sequence[Record], fraction: float, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split by key into (rest, held out), in order, so that no prompt stands on both sides.

    Holds out about `fraction` of the keys: never all, and at least one of several unless it is 0.

    Raises:
        ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    keys = [record.key for record in records]
    drawn = sorted(set(keys), key=lambda key: _digest([seed, key]))
    count = max(1, round(fraction * len(drawn))) if fraction else 0
    held_out = set(drawn[:min(count, len(drawn) - 1)])
    rest = [record for record, key in zip(records, keys) if key not in held_out]
    return rest, [record for record, key in zip(records, keys) if key in held_out]


def _digest(content: Any) -> str:
    # ASCII JSON spells out lone surrogates, which UTF-8 can't hold.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _to_record(row: Any, position: str, scale: ScoreScale | None) -> Record:
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
        if scale and score is not None and not min(scale.values) <= score <= max(scale.values):
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
    plain = {name.removeprefix("orig_"): row[name] for name in row if name.startswith("orig_")}
    record = _from_plain(plain)
    if record.feedback:
        return record
    output = _text(row, "output") or ""
    return replace(record, feedback=re.sub(r"\s*\[RESULT\]\s*[\d.]+\s*$", "", output) or None)


def _from_benchmark(row: Row) -> Record:
    columns = row["gpt4_feedback"], row["gpt4_score"]
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        raise ValueError("gpt4_feedback and gpt4_score must be lists of one length")
    pairs = [{"gpt4_feedback": feedback, "gpt4_score": score} for feedback, score in zip(*columns)]
    annotations = tuple(
        Annotation(_text(pair, "gpt4_feedback"), _number(pair, "gpt4_score")) for pair in pairs
    )
    if any(None in annotation for annotation in annotations):
        raise ValueError("gpt4_feedback and gpt4_score must not have gaps")
    score = fmean(annotation.score for annotation in annotations) if annotations else None
    return Record(prompt=_text(row, "instruction"), score=score, annotations=annotations)


def _rubric(row: Row) -> Rubric | None:
    rubric = row.get("rubric")
    if not isinstance(rubric, dict):
        rubric = {"criteria": rubric}
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
