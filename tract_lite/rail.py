"""CoT-RAIL: the expected score under the model's own distribution. Nothing else decides how.

A label of several tokens has the probability of its path: the product of its tokens'
probabilities, each after those before it. Where it begins other labels, as 1 begins 10, that is
times one minus the probability of the tokens that lead on to them.

Source: TRACT, sections 2 and 3 (RAIL and CoT-RAIL), for labels of one token; the tree is ours.
"""

import math
from dataclasses import dataclass
from typing import Iterable, Sequence

import numpy as np

from tract_lite.scale import Path, ScoreTokens

LOW_MASS = 0.9
# Branches that are not followed have at most so much probability, all together.
PRUNED_MASS = 5e-6

# What rounding may add to a log-probability of 0, and to a sum of 1.
_ROUNDING = 1e-3


def label_log_probabilities(logits: np.ndarray, label_ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities (..., K) of tokens, by the softmax of `logits` (..., V) in float64."""
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
    """What the top log-probabilities of a position tell of some tokens.

    `log_probabilities` (K,): -inf for a token that is not among them. `missing_mass`: the
    probability of the tokens that are not among them. `unseen_mass`: of that, what those of the K
    tokens that are not among them have together at most.
    """

    log_probabilities: np.ndarray
    missing_mass: float = 0.0
    unseen_mass: float = 0.0


def read_top_log_probabilities(top: Iterable[tuple[int, float]], tokens: Sequence[int]) -> TopReading:
    """Read some tokens from the `top` ones of a position, each with its log-probability.

    A token that is not there is no likelier than the least likely one that is.
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
    unseen = min(missing, sum(token not in found for token in tokens) * math.exp(min(found.values())))
    rows = np.array([found.get(token, -math.inf) for token in tokens], dtype=np.float64)
    return TopReading(rows, missing, unseen)


class LabelReading:
    """The labels' log-probabilities, read node by node of their tree.

    `wanted` are the nodes that are still to be read, () first: at each one, the tokens `asked`
    after it. What is read there may add the nodes that it leads to, unless they have next to no
    probability. Of labels of one token there is one node.
    """

    def __init__(self, tokens: ScoreTokens, end_id: int):
        self._tokens, self._end_id = tokens, end_id
        self._paths: dict[Path, float] = {(): 0.0}
        self._stops: dict[Path, float] = {}
        self._to_prune = PRUNED_MASS
        self._ended = self._may_end = 0.0
        self.wanted: list[Path] = [()]
        self.missing_mass = self.error_bound = 0.0

    def asked(self, node: Path) -> Path:
        """The tokens to read after a node."""
        return self._tokens.asked(node, self._end_id)

    def add_logits(self, node: Path, logits: np.ndarray) -> None:
        """Take the logits (V,) after a node."""
        self.add(node, TopReading(label_log_probabilities(logits, self.asked(node))))

    def add(self, node: Path, found: TopReading) -> None:
        """Take what was read after a node."""
        self.wanted.remove(node)
        following, before = self._tokens.following[node], self._paths[node]
        mass, after = math.exp(before), found.log_probabilities[: len(following)]
        self.missing_mass += mass * found.missing_mass
        for token, log_probability in zip(following, after):
            self._paths[(*node, token)] = before + log_probability
        if (value := self._tokens.worth.get(node)) is not None:
            leads_on = min(1.0, float(np.exp(after).sum()))
            self._stops[node] = math.log1p(-leads_on) if leads_on < 1 else -math.inf
            self._may_end += mass * (1 - leads_on)
            self._ended += mass * math.exp(found.log_probabilities[-1])
        unseen = [(*node, token) for token, one in zip(following, after) if one == -math.inf]
        if unseen and found.unseen_mass:
            # What lies there is counted as the label's where the node is one, else not at all. In
            # truth it may be that of labels further on, or of none.
            distance = max(abs(value or 0.0), *(self._tokens.reach(path, value or 0.0) for path in unseen))
            self.error_bound += mass * found.unseen_mass * distance
        leading = [path for path in ((*node, token) for token in following) if path in self._tokens.following]
        for path in sorted(leading, key=self._paths.__getitem__):
            if (lost := math.exp(self._paths[path])) <= self._to_prune:
                self._to_prune -= lost
                self._paths[path] = -math.inf
                self.error_bound += lost * self._tokens.reach(path, 0.0)
            else:
                self.wanted.append(path)

    @property
    def branches(self) -> bool:
        """Whether several nodes may have to be read after the first one."""
        return len(self._tokens.following) > 2

    @property
    def log_probabilities(self) -> np.ndarray:
        """Those of the labels (K,), -inf where a branch was not followed."""
        labels = self._tokens.labels
        return np.array([self._paths.get(path, -math.inf) + self._stops.get(path, 0.0) for path in labels])

    @property
    def end_mass(self) -> float:
        """Of the probability of labels that begin others, the part that lies on the end token; 1
        where there are none."""
        return self._ended / self._may_end if self._may_end > 0 else 1.0
