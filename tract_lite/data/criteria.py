"""A rubric's file: one rubric for all rows, or several criteria with names and weights."""

import json
import math
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Mapping, NamedTuple

from tract_lite.data.rubrics import (
    CRITERIA,
    LABEL,
    LEVELS,
    OBJECT,
    SCALE,
    described_label,
    parse_object,
    parse_rubric,
    rubric_scale,
)
from tract_lite.data.scales import read_scale
from tract_lite.record import Rubric
from tract_lite.scale import ScoreScale

_NAME, _WEIGHT = "name", "weight"


class Criterion(NamedTuple):
    """One of several criteria: its name, its rubric, how much it weighs in the mean, and its own
    scale, where it has one."""

    name: str
    rubric: Rubric
    weight: float = 1.0
    scale: ScoreScale | None = None


def read_rubric(path: str | Path) -> Rubric:
    """The rubric in a file: a JSON object of criteria and descriptions, or a text of criteria.
    Raises ValueError: it holds none or several, or keys that are not read.
    """
    content = _content(path)
    if several := named_criteria(content, str(path)):
        names = ", ".join(criterion.name for criterion in several)
        raise ValueError(
            f"{path} has named criteria ({names})\n`tract-lite judge` takes them, one rubric is needed here"
        )
    return single_rubric(content, str(path))


def single_rubric(content: Any, where: str) -> Rubric:
    """The rubric that a text or an object is. Raises ValueError: it is none, or has keys that are
    not read."""
    try:
        rubric, unread = parse_rubric(content)
    except ValueError as error:
        advice = 'one rubric has "criteria", a text; several have a name each'
        raise ValueError(f"{where}: {error}\n{advice}") from error
    if rubric_scale(content) is not None:
        raise ValueError(f"{where} has a scale, and is for all rows\nleave it out there, and give it as --scale")
    if unread:
        known = "criteria and descriptions, which maps labels to texts"
        raise ValueError(f"{where} has keys that no rubric has: {', '.join(unread)}; a rubric has {known}")
    if rubric is None:
        raise ValueError(f"{where} holds no rubric")
    return rubric


def read_criteria(path: str | Path) -> list[Criterion]:
    """The named criteria in a file, none where it holds a single rubric. Raises ValueError: as
    `named_criteria`."""
    return named_criteria(_content(path), str(path))


def named_criteria(content: Any, where: str) -> list[Criterion]:
    """The criteria of a list of objects with a `name`, or of an object of names and rubrics; none
    where it is a single rubric.
    Raises ValueError: one can't be read, two have one name, or the weights are none.
    """
    criteria = [_criterion(name, value, where) for name, value in _entries(content, where)]
    names = [criterion.name.casefold() for criterion in criteria]
    if twice := [criterion.name for criterion in criteria if names.count(criterion.name.casefold()) > 1]:
        raise ValueError(f"{where} has two criteria named {twice[0]!r}\ngive each a name of its own")
    if criteria and not sum(criterion.weight for criterion in criteria) > 0:
        raise ValueError(f"{where}: all weights are 0\ngive at least one criterion a weight above 0")
    return criteria


def _entries(content: Any, where: str) -> list[tuple[Any, Any]]:
    """Name and rubric of each named criterion; none where the content is a single rubric."""
    if isinstance(content, Mapping):
        keys = {str(key).strip().lower().replace(" ", "_"): key for key in content}
        inside = next((keys[key] for key in ("rubric", "rubrics", "criteria") if key in keys), None)
        if inside is not None and isinstance(content[inside], (list, Mapping)):
            found = _entries(content[inside], where)
            if found and len(content) > 1:
                others = ", ".join(str(key) for key in content if key != inside)
                raise ValueError(
                    f"{where} has keys beside its criteria: {others}\na weight stands inside its criterion"
                )
            return found
        known = {*CRITERIA, *LEVELS, SCALE, _NAME, _WEIGHT, "rubric"}
        if any(key in known or described_label(key, inside=True) for key in keys):
            return []
        objects = [isinstance(value, Mapping) for value in content.values()]
        texts = [isinstance(value, str) for value in content.values()]
        is_named = any(objects) or len(texts) > 1
        return list(content.items()) if is_named and all(map(max, objects, texts)) else []
    if not isinstance(content, list):
        return []
    entries = [{str(key).strip().lower(): key for key in one} for one in content if isinstance(one, Mapping)]
    if not any(_NAME in keys and not keys.keys() & {*LABEL} for keys in entries):
        return []
    if without := [number for number, keys in enumerate(entries, 1) if _NAME not in keys]:
        raise ValueError(f"{where}: criterion {without[0]} has no name\ngive each criterion a name of its own")
    if len(entries) < len(content):
        raise ValueError(f"{where}: each criterion must be an object with a name and criteria")
    return [
        (one[keys[_NAME]], {key: value for key, value in one.items() if key != keys[_NAME]})
        for one, keys in zip(content, entries)
    ]


def _criterion(name: Any, value: Any, where: str) -> Criterion:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: the name of a criterion must be a text, got {shorten(name)}")
    name, weight = name.strip(), 1.0
    if isinstance(value, Mapping):
        weights = [key for key in value if str(key).strip().lower() == _WEIGHT]
        weight = value[weights[0]] if weights else 1.0
        value = {key: cell for key, cell in value.items() if key not in weights}
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: the weight of {name!r} is {shorten(weight)}\ngive a number of 0 or more")
    try:
        (rubric, unread), scale = parse_rubric(value), read_scale(rubric_scale(value))
    except ValueError as error:
        raise ValueError(f"{where}: {name!r}: {error}") from error
    if unread:
        raise ValueError(f"{where}: {name!r} has keys that no rubric has: {', '.join(unread)}")
    if rubric is None:
        raise ValueError(f"{where}: the criterion {name!r} is empty\nsay what it asks for")
    return Criterion(name, rubric, float(weight), scale)


def _content(path: str | Path) -> Any:
    """What a rubric's file holds: an object or a list, as JSON has it, or a text.
    Raises ValueError: it can't be read, or names something twice.
    """
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        raise ValueError(f"{path}: a rubric is read as JSON or as plain text\nsave it as one of them")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"the rubric {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: save the rubric as JSON or as plain text") from error
    if not OBJECT.match(text):
        return text

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path} has {twice[0]!r} twice\ngive each a name of its own")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=checked)
    except (json.JSONDecodeError, RecursionError):
        return parse_object(text)
