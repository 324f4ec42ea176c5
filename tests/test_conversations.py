"""Conversations as rows."""

import json

import pytest

from tract_lite.data.records import BadRows, records_from

CHAT = [{"role": "user", "content": "How do I pack?"}, {"role": "assistant", "content": "Take a map."}]
SHAREGPT = [{"from": "human", "value": "How do I pack?"}, {"from": "gpt", "value": "Take a map."}]
LONG = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How do I pack?"},
    {"role": "assistant", "content": "For where?"},
    {"role": "user", "content": [{"type": "text", "text": "The hills,"}, {"type": "text", "text": "in May."}]},
    {"role": "assistant", "content": "Take a map."},
]


@pytest.mark.parametrize("column", ["messages", "conversations", "Conversation", "data.messages"])
@pytest.mark.parametrize("turns", [CHAT, SHAREGPT, json.dumps(CHAT), json.dumps(SHAREGPT)])
def test_the_last_turn_is_judged_and_the_one_before_is_its_instruction(column, turns):
    [record] = records_from([{column: turns, "criteria": "Is it useful?", "score": 4}])
    assert (record.instruction, record.response, record.score) == ("How do I pack?", "Take a map.", 4)
    assert record.rubric.criteria == "Is it useful?" and record.prompt is None


def test_several_turns_are_told_with_their_speakers():
    [record] = records_from([{"messages": LONG, "score": 4}])
    assert record.response == "Take a map."
    told = ["System: Be short.", "User: How do I pack?", "Assistant: For where?", "User: The hills,\nin May."]
    assert record.instruction == "\n\n".join(told)


def test_a_conversation_may_stand_in_the_prompt_or_before_a_response():
    expected = ("User: How do I pack?\n\nAssistant: For where?\n\nUser: The hills,\nin May.", "Take a map.")
    rows = [
        {"prompt": LONG[1:4], "response": "Take a map."},
        {"messages": LONG[1:4], "response": "Take a map."},
        {"instruction": LONG[1:4], "answer": [LONG[4]]},
    ]
    for row in rows:
        [record] = records_from([row])
        assert (record.instruction, record.response) == expected


def test_a_first_turn_that_is_repeated_in_a_column_is_left_out_and_named(caplog):
    [record] = records_from([{"prompt": "How do I pack?", "messages": CHAT}])
    assert record.instruction == "How do I pack?" and "not read: prompt" in caplog.text


@pytest.mark.parametrize("text", ["content", "text", "value"])
@pytest.mark.parametrize("role", ["role", "from", "type", "speaker"])
def test_turns_are_known_by_their_usual_names(role, text):
    turns = [{role: "human", text: "How do I pack?"}, {role: "ai", text: "Take a map."}]
    for cell in (turns, json.dumps(turns), str(turns)):
        [record] = records_from([{"messages": cell}])
        assert (record.instruction, record.response) == ("How do I pack?", "Take a map.")


def test_turns_of_several_parts_are_texts_if_all_parts_are():
    turns = [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": ["A", "B"]}]
    [record] = records_from([{"messages": turns}])
    assert (record.instruction, record.response) == ("Q", "A\nB")


def test_what_else_stands_in_turns_is_named(caplog):
    last = {"role": "assistant", "content": None, "refusal": "I can't.", "id": 7}
    [record] = records_from([{"messages": [CHAT[0] | {"images": ["x.png"]}, last]}])
    assert record.response == "" and "not read: messages.images, messages.refusal" in caplog.text


def test_a_conversation_as_text_is_read_in_a_prompt_too():
    [record] = records_from([{"prompt": json.dumps(LONG[:2]), "response": "r"}])
    assert record.instruction == "System: Be short.\n\nUser: How do I pack?"


@pytest.mark.parametrize(
    "text", ['[{"type": "fruit", "name": "apple"}]', '[{"from": "Berlin"}]', '[{"role": "x"}] is what?']
)
def test_other_json_is_a_text(text):
    [record] = records_from([{"instruction": text, "response": text}])
    assert record.instruction == record.response == text


def test_an_empty_last_turn_is_an_empty_response():
    [record] = records_from([{"messages": [CHAT[0], {"role": "assistant", "content": None}]}])
    assert (record.instruction, record.response) == ("How do I pack?", "")


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"messages": CHAT[:1]}, "must end with the assistant's turn, which is judged; it ends with User's"),
        ({"messages": CHAT[1:]}, "needs a turn of the user before"),
        ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, "a turn of 'tool' can't be judged"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [1]}]}, "calls tools"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": {"image": 1}}]}, "content must be text"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "image"}]}]}, "content must be text"),
        ({"messages": "How do I pack?"}, "must be a list of turns such as .*--columns messages= leaves it out"),
        ({"messages": ["How do I pack?"]}, "a turn must have a role"),
        ({"messages": [{"speaker": "A", "text": "b"}]}, "a turn of 'A' can't be judged"),
        ({"messages": [{"role": "user", "says": "b"}]}, "a turn must have a role and a content"),
        ({"messages": CHAT, "response": "Take a whistle."}, "both the response and the last turn"),
        ({"messages": CHAT, "instruction": "How do I hike?"}, "both instruction and a conversation"),
        ({"instruction": "i", "response": CHAT}, "response must be one turn of the assistant"),
    ],
)
def test_what_is_not_plain_is_refused(row, fault):
    with pytest.raises(BadRows, match=fault):
        records_from([row, {"instruction": "i", "response": "r"}])
