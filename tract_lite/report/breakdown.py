"""Where a judge errs: figures of its items by probability, doubt, gold score, criteria and length.

Each function takes the `scored` items, their `Numbers` or both, and returns rows of plain numbers;
none where there is nothing to tell.
"""

from collections import Counter
from statistics import median
from typing import Any, Sequence

import numpy as np

from tract_lite.metrics import tokens_of
from tract_lite.report.items import Item, Numbers
from tract_lite.scale import ScoreScale

Rows = list[dict[str, Any]]

# Bins of a probability, of the doubt, and of gold scores where these are many.
PROBABILITY_BINS, STD_BINS, GOLD_BINS = 10, 5, 6
# Items of a bin of the doubt at least; of criteria to be shown by themselves.
LEAST_IN_BIN, LEAST_OF_CRITERIA = 5, 3
MOST_GOLDS, MOST_CRITERIA, MOST_WORST = 11, 30, 10


def calibration(items: Sequence[Item]) -> Rows:
    """How often labels of about one probability were right, over all items and labels.

    A gold score between two labels counts for both, by its share.
    """
    pairs: list[tuple[float, float]] = []
    for item in items:
        judgement = item.judgement
        values = judgement.values
        if not judgement.mass > 0 or len(values) < 2 or not min(values.values()) <= item.gold <= max(values.values()):
            continue
        right = ScoreScale(tuple(values), tuple(values.values())).shares(item.gold)
        for place, label in enumerate(values):
            pairs.append((judgement.probabilities.get(label, 0.0) / judgement.mass, right.get(place, 0.0)))
    if not pairs:
        return []
    predicted, observed = np.array(pairs).T
    bins = np.minimum((predicted * PROBABILITY_BINS).astype(int), PROBABILITY_BINS - 1)
    return [
        {
            "from": number / PROBABILITY_BINS,
            "to": (number + 1) / PROBABILITY_BINS,
            "predicted": float(predicted[inside].mean()),
            "observed": float(observed[inside].mean()),
            "count": int(inside.sum()),
        }
        for number in range(PROBABILITY_BINS)
        if (inside := bins == number).any()
    ]


def by_std(numbers: Numbers) -> Rows:
    """The errors of items in bins of about one size, from the least `std` to the greatest."""
    known = np.isfinite(numbers.stds)
    stds, errors = numbers.stds[known], np.abs(numbers.errors[known])
    count = min(STD_BINS, stds.size // LEAST_IN_BIN)
    if count < 2:
        return []
    order = np.argsort(stds, kind="stable")
    return [
        {
            "from": float(stds[part].min()),
            "to": float(stds[part].max()),
            "std": float(stds[part].mean()),
            "mae": float(errors[part].mean()),
            "rmse": float(np.sqrt((errors[part] ** 2).mean())),
            "count": int(part.size),
        }
        for part in np.array_split(order, count)
    ]


def by_gold(numbers: Numbers) -> Rows:
    """The errors of the items of each gold score, or of each part of their range."""
    golds = numbers.golds
    if not golds.size:
        return []
    levels = np.unique(golds)
    if levels.size <= MOST_GOLDS:
        edges = [(float(level), float(level)) for level in levels]
    else:
        steps = np.linspace(golds.min(), golds.max(), GOLD_BINS + 1)
        edges = [(float(low), float(high)) for low, high in zip(steps, steps[1:])]
    rows = []
    for low, high in edges:
        inside = (golds >= low) & ((golds < high) | (golds == high) & (high in (low, golds.max())))
        if inside.any():
            rows.append({"from": low, "to": high, **_errors(numbers, inside)})
    return rows


def by_criteria(items: Sequence[Item], numbers: Numbers) -> Rows:
    """The errors of the items of each criteria, the most frequent first; rare ones together."""
    names = [item.record.rubric.criteria if item.record and item.record.rubric else None for item in items]
    counts = Counter(name for name in names if name is not None)
    frequent = [name for name, count in counts.most_common(MOST_CRITERIA) if count >= LEAST_OF_CRITERIA]
    if not frequent or len(counts) < 2:
        return []
    rows = [{"criteria": name, **_errors(numbers, np.array([one == name for one in names]))} for name in frequent]
    rare = counts.keys() - set(frequent)
    if rare:
        rows.append({"criteria": f"{len(rare):,} others", **_errors(numbers, np.array([one in rare for one in names]))})
    return rows


def reasoning_lengths(items: Sequence[Item]) -> list[int]:
    """The length of each item that has a reasoning; in words, where some tokens are not known."""
    reasoned = [item.judgement for item in items if any(item.judgement.feedback)]
    if _in_tokens(items):
        return list(map(tokens_of, reasoned))
    return [sum(len(text.split()) for text in judgement.feedback) for judgement in reasoned]


def lengths(items: Sequence[Item], numbers: Numbers) -> dict[str, Any]:
    """How long the reasonings are, how many the length limit cut off, and the mean absolute error
    of these and of whole ones. Empty: there are no reasonings."""
    each = reasoning_lengths(items)
    if not each:
        return {}
    errors = np.abs(numbers.errors)
    cut = np.array([item.judgement.truncated for item in items])
    whole = np.array([any(item.judgement.feedback) for item in items]) & ~cut
    return {
        "unit": "tokens" if _in_tokens(items) else "words",
        "count": len(each),
        "median": float(median(each)),
        "longest": max(each),
        "cut_off": int(cut.sum()),
        "mae_cut_off": float(errors[cut].mean()) if cut.any() else None,
        "mae_whole": float(errors[whole].mean()) if whole.any() else None,
    }


def worst(items: Sequence[Item], numbers: Numbers) -> list[Item]:
    """The items whose scores are farthest from gold, the worst first."""
    order = np.argsort(-np.abs(numbers.errors), kind="stable")[:MOST_WORST]
    return [items[place] for place in order]


def _errors(numbers: Numbers, inside: np.ndarray) -> dict[str, Any]:
    """The figures of the items that a mask (n,) holds."""
    errors = numbers.errors[inside]
    return {
        "count": int(inside.sum()),
        "gold": float(numbers.golds[inside].mean()),
        "score": float(numbers.scores[inside].mean()),
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt((errors**2).mean())),
    }


def _in_tokens(items: Sequence[Item]) -> bool:
    return all(item.judgement.feedback_ids for item in items if any(item.judgement.feedback))
