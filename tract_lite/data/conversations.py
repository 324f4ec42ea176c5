"""Conversations: the last turn of the assistant is judged, the turns before are its task."""

import re
from reprlib import repr as shorten
from typing import Any, Mapping, Sequence

from tract_lite.data.rubrics import parse_object

# The names of a turn's speaker and of its text.
_ROLES, _TEXTS = ("role", "from", "type", "speaker"), ("content", "value", "text", "parts")
# What a turn may say of itself beside them.
_MARKS = {"id", "name", "index", "timestamp", "weight", "train", *_ROLES}
_SPEAKERS = {
    "User": "user human prompter",
    "Assistant": "assistant gpt model chatgpt bot ai",
    "System": "system developer",
}
_KNOWN = {name: speaker for speaker, names in _SPEAKERS.items() for name in names.split()}

Turn = tuple[str, str]


def looks_like_turns(value: Any) -> bool:
    """Whether a cell holds a list of turns, perhaps as JSON; other JSON is a text."""
    if isinstance(value, str):
        if not re.match(r"\s*\[\s*\{", value):
            return False
        try:
            return all(_speaker(turn) in _KNOWN and set(_TEXTS) & turn.keys() for turn in parse_object(value))
        except (ValueError, AttributeError, TypeError):
            return False
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def read_turns(value: Any) -> tuple[list[Turn], list[str]]:
    """Speaker and text of each turn, and the names of what else stands in turns.
    Raises ValueError: it is no plain conversation of texts.
    """
    turns = parse_object(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(turns, list) or not turns:
        wanted = 'a list of turns such as {"role": "user", "content": "..."}'
        raise ValueError(f"a conversation must be {wanted}, got {shorten(value)}; --columns messages= leaves it out")
    read, unread = [], dict[str, None]()
    for turn in turns:
        speaker, text, others = _turn(turn)
        read.append((speaker, text))
        unread |= dict.fromkeys(others)
    return read, list(unread)


def split_turns(turns: Sequence[Turn]) -> tuple[str, str]:
    """The task and the response to judge. Raises ValueError: the last turn answers nobody."""
    *before, (speaker, response) = turns
    if speaker != "Assistant":
        raise ValueError(
            f"a conversation must end with the assistant's turn, which is judged; it ends with {speaker}'s"
        )
    if not any(name == "User" for name, _ in before):
        raise ValueError("a conversation needs a turn of the user before the assistant's last one")
    return joined(before), response


def joined(turns: Sequence[Turn]) -> str:
    """Turns as one text: a single one of the user as it is, several with their speakers."""
    if [speaker for speaker, _ in turns] == ["User"]:
        return turns[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in turns)


def _speaker(turn: Mapping[str, Any]) -> str:
    return next((str(turn[name]).strip().lower() for name in _ROLES if name in turn), "")


def _turn(turn: Any) -> tuple[str, str, list[str]]:
    role = next((name for name in _ROLES if isinstance(turn, Mapping) and name in turn), None)
    content = next((name for name in _TEXTS if isinstance(turn, Mapping) and name in turn), None)
    if role is None or content is None:
        raise ValueError(f"a turn must have a role and a content, got {shorten(turn)}")
    speaker = _KNOWN.get(str(turn[role]).strip().lower())
    if speaker is None:
        raise ValueError(f"a turn of {turn[role]!r} can't be judged: only user, assistant and system are known")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError("a turn that calls tools can't be judged as text")
    others = [
        name for name, value in turn.items() if name not in _MARKS | {content} and value not in (None, "", [], {})
    ]
    return speaker, _text(turn[content]), others


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else content
    if content is None:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"a turn's content must be text alone, got {shorten(content)}")
    return content
