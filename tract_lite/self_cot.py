"""The judge writes its own reasoning for every training item; the gold scores stay.

Source: TRACT, section 3 (the data of stage 2).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

from tqdm.auto import tqdm

from tract_lite.jsonl import append_rows, read_rows
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.records import Record, read_records, record_to_row


def generate_cots(judge: Judge, records: Sequence[Record], out: str | Path,
                  seed: int = 0) -> tuple[list[Record], Counter[str]]:
    """One reasoning per record, written to `out` (JSONL) with the record and its gold score.

    The judge's own score is thrown away. Goes on where an earlier call stopped. Returns the
    records with their new reasonings, as text and ids, and how many were rejected and why. A
    record without an id gets its position.

    Raises:
        ValueError: two records have one id, or every reasoning was rejected.
    """
    out = Path(out)
    records = [dataclasses.replace(record, id=record.id or str(position))
               for position, record in enumerate(records)]
    if len({record.id for record in records}) < len(records):
        raise ValueError("each record needs an id of its own, to be told apart in the file")
    rejects = out.with_name(out.stem + ".rejected.jsonl")
    done = {row["id"] for path in (out, rejects) for row in read_rows(path)}
    todo = [record for record in records if record.id not in done]
    judgements = tqdm(judge.score_many(todo, seed=seed), "reasonings", len(todo))
    append_rows(out, _usable_rows(judgements, todo, rejects))
    reasons = Counter(row["reason"] for row in read_rows(rejects))
    if not out.stat().st_size:
        raise ValueError(
            f"the judge wrote no usable reasoning for any of {len(records)} records "
            f"({dict(reasons)}): train stage 1 for longer, or allow more new tokens"
        )
    return read_records(out), reasons


def _usable_rows(judgements: Iterable[Judgement], records: Sequence[Record],
                 rejects: Path) -> Iterator[dict[str, Any]]:
    """The records with a usable reasoning as rows; the others go to `rejects` with the reason."""
    for judgement, record in zip(judgements, records):
        if reason := _fault(judgement):
            append_rows(rejects, [{"id": record.id, "reason": reason}])
        else:
            yield record_to_row(dataclasses.replace(
                record, feedback=judgement.feedback[0],
                feedback_ids=tuple(judgement.feedback_ids[0]),
            ))


def _fault(judgement: Judgement) -> str | None:
    if judgement.error:
        return judgement.error
    if judgement.truncated:
        return "cut off by the length limit"
    return None if judgement.feedback[0] else "empty"
