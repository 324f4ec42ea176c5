"""What a judge is worth, in plain sentences: how far off it is, and whether that is sure."""

import math
from typing import Any, Iterable, Mapping

from tract_lite.metrics import Ends
from tract_lite.report.rows import judge_of

# Of fewer items, figures are rough; on fewer training items, more of them help most.
FEW_ITEMS, FEW_TRAINED = 100, 1000
# Items with which a difference of the size that was seen is found four times in five.
POWER = 2.0
# Beyond so many times the items, more of them are no advice.
MOST_TIMES = 30
TOY = "toy"
IS_TOY = (
    "It is a toy: its seed model was made for this run, of texts like these, to show the way. For a judge of use, take "
    "a real seed model."
)

Row = Mapping[str, Any]


def is_toy(settings: Mapping[str, Any]) -> bool:
    """Whether a run's settings say that its seed model was made for it."""
    return "seed_model" in settings and settings["seed_model"] in (None, "", TOY)


def verdict(
    row: Row,
    baselines: Mapping[str, Row],
    *,
    ends: Ends | None = None,
    items: str = "held-out items",
    toy: bool = False,
    trained_on: int | None = None,
    improving: bool = False,
) -> str:
    """A judge's error beside that of `baselines`, whether its items are enough to be sure that it
    errs less, and what to do next.

    `row` is what `measured_rows` has of the judge, `baselines` the rows that it is compared with.
    `ends`: of the scale, None where nobody knows or there are several. `trained_on`: how many
    records the judge was trained on, None if nobody knows; `improving`: whether the end of its
    training was its best.
    """
    if not row["count"]:
        return f"The judge could judge none of the {items}: its errors stand in the rows of its judgements."
    if math.isnan(row["mae"]):
        scale = f"scale ({ends[0]:g} to {ends[1]:g})" if ends else "scale"
        off = f"{row['off_scale']:,} gold scores are outside the judge's {scale}, so that its error has no unit"
        return f"{off}. Next: judge with a scale that holds them."
    on = f" on a scale from {ends[0]:g} to {ends[1]:g}" if ends else ""
    on = ", as a share of the scale of each item" if row.get("scales") else on
    others = "; ".join(f"{_plain(name)}: {_number(baselines[name]['mae'])}" for name in row.get("better_by", {}))
    first = f"The judge is off by {_number(row['mae'])} on average{on}{f' ({others})' if others else ''}."
    sure = _by_sureness(row.get("better_by", {}))
    sentences = [first, *_compared(sure, row["count"], items)]
    if row["count"] < FEW_ITEMS:
        sentences.append(f"With fewer than {FEW_ITEMS} items these figures are rough.")
    sentences.append(IS_TOY if toy else _next(sure, row, items, trained_on, improving))
    return " ".join(filter(None, sentences))


def _by_sureness(compared: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """The comparisons in which the judge errs surely less, surely more, or neither."""
    sure: dict[str, dict[str, Row]] = {"better": {}, "unsure": {}, "worse": {}}
    for name, gained in compared.items():
        low, high = gained["intervals"]["mae"]
        sure["better" if low > 0 else "worse" if high < 0 else "unsure"][name] = gained
    return sure


def _compared(sure: Mapping[str, Mapping[str, Row]], count: int, items: str) -> Iterable[str]:
    if sure["better"]:
        yield f"Its {count:,} {items} are enough to be sure that it is better than {_listed(sure['better'], count)}."
    if sure["unsure"]:
        also = "But they" if sure["better"] else f"Its {count:,} {items}"
        yield f"{also} do not show that it is better than {_listed(sure['unsure'], count)}."
    if sure["worse"]:
        yield f"It is worse than {_listed(sure['worse'], count, -1)}."


def _listed(compared: Mapping[str, Row], count: int, sign: int = 1) -> str:
    """Names, each with the 95 % interval of how much better the judge is, or worse by the sign, and
    the number of items where it is not `count`.
    """
    parts = []
    for name, gained in compared.items():
        low, high = sorted(sign * end for end in gained["intervals"]["mae"])
        told = [f"by {low:.2g} to {high:.2g}"] if low == low else []
        told += [f"on {gained['count']:,} of them"] if gained["count"] < count else []
        parts.append(f"{_plain(name)} ({', '.join(told)})" if told else _plain(name))
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _next(sure: Mapping[str, Mapping[str, Row]], row: Row, items: str, trained_on: int | None, improving: bool) -> str:
    steps = []
    if sure["worse"]:
        steps.append("check that the gold scores are what the criteria ask for")
    elif sure["unsure"]:
        needed = max(_needed(gained) for gained in sure["unsure"].values())
        if needed <= MOST_TIMES * row["count"]:
            steps.append(f"take more {items} (about {_rounded(needed):,} would tell)")
        elif row["count"] < FEW_ITEMS:
            steps.append(f"take more {items}")
    if trained_on is None:
        steps += ["try other criteria or another judge"] * bool(sure["unsure"] or sure["worse"])
    elif trained_on < FEW_TRAINED:
        steps.append(f"train on more than these {trained_on:,} items")
    elif improving:
        steps.append("train for longer (--epochs): its last step was its best")
    else:
        steps.append("train a larger seed model (--seed-model)")
    return f"Next: {', or '.join(steps)}." if steps else ""


def _needed(gained: Row) -> float:
    """About how many items would show a difference of this size to be none of chance."""
    low, high = gained["intervals"]["mae"]
    if not gained["mae"] > 0:
        return math.inf
    return max(gained["count"] + 1, POWER * gained["count"] * ((high - low) / 2 / gained["mae"]) ** 2)


def _rounded(count: float) -> int:
    """Up to two digits."""
    step = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / step) * step


def _number(value: float) -> str:
    """Three digits of a number."""
    return f"{value:#.3g}".rstrip(".")


def _plain(name: str) -> str:
    """What a sentence calls a row: without the reading of its distribution."""
    guess = name.removeprefix("always ")
    return f"always guessing {guess}" if guess != name else f"“{judge_of(name)}”"
