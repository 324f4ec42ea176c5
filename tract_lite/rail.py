"""CoT-RAIL: the expected score under the model's own distribution. Nothing else decides how.

Source: TRACT, sections 2 and 3 (RAIL and CoT-RAIL).
"""

import math
from dataclasses import dataclass
from typing import Iterable, Sequence

import numpy as np

LOW_MASS = 0.9

# What rounding may add to a log-probability of 0, and to a sum of 1.
_ROUNDING = 1e-3


def label_log_probabilities(logits: np.ndarray, label_ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities (..., K) of the labels, by the softmax of `logits` (..., V) in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_total = top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))
    return logits[..., list(label_ids)] - log_total[..., None]


def expected_score(probabilities: np.ndarray, values: Sequence[float] | np.ndarray) -> float | np.ndarray:
    """The RAIL score: the sum over labels of probability times value, as in the paper.

    `probabilities` (..., K) are taken as they are: mass on other tokens is not redistributed.
    Returns a float for one row, else an array (...).
    Raises ValueError: the last axis and `values` differ in length.
    """
    rows, numbers = np.asarray(probabilities, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if rows.shape[-1:] != numbers.shape:
        raise ValueError(f"probabilities {rows.shape} do not match {len(values)} values")
    expectation = rows @ numbers
    return float(expectation) if expectation.ndim == 0 else expectation


@dataclass(frozen=True)
class TopReading:
    """What the top log-probabilities of a position tell of the labels.

    `label_log_probabilities` (K,): -inf for a label that is not among them. `missing_mass`: the
    probability of the tokens that are not among them. `error_bound`: how far the expected score may
    lie from the exact one.
    """

    label_log_probabilities: np.ndarray
    missing_mass: float
    error_bound: float


def read_top_log_probabilities(
    top: Iterable[tuple[int, float]], labels: Sequence[int], values: Sequence[float]
) -> TopReading:
    """Read the labels from the `top` tokens of a position, each with its log-probability.

    A label (token) that is not there is no likelier than the least likely token that is.
    Raises ValueError: these can't be the log-probabilities of a distribution's top tokens.
    """
    found: dict[int, float] = {}
    for token, log_probability in top:
        if not isinstance(log_probability, (int, float)) or not log_probability <= _ROUNDING:
            raise ValueError(f"{log_probability} is no log-probability")
        if token in found:
            raise ValueError(f"token {token!r} is there twice")
        found[token] = log_probability
    if not found:
        raise ValueError("there are none")
    total = math.fsum(map(math.exp, found.values()))
    if total > 1 + _ROUNDING:
        raise ValueError(f"the probabilities sum to {total:.3f}")
    missing = max(0.0, 1.0 - total)
    unsure = [value for label, value in zip(labels, values) if label not in found]
    unseen = min(missing, len(unsure) * math.exp(min(found.values())))
    rows = np.array([found.get(label, -math.inf) for label in labels], dtype=np.float64)
    return TopReading(rows, missing, unseen * max(map(abs, unsure), default=0.0))
