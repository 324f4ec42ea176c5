"""Agreement of predicted scores with gold scores, with intervals.

A figure with an interval is a function of predictions and golds, both (..., n): it reduces the n
items of the last axis, so that a stack of bootstrap resamples is measured at once.
"""

import math
import warnings
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from tract_lite.judgement import Judgement

Figure = Callable[[np.ndarray, np.ndarray], np.ndarray]

RESAMPLES = 1000
# Resamples measured at once: bounds the memory of many items.
CHUNK = 20
ERRORS = ("rmse", "mae")
WITH_INTERVAL = ("pearson", "spearman", *ERRORS)
# What says something only where predictions and golds are on one scale.
IN_UNITS = (*ERRORS, "qwk")
COLUMNS = ("pearson", "spearman", "kendall", "rmse", "mae", "coverage")
NORMALISED = "the items are on {} scales: each score counts by its place on its own, from 0 to 1"

# The lowest and the highest score of a scale.
Ends = tuple[float, float]


def evaluate(
    predictions: Sequence[float | None], golds: Sequence[float], ends: Ends | Sequence[Ends | None] | None = None
) -> dict[str, Any]:
    """Measure how well predictions agree with gold scores; rmse and mae in units of the score.

    Failed items (None, NaN or infinite) are left out: `count` is the number of items used,
    `coverage` their share. `intervals` are 95 % percentile bootstraps over items with a fixed
    seed. What is undefined is NaN: correlations of constant scores, all intervals of one item.
    `qwk` rounds scores to whole numbers, its only labels: it says little on a scale of fractions.

    `ends` are the lowest and highest score of the judge: with a gold score outside of them, what
    subtracts one from the other (rmse, mae, qwk) means nothing and is NaN; `off_scale` counts them.
    They may also be given for each item (None: unknown). If these differ, all figures are of scores
    from 0 to 1, each by its place on the item's scale: `scales` counts these, and qwk is NaN.
    Raises ValueError: no items, lengths that differ, a gold score that is not finite, or, of items
        on several scales, a judged one whose ends are unknown.
    """
    gold, predicted = _paired(golds, predictions)
    used = np.isfinite(predicted)
    off_scale: dict[str, int] = {}
    if ends:
        low, high, count = _each_ends(ends, used)
        off_scale = {"off_scale": int(((gold < low) | (gold > high)).sum())}
        if count > 1:
            off_scale["scales"] = count
            predicted, gold = (predicted - low) / (high - low), (gold - low) / (high - low)
    predicted, gold = predicted[used], gold[used]
    with warnings.catch_warnings():
        # NaN already says that a figure is undefined.
        warnings.simplefilter("ignore", RuntimeWarning)
        figures = {name: float(figure(predicted, gold)) for name, figure in _FIGURES.items()}
    intervals = _bootstrap(lambda figure, i: figure(predicted[i], gold[i]), gold.size)
    if off_scale.get("scales"):
        figures["qwk"] = math.nan
    if off_scale.get("off_scale"):
        figures |= dict.fromkeys(IN_UNITS, math.nan)
        intervals |= {name: (math.nan, math.nan) for name in IN_UNITS if name in intervals}
    counts = {"coverage": float(used.mean()), "count": int(used.sum()), **off_scale}
    return figures | counts | {"intervals": intervals}


def compare_judges(
    judged_a: Sequence[Judgement | float | None], judged_b: Sequence[Judgement | float | None], golds: Sequence[float]
) -> dict[str, Any]:
    """How much better one judge is than another on the same items, in the same order.

    `differences` are the figures of a minus those of b, over the items that both have judged:
    `count` of them. A negative difference in rmse or mae means that a errs less. `intervals` are
    95 % percentile bootstraps over pairs with a fixed seed, so that what makes an item hard for
    both does not count. `a` and `b` hold what `evaluate` says of each on these items.
    Raises ValueError: lengths differ, no item is judged by both, or a gold score is not finite.
    """
    a, b = ([_score_of(one) for one in judged] for judged in (judged_a, judged_b))
    ends = [ends_of(getattr(one, "values", None)) for one in judged_a]
    both = [place for place, pair in enumerate(zip(a, b)) if all(map(math.isfinite, pair))]
    known = {ends[place] for place in both}
    several = ends if len(known) > 1 and None not in known else None
    compared = _compared(a, b, golds, several, WITH_INTERVAL)
    of_both, gold = [ends[place] for place in both] if several else None, [golds[place] for place in both]
    figures = {name: evaluate([one[i] for i in both], gold, of_both) for name, one in (("a", a), ("b", b))}
    return compared | figures


def better_by(
    predictions: Sequence[float | None],
    others: Sequence[float | None],
    golds: Sequence[float],
    ends: Ends | Sequence[Ends | None] | None = None,
) -> dict[str, Any]:
    """By how much predictions err less than others do, over the items that both have.

    `count` of them; `rmse` and `mae` are those of the others minus those of the predictions, with
    their `intervals` as in `compare_judges`. `ends` are those of `evaluate`, and so are NaN.
    Raises ValueError: as `evaluate`, or no item has both.
    """
    compared = _compared(others, predictions, golds, ends, ERRORS)
    return {"count": compared["count"], **compared["differences"], "intervals": compared["intervals"]}


def _compared(
    scores: Sequence[float | None],
    others: Sequence[float | None],
    golds: Sequence[float],
    ends: Ends | Sequence[Ends | None] | None,
    names: Sequence[str],
) -> dict[str, Any]:
    """`count`, `differences` and `intervals` of some figures: see `compare_judges`."""
    gold, a, b = _paired(golds, scores, others)
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise ValueError("there is no item that both judges have judged")
    is_off = False
    if ends:
        low, high, count = _each_ends(ends, both)
        is_off = bool(((gold < low) | (gold > high)).any())
        if count > 1:
            gold, a, b = ((each - low) / (high - low) for each in (gold, a, b))
    gold, a, b = gold[both], a[both], b[both]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        differences = {name: float(_FIGURES[name](a, gold) - _FIGURES[name](b, gold)) for name in names}
    intervals = _bootstrap(lambda figure, i: figure(a[i], gold[i]) - figure(b[i], gold[i]), gold.size, names)
    if is_off:
        unknown = [name for name in names if name in IN_UNITS]
        differences |= dict.fromkeys(unknown, math.nan)
        intervals |= dict.fromkeys(unknown, (math.nan, math.nan))
    return {"count": int(gold.size), "differences": differences, "intervals": intervals}


def choose_gate(direct: Sequence[Judgement], reasoned: Sequence[Judgement] | None = None, share: float = 0.35) -> float:
    """The `gate` of `score_many` with which at most `share` of all tokens is written.

    `direct` are judgements of items like those to come, with `n_cot` 0; `reasoned` those of the
    same items with reasonings, whose tokens are counted: without them, all reasonings are taken to
    be of one length. What failed is left out.
    Raises ValueError: `share` is not from 0 to 1, the items differ, or none was judged.
    """
    pairs = list(zip(direct, reasoned or direct, strict=True))
    items = [
        (early.doubt, tokens_of(late) if reasoned else 1) for early, late in pairs if not early.error and not late.error
    ]
    if not items or not 0 <= share <= 1:
        raise ValueError(f"a gate needs judged items and a share from 0 to 1, got {len(items)} and {share}")
    left = share * sum(tokens for _, tokens in items)
    for doubt, tokens in sorted(items, reverse=True):
        left -= tokens
        # Those in more doubt than the first that is too much.
        if left < 0:
            return doubt
    return 0.0


def ends_of(values: Mapping[str, float] | None) -> Ends | None:
    """The lowest and the highest of the labels' values, None where there are none."""
    return (min(values.values()), max(values.values())) if values else None


def _each_ends(ends: Ends | Sequence[Ends | None], used: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The lowest and highest score of each item, NaN where unknown, and how many such pairs differ.
    Raises ValueError: one of several is unknown for an item that is used, or they don't pair up.
    """
    each: list[Any] = list(ends)
    if all(map(np.isscalar, each)):
        each = [tuple(each)] * used.size
    known = set(filter(None, each))
    if len(known) == 1:
        each = [*known] * used.size
    if len(each) != used.size:
        raise ValueError(f"ends must be of one scale or of each item, got {len(each)} for {used.size} items")
    unknown = [place for place, one in enumerate(each) if one is None and used[place]]
    if known and unknown:
        fault = f"{len(unknown)} judged items don't say on which of {len(known)} scales they are"
        raise ValueError(f"{fault}\ngive the `values` of each, as `judge` writes them")
    low, high = np.array([one or (math.nan, math.nan) for one in each]).T
    return low, high, len(known)


def tokens_of(judgement: Judgement) -> int:
    """How many tokens the reasonings of a judgement have."""
    return sum(map(len, judgement.feedback_ids))


def _paired(golds: Sequence[float], *predictions: Sequence[float | None]) -> list[np.ndarray]:
    """The golds and all predictions as arrays. Raises ValueError: they don't pair up."""
    gold, *predicted = arrays = [np.array(list(scores), dtype=np.float64) for scores in (golds, *predictions)]
    if gold.size == 0 or any(scores.shape != gold.shape for scores in predicted):
        counts = ", ".join(str(scores.size) for scores in predicted)
        raise ValueError(f"predictions and golds must pair up, got {counts} and {gold.size} of them")
    if not np.isfinite(gold).all():
        items = np.flatnonzero(~np.isfinite(gold)).tolist()
        raise ValueError(f"gold scores must be finite; those of items {items[:20]} are not")
    return arrays


def _score_of(judged: Judgement | float | None) -> float:
    score = judged.score if isinstance(judged, Judgement) else judged
    return math.nan if score is None else float(score)


def format_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """A markdown table, one named row each: texts as they are, figures with three decimals."""
    cells = [["", *columns]]
    for name, values in rows.items():
        shown = (values[column] for column in columns)
        cells.append([name, *(v if isinstance(v, str) else f"{v:.3f}" for v in shown)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    widths[1:] = [max(2, width) for width in widths[1:]]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (cells[0], rule, *cells[1:]):
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _bootstrap(
    measure: Callable[[Figure, np.ndarray], np.ndarray], count: int, names: Sequence[str] = WITH_INTERVAL
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the figures of these names, over resamples of `count` items."""
    if count < 2:
        return dict.fromkeys(names, (math.nan, math.nan))
    random = np.random.default_rng(0)
    draws: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(RESAMPLES // CHUNK):
            items = random.integers(count, size=(CHUNK, count))
            for name, values in draws.items():
                values.append(measure(_FIGURES[name], items))
        # A resample can be constant, and its correlation NaN, where the items are few.
        return {name: tuple(np.nanpercentile(values, [2.5, 97.5]).tolist()) for name, values in draws.items()}


def _pearson(predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    from scipy.stats import pearsonr

    return pearsonr(predicted, gold, axis=-1).statistic if gold.shape[-1] > 1 else np.array(np.nan)


def _spearman(predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return _pearson(rankdata(predicted, axis=-1), rankdata(gold, axis=-1))


def _kendall(predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    from scipy.stats import kendalltau

    return kendalltau(predicted, gold).statistic


def _qwk(predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Quadratic weighted kappa of scores rounded to whole numbers, halves to the even one.

    1 - the mean squared gap of the pairs over that of all predictions with all golds.
    """
    a, b = np.rint(predicted), np.rint(gold)
    chance = a.var(axis=-1) + b.var(axis=-1) + (a.mean(axis=-1) - b.mean(axis=-1)) ** 2
    return 1 - np.mean((a - b) ** 2, axis=-1) / chance


_FIGURES: dict[str, Figure] = {
    "pearson": _pearson,
    "spearman": _spearman,
    "kendall": _kendall,
    "rmse": lambda predicted, gold: np.sqrt(np.mean((predicted - gold) ** 2, axis=-1)),
    "mae": lambda predicted, gold: np.mean(np.abs(predicted - gold), axis=-1),
    "qwk": _qwk,
}
