"""CoT-RAIL: the expected score under the model's own distribution. Nothing else decides how.

Source: TRACT, sections 2 and 3 (RAIL and CoT-RAIL).
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

LOW_MASS = 0.9


def label_log_probabilities(logits: np.ndarray, label_ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities (..., K) of the labels under the softmax over the whole vocabulary.

    `logits` is (..., V); computed in float64.
    """
    logits = np.asarray(logits, dtype=np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_total = top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))
    return logits[..., list(label_ids)] - log_total[..., None]


def expected_score(probabilities: np.ndarray, values: Sequence[float]) -> float | np.ndarray:
    """The RAIL score: the sum over labels of probability times value, as in the paper.

    `probabilities` (..., K) are taken as they are: mass on other tokens is not redistributed.
    Returns a float for one row, else an array (...).

    Raises:
        ValueError: the last axis and `values` differ in length.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    if probabilities.shape[-1:] != values.shape:
        raise ValueError(f"probabilities {probabilities.shape} do not match {len(values)} values")
    expectation = probabilities @ values
    return float(expectation) if expectation.ndim == 0 else expectation
