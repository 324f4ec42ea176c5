"""Files: rows of JSONL, JSON, CSV, Excel, Parquet and the hub; the cache; which file is which."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Iterable

from tract_lite.data.columns import listed
from tract_lite.data.hub import why_not_fetched
from tract_lite.data.names import field_named
from tract_lite.data.sheets import Rows, read_csv, read_xlsx
from tract_lite.data.texts import EXCEL, ZIP, open_text

logger = logging.getLogger(__name__)

# Of a large file, so many pieces of so many bytes tell it from another.
PIECES, PIECE_BYTES = 256, 4096


def read_rows(source: str, format: str = "auto", split: str | None = None, encoding: str | None = None) -> Rows:
    """Each row's place and content; a row that can't be parsed is the ValueError that says why.
    Raises FileNotFoundError: no such file. Raises ValueError: the source can't be read.
    """
    format = _find_format(source) if format == "auto" else format.lower()
    known = ", ".join(_READERS)
    if format == "hub":
        rows = _read_hub(source, split or "train")
    elif source != "-" and not Path(source).exists():
        hint = "" if format in _READERS else "; if it is a data set on the hub: --format hub"
        raise FileNotFoundError(f"no file {source}{hint}")
    elif Path(source).is_dir():
        raise ValueError(f"{source} is a folder: name a file in it, or say --format hub if it is a data set")
    elif format in ("xls", "ods"):
        raise ValueError(f"{source}: spreadsheets are read as .xlsx or .csv: save it as one of them")
    elif format not in _READERS:
        raise ValueError(f"{source}: format must be {known} or hub, got {format!r}; --format names it")
    elif split is not None:
        raise ValueError(f"split is for hub data sets; to split {source}: split_records")
    else:
        rows = _READERS[format](source, encoding)
    try:
        yield from rows
    except UnicodeDecodeError as error:
        advice = "--encoding names what it is written in"
        name = encoding or error.encoding.replace("charmap", EXCEL)
        raise ValueError(f"can't read {source} as {name}: {advice}") from error
    except (OSError, ValueError, RecursionError, EOFError) as error:
        # What is raised here says what to do, what the readers' libraries say does not.
        told = type(error) is ValueError
        advice = "" if told else f"; check that the file is whole, or name another --format ({known})"
        raise ValueError(f"can't read {source} as {format}: {error}{advice}") from error


def _find_format(source: str) -> str:
    suffix = "jsonl" if source == "-" else Path(source.lower().removesuffix(".gz")).suffix.removeprefix(".")
    if suffix in _READERS or Path(source).exists():
        return suffix
    return "hub" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) else suffix


def _read_jsonl(source: str, encoding: str | None) -> Rows:
    with open_text(source, encoding) as file:
        first = ""
        for number, line in enumerate(file, 1):
            first = first or line.strip()
            if first == "[" or number == 1 and re.match(r"\s*\[\s*\{", line):
                yield from _numbered(json.loads(line + file.read(), object_pairs_hook=_object))
                return
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except (json.JSONDecodeError, RecursionError) as error:
        return ValueError(f"not JSON: {error}: each line must be one whole object")
    except ValueError as error:
        return error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two columns are named {', '.join(twice)}: give each a name of its own")
    return row


def _read_json(source: str, encoding: str | None) -> Rows:
    with open_text(source, encoding) as file:
        text = file.read()
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if "Extra data" not in str(error):
            raise
        # One object a line, under the name of the other kind.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        yield from ((f"line {number}", _parsed(line)) for number, line in lines)
    else:
        yield from _numbered(_rows_in(content, source))


def _rows_in(content: Any, source: str) -> list[Any]:
    """The rows of a JSON file: its list, the one list in its object, or an object that is a row."""
    if isinstance(content, list):
        return content
    values = content if isinstance(content, dict) else {}
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    read = {field_named(name) for name, value in values.items() if isinstance(value, str)}
    if "response" in read or any(field_named(name) == "messages" for name in lists):
        return [content]
    if len(lists) != 1:
        fault = "it must be a list of rows, or an object that holds one list"
        raise ValueError(f'{fault} (pandas writes one with orient="records")')
    if others := [name for name in values if name not in lists]:
        logger.warning("%s: read: %s; not read: %s", source, *lists, listed(others))
    return next(iter(lists.values()))


def _read_csv(source: str, encoding: str | None) -> Rows:
    with open_text(source, encoding, EXCEL) as file:
        yield from read_csv(file)


def _read_tsv(source: str, encoding: str | None) -> Rows:
    with open_text(source, encoding, EXCEL) as file:
        yield from read_csv(file, "\t")


def _read_xlsx(source: str, encoding: str | None) -> Rows:
    with open(source, "rb") as file:
        if file.read(4) != ZIP:
            raise ValueError("it is no xlsx file: save it as one")
    yield from read_xlsx(source)


def _read_parquet(source: str, encoding: str | None) -> Rows:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(source) as file:
        _object([(name, None) for name in file.schema_arrow.names])
        yield from _numbered(row for batch in file.iter_batches() for row in batch.to_pylist())


def _read_hub(source: str, split: str) -> Rows:
    from datasets import load_dataset

    try:
        rows = load_dataset(source, split=split)
    except Exception as error:  # whatever the hub's libraries raise
        known = isinstance(error, ValueError) and Path(source).exists()
        way = "hf download --repo-type dataset {}"
        advice = "" if known else f"{why_not_fetched(source, error, way)} with --format hub"
        raise ValueError(advice or str(error)) from error
    yield from _numbered(rows)


def _numbered(rows: Iterable[Any]) -> Rows:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "xlsx": _read_xlsx,
    "parquet": _read_parquet,
}


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
