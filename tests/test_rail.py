import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tract_lite.rail import LabelReading, expected_score, label_log_probabilities, read_top_log_probabilities
from tract_lite.scale import ScoreTokens

LABELS, VALUES = (10, 11, 12, 13, 14), (1.0, 2.0, 3.0, 4.0, 5.0)


def pairs(probabilities: dict[int, float]) -> list[tuple[int, float]]:
    """Each token with its log-probability."""
    return [(token, math.log(p)) for token, p in probabilities.items()]


def top_of(logits: np.ndarray, count: int) -> list[tuple[int, float]]:
    rows = label_log_probabilities(logits, range(len(logits)))
    return [(int(i), float(rows[i])) for i in np.argsort(-rows)[:count]]


def read(top: list[tuple[int, float]], values=VALUES) -> LabelReading:
    """What the top tokens of the one position tell of labels of one token."""
    reading = LabelReading(ScoreTokens((1,), tuple((label,) for label in LABELS), tuple(values)), end_id=0)
    reading.add((), read_top_log_probabilities(top, LABELS))
    assert not reading.wanted and reading.end_mass == 1
    return reading


def test_labels_that_are_all_reported_are_exact():
    top = pairs({11: 0.4, 10: 0.3, 12: 0.1, 13: 0.05, 99: 0.05, 14: 0.02})
    reading = read(top)
    np.testing.assert_allclose(np.exp(reading.log_probabilities), [0.3, 0.4, 0.1, 0.05, 0.02], rtol=1e-12)
    assert reading.missing_mass == pytest.approx(0.08) and reading.error_bound == 0


def test_labels_that_are_not_reported_hold_at_most_what_is_missing():
    reading = read(pairs({11: 0.6, 10: 0.3, 12: 0.08}))
    assert reading.log_probabilities[3:].tolist() == [-math.inf, -math.inf]
    assert reading.missing_mass == pytest.approx(0.02)
    assert reading.error_bound == pytest.approx(0.02 * 5)


def test_a_label_that_is_not_reported_is_no_likelier_than_the_least_that_is():
    reading = read(pairs({11: 0.5, 14: 0.1, 10: 0.01}))
    assert reading.missing_mass == pytest.approx(0.39)
    assert reading.error_bound == pytest.approx(2 * 0.01 * 4)


def test_a_position_tells_of_any_tokens():
    found = read_top_log_probabilities(pairs({11: 0.5, 14: 0.1, 10: 0.01}), (14, 99, 98))
    assert found.log_probabilities.tolist() == [math.log(0.1), -math.inf, -math.inf]
    assert found.missing_mass == pytest.approx(0.39) and found.unseen_mass == pytest.approx(0.02)
    assert read_top_log_probabilities(pairs({11: 0.5, 14: 0.1}), (14,)).unseen_mass == 0


@given(
    st.lists(st.floats(-12, 12), min_size=20, max_size=20),
    st.integers(1, 20),
    st.lists(st.floats(-9, 9), min_size=5, max_size=5, unique=True),
)
def test_the_exact_score_lies_within_the_bound(logits, count, values):
    logits = np.array(logits)
    exact = expected_score(np.exp(label_log_probabilities(logits, LABELS)), values)
    reading = read(top_of(logits, count), values)
    score = expected_score(np.exp(reading.log_probabilities), values)
    assert abs(score - exact) <= reading.error_bound + 1e-9


@pytest.mark.parametrize(
    ("top", "error"),
    [
        ([], "none"),
        ([(10, math.nan)], "nan is no log-probability"),
        ([(10, None)], "None is no log-probability"),
        ([(10, 0.7)], "0.7 is no log-probability"),
        ([(10, math.inf)], "inf is no log-probability"),
        ([(10, -0.1), (11, -0.5)], "sum to 1.511"),
        ([(10, -1.0), (10, -3.0)], "token 10 is there twice"),
    ],
)
def test_what_can_t_be_top_log_probabilities_is_refused(top, error):
    with pytest.raises(ValueError, match=error):
        read_top_log_probabilities(top, LABELS)


def test_rounding_is_no_lie():
    reading = read([(10, 1e-6), (11, -8.0)])
    assert reading.missing_mass == 0 and reading.error_bound == 0
    assert read([(10, -1e-3), (11, -3.4e38)]).error_bound == 0
