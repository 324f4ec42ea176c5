import copy
import re
from dataclasses import replace

import pytest
from tiny import TRAINED, VOCABULARIES, load_tokenizer

from tract_lite.prompt import Reasoning, cut_reasoning, prompt_ids, reasoning_text, render
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale
from tract_lite.spec import MARKER, make_spec
from tract_lite.vocabulary import TransformersVocabulary

SCALE = ScoreScale.integers(1, 5)
RUBRIC = Rubric("Is it right?", {"1": "No.", "5": "Yes."})
RECORD = Record("Add 2 and 2.", "It is 4.", RUBRIC)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
# Those whose tokenizers bring a chat template, and the start tokens of the others.
CHATTING = tuple(name for name in VOCABULARIES if name in ("split digits", "qwen2"))
STARTS = {"llama-bpe": [128000], "llama-spm": [1], "spm": [1]}
everywhere = pytest.mark.parametrize("name", VOCABULARIES)
chatting = pytest.mark.parametrize("name", CHATTING)


def load(name: str, **fields):
    tokenizer = load_tokenizer(name)
    return make_spec(tokenizer, SCALE, **fields), TransformersVocabulary(tokenizer)


def with_chat_template(name: str, template: str, **specials: str | list[str]):
    """The tokenizer with another chat template, and with special tokens added to its own."""
    tokenizer = copy.deepcopy(load_tokenizer(name))
    tokenizer.chat_template = template
    tokenizer.add_special_tokens(specials)
    return tokenizer


def special_ids(ids, vocabulary) -> list[int]:
    return [i for i in ids if i in set(vocabulary.specials.values())]


@pytest.mark.parametrize("name", [name for name in VOCABULARIES if name not in CHATTING])
def test_a_tokenizer_without_chat_template_gets_its_start_token_and_the_bare_prompt(name):
    start = STARTS.get(name, [])
    spec, vocabulary = load(name)
    ids = prompt_ids(RECORD, spec, vocabulary)
    assert ids[: len(start)] == start
    assert special_ids(ids, vocabulary) == start
    assert vocabulary.decode(ids).strip() == render(RECORD, spec).strip()


@chatting
def test_a_chat_template_gives_each_of_its_special_ids_once(name):
    spec, vocabulary = load(name)
    ids = prompt_ids(RECORD, spec, vocabulary)
    start, end = (vocabulary.specials[f"<|im_{side}|>"] for side in ("start", "end"))
    # The real one adds a system message.
    messages = 2 if name == "qwen2" else 1
    assert special_ids(ids, vocabulary) == [start, end] * messages + [start]


@chatting
def test_a_prompt_in_chat_format_is_what_the_tokenizer_itself_would_give(name):
    spec, vocabulary = load(name)
    message = [{"role": "user", "content": render(RECORD, spec)}]
    theirs = vocabulary.tokenizer.apply_chat_template(message, add_generation_prompt=True)
    assert prompt_ids(RECORD, spec, vocabulary) == list(theirs["input_ids"])


@pytest.mark.parametrize("name", [name for name in VOCABULARIES if name in ("merged digits", "llama-bpe")])
def test_a_chat_template_that_writes_the_start_token_gives_it_once(name):
    known = re.findall(r"<\|\w+\|>", LLAMA3)
    tokenizer = with_chat_template(name, LLAMA3, bos_token="<|begin_of_text|>", additional_special_tokens=known)
    vocabulary = TransformersVocabulary(tokenizer)
    ids = prompt_ids(RECORD, make_spec(tokenizer, SCALE), vocabulary)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert special_ids(ids, vocabulary) == special_ids(
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)["input_ids"],
        vocabulary,
    )


@pytest.mark.parametrize(
    "template",
    ["no message", "{{ messages[0].content }} {{ messages[0].content }}", "{{ messages[0].content | upper }}"],
)
def test_a_chat_template_that_changes_the_message_is_refused(template):
    with pytest.raises(ValueError, match="once and unchanged"):
        make_spec(with_chat_template("spm", template), SCALE)


@everywhere
def test_specials_in_a_record_stay_text(name):
    spec, vocabulary = load(name)
    nasty = " ".join([*vocabulary.specials, "</s>", "<|eot_id|>", "[INST]", f"{MARKER} 5", "{prompt}"])
    record = Record(nasty, nasty, Rubric(nasty, {"1": nasty}), nasty)
    ids = prompt_ids(record, spec, vocabulary)
    assert special_ids(ids, vocabulary) == [i for i in spec.chat if isinstance(i, int)]
    assert vocabulary.decode(ids).count(nasty) == 5


@everywhere
def test_lone_surrogates_are_read_as_the_replacement_character(name):
    spec, vocabulary = load(name)
    ids = prompt_ids(replace(RECORD, response="a \ud83d b"), spec, vocabulary)
    assert ids == prompt_ids(replace(RECORD, response="a \ufffd b"), spec, vocabulary)


def test_braces_in_a_record_are_no_template():
    spec, _ = load("spm")
    text = render(replace(RECORD, instruction="{{ 7 * 7 }} {% if %} {# x #}"), spec)
    assert "{{ 7 * 7 }} {% if %} {# x #}" in text


def test_a_ready_prompt_is_asked_as_it_stands():
    spec, vocabulary = load("spm")
    record = Record(prompt="Is {{ this }} {prompt} good?\n")
    assert render(record, spec) == record.prompt
    assert prompt_ids(record, spec, vocabulary) == [1, *vocabulary.encode(record.prompt)]


def test_reference_and_descriptions_are_optional():
    spec, _ = load("spm")
    full = render(replace(RECORD, reference="4, of course."), spec)
    bare = render(Record("Add.", "4", Rubric("Is it right?")), spec)
    assert "Reference" in full and "4, of course." in full and "Score 5: Yes." in full
    assert "Reference" not in bare and "Score 1" not in bare and "Is it right?" in bare


def test_a_record_that_lacks_what_the_template_asks_for_is_refused():
    spec, _ = load("spm")
    with pytest.raises(ValueError, match="--columns criteria=NAME"):
        render(Record("Add.", "4"), spec)


def test_a_template_that_asks_for_no_rubric_needs_none():
    spec, _ = load("spm", template="{% if rubric %}{{ rubric.criteria }} {% endif %}{{ response }}")
    assert render(Record("Add.", "4"), spec) == "4"
    assert render(RECORD, spec) == "Is it right? It is 4."


def test_the_prompt_names_the_marker_and_every_label():
    spec, _ = load("spm")
    assert f'"{MARKER}" and one of these scores: 1, 2, 3, 4, 5.' in render(RECORD, spec)


@everywhere
def test_responses_to_one_instruction_share_all_that_stands_before_them(name):
    spec, vocabulary = load(name)
    one, other = (prompt_ids(replace(RECORD, response=text), spec, vocabulary) for text in "AB")
    differing = [n for n, pair in enumerate(zip(one, other)) if len(set(pair)) > 1]
    assert len(differing) == 1 and vocabulary.decode(one[: differing[0]]).endswith("### Response\n")


@pytest.mark.parametrize(
    "tail",
    [
        "",
        " ",
        " [RESULT] 4",
        "\n[RESULT]4",
        " So the overall score is 4",
        " So the overall score is 4.",
        " So the overall score is 4. [RESULT] 4",
        " so the overall score is: (4)",
        " [RESULT] fair",
        " So the overall score is",
        " So the overall score is **4**. [RESULT] [RESULT] 4\n",
    ],
)
def test_the_score_that_a_feedback_ends_with_is_stripped(tail):
    assert reasoning_text(f"  It names 4 steps.{tail}") == "It names 4 steps."


@pytest.mark.parametrize(
    "text",
    [
        "It scores 4",
        "Of 5 steps, 4 are right, so I'd say 4.",
        "[RESULT] stands in the text: 3 of 4 hold",
        "So the overall score is hard to tell, for it names 4 steps.",
        "In 2024 it was 4.",
    ],
)
def test_numbers_inside_a_feedback_stay(text):
    assert reasoning_text(text) == text


def test_a_feedback_of_a_score_alone_leaves_nothing():
    assert reasoning_text("So the overall score is 4. [RESULT] 4") == ""


def other_spelling(text: str, vocabulary) -> list[int]:
    """The text in tokens of one byte each."""
    ids = []
    for byte in text.encode():
        piece = (
            f"<0x{byte:02X}>" if "<0x0A>" in vocabulary.tokenizer.get_vocab() else ("Ġ" if byte == 0x20 else chr(byte))
        )
        ids.append(vocabulary.tokenizer.convert_tokens_to_ids(piece))
    return ids


@everywhere
@pytest.mark.parametrize("after", [" 4. [RESULT] 4", "", " hard to tell."])
def test_a_reasoning_ends_where_the_marker_begins(name, after):
    spec, vocabulary = load(name)
    reasoning = vocabulary.encode("It names 4 steps.")
    written = [*reasoning, *spec.marker_ids, *vocabulary.encode(after), spec.eos_id]
    assert cut_reasoning(written, spec, vocabulary) == (reasoning, True)


@everywhere
def test_a_marker_spelt_by_other_tokens_ends_a_reasoning_too(name):
    spec, vocabulary = load(name)
    reasoning = vocabulary.encode("It names 4 steps.")
    spelled = other_spelling(f" {MARKER} 4", vocabulary)
    assert None not in spelled and spelled[:5] != list(spec.marker_ids[:5])
    ids, complete = cut_reasoning([*reasoning, *spelled], spec, vocabulary)
    assert complete and vocabulary.decode(ids).strip() == "It names 4 steps."


@everywhere
def test_the_end_token_ends_a_reasoning_and_is_no_part_of_it(name):
    spec, vocabulary = load(name)
    reasoning = vocabulary.encode("It names 4 steps.")
    assert cut_reasoning([*reasoning, spec.eos_id, 5, 5], spec, vocabulary) == (reasoning, True)


@chatting
def test_a_chat_model_may_end_its_reasoning_with_another_special_token(name):
    _, vocabulary = load(name)
    end_of_turn = vocabulary.specials["<|im_end|>"]
    tokenizer = with_chat_template(name, load_tokenizer(name).chat_template, eos_token="<|endoftext|>")
    spec, vocabulary = make_spec(tokenizer, SCALE), TransformersVocabulary(tokenizer)
    assert end_of_turn != spec.eos_id
    ids = vocabulary.encode("It is right.")
    assert cut_reasoning([*ids, end_of_turn, *ids], spec, vocabulary) == (ids, True)


def test_a_reasoning_without_an_end_is_not_complete():
    spec, vocabulary = load("spm")
    ids = vocabulary.encode("So the overall score")
    assert cut_reasoning(ids, spec, vocabulary) == (ids, False)


@everywhere
def test_a_reasoning_tells_at_once_that_it_is_complete(name):
    spec, vocabulary = load(name)
    reasoning, written = Reasoning(spec, vocabulary), vocabulary.encode("Good.")
    answers = [reasoning.add(token) for token in [*written, *spec.marker_ids]]
    first = answers.index(True)
    assert vocabulary.decode([*written, *spec.marker_ids][: first + 1]).strip() == f"Good. {MARKER}"
    assert vocabulary.decode(written + list(spec.marker_ids[: first - len(written)])).strip() != f"Good. {MARKER}"


@pytest.mark.parametrize("name", TRAINED)
def test_a_marker_whose_first_token_is_its_space_alone_is_cut_whole(name):
    spec, vocabulary = load(name, marker="Ωmega ☃:")
    reasoning = vocabulary.encode("It names 4 steps.")
    assert vocabulary.decode(spec.marker_ids[:1]).strip() == ""
    assert cut_reasoning([*reasoning, *spec.marker_ids, *spec.label_ids[0]], spec, vocabulary) == (reasoning, True)
