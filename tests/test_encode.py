import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import SHARED, VOCABULARIES, load_tokenizer, make_sentences

from tract_lite.data.records import read_records, records_from
from tract_lite.loss.cot_raft import IGNORE_INDEX
from tract_lite.prompt import cut_reasoning, prompt_ids
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale
from tract_lite.spec import MARKER, make_spec
from tract_lite.training.encode import LengthGroupedSampler, Unusable, collate, encode_record, encode_records
from tract_lite.vocabulary import TransformersVocabulary

VICUNA = SHARED / "data" / "vicuna_eval.json"
RECORD = Record(
    "Add 2 and 2.",
    "It is 4.",
    Rubric("Is it right?", {"1": "No.", "5": "Yes."}),
    score=4.0,
    feedback="It names 4 steps. So the overall score is 4. [RESULT] 4",
)
everywhere = pytest.mark.parametrize("name", VOCABULARIES)


def load(name: str, **fields):
    tokenizer = load_tokenizer(name)
    return make_spec(tokenizer, ScoreScale.integers(1, 5), **fields), TransformersVocabulary(tokenizer)


@everywhere
def test_reasoning_marker_label_and_end_are_supervised_and_nothing_else(name):
    spec, vocabulary = load(name)
    batch = collate([encode_record(RECORD, spec, vocabulary)], pad_id=0)
    supervised = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
    expected = [*vocabulary.encode("It names 4 steps."), *spec.marker_ids, *spec.label_ids[3], spec.eos_id]
    assert supervised == expected, f"{vocabulary.pieces(supervised)} != {vocabulary.pieces(expected)}"


@everywhere
def test_training_reads_the_ids_that_judging_meets(name):
    spec, vocabulary = load(name)
    example = encode_record(RECORD, spec, vocabulary)
    reasoning, complete = cut_reasoning(example.ids[example.prompt_length :], spec, vocabulary)
    judged = [*prompt_ids(RECORD, spec, vocabulary), *reasoning, *spec.marker_ids]
    assert complete and example.ids[: example.score_position] == judged
    assert example.ids[example.score_position :] == [*spec.label_ids[3], spec.eos_id]


@everywhere
def test_specials_in_a_record_never_move_the_score_position(name):
    spec, vocabulary = load(name, max_length=10**6)
    nasty = " ".join([*vocabulary.specials, "</s>", "<|eot_id|>", "[INST]", f"{MARKER} 1", "4"])
    feedback = nasty.replace(MARKER, "")
    record = Record(nasty, nasty, Rubric(nasty), nasty, score=2.0, feedback=feedback)
    example = encode_record(record, spec, vocabulary)
    assert example.score_position == len(example.ids) - 2
    assert example.ids[-2:] == [*spec.label_ids[1], spec.eos_id]
    specials = set(vocabulary.specials.values())
    in_chat = [piece for piece in spec.chat if isinstance(piece, int)]
    assert [i for i in example.ids[:-1] if i in specials] == in_chat


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=40), st.text(st.characters(), min_size=1, max_size=40))
def test_any_text_is_encoded_or_refused_with_a_reason(response, feedback):
    spec, vocabulary = load("split digits")
    try:
        example = encode_record(replace(RECORD, response=response, feedback=feedback), spec, vocabulary)
    except Unusable as reason:
        assert str(reason) == "no reasoning"
    else:
        assert example.ids[-2:] == [*spec.label_ids[3], spec.eos_id]


@everywhere
def test_lone_surrogates_do_not_stop_training(name):
    spec, vocabulary = load(name)
    assert encode_record(replace(RECORD, response="\ud800", feedback="a \udfff"), spec, vocabulary)


def test_a_reasoning_given_as_ids_is_taken_as_it_is():
    spec, vocabulary = load("spm")
    ids = tuple(vocabulary.encode("an odd")[::-1])
    example = encode_record(replace(RECORD, feedback_ids=ids), spec, vocabulary)
    start = example.prompt_length
    assert tuple(example.ids[start : start + len(ids)]) == ids
    assert example.ids[start + len(ids) : -2] == list(spec.marker_ids)


@everywhere
def test_a_direct_sequence_teaches_the_label_and_the_end_alone(name):
    spec, vocabulary = load(name)
    example = encode_record(replace(RECORD, feedback=None), spec, vocabulary, direct=True)
    assert example.ids[:-2] == [*prompt_ids(RECORD, spec, vocabulary), *spec.marker_ids]
    batch = collate([example], pad_id=0)
    supervised = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
    assert supervised == [*spec.label_ids[3], spec.eos_id] and example.score_position == len(example.ids) - 2


def many(count: int) -> list[Record]:
    return [replace(RECORD, response=f"It is {n}.") for n in range(count)]


@pytest.mark.parametrize(
    "share, reasoned, direct", [(0, 60, 0), (0.1, 60, 7), (0.25, 60, 20), (0.5, 60, 60), (0.8, 15, 60), (1, 0, 60)]
)
def test_the_share_of_direct_sequences_is_the_one_asked_for(share, reasoned, direct):
    spec, vocabulary = load("spm")
    examples, dropped = encode_records(many(60), spec, vocabulary, direct_share=share, seed=3)
    assert [example.is_direct for example in examples] == [False] * reasoned + [True] * direct and not dropped
    everything = [[encode_record(r, spec, vocabulary, direct=way) for r in many(60)] for way in (False, True)]
    for way, found in zip(everything, (examples[:reasoned], examples[reasoned:])):
        places = [way.index(example) for example in found]
        assert places == sorted(set(places))
    again = encode_records(many(60), spec, vocabulary, direct_share=share, seed=3)
    other = encode_records(many(60), spec, vocabulary, direct_share=share, seed=4)
    assert again[0] == examples and (other[0] == examples) == (share in (0, 0.5, 1))


def test_a_record_without_a_reasoning_is_of_use_where_all_sequences_are_direct():
    spec, vocabulary = load("spm")
    records = [RECORD, replace(RECORD, feedback=None), replace(RECORD, score=None)]
    for share, used, dropped in (
        (1, 1 + 1, {"no gold score": 1}),
        (0.5, 1 + 1, {"no gold score": 1, "no reasoning": 1}),
    ):
        examples, reasons = encode_records(records, spec, vocabulary, direct_share=share)
        assert (len(examples), reasons) == (used, dropped)


@pytest.mark.parametrize("score, label", [(1, 0), (2.4, 1), (2.5, 1), (2.6, 2), (5, 4)])
def test_a_score_between_two_labels_stays_the_target_of_the_nearest_label(score, label):
    spec, vocabulary = load("spm")
    example = encode_record(replace(RECORD, score=score), spec, vocabulary)
    assert example.target == score
    assert example.ids[example.score_position :] == [*spec.label_ids[label], spec.eos_id]
    assert (example.label, example.shares) == (label, {label: 1.0})


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"score": None}, "no gold score"),
        ({"score": 6.0}, "outside the scale"),
        ({"score": math.nan}, "outside the scale"),
        ({"feedback": None}, "no reasoning"),
        ({"feedback": "So the overall score is 4."}, "no reasoning"),
        ({"feedback": f"{MARKER} 3, but it is 4 in truth."}, "marker stands inside"),
        ({"rubric": None}, "no criteria"),
        ({"response": "long " * 1000}, "longer than 600 tokens"),
    ],
)
def test_an_unusable_record_is_dropped_and_counted_with_its_reason(fields, reason):
    spec, vocabulary = load("spm", max_length=600)
    bad = replace(RECORD, **fields)
    examples, dropped = encode_records([bad, RECORD, bad], spec, vocabulary)
    assert len(examples) == 1
    assert [count for text, count in dropped.items() if reason in text] == [2] == [*dropped.values()]


def test_where_nothing_can_be_trained_on_the_reasons_are_counted_in_words():
    spec, vocabulary = load("spm", max_length=600)
    long, plain = replace(RECORD, response="long " * 1000), replace(RECORD, score=None)
    words = r"out of 3: longer than 600 tokens \(--max-length\): 2; no gold score: 1$"
    with pytest.raises(ValueError, match=words):
        encode_records([long, plain, long], spec, vocabulary, required=True)
    with pytest.raises(ValueError, match="out of 0: there is none"):
        encode_records([], spec, vocabulary, required=True)


def test_a_sequence_that_just_fits_is_kept_whole():
    spec, vocabulary = load("spm")
    length = len(encode_record(RECORD, spec, vocabulary).ids)
    assert len(encode_record(RECORD, replace(spec, max_length=length), vocabulary).ids) == length
    with pytest.raises(Unusable, match="longer"):
        encode_record(RECORD, replace(spec, max_length=length - 1), vocabulary)


def test_a_batch_is_padded_on_the_right_and_learns_nothing_there():
    spec, vocabulary = load("spm")
    short, long = (encode_record(replace(RECORD, response=r), spec, vocabulary) for r in ("x", "x" * 9))
    batch = collate([short, long], pad_id=7)
    n, longest = len(short.ids), len(long.ids)
    assert n < longest and batch["input_ids"].shape == (2, longest)
    assert batch["input_ids"][0].tolist() == short.ids + [7] * (longest - n)
    assert batch["attention_mask"][0].tolist() == [1] * n + [0] * (longest - n)
    assert (batch["labels"][0, n:] == IGNORE_INDEX).all()
    assert batch["input_ids"][1].tolist() == long.ids
    assert batch["score_positions"].tolist() == [n - 2, longest - 2]
    assert batch["targets"].dtype == torch.float32


def padding(lengths: list[int], order: list[int], size: int) -> float:
    """The share of padding in micro-batches of a size."""
    batches = [[lengths[place] for place in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def test_sequences_computed_at_once_are_of_similar_lengths_and_their_batches_of_any():
    lengths = torch.randint(200, 3000, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthGroupedSampler(lengths, 8, seed=42))
    assert sorted(order) == list(range(1003)) and lengths[order[0]] == max(lengths)
    assert all(padding(lengths, order, size) <= 0.03 for size in (2, 4))
    means = [fmean(lengths[place] for place in order[start : start + 8]) for start in range(0, 1000, 8)]
    longer = sum(after > before for before, after in zip(means, means[1:]))
    # From long to short, none would be.
    assert 0.3 < longer / len(means) < 0.7


def check_all_pairs_are_encoded(records, name, count):
    spec, vocabulary = load(name, max_length=3000)
    pairs = [pair for record in records for pair in record.pairs()]
    examples, dropped = encode_records(pairs, spec, vocabulary)
    assert (len(pairs), len(examples), dropped) == (count, count, {})
    for pair, example in zip(pairs[:: count // 10], examples[:: count // 10]):
        written = vocabulary.decode(example.ids[example.prompt_length : example.score_position])
        assert written.strip() == f"{pair.feedback.strip()} {MARKER}"


@everywhere
def test_every_annotator_s_pair_of_a_benchmark_is_encoded(name):
    sentences = make_sentences(60)
    rows = [
        {
            "instruction": f"###Task Description: {text}\n###Feedback: ",
            "gpt4_feedback": sentences[n + 20 : n + 23],
            "gpt4_score": [1 + n % 5, 3, 5],
        }
        for n, text in enumerate(sentences[:20])
    ]
    check_all_pairs_are_encoded(records_from(rows), name, 60)


@pytest.mark.skipif(not VICUNA.is_file() or "qwen2" not in VOCABULARIES, reason="no real data here")
def test_all_pairs_of_a_real_benchmark_are_encoded():
    check_all_pairs_are_encoded(read_records(VICUNA), "qwen2", 960)
