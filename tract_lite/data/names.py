"""What a column's name stands for: the fields, their aliases, one of several answers."""

import re

from tract_lite.data.rubrics import described_label

# Each field with the names that are known for it, in lower case, words joined by underscores.
ALIASES = {
    "instruction": "instruction question query user_input user_prompt user_message problem",
    "input": "input",
    "response": "response answer output actual_output completion generation generated generated_text candidate pred "
    "prediction reply model_output model_response model_answer assistant_response llm_output llm_response llm_answer",
    "criteria": "criteria criterion evaluation_criteria scoring_criteria guidelines",
    "rubric": "rubric scoring_rubric score_rubric",
    "reference": "reference reference_answer reference_response reference_output expected_output expected_answer "
    "expected ground_truth gold_answer gold_response ideal ideal_answer correct_answer target",
    "score": "score rating gold_score human_score human_rating overall_score overall_rating grade stars",
    "scale": "scale score_scale rating_scale",
    "gold_scores": "gold_scores human_scores annotator_scores",
    "feedback": "feedback reasoning rationale explanation justification critique comment comments annotator_comment",
    "prompt": "prompt",
    "messages": "messages conversation conversations dialogue dialog chat",
    "id": "id uid uuid item_id row_id example_id sample_id record_id",
    "feedback_ids": "feedback_ids",
    # Of several answers, the one that a person likes best.
    "preferred": "preferred winner",
}
_FIELDS = {alias: field for field, aliases in ALIASES.items() for alias in aliases.split()}
# As good as the field's own name: beside it, nobody knows which of the two is meant.
_RIVALS = {"gold_score", "human_score", "human_rating"}
# Exports join the names of nested objects with dots: those that say nothing, first or last.
HOLDERS = set("inputs outputs fields data item row record example annotation annotations".split())
HOLDERS |= {"rubric", "score_rubric", "scoring_rubric"}
_VALUES = {"value", "text", "content"}


def answer_named(name: str) -> tuple[str, str] | None:
    """The field and the letter or digit of a column with one of several answers: `response_a`."""
    match = re.fullmatch(r"(\w+?)_?((?<=_)[a-z]|\d)", plain_name(name))
    field = match and field_named(match[1])
    return (field, match[2]) if match and field in ("response", "messages") else None


def field_named(name: str) -> str | None:
    """The field that a column of this name is read as."""
    reading = reading_of(name)
    return reading and reading[1]


def reading_of(name: str) -> tuple[int, str] | None:
    """The field that a column's name stands for, and how sure that is: 0 for its own name."""
    plain = plain_name(name)
    if name in ALIASES or described_label(name):
        return 0, name
    if plain in _FIELDS:
        return 0 if plain in _RIVALS else 1 if plain == _FIELDS[plain] else 2, _FIELDS[plain]
    first, *_, last = [plain_name(part) for part in re.split(r"[./]", name)] * 2
    if first.startswith("reference") and _FIELDS.get(last) == "response":
        return 3, "reference"
    field = _FIELDS.get(last) if first in HOLDERS else _FIELDS.get(first) if last in _VALUES else None
    return (3, field) if field else None


def plain_name(name: str) -> str:
    """A name in lower case without a scale in brackets, its words joined by underscores."""
    bare = re.sub(r"[(\[]\s*\d[^)\]]*[)\]]", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    return re.sub(r"[\W_]+", "_", bare).strip("_").lower() if not re.search(r"[()\[\]]", bare) else bare.lower()
