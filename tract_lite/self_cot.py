"""The judge writes its own reasoning for every training item; the gold scores stay.

Source: TRACT, section 3 (the data of stage 2).
"""

import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Sequence

from tract_lite.data.columns import Columns
from tract_lite.data.formats import record_to_row, to_record
from tract_lite.data.resume import ResumableRows, name_of
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.record import Record
from tract_lite.training.quiet import progress, quieter
from tract_lite.vocabulary import Vocabulary

# The end of a sentence, with what closes it. In "3.5" there is none.
_SENTENCE_END = re.compile(r"""([.!?\u2026]["'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]["\u201d\u300d]*)""")
_NUMBER_OF_ITEM = re.compile(r"(^|\n)\W*\d+\.$")
# What a kept row says of a reasoning that the length limit had cut off.
SHORTENED = "shortened"


def generate_cots(
    judge: Judge, records: Sequence[Record], out: str | Path, seed: int = 0
) -> tuple[list[Record], Counter[str]]:
    """One reasoning per record, written to `out` (JSONL) with the record and its gold score.

    A row is in the file as soon as it is complete, in any order; the last one puts them in that of
    the records. A reasoning that the length limit cuts off ends at its last whole sentence, and its
    row says `shortened`. Goes on where an earlier call stopped. Returns the records with their new
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
        rows.claim(judge.how(1, seed), judge.engine.shape)
    todo = [record for record in records if not (kept.has(record) or rejected.has(record))]
    # Nobody reads the scores.
    with quieter("judge", logging.ERROR), progress("writing reasonings", len(records), len(records) - len(todo)) as bar:
        for place, judgement in judge.as_completed(todo, 1, seed):
            record, vocabulary = todo[place], judge.engine.vocabulary
            ids = _whole_sentences(judgement, vocabulary)
            if reason := "" if ids else _fault(judgement):
                rejected.append(record, {"reason": reason})
            else:
                reasoned = replace(record, feedback=vocabulary.decode(ids).strip(), feedback_ids=tuple(ids))
                marks = {SHORTENED: True} if judgement.truncated else {}
                kept.append(record, record_to_row(reasoned) | marks)
            bar.update()
    kept.tidy(names)
    reasons = Counter(rejected.row(name)["reason"] for name, record in zip(names, records) if rejected.has(record))
    columns = Columns()
    complete = [to_record(kept.row(name), columns) for name, record in zip(names, records) if kept.has(record)]
    if not complete:
        why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
        fault = f"the judge wrote no usable reasoning for any of {len(records)} records ({why})"
        raise ValueError(f"{fault}\nin another output, train stage 1 for longer or allow more new tokens")
    return complete, reasons


def rejected_file(out: str | Path) -> Path:
    """Where `generate_cots` names the records whose reasonings could not be used, and why."""
    return Path(out).with_suffix(".rejected.jsonl")


def _whole_sentences(judgement: Judgement, vocabulary: Vocabulary) -> list[int]:
    """The ids of the reasoning; of one that was cut off, up to its last whole sentence."""
    ids = list(judgement.feedback_ids[0]) if judgement.feedback_ids else []
    if not judgement.truncated:
        return ids if judgement.feedback and judgement.feedback[0] else []
    text = vocabulary.decode(ids)
    ends = {match.end() for match in _SENTENCE_END.finditer(text) if not _NUMBER_OF_ITEM.search(text[: match.end()])}
    while ids and len(vocabulary.decode(ids).rstrip()) not in ends:
        ids.pop()
    return ids


def _fault(judgement: Judgement) -> str:
    return judgement.error or ("cut off by the length limit" if judgement.truncated else "empty")
