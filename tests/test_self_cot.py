from dataclasses import replace

import pytest
from tiny import WritingEngine, load_tokenizer

from tract_lite.data.jsonl import read_rows
from tract_lite.data.records import read_records
from tract_lite.judge import Judge
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale
from tract_lite.self_cot import generate_cots
from tract_lite.spec import make_spec
from tract_lite.training.encode import encode_record
from tract_lite.vocabulary import TransformersVocabulary


def make_engine() -> WritingEngine:
    tokenizer = load_tokenizer("spm")
    engine = WritingEngine(make_spec(tokenizer, ScoreScale.integers(1, 5)), TransformersVocabulary(tokenizer))
    engine.identity, engine.shape = {"model": "tiny"}, {"parallel": 4}
    return engine


def make_records(*texts: str) -> list[Record]:
    return [
        Record(
            "Do it.",
            text,
            Rubric("Is it good?", {"1": "No."}),
            "So.",
            score=1 + n % 5 / 2,
            feedback="The old one.",
            id=f"item {n}",
        )
        for n, text in enumerate(texts)
    ]


def texts_read_by(engine: WritingEngine) -> list[str]:
    return [prompt.rpartition("### Response\n")[2].partition("\n")[0] for prompt in engine.prompts]


def test_all_but_the_reasoning_stays_and_the_file_holds_what_is_returned(tmp_path):
    engine = make_engine()
    records = make_records(*"abcdefg")
    written, rejected = generate_cots(Judge(engine), records, tmp_path / "cots.jsonl")
    assert rejected == {} and read_records(tmp_path / "cots.jsonl") == written
    assert [replace(w, feedback=None, feedback_ids=None) for w in written] == [
        replace(r, feedback=None) for r in records
    ]
    for record in written:
        assert record.feedback == engine.vocabulary.decode(record.feedback_ids).strip()
    assert len({record.feedback for record in written}) == 7


def test_training_on_the_file_reads_the_ids_that_the_judge_wrote(tmp_path):
    engine = make_engine()
    [record], _ = generate_cots(Judge(engine), make_records("a"), tmp_path / "cots.jsonl")
    example = encode_record(record, engine.spec, engine.vocabulary)
    judgement = Judge(make_engine()).score(make_records("a")[0])
    written = example.ids[example.prompt_length : -2 - len(engine.spec.marker_ids)]
    assert written == judgement.feedback_ids[0]


def test_rejects_are_counted_with_their_reasons_and_left_out(tmp_path):
    records = make_records("a", "CUT", "EMPTY", "b", "LONG", "CUT")
    written, rejected = generate_cots(Judge(make_engine()), records, tmp_path / "cots.jsonl")
    assert [record.response for record in written] == ["a", "b"]
    assert rejected == {"cut off by the length limit": 2, "empty": 1, "too long": 1}


class CutEngine(WritingEngine):
    """Writes the judged text itself as a reasoning, and is cut off at its end."""

    def _sample(self, prompt, seed, given):
        [text] = texts_read_by(self)[-1:]
        return replace(super()._sample("CUT", seed, given), reasoning=self.vocabulary.encode(text))


def test_a_reasoning_that_is_cut_off_ends_at_its_last_whole_sentence(tmp_path):
    texts = {
        "It is good. It is too lo": "It is good.",
        'He says "no!" And th': 'He says "no!"',
        "It has 3.5 of 4. And 2.": "It has 3.5 of 4. And 2.",
        "It has 3.5 of 4. And 2.7": "It has 3.5 of 4.",
        "\u597d\u3002\u4e0d": "\u597d\u3002",
        "No end in sight": None,
        "1. 2": None,
    }
    plain = make_engine()
    engine = CutEngine(plain.spec, plain.vocabulary)
    engine.identity, engine.shape = plain.identity, plain.shape
    written, rejected = generate_cots(Judge(engine), make_records(*texts), tmp_path / "cots.jsonl")
    assert {record.response: record.feedback for record in written} == {t: s for t, s in texts.items() if s}
    assert rejected == {"cut off by the length limit": 2}
    for record in written:
        assert engine.vocabulary.decode(record.feedback_ids).strip() == record.feedback
    assert all(row["shortened"] is True for row in read_rows(tmp_path / "cots.jsonl"))
    assert read_records(tmp_path / "cots.jsonl") == written


def test_a_run_that_was_stopped_goes_on_and_judges_nothing_twice(tmp_path):
    records = make_records("a", "b", "CUT", "c", "d", "e", "f", "g", "h", "i")
    stopping = [replace(r, response="STOP") if n == 6 else r for n, r in enumerate(records)]
    out = tmp_path / "cots.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_cots(Judge(make_engine()), stopping, out)
    # All that was complete, as it came: the engine answers in another order.
    kept = [record.response for record in read_records(out)]
    assert kept == ["c", "b", "a", "g"]

    engine = make_engine()
    written, rejected = generate_cots(Judge(engine), records, out)
    assert sorted(texts_read_by(engine)) == ["d", "e", "f", "h", "i"]
    assert rejected == {"cut off by the length limit": 1}
    whole, _ = generate_cots(Judge(make_engine()), records, tmp_path / "whole.jsonl")
    assert written == whole and [record.response for record in written] == list("abcdefghi")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_only_what_is_asked_for_is_returned_in_the_order_of_the_question(tmp_path):
    records = make_records("a", "b", "CUT", "c")
    generate_cots(Judge(make_engine()), records, tmp_path / "cots.jsonl")
    written, rejected = generate_cots(Judge(make_engine()), [records[3], records[0]], tmp_path / "cots.jsonl")
    assert [record.response for record in written] == ["c", "a"] and rejected == {}


def test_a_finished_file_is_not_judged_again(tmp_path):
    out = tmp_path / "cots.jsonl"
    first = generate_cots(Judge(make_engine()), make_records("a", "CUT"), out)
    engine = make_engine()
    assert generate_cots(Judge(engine), make_records("a", "CUT"), out) == first
    assert engine.prompts == []


def test_a_half_written_line_is_cut_off_and_its_item_judged_again(tmp_path):
    records = make_records("a", "b", "c")
    out = tmp_path / "cots.jsonl"
    whole, _ = generate_cots(Judge(make_engine()), records, out)
    data = out.read_bytes()
    out.write_bytes(data[:-20])
    engine = make_engine()
    again, _ = generate_cots(Judge(engine), records, out)
    assert texts_read_by(engine) == ["c"]
    assert again == whole and out.read_bytes() == data


def test_another_seed_writes_other_reasonings(tmp_path):
    texts = [
        [
            record.feedback
            for record in generate_cots(
                Judge(make_engine()), make_records(*"abc"), tmp_path / f"{seed}.jsonl", seed=seed
            )[0]
        ]
        for seed in (0, 1)
    ]
    assert not set(texts[0]) & set(texts[1])


def test_lone_surrogates_are_written_and_read_back(tmp_path):
    records = make_records("a \ud83d b", "naïve 東京")
    written, _ = generate_cots(Judge(make_engine()), records, tmp_path / "cots.jsonl")
    assert [record.response for record in written] == ["a \ud83d b", "naïve 東京"]
    assert "naïve 東京" in (tmp_path / "cots.jsonl").read_text(encoding="utf-8")
    engine = make_engine()
    assert generate_cots(Judge(engine), records, tmp_path / "cots.jsonl")[0] == written
    assert engine.prompts == []


def test_records_without_an_id_are_kept_apart(tmp_path):
    records = [replace(record, id=None) for record in make_records("a", "b", "c")]
    written, _ = generate_cots(Judge(make_engine()), records, tmp_path / "cots.jsonl")
    assert [record.response for record in written] == ["a", "b", "c"]
    again, _ = generate_cots(Judge(make_engine()), records, tmp_path / "cots.jsonl")
    assert again == written


def test_two_records_of_one_id_are_refused_before_anything_is_judged(tmp_path):
    engine = make_engine()
    with pytest.raises(ValueError, match="id of its own"):
        generate_cots(Judge(engine), make_records("a", "b") + make_records("c"), tmp_path / "cots.jsonl")
    assert engine.prompts == [] and not list(tmp_path.iterdir())


def test_no_usable_reasoning_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(ValueError, match="any of 2 records.*too long.*1"):
        generate_cots(Judge(make_engine()), make_records("CUT", "LONG"), tmp_path / "cots.jsonl")
