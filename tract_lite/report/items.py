"""Judged items with their gold scores, from a run folder or a file of judgements."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import numpy as np

from tract_lite.data.columns import Columns
from tract_lite.data.files import read_rows as read_any
from tract_lite.data.formats import to_record
from tract_lite.data.jsonl import read_rows
from tract_lite.data.records import read_records
from tract_lite.data.resume import name_of
from tract_lite.data.table import ANSWERS_INSIDE, number_in, read_judged
from tract_lite.judgement import Judgement
from tract_lite.metrics import Ends, ends_of
from tract_lite.record import Record
from tract_lite.run import HELD_OUT, JUDGED, Run

Row = Mapping[str, Any]

# Columns of a table of judgements that the texts of an item are not read from.
_OURS = {"score": "", "feedback": "", "scale": ""}


@dataclass(frozen=True)
class Item:
    """What a judge said of an item with a gold score, and what it read, where that is known."""

    gold: float
    judgement: Judgement
    record: Record | None = None

    @property
    def ends(self) -> Ends | None:
        """The lowest and the highest score of its scale."""
        return ends_of(self.judgement.values)


class Judged(NamedTuple):
    """What one judge said: its name, the items, failed ones among them, and how many more it
    judged that have no gold score."""

    name: str
    items: list[Item]
    without_gold: int = 0

    @property
    def scales(self) -> list[Ends]:
        """The different scales of the items, by their ends."""
        return sorted({ends for item in self.items if (ends := item.ends)})

    @property
    def scored(self) -> list[Item]:
        """The items that could be judged; of several scales, on one that is known."""
        several = len(self.scales) > 1
        return [item for item in self.items if math.isfinite(item.judgement.score) and (item.ends or not several)]


class Numbers(NamedTuple):
    """Of each scored item, its gold score, its score and the judge's `std`, (n,) each. Of items on
    several scales, their places on these, from 0 to 1, and shares of their widths."""

    golds: np.ndarray
    scores: np.ndarray
    stds: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        return self.scores - self.golds


def numbers_of(items: Sequence[Item]) -> Numbers:
    """The numbers of the `scored` items of a judge."""
    several = len({item.ends for item in items if item.ends}) > 1
    ends = [item.ends if several and item.ends else (0.0, 1.0) for item in items]
    low, high = np.array(ends).reshape(-1, 2).T
    raw = [(item.gold, item.judgement.score, item.judgement.std) for item in items]
    golds, scores, stds = np.array(raw, dtype=float).reshape(-1, 3).T
    return Numbers((golds - low) / (high - low), (scores - low) / (high - low), stds / (high - low))


def judged_in_run(run: Run, name: str | None = None) -> Judged | None:
    """What the judge `name` said of a run's held-out items. Unless given, the one that has judged
    most: the last one by name, a GGUF file before others. None: nobody has judged one with gold."""
    records = {name_of(record): record for record in run.records(HELD_OUT)}
    best: Judged | None = None
    files = sorted((run / JUDGED).glob("*.jsonl"), key=lambda file: (".gguf" in file.name, file.name))
    for file in [file for file in files if name in (None, file.stem)]:
        rows = read_rows(file)
        judged = Judged(file.stem, _items(rows, _by_id(rows, records), gold_needed=True))
        if judged.scored and (best is None or len(judged.scored) >= len(best.scored)):
            best = judged
    return best


def judged_in_file(path: Path, data: str | None = None) -> Judged:
    """What stands in a file of judgements, JSONL or a table of them. `data` is what was judged: it
    has the texts of the items, and their gold scores where the file has none; a table has both.
    Raises ValueError: it holds no judgements, or none with a gold score.
    """
    rows = read_judged(path)
    if rows and "winner" in rows[0]:
        raise ValueError(ANSWERS_INSIDE % path)
    records: list[Record | None] = [None] * len(rows)
    if path.suffix.lower() != ".jsonl":
        cells = [row for _, row in read_any(str(path)) if isinstance(row, dict)]
        rows = [_judgement_row(*pair) for pair in zip(rows, cells)]
        columns = Columns(_OURS)
        records = [_record_of(row, columns) for row in cells]
    if data:
        named = {name_of(record): record for record in read_records(data, gold_needed=False)}
        records = [found or own for found, own in zip(_by_id(rows, named), records)]
    items = _items(rows, records, gold_needed=False)
    if not items:
        advice = "" if data else "\n--data names the file that was judged, if it has some"
        raise ValueError(f"none of the {len(rows)} rows of {path} has a gold score{advice}")
    return Judged(path.stem, items, len(rows) - len(items))


def _by_id(rows: Iterable[Row], records: Mapping[str, Record]) -> list[Record | None]:
    """The record of each row."""
    return [records.get(str(row.get("id"))) for row in rows]


def _items(rows: Iterable[Row], records: Sequence[Record | None], gold_needed: bool) -> list[Item]:
    """The rows with a gold score, each with its record; that of the record will do, unless it is
    needed in the row."""
    items = []
    for row, record in zip(rows, records, strict=True):
        gold = row.get("gold")
        if gold is None and record is not None and not gold_needed:
            gold = record.score
        if gold is not None and math.isfinite(gold):
            items.append(Item(float(gold), Judgement.from_row(row), record))
    return items


def _judgement_row(measured: Row, cells: Row) -> dict[str, Any]:
    """A row as `judge` writes it to JSONL, from a row of a table and what was `measured` in it."""

    def own(name: str) -> Any:
        """The cell of the judge's column of that name: it comes after one of the input."""
        return next((cells[n] for n in reversed([*cells]) if re.fullmatch(f"(judge_)*{re.escape(name)}", n)), None)

    values = measured["values"] or {}
    shares = {label: number_in(own(f"p_{label}")) for label in values}
    shares = {label: share for label, share in shares.items() if share is not None}
    feedback = own("feedback")
    return {
        "id": str(own("id")) if own("id") is not None else None,
        **measured,
        "values": values if len(shares) == len(values) else {label: values[label] for label in shares},
        "probabilities": shares,
        **{name: number_in(own(name)) for name in ("std", "mass", "mode")},
        "scores": [measured["score"]] if measured["score"] is not None else [],
        "feedback": [str(feedback)] if feedback else [],
        "truncated": str(own("truncated")).lower() == "true",
        "error": own("error") or None,
    }


def _record_of(cells: Row, columns: Columns) -> Record | None:
    """The record that a row of a table holds beside its judgement."""
    try:
        return to_record(dict(cells), columns)
    except ValueError:
        # Columns that only the options of `judge` could tell.
        return None
