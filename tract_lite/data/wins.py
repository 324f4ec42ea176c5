"""How often one of several answers, or judges, wins: rates with intervals, and in words."""

import math
import re
from itertools import chain
from statistics import NormalDist, fmean
from typing import Any, Iterable, Mapping, Sequence

from tract_lite.data.answers import TIE
from tract_lite.data.parts import SURE
from tract_lite.metrics import format_table

Row = Mapping[str, Any]
# A share, and its 95 % interval.
Share = tuple[float, float, float]

_PAIR = re.compile(r"([a-z]|\d)_above_([a-z]|\d)")


def share_of(successes: float, count: int) -> Share:
    """The share that successes are of all, and its 95 % interval, by Wilson's formula.

    A half success is a tie: its interval is then a little wide. NaN where there is nothing.
    """
    if not count:
        return (math.nan,) * 3
    z, share = NormalDist().inv_cdf(0.975), successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def shown(share: Share) -> str:
    """A share with its interval, for a table."""
    return "-" if math.isnan(share[0]) else "{:.3f} [{:.2f}, {:.2f}]".format(*share)


def win_rates(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Of each two answers, by "a over b", how often the first one wins: in the `rows` with a
    chance, `won`, `tied` and `lost`, where a win is a chance of more than `SURE`.

    `rate`: the share of the wins, where a tie counts half. `chance`: the mean of the chances. Rows
    are `whole_rows`, or those of their table.
    """
    chances: dict[str, list[float]] = {}
    for name, cell in chain.from_iterable(row.items() for row in rows):
        if (pair := _PAIR.fullmatch(name)) and cell not in (None, ""):
            chances.setdefault("{} over {}".format(*pair.groups()), []).append(float(cell))
    rates: dict[str, dict[str, Any]] = {}
    for name, found in chances.items():
        won, lost = (sum(chance > SURE for chance in side) for side in (found, [1 - chance for chance in found]))
        tied = len(found) - won - lost
        rates[name] = {"rows": len(found), "won": won, "tied": tied, "lost": lost, "chance": fmean(found)}
        rates[name]["rate"] = share_of(won + tied / 2, len(found))
    return rates


def agreement(rows: Iterable[Row]) -> dict[str, tuple[int, Share]]:
    """How often the winner is the one that people prefer: the number of rows and the share.

    `all`: over all rows with a winner and a preference, a tie being an answer as others are;
    `decided`: over those in which people prefer one, where the judge's tie counts half.
    """
    both = ("gold_preferred", "winner")
    pairs = [tuple(map(row.get, both)) for row in rows if all(map(row.get, both))]
    decided = [pair for pair in pairs if pair[0] != TIE]
    same = sum(preferred == winner for preferred, winner in pairs)
    half = sum((preferred == winner) + (winner == TIE) / 2 for preferred, winner in decided)
    return {"all": (len(pairs), share_of(same, len(pairs))), "decided": (len(decided), share_of(half, len(decided)))}


def wins_in_words(rows: Sequence[Row]) -> str:
    """The rates and the agreement of rows for a console; empty where nothing is compared."""
    rates = win_rates(rows)
    if not rates:
        return ""
    table = {
        name: {key: f"{row[key]:,}" for key in ("rows", "won", "tied", "lost")}
        | {"win rate": shown(row["rate"]), "P": row["chance"]}
        for name, row in rates.items()
    }
    lines = [format_table(table, ["rows", "won", "tied", "lost", "win rate", "P"]), ""]
    lines += [
        f"won: a chance of more than {SURE * 100:.0f} % to be the better one; tied: neither has it, which counts half"
    ]
    lines += ["in the win rate; in brackets: 95 % intervals (Wilson); P: the mean chance"]
    people = agreement(rows)
    if (count := people["all"][0]) > 0:
        count_decided, share = people["decided"]
        lines += ["", f"the winner is the preferred one in {shown(people['all'][1])} of {count:,} rows, a tie being an"]
        lines += [f"answer as others are; in {shown(share)} of the {count_decided:,} rows in which one is preferred,"]
        lines += ["where the judge's tie counts half"]
    return "\n".join(lines)
