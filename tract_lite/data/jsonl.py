"""JSON that a killed run does not spoil: JSONL that grows by whole rows, files written at once."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator, Mapping

_BLOCK_BYTES = 1 << 16


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, but for an unfinished last line. Raises ValueError: it is not JSONL."""
    return [row for _, row in read_lines(path)]


def read_lines(path: str | Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file, if there is one, each with its row; else as `read_rows`."""
    if not Path(path).exists():
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


def append_row(path: str | Path, row: Mapping[str, Any]) -> int:
    """Write a row at the end of a file, at once and whole; returns where in the file it begins.

    An unfinished last line is cut. A cloud drive passes on what is closed, so each row is.
    """
    line = _to_line(row)
    with open(path, "a+b", buffering=0) as file:
        start = _length_of_lines(file)
        file.truncate(start)
        try:
            while line:
                line = line[file.write(line) :]
        except BaseException:
            file.truncate(start)
            raise
    return start


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file; it is there complete or not at all."""
    with replacing(path) as part, open(part, "wb") as file:
        file.writelines(map(_to_line, rows))


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file; it is there complete or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file.
    Raises ValueError: it is no JSON.
    """
    if not Path(path).is_file():
        return {}
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


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
