"""Two judged files side by side, and one file by each of its criteria: figures, and in words."""

import math
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple

from tract_lite.data.table import read_columns
from tract_lite.data.wins import share_of, shown
from tract_lite.judgement import Judgement
from tract_lite.metrics import NORMALISED, compare_judges, format_table
from tract_lite.report.items import judged_in_file
from tract_lite.report.rows import measured_rows

# Figures that are compared, with what the better judge does.
FIGURES = {"pearson": "agrees more", "rmse": "errs less", "mae": "errs less"}
# Criteria of fewer items have no row of their own; of many so many have one, of a long one so much.
LEAST_ITEMS, MOST_CRITERIA, LONGEST = 3, 30, 50
_NAN = (math.nan, math.nan)


class Scored(NamedTuple):
    """What a judge said of an item, and the gold score."""

    judgement: Judgement | float
    gold: float

    @property
    def error(self) -> float:
        score = self.judgement.score if isinstance(self.judgement, Judgement) else self.judgement
        return abs(score - self.gold)


# By the items' ids.
Items = Mapping[str, Scored]


def rows_by_criterion(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of a judged file by each named criterion with gold scores, as `measured_rows`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, items in _by_criterion(path).items():
        scores, golds = zip(*items.values())
        rows |= measured_rows({name: scores}, golds)
    return rows


def compared_files(first: Path, second: Path, data: str | None = None) -> str:
    """How much better one judge is than another on the items that both files have, by their ids.

    `data` is what was judged, as for `judged_in_file`. A table, one by criteria where there are
    several, and what they say in words.
    Raises ValueError: as `judged_in_file`, or no item is judged in both files.
    """
    a, b = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    files = [judged_in_file(path, data) for path in (first, second)]
    ours, theirs = (
        {str(item.judgement.id): Scored(item.judgement, item.gold) for item in file.items} for file in files
    )
    both = ours.keys() & theirs.keys()
    if not both:
        fault = f"{first} and {second} have no item with a gold score in common"
        raise ValueError(f"{fault}\nitems are known by their ids: judge the same input twice")
    compared = _compared(ours, theirs)
    others = _by_criterion(second)
    groups = {name: (items, others[name]) for name, items in _by_criterion(first).items() if name in others}
    texts: dict[str, dict[str, Scored]] = {}
    for item in files[0].items:
        if item.record and item.record.rubric and item.judgement.id in both:
            texts.setdefault(item.record.rubric.criteria, {})[item.judgement.id] = ours[item.judgement.id]
    if len(texts) > 1:
        groups |= {" ".join(text.split()): (items, theirs) for text, items in texts.items()}
    table = {
        name: {"n": f"{compared['count']:,}", **{figure: _shown(row, row["intervals"], figure) for figure in FIGURES}}
        for name, row in ((a, compared["a"]), (b, compared["b"]))
    }
    columns = ["n", *FIGURES, "closer"]
    rows = {name: row | {"closer": ""} for name, row in table.items()} | {
        "the first less the second": _row(compared, columns)
    }
    lines = [format_table(rows, columns), "", *_by_group(groups, columns)]
    lines += ["in brackets: 95 % intervals over the n items that both have judged, of differences on the same items;"]
    lines += ["closer: on which share of them the first errs less, where equal errors count half", ""]
    lines += [*_counted(ours, theirs, compared, a, b), "", *_in_words(compared, a, b)]
    return "\n".join(lines)


def _by_criterion(path: Path) -> dict[str, dict[str, Scored]]:
    """The scores by each named criterion that has gold scores in a judged file."""
    rows = read_columns(path)
    found: dict[str, dict[str, Scored]] = {}
    for number, row in enumerate(rows):
        for name in (name.removeprefix("gold_") for name in row if name.startswith("gold_")):
            score, gold = (_number(row.get(f"{figure}_{name}")) for figure in ("score", "gold"))
            if not math.isnan(gold) and f"score_{name}" in row:
                found.setdefault(name, {})[str(row.get("id", number))] = Scored(score, gold)
    return found


def _compared(ours: Items, theirs: Items) -> dict[str, Any]:
    """`compare_judges` of the items that both have, and on which share of them ours is `closer`."""
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    first, second = ([pair[side].judgement for pair in pairs] for side in (0, 1))
    compared = compare_judges(first, second, [a.gold for a, _ in pairs])
    # The second file's own gold scores are not read.
    gaps = [Scored(b.judgement, a.gold).error - a.error for a, b in pairs]
    closer = sum((gap > 0) + (gap == 0) / 2 for gap in gaps)
    return compared | {"closer": share_of(closer, compared["count"])}


def _row(compared: Mapping[str, Any], columns: Iterable[str]) -> dict[str, str]:
    cells = [_shown(compared["differences"], compared["intervals"], figure) for figure in FIGURES]
    return dict(zip(columns, [f"{compared['count']:,}", *cells, shown(compared["closer"])]))


def _by_group(groups: Mapping[str, tuple[Items, Items]], columns: list[str]) -> Iterator[str]:
    """A table of the differences by criteria, of those with enough items."""
    rows = {}
    for name, (ours, theirs) in list(groups.items())[:MOST_CRITERIA]:
        pairs = [not math.isnan(ours[key].error + theirs[key].error) for key in ours.keys() & theirs.keys()]
        if sum(pairs) >= LEAST_ITEMS:
            title = name if len(name) <= LONGEST else f"{name[:LONGEST]} …"
            rows[title] = _row(_compared(ours, theirs), columns)
    if rows:
        yield from ("the differences by criteria:", "", format_table(rows, columns), "")


def _counted(ours: Items, theirs: Items, compared: Mapping[str, Any], a: str, b: str) -> Iterator[str]:
    both = ours.keys() & theirs.keys()
    alone = [f"{len(items.keys() - both):,} in {name} alone" for items, name in ((ours, a), (theirs, b))]
    yield f"items with a gold score: {len(both):,} in both files, {', '.join(alone)}"
    if (failed := len(both) - compared["count"]) > 0:
        yield f"{failed:,} of those in both have a judgement in one alone, or in none"
    if (other := sum(ours[key].gold != theirs[key].gold for key in both)) > 0:
        yield f"{other:,} of those in both have another gold score in {b}: that of {a} is taken"
    if "scales" in compared["a"]:
        yield NORMALISED.format(compared["a"]["scales"])


def _in_words(compared: Mapping[str, Any], a: str, b: str) -> Iterator[str]:
    """Of each figure which judge is better and by how much, or that the items do not show it."""
    for figure, verb in FIGURES.items():
        low, high = compared["intervals"][figure]
        difference, sign = compared["differences"][figure], 1 if figure == "pearson" else -1
        if math.isnan(difference) or math.isnan(low):
            yield f"{figure}: it tells nothing here."
        elif low > 0 or high < 0:
            better, worse = (a, b) if difference * sign > 0 else (b, a)
            least, most = sorted((abs(low), abs(high)))
            yield f"{figure}: {better} {verb} than {worse}, by {abs(difference):.3f} ({least:.3f} to {most:.3f})."
        else:
            best = [f"{name} may be better by up to {gain:.3f}" for name, gain in zip((a, b), _gains(low, high, sign))]
            yield f"{figure}: the items do not show which one is better: {', '.join(best)}."
    share, low, high = compared["closer"]
    sure = "surely more than half" if low > 0.5 else "surely less than half" if high < 0.5 else "it may be half"
    shares = f"{a} is closer to the gold score on {share * 100:.1f} % of the items, {b} on {(1 - share) * 100:.1f} %"
    yield f"{shares} ({sure})."


def _gains(low: float, high: float, sign: int) -> tuple[float, float]:
    """By how much the first, and the second, may be better at most."""
    return (high, -low) if sign > 0 else (-low, high)


def _shown(figures: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], name: str) -> str:
    low, high = intervals.get(name, _NAN)
    shown = "-" if math.isnan(figures[name]) else f"{figures[name]:.3f}"
    return shown if math.isnan(low) else f"{shown} [{low:.2f}, {high:.2f}]"


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
