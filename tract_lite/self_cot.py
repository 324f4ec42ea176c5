"""The judge writes its own reasoning for every training item; the gold scores stay.

Source: TRACT, section 3 (the data of stage 2).
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Sequence

from tqdm.auto import tqdm

from tract_lite.data.columns import Columns
from tract_lite.data.formats import record_to_row, to_record
from tract_lite.data.resume import ResumableRows, name_of
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.record import Record


def generate_cots(
    judge: Judge, records: Sequence[Record], out: str | Path, seed: int = 0
) -> tuple[list[Record], Counter[str]]:
    """One reasoning per record, written to `out` (JSONL) with the record and its gold score.

    A row is in the file as soon as it is complete, in any order; the last one puts them in that of
    the records. Goes on where an earlier call stopped. Returns the records with their new
    reasonings (text and ids), and how many were rejected and why, which `rejected_file` names. A
    record without an id gets its position.
    Raises ValueError: two records of one id, no usable reasoning, or `out` is of another judge.
    """
    records = [replace(record, id=record.id or str(n)) for n, record in enumerate(records)]
    names = list(map(name_of, records))
    if len(set(names)) < len(names):
        raise ValueError("each record needs an id of its own, to be told apart in the file")
    kept, rejected = ResumableRows(out), ResumableRows(rejected_file(out))
    for rows in (kept, rejected):
        rows.claim(judge.how(seed=seed), judge.engine.shape)
    todo = [record for record in records if not (kept.has(record) or rejected.has(record))]
    with tqdm(desc="reasonings", total=len(records), initial=len(records) - len(todo)) as progress:
        for place, judgement in judge.as_completed(todo, seed=seed):
            record = todo[place]
            if reason := _fault(judgement):
                rejected.append(record, {"reason": reason})
            else:
                [text], [ids] = judgement.feedback, judgement.feedback_ids
                kept.append(record, record_to_row(replace(record, feedback=text, feedback_ids=tuple(ids))))
            progress.update()
    kept.tidy(names)
    reasons = Counter(rejected.row(name)["reason"] for name, record in zip(names, records) if rejected.has(record))
    columns = Columns()
    reasoned = [to_record(kept.row(name), columns) for name, record in zip(names, records) if kept.has(record)]
    if not reasoned:
        why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
        fault = f"the judge wrote no usable reasoning for any of {len(records)} records ({why})"
        raise ValueError(f"{fault}\nin another output, train stage 1 for longer or allow more new tokens")
    return reasoned, reasons


def rejected_file(out: str | Path) -> Path:
    """Where `generate_cots` names the records whose reasonings could not be used, and why."""
    return Path(out).with_suffix(".rejected.jsonl")


def _fault(judgement: Judgement) -> str | None:
    if judgement.error or judgement.truncated:
        return judgement.error or "cut off by the length limit"
    return None if judgement.feedback[0] else "empty"
