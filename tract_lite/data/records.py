"""Judging data as records: read from files and the hub, or taken from dicts and data frames."""

import logging
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple, Sequence, TypedDict, Unpack

from tract_lite.data.answers import answers_of, preferred_of
from tract_lite.data.columns import Columns, is_blank, parse_columns
from tract_lite.data.criteria import read_rubric
from tract_lite.data.files import read_rows
from tract_lite.data.formats import record_to_row, to_record
from tract_lite.data.jsonl import write_rows
from tract_lite.data.scales import golds_of
from tract_lite.record import Record, Rubric, digest
from tract_lite.scale import ScoreScale

logger = logging.getLogger(__name__)

MOST_FAULTS = 20
# By what one row's fault differs from another's of its kind.
_VALUES = re.compile(r"'[^']*'|\d+(\.\d+)?")


class BadRows(ValueError):
    """Unusable rows; `rows` has the place and the fault of each, the message one of each kind."""

    def __init__(self, source: str, rows: Sequence[tuple[str, str]], count: int):
        kinds: dict[str, list[tuple[str, str]]] = {}
        for place, fault in rows:
            kinds.setdefault(_VALUES.sub("", fault), []).append((place, fault))
        way_out = "; skip_bad=True or --skip-bad omits them" if len(rows) < count else ""
        lines = [f"{source}: unusable rows: {len(rows)} of {count}{way_out}:"]
        for (place, fault), *others in list(kinds.values())[:MOST_FAULTS]:
            lines.append(f"{place}{f' and {len(others)} more' if others else ''}: {fault}")
        super().__init__("\n  ".join(lines + ["..."] * (len(kinds) > MOST_FAULTS)))
        self.rows = [f"{place}: {fault}" for place, fault in rows]


class Options(TypedDict, total=False):
    """How rows are read. `columns`: fields and the columns that fill them ("" for none), where
    their names don't tell. `rubric`: one for all rows, in place of their own.

    `scale`: a score outside of it, or of the row's own, is bad. `gold_needed=False`: a score that
    can't be read is left out, and counted in a warning. `skip_bad`: bad rows are left out, counted
    in a warning, and appended to `rejected`. `elsewhere`: columns that others read.
    """

    scale: ScoreScale | None
    columns: Mapping[str, str] | None
    rubric: Rubric | None
    gold_needed: bool
    skip_bad: bool
    rejected: list[str] | None
    elsewhere: Iterable[str]


class Answers(NamedTuple):
    """The records of several answers to one instruction, and which of them a person prefers.

    Both go by the answers' letters; `preferred` may also be `TIE`, or None where nobody says it.
    """

    records: dict[str, Record]
    preferred: str | None


class Table(NamedTuple):
    """Records, the row that each one was read from, and its place, from 0; and the row's answers,
    where it has several: then its record is that of the first."""

    records: list[Record]
    rows: list[dict[str, Any]]
    places: list[int]
    answers: list[Answers | None]


def read_records(
    path_or_hub_id: str | Path,
    format: str = "auto",
    split: str | None = None,
    *,
    encoding: str | None = None,
    **options: Unpack[Options],
) -> list[Record]:
    """Read a file of rows or a hub data set into records, each with an id of its own.

    JSONL, JSON, CSV, TSV, Parquet and Excel's xlsx are known, the texts also as `.gz`; `"-"` is
    JSONL from standard input. `split` belongs to hub data sets ("train" if None). What the columns
    are read as is said once; `docs/data.md` has their names. A row without an id gets its
    position, from 0, and of several rows with one id the later ones get a number behind it.
    Raises FileNotFoundError: no such file or hub id. Raises BadRows: some rows are unusable.
    Raises ValueError: the source can't be read, or no row of it is usable.
    """
    source = str(path_or_hub_id)
    return _to_table(source, read_rows(source, format, split, encoding), **options).records


def read_table(
    path_or_hub_id: str | Path,
    format: str = "auto",
    split: str | None = None,
    *,
    encoding: str | None = None,
    **options: Unpack[Options],
) -> Table:
    """As `read_records`, with the rows beside the records, and rows of several answers read."""
    source = str(path_or_hub_id)
    return _to_table(source, read_rows(source, format, split, encoding), True, **options)


def records_from(rows: Any, **options: Unpack[Options]) -> list[Record]:
    """The records of dicts, or of a pandas DataFrame, as `read_records` reads a file of them.
    Raises BadRows: some rows are unusable. Raises ValueError: no row is usable.
    """
    return table_from(rows, several=False, **options).records


def table_from(rows: Any, several: bool = True, **options: Unpack[Options]) -> Table:
    """As `records_from`, with the rows beside the records, and rows of `several` answers read."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        if len(set(rows.columns)) < len(rows.columns):
            raise ValueError(f"the data frame has two columns of one name: {', '.join(map(str, rows.columns))}")
        named = rows.reset_index() if any(rows.index.names) else rows
        rows = named.to_dict("records")
    placed = ((f"row {number}", _plain(row)) for number, row in enumerate(rows, 1))
    return _to_table("the rows given", placed, several, **options)


def how_to_read(options: Any) -> dict[str, Any]:
    """What a user chose for reading (`DataOptions`), as `read_records` takes it.
    Raises ValueError: `criteria` and `rubric` are given, or one of them can't be read.
    """
    if options.criteria and options.rubric:
        raise ValueError("give --criteria or --rubric, not both")
    rubric = Rubric(options.criteria) if options.criteria else read_rubric(options.rubric) if options.rubric else None
    columns = parse_columns(options.columns or ())
    names = ("format", "split", "encoding", "skip_bad")
    return {name: getattr(options, name) for name in names} | {"columns": columns, "rubric": rubric}


def _plain(value: Any) -> Any:
    """A row or a cell without the types of numpy and pandas, None for one that is missing."""
    if isinstance(value, Mapping):
        return {str(name): _plain(cell) for name, cell in value.items()}
    if type(value).__name__ in ("NAType", "NaTType") or isinstance(value, float) and math.isnan(value):
        return None
    return value.tolist() if hasattr(value, "tolist") else value


def _to_table(source: str, rows: Iterable[tuple[str, Any]], several: bool = False, **options: Unpack[Options]) -> Table:
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"no options of reading: {', '.join(sorted(unknown))}")
    scale, gold_needed, rejected = options.get("scale"), options.get("gold_needed", True), options.get("rejected")
    columns = Columns(options.get("columns"), options.get("elsewhere", ()))
    records: list[Record] = []
    answers: list[Answers | None] = []
    kept: list[dict[str, Any]] = []
    positions: list[int] = []
    bad: list[tuple[str, str]] = []
    golds: list[str] = []
    how = columns, scale, options.get("rubric")
    unread: list[str] = []
    count = empty = 0
    for count, (place, row) in enumerate(rows, 1):
        if isinstance(row, dict) and _is_empty(row):
            empty += 1
            continue
        try:
            parts = answers_of(row, columns) if several and isinstance(row, dict) else {}
            read = [to_record(part, *how, None if gold_needed else golds) for part in parts.values() or [row]]
            record = read[0]
            if gold_needed:
                _check_scores(record, scale)
        except ValueError as error:
            bad.append((place, "; ".join(str(error).splitlines())))
            continue
        records.append(record)
        preferred = _preferred(row, columns, parts, unread) if parts else None
        answers.append(Answers(dict(zip(parts, read)), preferred) if parts else None)
        kept.append(row)
        positions.append(count - 1)
    columns.check()
    faults = BadRows(source, bad, count - empty)
    if bad and not options.get("skip_bad"):
        raise faults
    if rejected is not None:
        rejected.extend(faults.rows)
    if not records:
        raise ValueError(f"{source} has no usable row{f': {faults.rows[0]}' if bad else ''}")
    said, important = columns.summary(*["rubric"] * bool(options.get("rubric")))
    logger.log(logging.WARNING if important else logging.INFO, "%s: %s", source, said)
    warnings = {
        "unusable rows left out": faults.rows,
        "rows with nothing in them left out": [""] * empty,
        "gold scores that can't be read, left out": golds,
        "preferences that can't be read, left out": unread,
    }
    for what, lines in warnings.items():
        if lines:
            logger.warning("%s: %s: %d%s", source, what, len(lines), lines[0] and f"; the first: {lines[0]}")
    return Table(with_own_ids(records, positions), kept, positions, answers)


def _preferred(row: Mapping[str, Any], columns: Columns, parts: Iterable[str], unread: list[str]) -> str | None:
    try:
        return preferred_of(row, columns, [*parts])
    except ValueError as error:
        unread.append(str(error))
        return None


def _is_empty(row: Mapping[str, Any]) -> bool:
    """Whether nothing stands in a row; an empty text is something where it is the only cell."""
    return bool(row) and all(map(is_blank, row.values())) and (len(row) > 1 or None in row.values())


def _check_scores(record: Record, scale: ScoreScale | None) -> None:
    """Raises ValueError: a gold score is outside the record's scale, or else outside `scale`."""
    where = f"the scale {scale}: --scale names another"
    if record.scale is not None:
        scale, where = record.scale, f"the item's scale {record.scale}"
    for score in golds_of(record):
        if scale and not scale.contains(score):
            raise ValueError(f"score {score:g} is outside {where}")


def with_own_ids(records: Sequence[Record], positions: Sequence[int] | None = None) -> list[Record]:
    """The records, each with an id of its own; one that is made up is no other's.

    A missing id is the position; the second record of one id gets "#2" behind it, and so on.
    """
    given = Counter(record.id for record in records)
    used: set[str] = set()
    numbers: Counter[str] = Counter()
    named = []
    for place, record in zip(positions or range(len(records)), records):
        base = record.id or (str(place) if str(place) not in given else f"row {place + 1}")
        name = base
        while name in used or name in given and name != record.id:
            numbers[base] += 1
            name = f"{base}#{numbers[base] + 1}"
        used.add(name)
        named.append(record if record.id == name else replace(record, id=name))
    repeated = [name for name, count in given.items() if name and count > 1]
    if repeated:
        first = f"the first: {repeated[0]!r}; the later ones have a number behind it, as in {repeated[0] + '#2'!r}"
        logger.warning("ids that several records have: %d; %s", len(repeated), first)
    return named


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
