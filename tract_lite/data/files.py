"""Files: rows of JSONL, JSON, CSV and Parquet, of the hub; the cache; which file is which."""

import csv
import hashlib
import json
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any, Iterable, Iterator, TextIO

# Of a large file, so many pieces of so many bytes tell it from another.
PIECES, PIECE_BYTES = 256, 4096

Rows = Iterator[tuple[str, Any]]


def read_rows(source: str, format: str, split: str | None) -> Rows:
    """Each row's place and content; a row that can't be parsed is the ValueError that says why.
    Raises FileNotFoundError: no such file. Raises ValueError: the source can't be read.
    """
    format = _find_format(source) if format == "auto" else format
    if format == "hub":
        rows = _read_hub(source, split or "train")
    elif source != "-" and not Path(source).exists():
        hint = "" if format in _READERS else "; if it is a data set on the hub: --format hub"
        raise FileNotFoundError(f"no file {source}{hint}")
    elif format not in _READERS:
        raise ValueError(f"{source}: format must be {', '.join(_READERS)} or hub, got {format!r}")
    elif split is not None:
        raise ValueError(f"split is for hub data sets; to split {source}: split_records")
    else:
        rows = _READERS[format](source)
    try:
        yield from rows
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        advice = "check that it exists and is whole and in UTF-8, or name another format"
        raise ValueError(f"can't read {source} as {format}: {error}; {advice}") from error


def _find_format(source: str) -> str:
    suffix = "jsonl" if source == "-" else Path(source).suffix.lower().removeprefix(".")
    if suffix in _READERS or Path(source).exists():
        return suffix
    return "hub" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) else suffix


def _open(source: str) -> TextIO:
    file = 0 if source == "-" else source
    return open(file, encoding="utf-8-sig", newline="", closefd=file != 0)


def _read_jsonl(source: str) -> Rows:
    with _open(source) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = ValueError(f"not JSON: {error}")
            if line.strip():
                yield f"line {number}", row


def _read_json(source: str) -> Rows:
    with _open(source) as file:
        content = json.load(file)
    values = content.values() if isinstance(content, dict) else [content]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        raise ValueError("it must be a list of rows, or an object that holds one list")
    yield from _numbered(lists[0])


def _read_csv(source: str) -> Rows:
    csv.field_size_limit(2**31 - 1)
    with _open(source) as file:
        first = file.readline()
        # Spreadsheets separate by what their country does.
        reader = csv.reader(chain([first], file), strict=True, delimiter=max(",;\t", key=first.count))
        header = next(reader, [])
        start = reader.line_num + 1
        for values in reader:
            place, start = f"line {start}", reader.line_num + 1
            if len(values) > len(header):
                yield place, ValueError(f"{len(values)} values for {len(header)} columns")
            elif values:
                yield place, dict(zip(header, values))


def _read_parquet(source: str) -> Rows:
    from pyarrow.parquet import read_table

    yield from _numbered(read_table(source).to_pylist())


def _read_hub(source: str, split: str) -> Rows:
    from datasets import load_dataset

    yield from _numbered(load_dataset(source, split=split))


def _numbered(rows: Iterable[Any]) -> Rows:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}


def cache_folder() -> Path:
    """`TRACT_LITE_CACHE`, or `tract_lite` in the user's cache folder; made if it is not there."""
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tract_lite")
    folder = Path(os.environ.get("TRACT_LITE_CACHE") or of_user).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(path: str | Path) -> str:
    """A hash of a file's size and of pieces from all over it: another model differs in most."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(PIECES):
            file.seek(size * piece // PIECES)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
