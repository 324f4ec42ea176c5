"""Judgements as a table: a CSV or Parquet file made from their rows."""

import csv
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from tract_lite.data.jsonl import replacing

Row = Mapping[str, Any]


def check_table(path: Path) -> None:
    """Raises ValueError or ModuleNotFoundError where no table of this name can be written."""
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"the output must end in .jsonl, {' or '.join(TABLES)}, got {path}")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # noqa: F401


def write_table(path: Path, rows: Iterable[Row], labels: Sequence[str]) -> None:
    """Write the rows of judgements as a table with a column for each label's probability."""
    figures = ["score", "std", "spread", "mode", "mass", *(f"p_{label}" for label in labels), "error_bound"]
    columns = {"id": "string", **dict.fromkeys(figures, "double"), "truncated": "bool"}
    columns |= {"error": "string", "gold": "double", "feedback": "string"}
    with replacing(path) as part:
        TABLES[path.suffix.lower()](part, columns, (_cells(row, labels) for row in rows))


def _cells(row: Row, labels: Sequence[str]) -> dict[str, Any]:
    shares = {f"p_{label}": row["probabilities"].get(label) for label in labels}
    texts = {name: None if row[name] is None else _writable(row[name]) for name in ("id", "error")}
    return {**row, **shares, **texts, "feedback": _writable("\n\n".join(row["feedback"]))}


def _writable(text: str) -> str:
    """The text with lone surrogates, which no table can hold, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write_csv(path: Path, columns: Mapping[str, str], rows: Iterator[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, columns: Mapping[str, str], rows: Iterator[Row]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    types = {"string": pyarrow.string(), "double": pyarrow.float64(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, 4096)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


TABLES = {".csv": _write_csv, ".parquet": _write_parquet}
