"""A row to a record: plain, a conversation, of the Feedback Collection, or of a benchmark."""

import re
from dataclasses import asdict, replace
from reprlib import repr as shorten
from statistics import fmean
from typing import Any, Mapping

from tract_lite.data.columns import BENCHMARK, Columns, Fields, flat, listed, may_be_response
from tract_lite.data.conversations import joined, looks_like_turns, read_turns, split_turns
from tract_lite.data.rubrics import parse_rubric, rubric_scale, text_of
from tract_lite.data.scales import read_scale, scale_cell
from tract_lite.data.scores import parse_score, parse_scores
from tract_lite.record import Annotation, Record, Rubric
from tract_lite.scale import ScoreScale

# What a ready prompt holds already, where it is one.
_ASKED = ("instruction", "input", "criteria", "rubric", "reference")


def record_to_row(record: Record) -> dict[str, Any]:
    """A plain row that `to_record` reads back as this one, without its annotations.

    Of a record with a ready prompt, texts that are not asked are left out.
    """
    row = asdict(replace(record, annotations=(), scale=None))
    row["scale"] = record.scale and scale_cell(record.scale)
    unasked = () if record.prompt is None else ("instruction", "response", "rubric", "reference")
    return {k: v for k, v in row.items() if k not in unasked and (v not in (None, "", ()) or k == "response")}


def to_record(
    row: Any,
    columns: Columns,
    scale: ScoreScale | None = None,
    rubric: Rubric | None = None,
    unread_golds: list[str] | None = None,
) -> Record:
    """The record of a row, without an id where the row has none; `rubric` in place of its own.

    Gold scores are read as the row's own scale has them, or else as `scale` does. What is wrong
    with its gold score is added to `unread_golds`, if given.
    Raises ValueError: what is wrong with the row.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must have named columns, got {shorten(row)}")
    row = flat(row)
    fields, parts = columns.fields(row), list[str]()
    own = None if columns.given.get("scale") == "" else _own_scale(fields, with_rubric=rubric is None)
    if all(name in fields for name in BENCHMARK):
        record = _from_benchmark(fields, own or scale)
    else:
        record = _asked(row, fields, columns, parts)
        if record.prompt is None:
            reference = _text(fields, "reference")
            record = replace(record, rubric=rubric or _rubric(fields, parts), reference=reference)
        score, golds = _scores(fields, own or scale, unread_golds)
        record = replace(
            record, score=score, gold_scores=golds, feedback=_feedback(row, fields), feedback_ids=_feedback_ids(fields)
        )
    if rubric and record.prompt is not None:
        raise ValueError("a ready prompt is asked as it stands: --criteria or --rubric would not be asked")
    record = replace(record, id=_text(fields, "id"), scale=own)
    columns.count(row, fields, parts)
    return record


def _asked(row: Mapping[str, Any], fields: Fields, columns: Columns, parts: list[str]) -> Record:
    """What is asked: a ready prompt, a conversation, or an instruction and a response.

    A `prompt` beside a response is its instruction; alone, it is ready and asked as it stands.
    """
    if fields.filled("messages"):
        return _from_turns(fields, parts)
    beside = [name for name in _ASKED if fields.filled(name)]
    # In tables of both kinds of rows, these two are not blank but missing.
    alone = fields.cell("response") is None and fields.cell("instruction") is None and "instruction" in fields
    if fields.filled("prompt") and ("response" not in fields or alone or columns.given.get("prompt")):
        prompt = _text(fields, "prompt")
        _check_ready(row, fields, columns, beside)
        return Record(prompt=prompt)
    if "response" not in fields or any(name.startswith("orig_response_") for name in row):
        raise ValueError(columns.without_response(row))
    if fields.filled("prompt") and not fields.filled("instruction"):
        instruction = _spoken(fields, "prompt", "instruction", parts)
    else:
        instruction = _spoken(fields, "instruction", "instruction", parts)
        name = fields.columns.get("instruction", "instruction")
        if fields.filled("prompt") and not name.strip().lower().endswith("instruction"):
            both = f"{name} or {fields.columns['prompt']} may be the instruction"
            raise ValueError(f"{both}: --columns instruction={name} prompt= chooses one")
    texts = [instruction, _spoken(fields, "input", "input", parts)]
    return Record(instruction="\n\n".join(filter(str.strip, texts)), response=_response(fields, parts))


def _check_ready(row: Mapping[str, Any], fields: Fields, columns: Columns, beside: list[str]) -> None:
    """Raises ValueError: a text stands beside the prompt, and would not be asked."""
    if columns.given.get("prompt"):
        if fields.filled("response"):
            advice = "--columns response= leaves it out"
            raise ValueError(f"a ready prompt and a response, which would not be asked: {advice}")
        return
    names = [fields.columns[name] for name in [*beside, *fields.descriptions()]]
    known = set(fields.columns.values())
    unread = [name for name in columns.unread(row, fields) if name not in known]
    names += [name for name in unread if may_be_response(name, row[name])]
    if names:
        ways = "name it with --columns response=NAME, or say --columns prompt=prompt if the prompt is ready"
        raise ValueError(f"a prompt beside {listed(names)}, and no response: {ways}")


def _from_turns(fields: Fields, parts: list[str]) -> Record:
    turns, unread = read_turns(fields.take("messages"))
    parts += [f"{fields.columns['messages']}.{name}" for name in unread]
    if fields.filled("response"):
        if turns[-1][0] == "Assistant":
            advice = "--columns response= or messages= leaves one out"
            raise ValueError(f"both the response and the last turn of the conversation may be what is judged: {advice}")
        task, response = joined(turns), _response(fields, parts)
    else:
        task, response = split_turns(turns)
    for name in ("instruction", "prompt", "input"):
        # Some data sets repeat the first turn in a column of its own, which then stays unread.
        if fields.filled(name) and str(fields.take(name)).strip() not in task:
            raise ValueError(f"both {name} and a conversation say what was asked: --columns {name}= leaves it out")
        fields.read.pop(name, None)
    return Record(instruction=task, response=response)


def _spoken(fields: Fields, name: str, read_as: str, parts: list[str]) -> str:
    """A text, or a conversation as one; empty where there is none."""
    if looks_like_turns(value := fields.take(name, read_as)):
        turns, unread = read_turns(value)
        parts += [f"{fields.columns[name]}.{key}" for key in unread]
        return joined(turns)
    return text_of(value, name) or ""


def _response(fields: Fields, parts: list[str]) -> str:
    """The text to judge, which may be empty."""
    value = fields.take("response")
    if not looks_like_turns(value):
        return value if isinstance(value, str) else text_of(value, "response") or ""
    turns, unread = read_turns(value)
    parts += [f"{fields.columns['response']}.{key}" for key in unread]
    if [speaker for speaker, _ in turns] != ["Assistant"]:
        raise ValueError("response must be one turn of the assistant, or a text")
    return turns[0][1]


def _rubric(fields: Fields, parts: list[str]) -> Rubric | None:
    criteria, descriptions = "", dict[str, str]()
    for name in ("rubric", "criteria"):
        read, unread = parse_rubric(fields.take(name))
        parts += [f"{fields.columns[name]}.{key}" for key in unread]
        if read and criteria and read.criteria not in ("", criteria):
            raise ValueError(f"two criteria: --columns {name}= leaves one out")
        if read:
            criteria = criteria or read.criteria
            _add(descriptions, read.descriptions)
    for name, label in fields.descriptions().items():
        if text := _text(fields, name):
            _add(descriptions, {label: text})
    return Rubric(criteria, descriptions) if criteria or descriptions else None


def _add(descriptions: dict[str, str], more: Mapping[str, str]) -> None:
    """Add descriptions of labels. Raises ValueError: a label has another one."""
    if twice := [label for label in more if descriptions.get(label, more[label]) != more[label]]:
        raise ValueError(f"the rubric describes {listed(twice)} twice: leave one out, as in --columns rubric=")
    descriptions |= more


def _own_scale(fields: Fields, with_rubric: bool) -> ScoreScale | None:
    """The scale that a row names, in a column or in its rubric.
    Raises ValueError: it can't be read, or there are two.
    """
    cells = [fields.take("scale")]
    if with_rubric:
        cells += [rubric_scale(fields.cell(name)) for name in ("rubric", "criteria")]
    try:
        named = [read_scale(cell) for cell in cells]
    except ValueError as error:
        raise ValueError(f"{error}: --columns scale= leaves it out") from error
    found = list(dict.fromkeys(scale for scale in named if scale is not None))
    if len(found) > 1:
        raise ValueError(f"two scales, {found[0]} and {found[1]}: --columns scale= leaves both out")
    return found[0] if found else None


def _scores(
    fields: Fields, scale: ScoreScale | None, unread_golds: list[str] | None
) -> tuple[float | None, tuple[float, ...]]:
    """The gold score, the mean of several, and these."""
    try:
        given, several = (parse_scores(fields.take(name), scale) for name in ("score", "gold_scores"))
    except ValueError as error:
        if unread_golds is None:
            raise
        unread_golds.append(str(error))
        return None, ()
    several = several or (given if len(given) > 1 else ())
    return (fmean(given or several) if given or several else None), several


def _feedback(row: Mapping[str, Any], fields: Fields) -> str | None:
    feedback = _text(fields, "feedback")
    if feedback or "orig_response" not in row:
        return feedback
    return re.sub(r"\s*\[RESULT\]\s*[\d.]+\s*$", "", text_of(row.get("output"), "output") or "") or None


def _from_benchmark(fields: Fields, scale: ScoreScale | None) -> Record:
    columns = fields.take("gpt4_feedback"), fields.take("gpt4_score")
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        single = "--columns score=gpt4_score feedback=gpt4_feedback reads single ones"
        raise ValueError(f"gpt4_feedback and gpt4_score must be lists of one length; {single}")
    read = [(text_of(text, "gpt4_feedback"), parse_score(score, scale)) for text, score in zip(*columns)]
    annotations = tuple(Annotation(text, score) for text, score in read if text is not None and score is not None)
    if len(annotations) < len(read):
        raise ValueError("gpt4_feedback and gpt4_score must not have gaps")
    if not (prompt := _text(fields, "prompt")):
        raise ValueError("neither a prompt nor a response: the instruction of a benchmark row is its ready prompt")
    score = fmean(annotation.score for annotation in annotations) if annotations else None
    return Record(prompt=prompt, score=score, annotations=annotations)


def _feedback_ids(fields: Fields) -> tuple[int, ...] | None:
    ids = fields.take("feedback_ids") or []
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise ValueError(f"feedback_ids must be a list of token ids, got {shorten(ids)}")
    return tuple(ids) or None


def _text(fields: Fields, name: str) -> str | None:
    try:
        return text_of(fields.take(name), name)
    except ValueError as error:
        raise ValueError(f"{error}: --columns {name}= leaves it out") from error
