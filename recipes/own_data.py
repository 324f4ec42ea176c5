"""A user's judging data: read, counted, split into training pairs and held-out items."""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

from tract_lite import Record, ScoreScale, read_records, split_records

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
# Below, agreement is mostly chance.
FEW_ITEMS = 20


def read_own_data(data: str, split: str | None, scale: ScoreScale, skip_bad: bool, max_items: int,
                  max_held_out: int) -> tuple[list[Record], list[Record], dict[str, Any]]:
    """The training records, the held-out items, and the counts of what was read and left out.

    An item that several annotators judged gives one training record each; held out, it is one item
    with their mean score. A tenth of the items is held out, `max_held_out` at most.

    Raises:
        ValueError: unusable rows, or too few items with a score.
    """
    rejected: list[str] = []
    items = read_records(data, split=split, scale=scale, skip_bad=skip_bad, rejected=rejected)
    scored = [item for item in items if item.score is not None]
    counts = {
        "items": len(items), "bad_rows": len(rejected), "without_score": len(items) - len(scored),
        "pairs": sum(len(item.pairs()) for item in scored),
    }
    logger.info("read %(items)d items with %(pairs)d judged pairs; left out %(bad_rows)d bad rows "
                "and %(without_score)d items without a score", counts)
    share = min(HELD_OUT_SHARE, max_held_out / max(len(scored), 1))
    training, held_out = split_records(scored, share)
    if not training or not held_out:
        raise ValueError(f"{len(scored)} items with a score are too few to hold some out; the "
                         "column of gold scores is named score")
    if len(held_out) < FEW_ITEMS:
        logger.warning("only %d items are held out: the figures of this run say little",
                       len(held_out))
    if len(training) > max_items:
        logger.info("%d of %d items are used (--max-items)", max_items, len(training))
        training = random.Random(0).sample(training, max_items)
    counts["held_out_pairs"] = sum(len(item.pairs()) for item in held_out)
    return ([pair for item in training for pair in item.pairs()],
            [dataclasses.replace(item, annotations=()) for item in held_out], counts)
