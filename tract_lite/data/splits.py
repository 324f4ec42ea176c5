"""What a run trains on, what it is validated on, and what it is measured with."""

import logging
import random
from dataclasses import dataclass, field, replace
from typing import Any, Sequence

from tract_lite.data.records import read_records, split_records, with_own_ids
from tract_lite.data.scales import propose_scale, read_scale, scale_cell
from tract_lite.record import Record
from tract_lite.scale import ScoreScale

logger = logging.getLogger(__name__)

# A tenth is held out, but LEAST_HELD_OUT items where these are no more than MOST_SHARE of all.
HELD_OUT_SHARE, LEAST_HELD_OUT, MOST_SHARE = 0.1, 100, 0.25
# Of fewer items than FEW_ITEMS, agreement is mostly chance.
FEW_ITEMS = 20
# As TRACT's; of fewer records, the best step would be found by chance.
VALIDATION_SHARE, LEAST_VALIDATION = 0.05, 20


@dataclass(frozen=True)
class Splits:
    """The parts of a run's data, no prompt in two of them, and counts of what was left out; with
    these, the scale that was proposed, if none was named.
    """

    training: list[Record]
    validation: list[Record]
    held_out: list[Record]
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> ScoreScale | None:
        """The scale that the data have proposed."""
        return read_scale(self.counts.get("scale"))

    @property
    def records(self) -> list[Record]:
        """Those of all parts."""
        return [*self.training, *self.validation, *self.held_out]


def read_splits(
    data: str,
    held_out: str | None = None,
    *,
    scale: ScoreScale | None,
    max_items: int,
    max_held_out: int,
    max_validation: int,
    split: str | None = None,
    **reading: Any,
) -> Splits:
    """Training and validation records, and held-out items: those of their own file, or a tenth of
    the data, and at least 100 items or a quarter of them.

    An item of several annotators gives one training record each; held out, it is one item with
    their mean score. A twentieth of the training records, unless fewer than 20, is for validation.
    Without a `scale`, one is proposed from all gold scores. `reading` and `split`, that of the
    data, are options of `read_records`.
    Raises ValueError: unusable rows, or too few items with a score.
    """
    rejected: list[str] = []
    reading |= {"scale": scale, "rejected": rejected}
    items = read_records(data, split=split, **reading)
    scored, measured = [item for item in items if item.score is not None], list[Record]()
    if held_out:
        measured = read_records(held_out, **{**reading, "format": "auto"})
        kept = [item for item in measured if item.score is not None][:max_held_out]
        seen = {item.key for item in kept}
        training = [item for item in scored if item.key not in seen]
    else:
        count = max(len(scored), 1)
        share = max(HELD_OUT_SHARE, min(MOST_SHARE, LEAST_HELD_OUT / count))
        training, kept = split_records(scored, min(share, max_held_out / count))
    if not training or not kept:
        few = f"{len(scored)} items with a score are too few to hold some out"
        raise ValueError(f"{few}; --columns score=NAME names the column of gold scores")
    if len(kept) < LEAST_HELD_OUT:
        worth = "say little" if len(kept) < FEW_ITEMS else "are rough, as their intervals show"
        logger.warning("only %d items are held out: the figures of this run %s", len(kept), worth)
    if len(training) > max_items:
        logger.info("%d of %d items are used (--max-items)", max_items, len(training))
        training = random.Random(0).sample(training, max_items)
    pairs = with_own_ids([pair for item in training for pair in item.pairs()])
    rest, validation = split_records(pairs, min(VALIDATION_SHARE, max_validation / len(pairs)))
    if len(validation) < LEAST_VALIDATION:
        rest, validation = pairs, []
    counts: dict[str, Any] = {"items": len(items), "bad_rows": len(rejected), "without_score": len(items) - len(scored)}
    counts["pairs"] = sum(len(item.pairs()) for item in scored)
    counts["held_out_pairs"] = sum(len(item.pairs()) for item in kept)
    if scale is None:
        counts["scale"] = scale_cell(propose_scale([*items, *measured]))
    return Splits(rest, validation, [replace(item, annotations=()) for item in kept], counts)


def apart(records: Sequence[Record], others: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The records whose prompts are not among those of the others, and the ones whose are."""
    keys = {record.key for record in others}
    shared = [record for record in records if record.key in keys]
    return [record for record in records if record.key not in keys], shared
