"""Judgements as a table: a CSV or Parquet file made from their rows."""

import csv
import json
import re
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from tract_lite.data.files import read_rows
from tract_lite.data.jsonl import read_rows as read_jsonl, replacing
from tract_lite.data.parts import whole_rows
from tract_lite.data.rubrics import parse_object
from tract_lite.data.scales import read_scale, scale_cell
from tract_lite.scale import ScoreScale

Row = Mapping[str, Any]
# Labels and their values.
Values = Mapping[str, float]


def check_table(path: Path) -> None:
    """Raises ValueError or ModuleNotFoundError where no table of this name can be written."""
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"the output must end in .jsonl, {' or '.join(TABLES)}, got {path}")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # noqa: F401


def scales_in(rows: Iterable[Row]) -> list[Values]:
    """The `values` of rows of judgements, each once, in order of first appearance."""
    found = {tuple(values.items()): values for row in rows if (values := row.get("values"))}
    return list(found.values())


def write_table(path: Path, rows: Iterable[Row], scales: Sequence[Values], given: Mapping[str, Row]) -> None:
    """Write the rows of judgements as a table: the columns of the input, then those of the judge.

    `scales`: all that the rows are on. Where there are several, or one whose labels do not say
    their values, a column `scale` names that of each row. `given`: by id, the row of the input. A
    column of the judge that the input has as well gets `judge_` before its name; its id stands
    there only where the input's own `id` is another one.
    """
    _write(path, *judged_columns(rows, scales, given), given)


def write_whole_rows(path: Path, rows: Sequence[Row], given: Mapping[str, Row]) -> None:
    """Write rows of several parts each (`whole_rows`) as a table, else as `write_table`."""
    _write(path, whole_columns(rows, given), rows, given)


def judged_columns(
    rows: Iterable[Row], scales: Sequence[Values], given: Mapping[str, Row]
) -> tuple[dict[str, str], Iterator[dict[str, Any]]]:
    """The columns of the judge with their types, and the cells of each row in them."""
    figures = ["score", "normalised_score", "std", "spread", "doubt", "mode", "mass"]
    figures += ["end_mass"] * any(map(_has_beginnings, scales))
    labels = dict.fromkeys(label for values in scales for label in values)
    figures += [*(f"p_{label}" for label in labels), "error_bound"]
    ours = {"id": "string", **dict.fromkeys(figures, "double"), "truncated": "bool"}
    ours |= {"error": "string", "gold": "double", "feedback": "string"}
    if (
        len(scales) > 1
        or any("scale" in row for row in given.values())
        or any(number_in(label) != value for values in scales for label, value in values.items())
    ):
        ours["scale"] = "string"
    return _without_own_ids(ours, given), (_cells(row, [*labels]) for row in rows)


def whole_columns(rows: Iterable[Row], given: Mapping[str, Row]) -> dict[str, str]:
    """The columns of `whole_rows` with their types."""
    texts = re.compile("(id|winner|gold_preferred|error|feedback(_.*)?)")
    names = dict.fromkeys(name for row in rows for name in row)
    ours = {name: "string" if texts.fullmatch(name) else "double" for name in names}
    return _without_own_ids(ours, given)


def _without_own_ids(ours: dict[str, str], given: Mapping[str, Row]) -> dict[str, str]:
    """Our columns, without `id` where each row of the input has the same one."""
    is_own = bool(given) and all("id" in row and str(row["id"]) == name for name, row in given.items())
    return {name: kind for name, kind in ours.items() if name != "id" or not is_own}


def _write(path: Path, ours: Mapping[str, str], rows: Iterable[Row], given: Mapping[str, Row]) -> None:
    own = dict.fromkeys(name for row in given.values() for name in row)
    names = free_names(ours, own)
    columns = {name: _kind([row.get(name) for row in given.values()]) for name in own}
    columns |= {names[name]: kind for name, kind in ours.items()}

    def cells(row: Row) -> dict[str, Any]:
        of_input = {name: _cell(cell, columns[name]) for name, cell in given.get(row["id"], {}).items()}
        return of_input | {names[name]: _written(row.get(name)) for name in ours}

    with replacing(path) as part:
        TABLES[path.suffix.lower()](part, columns, map(cells, rows))


def free_names(ours: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """The names of our columns beside those of the input."""
    return {name: _free(name, own) for name in ours}


# Such a file measures no scores.
ANSWERS_INSIDE = "%s holds several answers a row\n`tract-lite evaluate` counts their wins"


def read_judged(path: Path) -> list[dict[str, Any]]:
    """The `score`, `gold` and `values` of each row of judgements, from JSONL or a table of them.

    In a table, the column `scale` has the values, or else labels that are numbers.
    Raises ValueError: there is no score, or another kind of file.
    """
    if path.suffix.lower() == ".jsonl":
        # Of two rows of one item the later one stands; without an id, each is an item.
        rows = list({row.get("id") or (number,): row for number, row in enumerate(read_jsonl(path))}.values())
        return whole_rows(rows) or rows
    check_table(path)
    rows = [row for _, row in read_rows(str(path)) if isinstance(row, dict)]
    names = list(rows[0]) if rows else []
    score, gold, scale = (
        next((n for n in reversed(names) if re.fullmatch(f"(judge_)*{w}", n)), None) for w in _MEASURED
    )
    if score is None and any("_above_" in name for name in names):
        raise ValueError(ANSWERS_INSIDE % path)
    if score is None:
        raise ValueError(f"{path} has no column score or judge_score: it is no table of judgements")
    labels = {name: name[2:] for name in names if name.startswith("p_")}
    values = {label: number for label in labels.values() if (number := number_in(label)) is not None}

    def read(row: Row) -> dict[str, Any]:
        own = _values(row[scale]) if scale else None
        return {
            "score": number_in(row[score]),
            "gold": number_in(row[gold]) if gold else None,
            "values": values if own is None else own,
        }

    return [read(row) for row in rows]


def read_columns(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of judgements by their columns' names without `judge_`, those of the judge
    in place of the input's. Raises ValueError: another kind of file.
    """
    if path.suffix.lower() == ".jsonl":
        return read_judged(path)
    check_table(path)
    rows = [row for _, row in read_rows(str(path)) if isinstance(row, dict)]
    return [{re.sub("^(judge_)+", "", name): cell for name, cell in row.items()} for row in rows]


_MEASURED = ("score", "gold", "scale")
# Larger whole numbers, a double can't tell apart.
_WHOLE = 2**53


def number_in(cell: Any) -> float | None:
    """The number that a cell of a table holds, if it holds one."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _values(cell: Any) -> dict[str, float] | None:
    """The values that a cell of the column `scale` names; None where it names none."""
    try:
        found = read_scale(parse_object(cell) if isinstance(cell, str) and cell.startswith("{") else cell)
    except ValueError:
        return None
    return dict(zip(found.labels, found.values)) if found else None


def _has_beginnings(labels: Iterable[str]) -> bool:
    """Whether some label begins another one, as 1 begins 10."""
    ordered = sorted(labels)
    return any(after.startswith(before) for before, after in pairwise(ordered))


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, or the first with `judge_` before it that differs from all, whatever their case."""
    others = {other.casefold() for other in taken}
    while name.casefold() in others:
        name = f"judge_{name}"
    return name


def _kind(cells: Sequence[Any]) -> str:
    """The type of a column of the input: that of all its cells, else text."""
    filled = [cell for cell in cells if cell is not None]
    kinds = set(map(type, filled))
    if kinds and kinds <= {int, float} and all(abs(cell) <= _WHOLE for cell in filled if type(cell) is int):
        return "int" if kinds == {int} else "double"
    return "bool" if kinds == {bool} else "string"


def _cell(cell: Any, kind: str) -> Any:
    """A cell of the input, spelled out where its column is text."""
    if cell is None or kind != "string":
        return cell
    is_nested = isinstance(cell, (dict, list))
    return _writable(json.dumps(cell, ensure_ascii=False, default=str) if is_nested else str(cell))


def _cells(row: Row, labels: Sequence[str]) -> dict[str, Any]:
    shares = {f"p_{label}": row["probabilities"].get(label) for label in labels}
    scale = _named(tuple((row.get("values") or {}).items()))
    return {**row, **shares, "feedback": "\n\n".join(row["feedback"]), "scale": scale}


def _written(cell: Any) -> Any:
    return _writable(cell) if isinstance(cell, str) else cell


@lru_cache(maxsize=1024)
def _named(values: tuple[tuple[str, float], ...]) -> str | None:
    """What names the scale of labels and values in a cell."""
    named = scale_cell(ScoreScale(*zip(*values))) if values else None
    return named if named is None or isinstance(named, str) else json.dumps(named, ensure_ascii=False)


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

    types = {"string": pyarrow.string(), "int": pyarrow.int64(), "double": pyarrow.float64(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, 4096)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


TABLES = {".csv": _write_csv, ".parquet": _write_parquet}
