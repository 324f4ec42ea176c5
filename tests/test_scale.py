import math

import pytest
from tiny import TRAINED, VOCABULARIES, load_tokenizer

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
    assert len(set(tokens.labels)) == 5
    for label, token in zip(scale.labels, tokens.labels):
        ids = [*tokens.marker, token]
        assert vocabulary.encode(f"Good. {MARKER} {label}")[-len(ids) :] == ids
        assert vocabulary.decode(ids).strip() == f"{MARKER} {label}"


@everywhere
def test_a_label_is_a_bare_digit_except_where_the_vocabulary_merges_the_space(name):
    vocabulary = vocabulary_of(name)
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale.integers(1, 5))
    space = "Ġ" if name in SPACED else ""
    assert vocabulary.pieces(tokens.labels) == [f"{space}{n}" for n in range(1, 6)]


@everywhere
def test_word_labels_are_found(name):
    vocabulary = vocabulary_of(name)
    words = ("wrong", "short", "clear") if name in TRAINED else ("poor", "fair", "good")
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale(words, (0.0, 0.5, 1.0)))
    assert [vocabulary.decode([i]).strip() for i in tokens.labels] == list(words)


@pytest.mark.parametrize("name", sorted(WHOLE_TEN & set(VOCABULARIES)))
def test_ten_is_a_label_where_it_is_one_token(name):
    vocabulary = vocabulary_of(name)
    tokens = find_score_tokens(vocabulary, MARKER, ScoreScale.integers(1, 10))
    assert vocabulary.decode(tokens.labels[-1:]).strip() == "10"


@pytest.mark.parametrize("name", sorted(set(VOCABULARIES) - WHOLE_TEN))
def test_ten_is_refused_where_it_is_two_tokens_and_scales_that_fit_are_named(name):
    with pytest.raises(
        ValueError, match="^the label 10 takes 2 tokens in this vocabulary\n.*the scales 0-9, 1-5, 1-3 fit"
    ):
        find_score_tokens(vocabulary_of(name), MARKER, ScoreScale.integers(1, 10))


@pytest.mark.parametrize("name", sorted(set(VOCABULARIES) - WHOLE_TEN))
def test_a_scale_of_many_labels_is_refused_in_two_short_lines(name):
    with pytest.raises(ValueError, match=r"the label 10 takes 2 tokens .*91 of 101 labels") as refused:
        find_score_tokens(vocabulary_of(name), MARKER, ScoreScale.integers(0, 100))
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) < 100


class Lowering(TransformersVocabulary):
    """Reads all letters as small ones, as some vocabularies do."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.lower())


def test_labels_that_are_read_as_one_are_refused_and_where_nothing_fits_another_seed_is_named():
    vocabulary = Lowering(load_tokenizer("space and digit"))
    with pytest.raises(
        ValueError, match="the labels a=0,A=1 are not told apart.*\n.*no usual scale fits.*another seed"
    ):
        find_score_tokens(vocabulary, MARKER, ScoreScale(("a", "A"), (0, 1)))


@everywhere
@pytest.mark.parametrize(
    "labels", [("grade A", "grade B"), ("A+", "A-"), ("☃☃", "☂☂"), ("abracadabrant", "hocuspocusly")]
)
def test_labels_of_several_tokens_are_refused(name, labels):
    with pytest.raises(ValueError, match="one token of its own"):
        find_score_tokens(vocabulary_of(name), MARKER, ScoreScale(labels, (0, 1)))


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
    "text", ["", "5", "1-", "-5", "1-1", "5-1", "-1--5", "1-5-9", "a-b", "1.5-3", "1,5", "1--", "1\n5"]
)
def test_a_text_that_names_no_scale_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="can't be read: give its lowest and highest score, as in 1-5"):
        ScoreScale.parse(text)


def test_the_nearest_label_is_the_lower_one_of_two_in_any_order_of_values():
    scale = ScoreScale.integers(1, 5)
    assert [scale.nearest(score) for score in (-3, 1.4, 1.5, 1.6, 9)] == [0, 0, 0, 1, 4]
    assert ScoreScale(("good", "bad"), (1, 0)).nearest(0.2) == 1


def test_a_scale_contains_what_lies_between_its_ends_and_nothing_else():
    scale = ScoreScale.integers(1, 5)
    assert [scale.contains(x) for x in (1, 3.7, 5, 0.99, 5.01, math.nan)] == [True] * 3 + [False] * 3
