"""How a stopped call goes on: rows appended as they come, each with its record's id and key."""

import json
from collections import deque
from itertools import chain
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, Sequence

from tract_lite.data.jsonl import append_row, read_json, read_lines, replacing, write_json
from tract_lite.record import Record

Row = Mapping[str, Any]

# Records that wait at most for an earlier one that is still being judged.
MOST_WAITING = 1000
# The end of a name whose value is a hash of what the thing holds.
CONTENT = "_sha256"
# Characters of a value that a line of a message has room for.
LONGEST_SHOWN = 60


def claim(file: Path, how: Row) -> None:
    """Keep how something is made. Raises ValueError: the file says it was made in another way.

    Where `data_sha256` says what `data` holds, its name may be another.
    """
    how = json.loads(json.dumps(how))
    try:
        other = _differences(read_json(file), how) if file.exists() else []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): choose another output") from error
    if other:
        raise ValueError(
            "\n  ".join([f"{file} was made with other settings: choose another output, or these again:", *other])
        )
    if not file.exists():
        write_json(file, how)


def _differences(before: Row, now: Row) -> list[str]:
    """A line for each thing that differs, also within what is nested."""
    lines = []
    for name in now:
        old, new, label = before.get(name), now[name], name.removesuffix(CONTENT)
        contents = before.get(name + CONTENT), now.get(name + CONTENT)
        if label != name and label in now or all(contents) and contents[0] == contents[1]:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new)
        elif all(contents) or old != new:
            texts = [_shown(old), _shown(new)]
            is_short = max(map(len, texts)) <= LONGEST_SHOWN and not all(contents)
            lines.append(f"{label}: " + ("{} there, {} now".format(*texts) if is_short else "another content"))
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class ResumableRows:
    """Rows in a JSONL file, which a stopped call leaves whole and the next one goes on with.

    A row with an `error` does not count, and of two rows of one id the later one stands.
    Raises ValueError: the file holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.run_file = self.path.with_suffix(".run.json")
        self._keys: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._failed: set[str] = set()
        self._superseded = start = 0
        for line, row in read_lines(self.path):
            if not {"id", "key"} <= row.keys() or not isinstance(row["id"], str):
                raise ValueError(f"{self.path} holds other rows than these: choose another output")
            self._note(row, start)
            start += len(line)
        self.tidy()

    def claim(self, how: Row, shape: Row) -> None:
        """Keep how rows are made, on what `shape`. Raises ValueError: others are there already."""
        if not self._keys:
            self.run_file.unlink(missing_ok=True)
        elif not self.run_file.exists():
            gone = f"{self.run_file}, which says how they were made, is gone"
            raise ValueError(f"{self.path} has rows, but {gone}: choose another output")
        claim(self.run_file, how)
        shapes = read_json(self.run_file).get("shapes", [])
        write_json(self.run_file, {**how, "shapes": shapes + [shape] * (shape not in shapes)})

    def has(self, record: Record) -> bool:
        """Whether a record has a row that counts. Raises ValueError: another one has its id."""
        if not isinstance(record, Record):
            raise ValueError(f"not a Record: {shorten(record)}; read_records gives them")
        name = name_of(record)
        if name in self._failed:
            return False
        if self._keys.get(name, record.key) != record.key:
            fault = f"{self.path} holds another item with the id {name!r}"
            raise ValueError(f"{fault}: it was made from another input, choose another output")
        return name in self._keys

    def row(self, name: str) -> dict[str, Any]:
        """The row of an id."""
        with open(self.path, "rb") as file:
            file.seek(self._places[name])
            return json.loads(file.readline())

    def rows(self, first: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """All rows, those with the ids of `first` in that order before the others."""
        known = [name for name in first if name in self._keys]
        return map(self.row, dict.fromkeys([*known, *self._keys]))

    def append(self, record: Record, row: Row) -> None:
        """Write the row of a record, at once and whole."""
        row = row_of(record, row)
        self._note(row, append_row(self.path, row))

    def fill(self, records: Iterable[Record], make: Callable[[Iterator[Record]], Iterable[Row]]) -> Iterator[Row]:
        """The row of each record in order: its own, or for those without one what `make` gives.

        Each is appended as it comes, with its record's gold score; `make` may be called again.
        """
        records = iter(records)
        for record in records:
            if self.has(record):
                yield self._own(record)
            else:
                yield from self._made(chain([record], records), make)
        self.tidy()

    def _made(self, records: Iterator[Record], make: Callable[[Iterator[Record]], Iterable[Row]]) -> Iterator[Row]:
        # What was taken from the input and not given yet, and whether its row is there.
        waiting: deque[tuple[Record, bool]] = deque()

        def missing() -> Iterator[Record]:
            for record in records:
                waiting.append((record, self.has(record)))
                if not waiting[-1][1]:
                    yield record
                elif len(waiting) >= MOST_WAITING:
                    return

        def known() -> Iterator[Row]:
            while waiting and waiting[0][1]:
                yield self._own(waiting.popleft()[0])

        for made in make(missing()):
            yield from known()
            record, _ = waiting.popleft()
            self.append(record, row_of(record, made, gold=True))
            yield made
        yield from known()

    def _own(self, record: Record) -> Row:
        """The row of a record, by its own id, with the gold score that it has now."""
        row = self.row(name_of(record))
        if record.score is not None and row.get("gold") != record.score:
            row = row_of(record, row, gold=True)
            self.append(record, row)
        return {**row, "id": record.id}

    def tidy(self, first: Sequence[str] = (), without: Collection[str] = ()) -> None:
        """Leave one row of each id in the file, but of those `without`: those of `first` in that
        order, then the others."""
        there = sorted(self._keys, key=self._places.__getitem__)
        ordered = dict.fromkeys([*(name for name in first if name in self._keys), *there])
        names = [name for name in ordered if name not in without]
        if names == there and not self._superseded:
            return
        moved = {}
        with replacing(self.path) as part, open(part, "wb") as file, open(self.path, "rb") as rows:
            for name in names:
                rows.seek(self._places[name])
                moved[name] = file.tell()
                file.write(rows.readline())
        self._keys, self._places = {name: self._keys[name] for name in names}, moved
        self._superseded = 0

    def _note(self, row: Row, place: int) -> None:
        name = row["id"]
        self._superseded += name in self._keys
        self._keys[name], self._places[name] = row["key"], place
        (self._failed.discard if row.get("error") is None else self._failed.add)(name)


def name_of(record: Record) -> str:
    """The name of a record in a file: its id, or its key where it has none."""
    return record.key if record.id is None else record.id


def row_of(record: Record, row: Row, gold: bool = False) -> dict[str, Any]:
    """What is made of a record, with its name and key and, if it has one, its `gold` score."""
    score = {"gold": record.score} if gold and record.score is not None else {}
    return {**row, **score, "id": name_of(record), "key": record.key}
