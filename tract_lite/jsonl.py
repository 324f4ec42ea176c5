"""JSON that a killed run does not spoil: JSONL that grows row by row, files written at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterable, Mapping


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, without the last line if it is unfinished; none if there is no file.

    Raises:
        ValueError: a line is not a JSON object.
    """
    path = Path(path)
    *lines, unfinished = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        rows = [json.loads(line) for line in lines]
        if unfinished[:1] not in (b"", b"{") or not all(isinstance(row, dict) for row in rows):
            raise ValueError("each line must be an object")
    except ValueError as error:
        raise ValueError(f"{path} is not JSONL: {error}") from error
    return rows


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows at the end of a file, each at once as it comes; an unfinished last line is cut."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    # What UTF-8 can't hold (lone surrogates) then stands there as JSON escapes it.
    with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file; it is there complete or not at all."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.unlink(missing_ok=True)
    append_rows(unfinished, rows)
    os.replace(unfinished, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file; it is there complete or not at all."""
    path = Path(path)
    text = json.dumps(value, indent=1)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
