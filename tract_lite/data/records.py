"""Judging data as records: read from files and the hub, or taken from dicts and data frames."""

import logging
import math
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from tract_lite.data.files import read_rows
from tract_lite.data.formats import record_to_row, to_record
from tract_lite.data.jsonl import write_rows
from tract_lite.record import Record, digest
from tract_lite.scale import ScoreScale

logger = logging.getLogger(__name__)


class BadRows(ValueError):
    """Unusable rows; `rows` has the place and the fault of each, the message the first 20."""

    def __init__(self, source: str, rows: Sequence[str]):
        shown = [*rows[:20], "..."] if len(rows) > 20 else rows
        summary = f"{source}: unusable rows: {len(rows)}; skip_bad=True or --skip-bad omits them;"
        super().__init__("\n  ".join([summary, *shown]))
        self.rows = list(rows)


def read_records(
    path_or_hub_id: str | Path,
    format: str = "auto",
    split: str | None = None,
    *,
    scale: ScoreScale | None = None,
    skip_bad: bool = False,
    rejected: list[str] | None = None,
) -> list[Record]:
    """Read JSONL, JSON, CSV, Parquet or a hub data set into records, each with an id of its own.

    `"-"` is JSONL from standard input; `split` belongs to hub data sets ("train" if None). A row
    without an id gets its position, from 0. With a `scale`, a score outside its range is bad.
    With `skip_bad`, bad rows are left out, counted in a warning and appended to `rejected`.
    Raises FileNotFoundError: no such file or hub id. Raises BadRows: some rows are unusable.
    Raises ValueError: the source can't be read, or no row of it is usable.
    """
    source = str(path_or_hub_id)
    return _to_records(source, read_rows(source, format, split), scale, skip_bad, rejected)


def records_from(
    rows: Any, *, scale: ScoreScale | None = None, skip_bad: bool = False, rejected: list[str] | None = None
) -> list[Record]:
    """The records of dicts, or of a pandas DataFrame, as `read_records` reads a file of them.
    Raises BadRows: some rows are unusable. Raises ValueError: no row is usable.
    """
    given = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    placed = ((f"row {number}", _plain(row)) for number, row in enumerate(given, 1))
    return _to_records("the rows given", placed, scale, skip_bad, rejected)


def _plain(value: Any) -> Any:
    """A row or a cell without the types of numpy and pandas, None for one that is missing."""
    if isinstance(value, Mapping):
        return {name: _plain(cell) for name, cell in value.items()}
    if type(value).__name__ in ("NAType", "NaTType") or isinstance(value, float) and math.isnan(value):
        return None
    return value.tolist() if hasattr(value, "tolist") else value


def _to_records(
    source: str, rows: Iterable[tuple[str, Any]], scale: ScoreScale | None, skip_bad: bool, rejected: list[str] | None
) -> list[Record]:
    records: dict[str, Record] = {}
    bad = []
    for position, (place, row) in enumerate(rows):
        try:
            record = to_record(row, str(position), scale)
            name = str(record.id)
            if name in records:
                raise ValueError(f"the id {name!r} belongs to an earlier row")
            records[name] = record
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


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSONL that `read_records` reads back, without their annotations."""
    write_rows(path, map(record_to_row, records))


def split_records(records: Sequence[Record], fraction: float, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Split by key into (rest, held out), in order, so that no prompt stands on both sides.

    Holds out about `fraction` of the keys: never all, and at least one of several unless it is 0.
    Raises ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    keys = [record.key for record in records]
    drawn = sorted(set(keys), key=lambda key: digest([seed, key]))
    count = max(1, round(fraction * len(drawn))) if fraction else 0
    held_out = set(drawn[: min(count, len(drawn) - 1)])
    rest = [record for record, key in zip(records, keys) if key not in held_out]
    return rest, [record for record, key in zip(records, keys) if key in held_out]
