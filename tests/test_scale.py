import math

import pytest
from hypothesis import given, strategies as st
from tiny import TRAINED, VOCABULARIES, load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tract_lite.scale import ScoreScale, find_score_tokens
from tract_lite.spec import MARKER
from tract_lite.vocabulary import TransformersVocabulary

# Where ten is one token, and where a label's token begins with its space.
WHOLE_TEN = {"gpt-2", "llama-bpe", "merged digits", "space and digit"}
SPACED = {"gpt-2", "space and digit"}
everywhere = pytest.mark.parametrize("name", VOCABULARIES)


def vocabulary_of(name: str) -> TransformersVocabulary:
    return TransformersVocabulary(load_tokenizer(name))


@everywhere
def test_marker_and_labels_are_the_tokens_of_the_written_text(name):
    vocabulary = vocabulary_of(name)
    scale = ScoreScale.integers(1, 5)
    tokens = find_score_tokens(vocabulary, MARKER, scale)
    assert len(set(tokens.labels)) == 5 and tokens.is_flat and tokens.longest == 1
    for label, path in zip(scale.labels, tokens.labels):
        ids = [*tokens.marker, *path]
        assert vocabulary.encode(f"Good. {MARKER} {label}")[-len(ids) :] == ids
        assert vocabulary.decode(ids).strip() == f"{MARKER} {label}"


@everywhere
def test_a_label_is_a_bare_digit_except_where_the_vocabulary_merges_the_space(name):
    vocabulary = vocabulary_of(name)
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale.integers(1, 5))
    space = "Ġ" if name in SPACED else ""
    assert vocabulary.pieces([token for (token,) in tokens.labels]) == [f"{space}{n}" for n in range(1, 6)]


@everywhere
def test_word_labels_are_found(name):
    vocabulary = vocabulary_of(name)
    words = ("wrong", "short", "clear") if name in TRAINED else ("poor", "fair", "good")
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale(words, (0.0, 0.5, 1.0)))
    assert [vocabulary.decode([token]).strip() for (token,) in tokens.labels] == list(words)


@pytest.mark.parametrize("name", sorted(WHOLE_TEN & set(VOCABULARIES)))
def test_ten_is_a_label_where_it_is_one_token(name):
    vocabulary = vocabulary_of(name)
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale.integers(1, 10))
    [ten] = tokens.labels[-1]
    assert vocabulary.decode([ten]).strip() == "10" and tokens.is_flat


@pytest.mark.parametrize("name", sorted(set(VOCABULARIES) - WHOLE_TEN))
def test_ten_goes_on_from_one_where_it_is_two_tokens(name):
    vocabulary = vocabulary_of(name)
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale.integers(1, 10))
    one, ten = tokens.labels[0], tokens.labels[-1]
    assert (len(one), len(ten), ten[:1]) == (1, 2, one) and vocabulary.decode(ten).strip() == "10"
    assert list(tokens.following) == [(), one] and tokens.following[one] == ten[1:]
    assert not tokens.is_flat and tokens.longest == 2


LABELS = [
    ScoreScale.parse("0-100").labels,
    ScoreScale.parse("-2-2:0.25").labels,
    ("grade A", "grade B"),
    ("A+", "A-"),
    ("☃☃", "☂☂"),
    ("abracadabrant", "hocuspocusly"),
    ("good", "good enough", "good enough for most"),
    ("東京", "東", "naïve"),
]


@everywhere
@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: labels[0])
def test_labels_of_several_tokens_are_those_of_the_written_text(name, labels):
    vocabulary = vocabulary_of(name)
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale(labels, range(len(labels))))
    assert len(set(tokens.labels)) == len(labels)
    for label, path in zip(labels, tokens.labels):
        ids = [*tokens.marker, *path]
        assert vocabulary.encode(f"Good. {MARKER} {label}")[-len(ids) :] == ids
    # Each beginning that leads on is a node, with what leads on from it.
    leads = {(path[:n], path[n]) for path in tokens.labels for n in range(len(path))}
    assert {(node, token) for node, after in tokens.following.items() for token in after} == leads
    assert sum(map(len, tokens.following.values())) == len(leads)
    assert [len(node) for node in tokens.following] == sorted(map(len, tokens.following))


@everywhere
def test_the_marker_has_the_same_tokens_before_numbers_and_spells_the_same_before_any_label(name):
    vocabulary = vocabulary_of(name)
    numbers, others = ("1-5", "0-100", "10-12", "100-100.5:0.5"), ("-1-1", "wrong=0,right=1", "grade A=0,grade B=1")
    scales = map(ScoreScale.parse, (*numbers, *others))
    markers = [find_score_tokens(vocabulary, MARKER, scale).marker for scale in scales]
    assert len(set(markers[: len(numbers)])) == 1
    assert {vocabulary.decode(marker).strip() for marker in markers} == {MARKER}


class Lowering(TransformersVocabulary):
    """Reads the last word's letters as small ones, as some vocabularies do all."""

    def encode(self, text: str) -> list[int]:
        before, space, last = text.rpartition(" ")
        return super().encode(before + space + last.lower())


def assert_refused(vocabulary: TransformersVocabulary, labels: tuple[str, ...], words: str) -> None:
    """In two short lines."""
    with pytest.raises(ValueError, match=words) as refused:
        find_score_tokens(vocabulary, MARKER, ScoreScale(labels, range(len(labels))))
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) < 100


def test_a_label_that_is_read_as_something_else_is_refused_by_its_name():
    vocabulary = Lowering(load_tokenizer("space and digit"))
    assert_refused(vocabulary, ("a", "A"), "^the label 'A' can't be spelled in this vocabulary\nname it otherwise")


@everywhere
def test_labels_that_are_read_as_one_are_refused_with_both_names(name):
    words = "^the labels 'é' and 'é' have the same tokens in this vocabulary\nname one of them otherwise"
    assert_refused(vocabulary_of(name), ("é", "é"), words)


def test_a_label_whose_tokens_begin_inside_the_marker_is_refused_by_its_name():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, special_tokens=["<end>"], show_progress=False
    )
    # A vocabulary without words, in which "s 2" is one token.
    tokenizer.train_from_iterator(["s 2", "was 2"] * 20, trainer)
    vocabulary = TransformersVocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"))
    assert_refused(vocabulary, ("1", "2", "3"), "^the label '2' merges with the marker's end in this vocabulary\nname")


@pytest.mark.parametrize(
    "labels, values",
    [
        (("1",), (1,)),
        (("1", "2"), (1,)),
        (("1", "1"), (1, 2)),
        (("1", "2"), (1, 1)),
        (("1", " 2"), (1, 2)),
        (("1", ""), (1, 2)),
        (("1", "2"), (1, math.nan)),
        (("1", "2"), (1, math.inf)),
    ],
)
def test_a_scale_that_is_none_is_refused(labels, values):
    with pytest.raises(ValueError):
        ScoreScale(labels, values)


def test_integers_include_both_ends():
    assert ScoreScale.integers(0, 2) == ScoreScale(("0", "1", "2"), (0.0, 1.0, 2.0))


@pytest.mark.parametrize(
    "text, low, high",
    [("1-5", 1, 5), ("0-10", 0, 10), ("-2-2", -2, 2), ("-5--1", -5, -1), ("+1-+3", 1, 3), (" 1 - 5 ", 1, 5)],
)
def test_a_scale_is_read_from_its_lowest_and_highest_score(text, low, high):
    assert ScoreScale.parse(text) == ScoreScale.integers(low, high)


@pytest.mark.parametrize(
    "text, labels",
    [
        ("0-2:0.5", ("0", "0.5", "1", "1.5", "2")),
        ("0-100:25", ("0", "25", "50", "75", "100")),
        ("1.5-3.5", ("1.5", "2.5", "3.5")),
        ("-0.2-0.2:0.1", ("-0.2", "-0.1", "0", "0.1", "0.2")),
        ("1.0-2.0:0.50", ("1", "1.5", "2")),
    ],
)
def test_steps_are_labels_as_people_write_them(text, labels):
    assert ScoreScale.parse(text) == ScoreScale(labels, map(float, labels))


def test_labels_with_values_are_read_in_their_order():
    expected = ScoreScale(("not bad", "ok", "a=b"), (0.5, -1.0, 1e3))
    assert ScoreScale.parse("not bad=0.5, ok=-1,a=b=1000") == expected


@pytest.mark.parametrize("text", ["", "5", "1-", "-5", "1-5-9", "a-b", "1,5", "1--", "1\n5", "1-5:", "1e3-2e3"])
def test_a_text_that_names_no_scale_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="can't be read: give its lowest and highest score, as in 1-5"):
        ScoreScale.parse(text)


@pytest.mark.parametrize("text", ["1-1", "5-1", "-1--5", "1.5-3", "0-5:0", "0-5:-1", "0-5:0.3", "0-5:10"])
def test_steps_that_lead_nowhere_are_refused_in_words(text):
    with pytest.raises(ValueError, match=r"can't be read: no steps of \S+ lead from \S+ up to \S+$"):
        ScoreScale.parse(text)


@pytest.mark.parametrize("text", ["0-2000", "0-100:0.01", "0-" + "9" * 40])
def test_a_scale_of_too_many_labels_is_refused_with_a_way_out(text):
    with pytest.raises(ValueError, match="labels: 1,001 at most\ntake a wider step"):
        ScoreScale.parse(text)


@pytest.mark.parametrize("text", ["bad=0", "=0,b=1", "a=x,b=1", "a=1,b=1", "a=1,a=2", "a=1,b", "a=1,,b=2", "a=nan,b=1"])
def test_labels_without_values_of_their_own_are_refused(text):
    with pytest.raises(ValueError, match="can't be read: give label=value, with commas"):
        ScoreScale.parse(text)


@given(
    st.lists(
        st.tuples(st.text("ab 1.-", min_size=1), st.floats(-1e6, 1e6)),
        min_size=2,
        max_size=5,
        unique_by=(lambda pair: pair[0].strip(), lambda pair: pair[1]),
    )
)
def test_a_scale_written_down_is_read_back(pairs):
    labels, values = zip(*((label.strip() or "x", value) for label, value in pairs))
    scale = ScoreScale(labels, values)
    assert ScoreScale.parse(str(scale)) == scale


@pytest.mark.parametrize("text", ["1-5", "0-100", "-2-2", "-5--1", "0-5:0.5", "0-100:10", "-1-1:0.1"])
def test_a_scale_of_steps_is_written_as_it_is_named(text):
    assert str(ScoreScale.parse(text)) == text


def test_a_scale_remapped_onto_other_labels_keeps_its_units():
    digits = ScoreScale.parse("0-9")
    remapped = ScoreScale.parse("1-100").remapped(digits)
    assert remapped.labels == digits.labels and (remapped.values[0], remapped.values[-1]) == (1.0, 100.0)
    assert remapped.values == pytest.approx([1 + 11 * n for n in range(10)])
    assert ScoreScale.parse(str(remapped)) == remapped
    backwards = ScoreScale.parse("0-1").remapped(ScoreScale(("good", "fair", "poor"), (3, 2, 1)))
    assert backwards.values == (1.0, 0.5, 0.0)


def test_a_prompt_names_the_labels_of_a_short_scale_and_the_ends_of_a_long_one():
    assert ScoreScale.parse("1-5").named == "1, 2, 3, 4, 5"
    assert ScoreScale.parse("0-11").named.count(",") == 11
    assert ScoreScale.parse("0-100").named == "0, 1, 2, ..., 99, 100"


@given(st.floats(-2, 7))
def test_the_shares_of_a_score_sum_to_one_and_their_mean_is_the_score(score):
    scale = ScoreScale(("high", "low", "middle"), (7.0, -2.0, 0.5))
    shares = scale.shares(score)
    assert sum(shares.values()) == pytest.approx(1) and all(0 <= share <= 1 for share in shares.values())
    assert sum(scale.values[label] * share for label, share in shares.items()) == pytest.approx(score, abs=1e-9)
    # They are those of its neighbours.
    values = sorted(scale.values[label] for label in shares)
    assert not any(values[0] < value < values[-1] for value in scale.values)


def test_the_nearest_label_is_the_lower_one_of_two_in_any_order_of_values():
    scale = ScoreScale.integers(1, 5)
    assert [scale.nearest(score) for score in (-3, 1.4, 1.5, 1.6, 9)] == [0, 0, 0, 1, 4]
    assert ScoreScale(("good", "bad"), (1, 0)).nearest(0.2) == 1


def test_a_scale_contains_what_lies_between_its_ends_and_nothing_else():
    scale = ScoreScale.integers(1, 5)
    assert [scale.contains(x) for x in (1, 3.7, 5, 0.99, 5.01, math.nan)] == [True] * 3 + [False] * 3
