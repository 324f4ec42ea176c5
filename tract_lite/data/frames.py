"""Data frames of pandas, with the columns of a judge beside their own."""

from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

from tract_lite.data.criteria import Criterion, named_criteria, read_criteria, read_rubric, single_rubric
from tract_lite.data.parts import asked_by, judged_parts, parts_of, whole_rows
from tract_lite.data.records import table_from
from tract_lite.data.table import free_names, judged_columns, scales_in, whole_columns
from tract_lite.judgement import Judgement
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale

# A rubric or several: one, the file of some, or what such a file holds.
AnyRubric = Rubric | str | Path | Mapping[str, Any] | Sequence[Any] | None


def judged_frame(
    frame: Any,
    judged: Callable[[Sequence[Record]], Iterable[Judgement]],
    scale: ScoreScale | None = None,
    rubric: AnyRubric = None,
    **options: Any,
) -> Any:
    """The frame with columns as `judge` writes them into a table; `judged` judges records in order.
    Rows that were left out have nothing in them. Raises ValueError: as `records_from`.
    """
    one, criteria = _rubrics(rubric)
    table = table_from(frame, **asked_by(criteria, {"scale": scale, "rubric": one, **options}))
    parts = parts_of(table, criteria, scale)
    rows = [row for _, row in judged_parts(parts, judged)]
    given = {str(record.id): row for record, row in zip(table.records, table.rows)}
    if any(part.of for part in parts):
        rows = whole_rows(rows)
        ours = whole_columns(rows, given)
    else:
        ours, cells = judged_columns(rows, scales_in(rows), given)
        rows = list(cells)
    found = {row["id"]: row for row in rows}
    by_place = dict(zip(table.places, table.records))
    lines = [found.get(str(by_place[place].id), {}) if place in by_place else {} for place in range(len(frame))]
    names = free_names(ours, [str(name) for name in frame.columns])
    return frame.assign(**{names[name]: [line.get(name) for line in lines] for name in ours})


def _rubrics(rubric: AnyRubric) -> tuple[Rubric | None, list[Criterion]]:
    """A single rubric, or several criteria."""
    if rubric is None or isinstance(rubric, Rubric):
        return rubric, []
    if isinstance(rubric, (str, Path)):
        criteria = read_criteria(rubric)
        return (None, criteria) if criteria else (read_rubric(rubric), [])
    criteria = named_criteria(rubric, "the rubric")
    return (None, criteria) if criteria else (single_rubric(rubric, "the rubric"), [])
