"""Tables as spreadsheets write them: CSV in its dialects, and xlsx."""

import csv
import logging
from itertools import chain
from typing import Any, Iterable, Iterator, Sequence

from tract_lite.data.names import field_named

logger = logging.getLogger(__name__)

Rows = Iterator[tuple[str, Any]]

_DELIMITERS = ",;\t|"
# How Qualtrics marks its third line; the second has the questions.
_QUALTRICS = '{"ImportId"'
UNCLOSED = (
    "a quote that opens in the row of line %d is not closed before the end: close it, or double the quotes inside"
)


def read_csv(lines: Iterable[str], delimiters: str = _DELIMITERS) -> Rows:
    """The rows of CSV lines, each with the line it starts on.

    The separator is a line `sep=;` if there is one, else the one that gives the most columns.
    Raises ValueError: a quote is never closed, or two columns have one name.
    """
    csv.field_size_limit(2**31 - 1)
    lines, before = iter(lines), 0
    first = next(lines, "")
    while first and (not first.strip() or is_separator_line(first)):
        delimiters = first[4] if is_separator_line(first) else delimiters
        first, before = next(lines, ""), before + 1
    if not any(separator in first for separator in delimiters):
        delimiters = _DELIMITERS
    delimiter = max(delimiters, key=lambda one: len(next(csv.reader([first], delimiter=one), [])))
    spaced = first.count(delimiter) == first.count(f"{delimiter} ") > 0
    reader = csv.reader(chain([first], lines), strict=True, delimiter=delimiter, skipinitialspace=spaced)
    names: list[str] | None = None
    held: tuple[str, Any] | None = None
    end = before
    while True:
        start = end + 1
        try:
            values = next(reader)
        except StopIteration:
            yield from [held] if held else []
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise ValueError(UNCLOSED % start) from error
            end = before + reader.line_num
            yield from [held] if held else []
            held = f"line {start}", ValueError(f"{error}: double the quotes that stand inside a quoted text")
            continue
        end = before + reader.line_num
        if names is None:
            names = column_names(values)
        elif values:
            row = to_row(names, values)
            if held and any(value.startswith(_QUALTRICS) for value in values):
                held = held[0], row
            yield from [held] if held else []
            held = f"line {start}", row


def is_separator_line(line: str) -> bool:
    """Whether a line tells Excel the separator."""
    return line.lower().startswith("sep=") and len(line.strip("\r\n")) == 5


def read_xlsx(source: str) -> Rows:
    """The rows of the first sheet that can be read: a visible one whose columns are known.
    Raises ValueError: no workbook, a formula without its value, or two columns of one name.
    """
    from openpyxl import load_workbook

    try:
        book, formulas = load_workbook(source, data_only=True), load_workbook(source)
    except Exception as error:  # whatever stands in the file
        raise ValueError(f"it is no workbook that openpyxl can read ({error}): save it again as .xlsx") from error
    filled = [sheet for sheet in book.worksheets if any(any(row) for row in sheet.iter_rows(values_only=True))]
    filled.sort(key=lambda sheet: (sheet.sheet_state != "visible", not any(map(field_named, _header(sheet)))))
    if others := [sheet.title for sheet in filled[1:]]:
        logger.warning("%s: the sheet %s is read, not: %s", source, filled[0].title, ", ".join(others))
    for sheet in filled[:1]:
        _check_formulas(sheet, formulas[sheet.title])
        _fill_merged(sheet, source)
        names: list[str] | None = None
        for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            values = [None if isinstance(value, str) and not value else value for value in cells]
            if names is not None:
                yield f"row {number}", to_row(names, values)
            elif any(value is not None for value in values):
                names = column_names(["" if value is None else str(value) for value in values])


def _header(sheet: Any) -> list[str]:
    """The texts of the first row with something in it."""
    filled = (row for row in sheet.iter_rows(values_only=True) if any(row))
    return [value for value in next(filled, ()) if isinstance(value, str)]


def _check_formulas(sheet: Any, formulas: Any) -> None:
    """Raises ValueError: a cell has a formula, and no program has stored its value."""
    for row in formulas.iter_rows():
        for cell in row:
            if cell.data_type == "f" and sheet[cell.coordinate].value is None:
                fault = f"the cell {cell.coordinate} of {sheet.title} is a formula without its value"
                raise ValueError(f"{fault}: open and save the file in a spreadsheet program, or save values alone")


def _fill_merged(sheet: Any, source: str) -> None:
    """Give every cell that was merged the text of the first of them."""
    ranges = list(sheet.merged_cells.ranges)
    for merged in ranges:
        value = sheet.cell(merged.min_row, merged.min_col).value
        sheet.unmerge_cells(str(merged))
        for row in sheet.iter_rows(merged.min_row, merged.max_row, merged.min_col, merged.max_col):
            for cell in row:
                cell.value = value
    if ranges:
        logger.warning("%s: merged cells, read as if each had the text: %s", source, ", ".join(map(str, ranges)))


def column_names(header: Sequence[str]) -> list[str]:
    """Names without blanks at their ends; one that is empty is its place, as in "column 3".
    Raises ValueError: two have one name.
    """
    names = [name.strip() or f"column {place}" for place, name in enumerate(header, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two columns are named {', '.join(twice)}: give each a name of its own")
    return names


def to_row(names: Sequence[str], values: Sequence[Any]) -> Any:
    """A row by its columns' names, or the ValueError that says what does not fit."""
    if len(values) != len(names):
        fault = f"{len(values)} value{'s' * (len(values) != 1)} for {len(names)} column{'s' * (len(names) != 1)}"
        cure = "a text with a line break, a quote or a separator needs quotes around it"
        return ValueError(
            f"{fault}: {cure if len(names) > 1 or field_named(names[0]) else 'the first line must be the header'}"
        )
    texts = [str(value).strip() for value in values]
    if texts == list(names):
        return ValueError("the header stands here again: delete this line")
    if any(text.startswith(_QUALTRICS) for text in texts):
        return ValueError("a line of the header of Qualtrics: delete the second and the third line")
    return dict(zip(names, values))
