"""Rubrics in the shapes in which people write them: a text, an object, columns of levels."""

import ast
import json
import re
from datetime import date, time
from reprlib import repr as shorten
from typing import Any, Mapping

from tract_lite.record import Rubric

# The keys of an object, the surest first.
CRITERIA = (
    *("criteria", "criterion", "evaluation_criteria", "scoring_criteria", "guidelines"),
    *("question", "description"),
)
LEVELS = ("descriptions", "levels", "scores", "score_descriptions")
SCALE = "scale"
LABEL, _TEXT = ("score", "label", "level", "value"), ("description", "text", "meaning")
# A column of the whole row must say what it is; inside a rubric a bare "1" or "score_1" does.
_DESCRIBES = r"(?:\w+\.)?(?:score[ _-]*(.+?)[ _-]+description|descriptions?[ _.-]+(.+))"
_DESCRIBES_INSIDE = (
    rf"{_DESCRIBES}|(?:score|level|rating)[ _-]*(-?\d+)|(-?\d+(?:\.\d+)?)(?:\s*[-:=(\u2013]\s*[^\d\s].*)?"
)
# The beginning of an object or a list, in JSON or as Python prints it; prose may begin with "[".
OBJECT = re.compile(r"\s*(\{\s*[\"'}\d-]|\[\s*[\[{\"'\]])")


def described_label(name: str, inside: bool = False) -> str | None:
    """The label that a column (or, `inside` a rubric, a key) describes: "score1_description"."""
    holder, dot, key = name.partition(".")
    if dot and holder.strip().lower().endswith("rubric") and not re.fullmatch(_DESCRIBES, name, re.IGNORECASE):
        name, inside = key, True
    match = re.fullmatch(_DESCRIBES_INSIDE if inside else _DESCRIBES, name.strip(), re.IGNORECASE)
    return match and _label(next(filter(None, match.groups())))


def parse_rubric(value: Any) -> tuple[Rubric | None, list[str]]:
    """The rubric that a cell holds, None for a blank one, and the keys of it that were not read;
    its scale is that of `rubric_scale`.
    Raises ValueError: it looks like an object and can't be read as one, or holds other things.
    """
    if isinstance(value, str) and OBJECT.match(value):
        value = parse_object(value)
    if isinstance(value, list):
        value = {"descriptions": value} if value else {}
    if not isinstance(value, Mapping):
        criteria = text_of(value, "the rubric")
        return (Rubric(criteria) if criteria else None), []
    content = {str(key): cell for key, cell in value.items() if cell not in (None, "", [], {})}
    if list(content) == ["rubric"]:
        return parse_rubric(content["rubric"])
    plain = {key: key.strip().lower().replace(" ", "_") for key in content}
    chosen = next((key for name in CRITERIA for key in content if plain[key] == name), None)
    criteria = text_of(content[chosen], plain[chosen]) or "" if chosen else ""
    descriptions, unread = dict[str, str](), list[str]()
    for key, cell in content.items():
        if plain[key] in LEVELS and not isinstance(cell, (str, int, float)):
            found, others = _levels(cell, plain[key])
            unread += [f"{key}.{name}" for name in others]
        elif label := described_label(key, inside=True):
            found = {label: text_of(cell, f"the description of {label}") or ""}
        elif key != chosen:
            unread += [key] if plain[key] != SCALE else []
            continue
        else:
            continue
        if twice := found.keys() & descriptions.keys():
            raise ValueError(f"the rubric describes {', '.join(sorted(twice))} twice")
        descriptions |= {label: text for label, text in found.items() if text}
    if not criteria and not descriptions and unread:
        raise ValueError(f"the rubric has neither criteria nor descriptions; its keys: {', '.join(content)}")
    return (Rubric(criteria, descriptions) if criteria or descriptions else None), unread


def rubric_scale(value: Any) -> Any:
    """What a rubric object, or one inside it, has as its own scale; None where it has none.
    Raises ValueError: it looks like an object and can't be read as one.
    """
    if isinstance(value, str):
        value = parse_object(value) if OBJECT.match(value) and SCALE in value.lower() else None
    if not isinstance(value, Mapping):
        return None
    found = next((cell for key, cell in value.items() if str(key).strip().lower() == SCALE), None)
    return rubric_scale(value["rubric"]) if found is None and list(value) == ["rubric"] else found


def text_of(value: Any, name: str) -> str | None:
    """A cell as text, None where it is blank; numbers and dates are spelled out.
    Raises ValueError: it is no text.
    """
    if value is None or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float, date, time)):
        raise ValueError(f"{name} must be text, got {shorten(value)}")
    return str(value) if str(value).strip() else None


def parse_object(text: str) -> Any:
    """What JSON, or an object as Python prints it, stands for. Raises ValueError: it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(f"it looks like an object and can't be read as JSON: {shorten(text)}")


def _levels(content: Any, name: str) -> tuple[dict[str, str], list[str]]:
    """Label and text of each level, of a mapping or a list of objects; and keys of them unread."""
    if isinstance(content, Mapping):
        pairs = [(described_label(str(key), inside=True) or str(key).strip(), text) for key, text in content.items()]
        unread: dict[str, None] = {}
    elif isinstance(content, list) and all(isinstance(level, Mapping) for level in content):
        keys = [(_key(level, LABEL, name), _key(level, _TEXT, name)) for level in content]
        pairs = [(_label(str(level[label])), level[text]) for level, (label, text) in zip(content, keys)]
        unread = dict.fromkeys(key for level, used in zip(content, keys) for key in level if key not in used)
    else:
        raise ValueError(f"{name} must map labels to texts, got {shorten(content)}")
    if len({label for label, _ in pairs}) < len(pairs):
        raise ValueError(f"{name} describes a label twice: {shorten(content)}")
    if wrong := [text for _, text in pairs if text is not None and not isinstance(text, str)]:
        raise ValueError(f"{name} must map labels to texts, got {shorten(wrong[0])}")
    return {label: text for label, text in pairs if text and text.strip()}, list(unread)


def _key(level: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of the names that a level has."""
    for name in names:
        if level.get(name) is not None:
            return name
    raise ValueError(f"{where}: a level needs a {names[0]}, got {shorten(dict(level))}")


def _label(text: str) -> str:
    """A label as a scale spells it: 1 for 1.0."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())
