"""Which column fills which field of a record: names, their aliases, what is not read."""

import re
from collections import Counter
from difflib import get_close_matches
from functools import lru_cache
from shlex import quote
from typing import Any, Iterable, Mapping, Sequence

from tract_lite.data.names import ALIASES, HOLDERS, answer_named, plain_name, reading_of
from tract_lite.data.rubrics import described_label

BENCHMARK = {"gpt4_feedback", "gpt4_score"}
# The Feedback Collection has its texts twice: apart, with this prefix, and inside a ready prompt.
_COLLECTION, _READY = "orig_", {"instruction", "input", "output"}
# What our own files say of a row.
_OWN = {"key", "shortened"}
# What nobody misses where another field is there.
_STANDS_FOR = {
    "prompt": "instruction criteria",
    "messages": "instruction",
    "input": "instruction",
    "rubric": "criteria",
    "gpt4_score": "instruction criteria score",
}
# Beside a ready prompt: what is no text to judge, and what sounds like one.
_MARKS = set("category categories source dataset subset split language lang domain topic type model tags idx".split())
_MARKS |= set("index difficulty level version timestamp date time annotator user".split())
_RESPONSES = "response", "answer", "chosen", "rejected", "completion", "output", "generat"
WANTED = "response (the text to judge), instruction, criteria and score"
MOST_SHOWN = 15


class Fields:
    """The cells of one row by the field they fill, and which of them were read."""

    def __init__(self, cells: Mapping[str, Any], columns: Mapping[str, str]):
        self._cells, self.columns = cells, columns
        self.read: dict[str, str] = {}

    def __contains__(self, field: object) -> bool:
        return field in self._cells

    def cell(self, field: str) -> Any:
        """The cell of a field, None if it has none; not counted as read."""
        return self._cells.get(field)

    def filled(self, field: str) -> bool:
        return not is_blank(self._cells.get(field))

    def take(self, field: str, other: str | None = None) -> Any:
        """The cell of a field, None if it has none; counted as read, perhaps as another field."""
        if field in self._cells:
            self.read[field] = other or field
        return self._cells.get(field)

    def descriptions(self) -> dict[str, str]:
        """The fields that describe a label each, with the label."""
        return {field: label for field in self._cells if (label := described_label(field))}


class Columns:
    """How the columns of one source are read, and what of them was not.

    `given` maps fields to the names of their columns, or to "" for a field that is not to be read;
    `elsewhere` names columns that others read.
    Raises ValueError: a field that no record has.
    """

    def __init__(self, given: Mapping[str, str] | None = None, elsewhere: Iterable[str] = ()):
        self.given, self._elsewhere = dict(given or {}), set(map(plain_name, elsewhere))
        for field in self.given:
            if field not in ALIASES and not described_label(field) and not answer_named(field):
                raise ValueError(
                    f"--columns: no field {field!r}{_meant(field, ALIASES)}; there are {', '.join(ALIASES)}"
                )
        names = [name for name in self.given.values() if name]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"--columns: {', '.join(twice)} can't fill two fields")
        self._assigned = lru_cache(maxsize=1024)(self._assign)
        self._names: dict[str, None] = {}
        self._read: Counter[tuple[str, str]] = Counter()
        self._unread: Counter[str] = Counter()
        self._made: set[tuple[str, str]] = set()

    def fields(self, row: Mapping[str, Any]) -> Fields:
        """The row's cells by field. Raises ValueError: two filled columns may be one field."""
        candidates = self._assigned(tuple(row))
        chosen = {}
        for field, ranked in candidates.items():
            best = [name for rank, name in ranked if rank == ranked[0][0]]
            filled = [name for name in best if not is_blank(row[name])] or best[:1]
            if len(filled) > 1:
                choice = f"--columns {quote(f'{field}={filled[0]}')} chooses one"
                raise ValueError(f"{listed(filled, ' or ')} may be the {field}: {choice}")
            others = [name for _, name in ranked if name != filled[0] and not is_blank(row[name])]
            if field in ("instruction", "response") and others and is_blank(row[filled[0]]):
                both = f"{filled[0]} is blank and {others[0]} is not"
                ways = " or ".join(quote(f"{field}={name}") for name in (filled[0], others[0]))
                raise ValueError(f"{both}: --columns {ways} chooses one")
            chosen[field] = filled[0]
        return Fields({field: row[name] for field, name in chosen.items()}, chosen)

    def count(self, row: Mapping[str, Any], fields: Fields, parts: Iterable[str] = ()) -> None:
        """Count what was read of a row, and what was not; `parts`: of a cell."""
        read = {fields.columns[field]: other for field, other in fields.read.items()}
        self._read.update(read.items())
        self._unread.update(self.unread(row, fields))
        self._unread.update(parts)

    def unread(self, row: Mapping[str, Any], fields: Fields) -> list[str]:
        """The filled columns of a row that were not read."""
        read = {fields.columns[field] for field in fields.read}
        own = {name for name in row if name in _OWN or plain_name(name) in self._elsewhere}
        return [name for name in row if name not in read | own and not is_blank(row[name])]

    def count_as(self, row: Mapping[str, Any], fields: Mapping[str, str]) -> None:
        """Count columns as what they were read as, in the place of the fields' own names."""
        self._names |= dict.fromkeys(row)
        self._read.update(fields.items())
        self._made |= {(field, field) for field in fields.values() if field not in row}

    def check(self) -> None:
        """Raises ValueError: a column that was given is in no row."""
        for field, name in self.given.items():
            if name and self._names and not _find(name, list(self._names)):
                there = listed(self._names)
                raise ValueError(f"no column {name!r} for {field}{_meant(name, self._names)}; its columns: {there}")

    def summary(self, *elsewhere: str) -> tuple[str, bool]:
        """What was read as what, what was not, what is absent; and whether a user must know.

        `elsewhere`: fields that are not asked of the columns.
        """
        fields = {field for _, field in self._read} | set(elsewhere)
        covered = fields.union(*(_STANDS_FOR.get(field, "").split() for field in fields))
        absent = [field for field in ("instruction", "criteria", "score") if field not in covered]
        lacking = [field for field in ALIASES if field not in fields]
        unread = [name if reading_of(name) else name + _meant(name, lacking) for name in self._unread]
        read = [pair for pair in self._read if pair[0] not in _OWN and pair not in self._made]
        renamed = [(name, _shown(name, field)) for name, field in read]
        parts = {"read": [shown for _, shown in renamed], "not read": unread, "not there": absent}
        said = "; ".join(f"{what}: {listed(names)}" for what, names in parts.items() if names)
        if any(name.startswith(_COLLECTION) for name, _ in renamed):
            return said, bool(self._unread.keys() - _READY)
        return said, bool(unread) or any(name != shown for name, shown in renamed)

    def without_response(self, row: Mapping[str, Any]) -> str:
        """What to say of a row that has no text to judge."""
        texts = [name for name, cell in row.items() if isinstance(cell, str) and not reading_of(name)]
        close = [quote(f"response={name}") for name in texts if _meant(name, ["response"])]
        advice = (
            f"did you mean --columns {close[0]}?"
            if close
            else "--columns response=NAME names it; of several answers, response_a=NAME response_b=NAME"
        )
        if "column 2" in row:
            advice += "; is the first line the header?"
        there = listed(row) or "none"
        return f"neither a prompt nor a response; its columns: {there}; wanted: {WANTED}; {advice}"

    def _assign(self, names: tuple[str, ...]) -> dict[str, list[tuple[int, str]]]:
        """The columns that may fill each field, with their ranks, the best first."""
        self._names |= dict.fromkeys(names)
        taken = {field: column for field, name in self.given.items() if name and (column := _find(name, names))}
        found = {field: [(0, name)] for field, name in taken.items()}
        chosen = self.given.keys() & {"response", "prompt", "instruction", "score", "feedback"}
        if BENCHMARK <= set(names) and "response" not in names and not chosen:
            read = {"prompt": "instruction", "id": "id", "scale": "scale", **{name: name for name in sorted(BENCHMARK)}}
            return {field: [(0, name)] for field, name in read.items() if name in names} | found
        collection = "orig_response" in names
        for name in names:
            bare = name.removeprefix(_COLLECTION) if collection else name
            if name in taken.values() or collection and name in _READY or not (reading := reading_of(bare)):
                continue
            rank, field = reading
            if field not in self.given:
                found.setdefault(field, []).append((rank - (bare != name), name))
        return {field: sorted(ranked, key=lambda pair: pair[0]) for field, ranked in found.items()}


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Fields and their columns, from texts such as "response=Answer".
    Raises ValueError: a text is no such pair.
    """
    chosen = {}
    for pair in pairs:
        field, equals, name = pair.partition("=")
        if not equals:
            raise ValueError(f"--columns takes FIELD=COLUMN, such as response=Answer, got {pair!r}")
        chosen[field.strip()] = name.strip()
    return chosen


def is_blank(cell: Any) -> bool:
    """Whether a cell holds nothing that could be left out."""
    return cell is None or cell != cell or cell in ([], {}) or isinstance(cell, str) and not cell.strip()


def may_be_response(name: str, cell: Any) -> bool:
    """Whether an unknown column may hold a text to judge, and not only a mark or a number."""
    plain = plain_name(name)
    if any(word in plain for word in _RESPONSES):
        return True
    is_mark = plain in _MARKS or plain.endswith(("_id", "_at")) or isinstance(cell, (bool, int, float))
    return not is_mark and not re.fullmatch(r"[\d.,:%/+-]+", str(cell).strip())


def flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with what stands inside the objects of exports, by names with a dot."""
    found: dict[str, Any] = {}
    for name, cell in row.items():
        opened = isinstance(cell, dict) and name.lower() in HOLDERS and "rubric" not in name.lower()
        found |= {f"{name}.{inside}": value for inside, value in cell.items()} if opened else {name: cell}
    return found


def listed(names: Iterable[str], joint: str = ", ") -> str:
    """The names in a row, the first ones of many."""
    names = [re.sub(r"[\r\n]+", " ", name) for name in names]
    more = [f"{len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return joint.join([*names[:MOST_SHOWN], *more])


def _shown(name: str, field: str) -> str:
    """A column with what it is read as, unless its name says that."""
    label = described_label(field)
    if label and not re.fullmatch(r"-?\d+(\.\d+)?", label):
        return f"{name} as the description of {label}"
    return name if name in (field, _COLLECTION + field) or label else f"{name} as {field}"


def _find(name: str, names: Sequence[str]) -> str | None:
    """The column of this name, or the only one that differs in case, blanks or brackets."""
    alike = [name] if name in names else [other for other in names if plain_name(other) == plain_name(name)]
    return alike[0] if len(alike) == 1 else None


def _meant(name: str, candidates: Iterable[str]) -> str:
    """A question after one of the candidates, by its aliases if it is a field, that is close."""
    known = {alias: field for field in candidates for alias in ALIASES.get(field, plain_name(field)).split()}
    close = [] if plain_name(name).endswith("id") else get_close_matches(plain_name(name), list(known), 1, 0.8)
    return f" (did you mean {known[close[0]]}?)" if close else ""
