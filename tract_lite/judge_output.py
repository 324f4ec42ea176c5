"""The files of judging: rows that grow, how they were judged, and the table made from them."""

from __future__ import annotations

import csv
import json
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from tract_lite.jsonl import append_rows, keep_rows, read_lines, replacing, write_json
from tract_lite.records import Record

Row = Mapping[str, Any]

# What may not change between the calls that fill one file; the rest changes rounding alone, or
# which items fit.
SAME = ("fingerprint", "adapter", "spec_sha256", "n_cot", "seed")
ROW_KEYS = {"id", "key", "probabilities", "error"}
ROW_GROUP = 4096


class JudgeOutput:
    """Judgements on disk, which a stopped call leaves whole and the next one goes on with.

    The rows stand in a JSONL file, appended as they come. `x.csv` or `x.parquet` is a table made
    from the rows in `x.jsonl`; `x.run.json` says how they were judged.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of file, one that holds something else, or the input itself.
    """

    def __init__(self, path: Path, source: str):
        suffix = path.suffix.lower()
        if suffix != ".jsonl" and suffix not in _WRITERS:
            raise ValueError(f"the output must end in .jsonl, {' or '.join(_WRITERS)}, got {path}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent}")
        self.path = path
        self.is_table = suffix in _WRITERS
        self.rows_file = path.with_suffix(".jsonl") if self.is_table else path
        self.run_file = path.with_suffix(".run.json")
        for file in (path, self.rows_file, self.run_file):
            if file.exists() and Path(source).exists() and file.samefile(source):
                raise ValueError(f"{file} is the input: choose another output than {path}")
        if self.is_table and path.exists() and not self.rows_file.exists():
            raise ValueError(f"{path} is there without {self.rows_file}, which it would be made "
                             "from: move it away, or choose another output")
        if suffix == ".parquet":
            # Where it is missing, better now than after hours of judging.
            import_module("pyarrow.parquet")
        self._keys: dict[str, str] = {}
        self._failed: set[str] = set()
        self._read()

    def _read(self) -> None:
        for _, row in read_lines(self.rows_file):
            if not ROW_KEYS <= row.keys() or not isinstance(row["id"], str):
                raise ValueError(f"{self.rows_file} holds other rows than judgements: choose "
                                 "another output")
            self._keys[row["id"]] = row["key"]
            if row["error"] is not None:
                self._failed.add(row["id"])

    def missing(self, records: Iterable[Record]) -> list[Record]:
        """The records without a judgement; those that failed before are among them.

        Raises:
            ValueError: a row belongs to another item of the same id.
        """
        missing = []
        for record in records:
            if self._keys.get(record.id, record.key) != record.key:
                raise ValueError(f"{self.rows_file} holds another item with the id {record.id!r}: "
                                 "it was made from another input, choose another output")
            if record.id not in self._keys or record.id in self._failed:
                missing.append(record)
        return missing

    def check_run(self, run: Row) -> None:
        """Refuse to go on with rows that were judged in another way.

        Raises:
            ValueError: another model, spec, number of reasonings or seed.
        """
        if not self._keys:
            return
        if not self.run_file.exists():
            raise ValueError(f"{self.rows_file} has rows, but {self.run_file}, which says how they "
                             "were judged, is gone: choose another output")
        before = self._read_run()
        # A server's model has no file that could be seen, only a name.
        same = SAME if run["fingerprint"] is not None else (*SAME, "model")
        if other := [f"{name} {before.get(name)!r}, not {run[name]!r}" for name in same
                     if before.get(name) != run[name]]:
            raise ValueError(f"{self.rows_file} was judged with {'; '.join(other)}: choose another "
                             "output, or the same model and settings")

    def start(self, run: Row, shape: Row, records: Iterable[Record]) -> None:
        """Get ready to add the judgements of `records`: note how, drop their failed rows."""
        shapes = []
        if self._keys:
            shapes = self._read_run()["shapes"]
        write_json(self.run_file, {**run, "shapes": shapes + [shape] * (shape not in shapes)})
        if again := self._failed & {record.id for record in records}:
            keep_rows(self.rows_file, lambda row: row["id"] not in again)

    def _read_run(self) -> dict[str, Any]:
        try:
            return {"shapes": [], **json.loads(self.run_file.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.run_file} does not say how {self.rows_file} was judged: "
                             "choose another output") from error

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows as they come."""
        append_rows(self.rows_file, rows)

    def finish(self, labels: Sequence[str], ids: Sequence[str]) -> None:
        """Write the table, if one is wanted: the rows with these ids in this order, then others."""
        if self.is_table:
            columns = _columns(labels)
            rows = (_to_table_row(row, labels) for row in self._ordered(ids))
            with replacing(self.path) as part:
                _WRITERS[self.path.suffix.lower()](part, columns, rows)

    def _ordered(self, ids: Sequence[str]) -> Iterator[Row]:
        places, start = {}, 0
        for line, row in read_lines(self.rows_file):
            places[row["id"]] = start
            start += len(line)
        ordered = [places.pop(name) for name in ids if name in places]
        with open(self.rows_file, "rb") as file:
            for start in [*ordered, *places.values()]:
                file.seek(start)
                yield json.loads(file.readline())


def _columns(labels: Sequence[str]) -> dict[str, str]:
    """The table's columns with their types."""
    return {
        "id": "string", **dict.fromkeys(("score", "std", "spread", "mode", "mass"), "double"),
        **{f"p_{label}": "double" for label in labels}, "error_bound": "double",
        "truncated": "bool", "error": "string", "gold": "double", "feedback": "string",
    }


def _to_table_row(row: Row, labels: Sequence[str]) -> dict[str, Any]:
    shares = {f"p_{label}": row["probabilities"].get(label) for label in labels}
    texts = {name: None if row[name] is None else _writable(row[name]) for name in ("id", "error")}
    return {**row, **shares, **texts, "feedback": _writable("\n\n".join(row["feedback"]))}


def _writable(text: str) -> str:
    """The text with lone surrogates, which no table can hold, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write_csv(path: Path, columns: Mapping[str, str], rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, columns: Mapping[str, str], rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    types = {"string": pyarrow.string(), "double": pyarrow.float64(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    rows = iter(rows)
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


_WRITERS: dict[str, Callable[[Path, Mapping[str, str], Iterable[Row]], None]] = {
    ".csv": _write_csv, ".parquet": _write_parquet,
}
