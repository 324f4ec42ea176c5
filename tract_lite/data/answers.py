"""Rows with several answers to one instruction, as `response_a` and `response_b`: told apart."""

import re
from shlex import quote
from typing import Any, Iterable, Mapping

from tract_lite.data.columns import Columns, is_blank, listed
from tract_lite.data.names import answer_named, field_named

# What is said where none of several answers is preferred.
TIE = "tie"
# As in `A>B` and `[[B >> A]]`.
_COMPARED = re.compile(r"\W*?([a-z0-9])\s*([<>=])\2*\s*([a-z0-9])\W*")
_TIES = ("tie", "tied", "equal", "draw", "same", "both", "neither", "none")


def answers_of(row: Mapping[str, Any], columns: Columns) -> dict[str, dict[str, Any]]:
    """A row for each of several answers, by its letter or digit: as if it were the row's only one.
    Of a blank answer, the response is empty. Nothing where the row has no such columns, or a
    response beside them.
    Raises ValueError: there is only one answer, or two have one letter.
    """
    given = {column: field for field, column in columns.given.items() if answer_named(field)}
    found = {name: named for name in row if (named := answer_named(given.get(name, name)))}
    found = {name: named for name, named in found.items() if columns.given.get("_".join(named), name) == name}
    fields = {field for field, _ in found.values()}
    if not found or columns.given.keys() & fields or fields & set(map(field_named, row.keys() - found.keys())):
        return {}
    letters = [letter for _, letter in found.values()]
    if len(found) == 1:
        advice = f"--columns {quote(f'response={next(iter(found))}')} judges it alone"
        raise ValueError(f"{next(iter(found))} has no other answer beside it, to compare it with\n{advice}")
    if twice := [name for name, (_, letter) in found.items() if letters.count(letter) > 1]:
        raise ValueError(f"{listed(twice, ' or ')} may be one answer\n--columns response_a=NAME response_b=NAME tells")
    preferred = columns.fields(row).columns.get("preferred")
    rest = {name: cell for name, cell in row.items() if name not in found and name != preferred}
    rows = {
        letter: rest | ({"response": ""} if is_blank(row[name]) else {field: row[name]})
        for name, (field, letter) in found.items()
    }
    columns.count_as(row, {name: field for name, (field, _) in found.items()})
    return rows


def preferred_of(row: Mapping[str, Any], columns: Columns, letters: Iterable[str]) -> str | None:
    """The letter of the answer that a row says is best, or `TIE`; None where it says nothing.
    Raises ValueError: it says something else.
    """
    fields = columns.fields(row)
    if not fields.filled("preferred"):
        return None
    cell = fields.take("preferred")
    columns.count_as(row, {fields.columns["preferred"]: "preferred"})
    said = str(cell).lower().removesuffix(".0")
    if compared := _COMPARED.fullmatch(said):
        one, sign, other = compared.groups()
        said = TIE if sign == "=" else one if sign == ">" else other
    words = re.findall(r"[a-z0-9]+", said)
    if words and words[0] in _TIES:
        return TIE
    if words and words[-1] in letters and len({*words} & {*letters}) == 1:
        return words[-1]
    raise ValueError(f"{fields.columns['preferred']} is {cell!r}, and the answers are {listed(letters)}, or {TIE}")
