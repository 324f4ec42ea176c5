"""JSON that a killed run does not spoil: JSONL that grows row by row, files written at once."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Mapping

_BLOCK_BYTES = 1 << 16


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, without the last line if it is unfinished; none if there is no file.

    Raises:
        ValueError: a line is not a JSON object.
    """
    return [row for _, row in read_lines(path)]


def read_lines(path: str | Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file, one by one, each with the row that it holds; else as `read_rows`."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"{") and not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("each line must be an object")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is not JSONL: {error}") from error
            yield line, row


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows at the end of a file, each at once and whole as it comes.

    An unfinished last line is cut first, and also if the writing of a row fails.
    """
    with open(path, "a+b", buffering=0) as file:
        file.truncate(_length_of_lines(file))
    for row in rows:
        line = _to_line(row)
        # Closed after each row: folders of a cloud drive pass on what is closed.
        with open(path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line):]
            except BaseException:
                file.truncate(start)
                raise


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file; it is there complete or not at all."""
    with replacing(path) as part, open(part, "wb") as file:
        file.writelines(map(_to_line, rows))


def keep_rows(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the rows that `keep` is true for, byte for byte; at once or not at all."""
    with replacing(path) as part, open(part, "wb") as file:
        file.writelines(line for line, row in read_lines(path) if keep(row))


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file; it is there complete or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1), encoding="utf-8")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which then takes its place, or goes if the writing failed."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _to_line(row: Mapping[str, Any]) -> bytes:
    # What UTF-8 can't hold (lone surrogates) then stands there as JSON escapes it.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _length_of_lines(file: BinaryIO) -> int:
    """Where the last line that is complete ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
