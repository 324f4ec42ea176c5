"""What a row asks for, in parts: each of its answers by each criterion; and the parts as one row.

A judgement of a part is written as a row of its own, whose `of` says of what: the `item`, the
letter of the `response`, the `criterion` with its `weight`, and what people said of the whole item:
`gold` (its score) and `preferred` (a letter, or a tie). One alone has no `of`.
"""

import logging
import math
from dataclasses import replace
from itertools import combinations
from reprlib import repr as shorten
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from tract_lite.data.answers import TIE
from tract_lite.data.criteria import Criterion
from tract_lite.data.names import plain_name
from tract_lite.data.records import Answers, Table
from tract_lite.data.resume import row_of
from tract_lite.data.scores import parse_score
from tract_lite.judgement import Judgement, mean_above
from tract_lite.metrics import ends_of
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

# The winner of two answers has more than this chance to be the better one; else it is a tie.
SURE = 0.55


class Part(NamedTuple):
    """A record to judge, what its judgement is `of` (None: of the whole row), and why it can't be
    judged, where that is known before."""

    record: Record
    of: dict[str, Any] | None = None
    error: str | None = None

    @property
    def marks(self) -> dict[str, Any]:
        """What the row of its judgement has beside that."""
        return {"of": self.of} if self.of else {}


def asked_by(criteria: Sequence[Criterion], how: Mapping[str, Any]) -> Any:
    """How a table is read (`Options`) whose rows are judged by these criteria, if there are any."""
    named = {"rubric": criteria[0].rubric, "elsewhere": [criterion.name for criterion in criteria]} if criteria else {}
    return {"gold_needed": False, **how, **named}


def parts_of(table: Table, criteria: Sequence[Criterion] = (), scale: ScoreScale | None = None) -> list[Part]:
    """Each answer of each row by each criterion; the records as they are where no row has more than
    one.

    All parts of a row follow one another. A column with a criterion's name has gold scores of it,
    which are read as on its own scale, or else on `scale`.
    """
    found: list[Part] = []
    unread: list[str] = []
    in_parts = bool(criteria) or any(table.answers)
    for record, row, answers in zip(table.records, table.rows, table.answers):
        if in_parts:
            found += _parts(record, row, answers or Answers({"": record}, None), criteria, scale, unread)
        else:
            found.append(Part(record))
    if unread:
        logger.warning("%d cells in columns of criteria are no score, and left out, such as %s", len(unread), unread[0])
    return found


def _parts(
    record: Record,
    row: Row,
    answers: Answers,
    criteria: Sequence[Criterion],
    scale: ScoreScale | None,
    unread: list[str],
) -> Iterator[Part]:
    cells = {plain_name(name): cell for name, cell in row.items()}
    asked = criteria or [Criterion("", record.rubric or Rubric(""))]
    whole = sum(criterion.weight for criterion in asked)
    for letter, answer in answers.records.items():
        # A row's own gold score is that of its one answer by all criteria.
        said = {"preferred": answers.preferred} if letter else {"gold": record.score}
        error = f"response_{letter} is empty" if letter and answer.prompt is None and not answer.response else None
        for name, rubric, weight, own in asked:
            of = {"item": record.id, "response": letter, "criterion": name, "weight": weight / whole, **said}
            gold = _gold(cells.get(plain_name(name)), own or scale, unread) if name and not letter else None
            yield Part(
                replace(
                    answer,
                    id="/".join(filter(None, [record.id, letter, name])),
                    rubric=rubric if name else answer.rubric,
                    scale=own or answer.scale,
                    score=gold,
                    gold_scores=(),
                ),
                {key: value for key, value in of.items() if value not in (None, "")},
                error,
            )


def judged_parts(
    parts: Sequence[Part], judged: Callable[[Sequence[Record]], Iterable[Judgement]]
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Each part in order with the row of its judgement; `judged` judges those that can be."""
    judgements = iter(judged([part.record for part in parts if not part.error]))
    for part in parts:
        judgement = Judgement(part.record.id, error=part.error) if part.error else next(judgements)
        yield part, row_of(part.record, judgement.to_row() | part.marks, gold=True)
    # What judges ends its work, too.
    next(judgements, None)


def _gold(cell: Any, scale: ScoreScale | None, unread: list[str]) -> float | None:
    """The gold score in a column with a criterion's name; other cells are noted as `unread`."""
    try:
        return parse_score(cell, scale)
    except ValueError:
        unread.append(shorten(cell))
        return None


class _Weighed(NamedTuple):
    """A judgement of a part, its share of the mean, and what its figures are of: they lie from
    `low` on and are `width` wide."""

    criterion: str
    judgement: Judgement
    share: float
    gold: float | None
    low: float
    width: float

    def in_mean(self, score: float) -> float:
        """What a score adds to the mean."""
        return self.share * (score - self.low) / self.width


def whole_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A row for each item, of the rows of its parts; rows that are no parts are left out.

    Its keys are the columns of a table, in order: the figures of each answer by all criteria, the
    chances between two answers, the winner, the figures of each part, `error` and `gold`.
    """
    items: dict[str, list[Row]] = {}
    for row in rows:
        if "of" in row:
            items.setdefault(row["of"]["item"], []).append(row)
    return [_whole(item, sorted(parts, key=lambda row: row["of"].get("response", ""))) for item, parts in items.items()]


def _whole(item: str, rows: Sequence[Row]) -> dict[str, Any]:
    scales = {ends for row in rows if (ends := ends_of(row.get("values")))}
    answers: dict[str, list[_Weighed]] = {}
    for row in rows:
        # On several scales, each score counts by its place on its own.
        low, high = (ends_of(row.get("values")) if len(scales) > 1 else None) or (0.0, 1.0)
        of, judgement = row["of"], Judgement.from_row(row)
        weighed = _Weighed(of.get("criterion", ""), judgement, of["weight"], row.get("gold"), low, high - low)
        answers.setdefault(of.get("response", ""), []).append(weighed)
    whole: dict[str, Any] = {"id": item}
    for letter, parts in answers.items():
        whole |= _ending(_mean(parts), letter)
    if len(answers) > 1:
        whole |= _compared(answers)
        whole |= {"gold_preferred": rows[0]["of"]["preferred"]} if "preferred" in rows[0]["of"] else {}
    for letter, parts in answers.items():
        for part in parts:
            text = {"feedback": "\n\n".join(part.judgement.feedback)}
            figures = _figures(part.judgement) | ({} if part.gold is None else {"gold": part.gold})
            whole |= _ending((figures if part.criterion else {}) | text, letter, part.criterion)
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row["error"]:
            name = "/".join(filter(None, map(row["of"].get, ("response", "criterion"))))
            failed.setdefault(row["error"], []).append(name)
    whole["error"] = "; ".join(f"{', '.join(names)}: {error}" for error, names in failed.items()) or None
    if len(answers) == 1:
        [parts] = answers.values()
        known = [part.in_mean(part.gold) for part in parts if part.gold is not None]
        # On several scales, the row's own score is in units that their mean does not have.
        own = rows[0]["of"].get("gold") if len(scales) < 2 else None
        whole["gold"] = own if own is not None else sum(known) if len(known) == len(parts) else None
    return whole


def _figures(judgement: Judgement) -> dict[str, Any]:
    return {name: _known(getattr(judgement, name)) for name in ("score", "std", "doubt")}


def _mean(parts: Sequence[_Weighed]) -> dict[str, Any]:
    """The weighted mean of judgements and its doubt, which are independent of one another."""
    if not _is_whole(parts):
        return dict.fromkeys(("score", "std", "doubt"))
    used = [part for part in parts if part.share]
    squares = {
        name: sum((part.share * getattr(part.judgement, name) / part.width) ** 2 for part in used)
        for name in ("std", "doubt")
    }
    score = _known(sum(part.in_mean(part.judgement.score) for part in used))
    # A failed judgement has a doubt, and the mean has none.
    return {"score": score} | {
        name: None if score is None else _known(math.sqrt(square)) for name, square in squares.items()
    }


def _is_whole(parts: Sequence[_Weighed]) -> bool:
    """Whether each criterion has been judged, and none that is gone from the rubric is there."""
    return math.isclose(sum(part.share for part in parts), 1)


def _compared(answers: Mapping[str, Sequence[_Weighed]]) -> dict[str, Any]:
    """The chance of each answer to be better than each later one, and the winner."""
    chances: dict[tuple[str, str], float | None] = {}
    for (one, ours), (other, theirs) in combinations(answers.items(), 2):
        by_name = {part.criterion: part for part in theirs}
        used = [(part, by_name[part.criterion]) for part in ours if part.share and part.criterion in by_name]
        try:
            first, second = ([pair[side].judgement for pair in used] for side in (0, 1))
            chances[one, other] = mean_above(first, second, [part.share / part.width for part, _ in used])
        except ValueError:
            # One was not judged.
            chances[one, other] = None
    if not all(map(_is_whole, answers.values())):
        chances = dict.fromkeys(chances)
    return {f"{one}_above_{other}": chance for (one, other), chance in chances.items()} | {"winner": _winner(chances)}


def _winner(chances: Mapping[tuple[str, str], float | None]) -> str | None:
    """The answer with more than the chance `SURE` against each other one, else `TIE`."""
    known = {pair: chance for pair, chance in chances.items() if chance is not None}
    if len(known) < len(chances):
        return None
    both = known | {(other, one): 1 - chance for (one, other), chance in known.items()}
    letters = dict.fromkeys(letter for pair in both for letter in pair)
    sure = (a for a in letters if all(both[a, b] > SURE for b in letters if b != a))
    return next(sure, TIE)


def _ending(figures: Row, *names: str) -> dict[str, Any]:
    """The figures under their names with these behind them."""
    return {"_".join(filter(None, [figure, *names])): value for figure, value in figures.items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
