"""Judging a file: records in, judgements out, from a GGUF file or a server."""

import logging
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Iterable, Iterator, Mapping, Sequence, TypeVar

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tract_lite.data.criteria import read_criteria
from tract_lite.data.parts import Part, asked_by, judged_parts, parts_of, whole_rows
from tract_lite.data.records import Table, how_to_read, read_table
from tract_lite.data.resume import ResumableRows, name_of
from tract_lite.data.scales import DEFAULT_SCALE, named_scale, propose_scale
from tract_lite.data.table import check_table, scales_in, write_table, write_whole_rows
from tract_lite.data.wins import wins_in_words
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.metrics import NORMALISED, choose_gate, ends_of, evaluate, format_table, tokens_of
from tract_lite.options import AskOptions, GateOptions, JudgeOptions, flag_of
from tract_lite.record import Record
from tract_lite.spec import read_template, read_template_text
from tract_lite.version import __version__

logger = logging.getLogger(__name__)

Judged = TypeVar("Judged")

# A server's key is not given on the command line, where others could read it.
API_KEY = "TRACT_LITE_API_KEY"


class _PartRows(ResumableRows):
    """Rows of judgements that say what they are of."""

    def __init__(self, path: Path, parts: Sequence[Part]):
        super().__init__(path)
        first = next(self.rows(), None)
        if first and parts and ("of" in first) != bool(parts[0].of):
            other = "several criteria or answers" if "of" in first else "one rubric and one answer"
            raise ValueError(f"{path} holds judgements by {other}\nchoose another output, or ask as before")
        self._marks = {name_of(part.record): part.marks for part in parts}

    def append(self, record: Record, row: Mapping[str, Any]) -> None:
        super().append(record, {**row, **self._marks[name_of(record)]})

    def complete(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The rows of all parts, which are there, with what is said of these now. What was a part
        of these items, and is none any more, goes."""
        for part in parts:
            if (row := self.row(name_of(part.record))).get("of") != part.of:
                self.append(part.record, row)
        names, items = [name_of(part.record) for part in parts], {part.of["item"] for part in parts if part.of}
        gone = {row["id"] for row in self.rows() if row.get("of", {}).get("item") in items} - {*names}
        self.tidy(names, gone)
        return list(map(self.row, names))


def judge_file(model: str, source: str, output: Path, options: JudgeOptions) -> str:
    """Judge what has no judgement in the output yet; returns what was done, in a line, and who won
    where several answers are compared.

    The rows stand in a JSONL file, appended as they come. `x.csv` or `x.parquet` is a table made
    from the rows in `x.jsonl`; `x.run.json` says how they were judged.
    Raises ValueError: the output holds something else. Raises RuntimeError: nothing was judged.
    """
    _check(model, options)
    rows_file = _rows_file(output, source)
    table, parts = _read(model, source, options)
    rows, records = _PartRows(rows_file, parts), [part.record for part in parts]
    missing = sum(not rows.has(record) for record in records)
    failures, reasoned = [], 0
    with _open(model, options, records) as judge:
        judge.engine.shape["tract_lite"] = __version__
        asked = [part.record for part in parts if not part.error]
        judged = judge.score_many(asked, options.n_cot, options.seed, gate=options.gate, resume=rows)
        for part, row in _with_progress(judged_parts(parts, lambda _: judged), len(records), len(records) - missing):
            if part.error:
                rows.append(part.record, row)
            failures += [row["error"]] if row["error"] else []
            reasoned += bool(row["feedback"])
    names = list(map(name_of, records))
    given = {name_of(record): row for record, row in zip(table.records, table.rows)}
    whole = whole_rows(rows.complete(parts)) if any(part.of for part in parts) else []
    if output != rows.path and whole:
        write_whole_rows(output, whole, given)
    elif output != rows.path:
        write_table(output, map(rows.row, names), scales_in(map(rows.row, names)), given)
    _check_failures(failures, records)
    first = f"; the first failure: {failures[0]}" if failures else ""
    there = len(records) - missing
    of_rows = f", in parts of {len(given)} rows" if whole else ""
    if others := sum(1 for _ in rows.rows()) - len(names):
        of_rows += f"; {others} of items that are not in the input stay in {rows.path.name}"
    done = f"{output}: {missing} judged, {len(failures)} of them failed, {there} were there already{of_rows}"
    gated = "" if options.gate is None else f"; {reasoned} of {len(records)} with reasonings"
    return "\n\n".join(filter(None, [f"{done}{gated}{_without_gold(table.records)}{first}", wins_in_words(whole)]))


def judge_rows(model: str, source: str, options: JudgeOptions) -> Iterator[dict[str, Any]]:
    """Judge every item; gives each row, as `judge_file` writes it, as soon as it is complete.
    Raises RuntimeError: nothing was judged.
    """
    _check(model, options)
    table, parts = _read(model, source, options)
    records, failures = [part.record for part in parts], []
    with _open(model, options, records) as judge:
        judged = judged_parts(
            parts, lambda some: judge.score_many(some, options.n_cot, options.seed, gate=options.gate)
        )
        for _, row in _with_progress(judged, len(records), 0):
            failures += [row["error"]] if row["error"] else []
            yield row
    logger.info("%d judged, %d of them failed%s", len(records), len(failures), _without_gold(table.records))
    _check_failures(failures, records)


def judge_item(model: str, source: str, name: str, options: JudgeOptions) -> list[tuple[Record, Judgement]]:
    """The item of an id, or the first, in its parts, each with its judgement.
    Raises ValueError: no such item.
    """
    _check(model, options)
    table, parts = _read(model, source, options)
    names = {name_of(record) for record in table.records}
    item = next(filter(names.__contains__, [name] if name else map(name_of, table.records)), None)
    if item is None:
        raise ValueError(f"{source} has no item with the id {name!r}; its first is {table.records[0].id!r}")
    chosen = [part for part in parts if item == (part.of["item"] if part.of else name_of(part.record))]
    samples = max(options.n_cot or 1, 1) * len(chosen)
    at_once = min(options.parallel or samples, samples)
    with _open(model, options, [part.record for part in chosen], parallel=at_once) as judge:
        asked = [part.record for part in chosen if not part.error]
        judged = judge.score_many(asked, options.n_cot, options.seed, gate=options.gate)
        rows = [row for _, row in judged_parts(chosen, lambda _: judged)]
    return [(part.record, Judgement.from_row(row)) for part, row in zip(chosen, rows)]


def find_gate(model: str, source: str, options: GateOptions) -> str:
    """Judge every item both ways; returns the gate for a share of the tokens, and a table of what
    it costs and, where there are gold scores, what it is worth.
    Raises ValueError: the share is not from 0 to 1, or nothing is to be chosen.
    Raises RuntimeError: nothing was judged.
    """
    _check(model, options)
    n_cot = 1 if options.n_cot is None else options.n_cot
    if n_cot < 1 or not 0 <= options.share <= 1:
        raise ValueError("a gate needs --n-cot of 1 or more, and a --share of the tokens from 0 to 1")
    records = [part.record for part in _read(model, source, options)[1] if not part.error]
    if any(record.score is not None for record in records):
        # What measures them is missed before all items are judged, and not after.
        import scipy  # noqa: F401
    ways = []
    with _open(model, options, records) as judge:
        for count in (0, n_cot):
            judged = judge.score_many(records, count, options.seed)
            ways.append(list(_with_progress(judged, len(records), 0)))
            _check_failures([judgement.error for judgement in ways[-1] if judgement.error], records)
    direct, reasoned = ways
    # In figures that can be typed; up, so that no more is written.
    gate = math.ceil(choose_gate(direct, reasoned, options.share) * 1e4) / 1e4
    gated = [late if early.doubt > gate else early for early, late in zip(direct, reasoned)]
    rows = {"direct": direct, f"--gate {gate:g}": gated, "always reasoning": reasoned}
    return f"{_costs(rows, records)}\n--gate {gate:g}"


def _costs(rows: Mapping[str, Sequence[Judgement]], records: Sequence[Record]) -> str:
    """Of each way of judging, the share of the items and tokens that are reasoned, and figures."""
    most = max(1, *(sum(map(tokens_of, judged)) for judged in rows.values()))
    golds = {place: record.score for place, record in enumerate(records) if record.score is not None}
    table: dict[str, dict[str, Any]] = {}
    for name, judged in rows.items():
        table[name] = {"reasoned": fmean(bool(judgement.feedback) for judgement in judged)}
        table[name] |= {"tokens": sum(map(tokens_of, judged)) / most}
        if golds:
            ends = [ends_of(judged[place].values) for place in golds]
            several = ends if len({*ends}) > 1 else None
            table[name] |= evaluate([judged[place].score for place in golds], list(golds.values()), several)
    notes = {NORMALISED.format(row["scales"]) for row in table.values() if "scales" in row}
    shown = format_table(table, ["reasoned", "tokens", *(["pearson", "rmse"] if golds else [])])
    return "\n".join([shown, *notes])


def _read(model: str, source: str, options: AskOptions) -> tuple[Table, list[Part]]:
    """The input, and what is to be judged of it. Gold scores are read as the judge's scale has
    them, and are not needed."""
    scale = None
    if options.spec or not (_is_server(model) or options.adapter):
        from tract_lite.engines.llama_cpp import spec_at

        spec = spec_at(options.spec or model)
        scale = (spec.units or spec.scale) if spec else named_scale(options.scale or str(DEFAULT_SCALE))
    criteria = read_criteria(options.rubric) if options.rubric and not options.criteria else []
    how = how_to_read(replace(options, rubric=None) if criteria else options)
    table = read_table(source, **asked_by(criteria, {"scale": scale, **how}))
    return table, parts_of(table, criteria, scale)


def _without_gold(records: Sequence[Record]) -> str:
    """How many have no gold score, where others have one."""
    count = sum(record.score is None for record in records)
    return f"; {count} of {len(records)} have no gold score" if 0 < count < len(records) else ""


def _check_failures(failures: Sequence[str], records: Sequence[Record]) -> None:
    if len(failures) == len(records):
        raise RuntimeError(f"none of the {len(records)} items could be judged; the first: {failures[0]}")


def _rows_file(output: Path, source: str) -> Path:
    """The JSONL file of an output.
    Raises ValueError: the output is of another kind, is the input, or is somebody's table.
    Raises FileNotFoundError: no such folder.
    """
    rows_file = output
    if output.suffix.lower() != ".jsonl":
        check_table(output)
        rows_file = output.with_suffix(".jsonl")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent}")
    for file in (output, rows_file, output.with_suffix(".run.json")):
        if file.exists() and Path(source).exists() and file.samefile(source):
            raise ValueError(f"{file} is the input: choose another output than {output}")
    if output.exists() and not rows_file.exists():
        raise ValueError(f"{output} is there without {rows_file}, its rows: move it away, or choose another output")
    return rows_file


def _with_progress(judged: Iterable[Judged], count: int, done: int) -> Iterator[Judged]:
    """A bar for those that are judged now; what is logged meanwhile stands above it."""
    bar = tqdm(desc="judging", total=count, initial=done, unit="item", smoothing=0, disable=sys.stderr is None)
    with logging_redirect_tqdm(), bar as progress:
        for number, judgement in enumerate(judged):
            progress.update(number >= done)
            yield judgement


def _check(model: str, options: AskOptions) -> None:
    """Raises ValueError, or FileNotFoundError, for what can be told without reading anything."""
    gate = getattr(options, "gate", None)
    if gate is not None and (options.n_cot == 0 or not gate >= 0):
        raise ValueError("--gate is a doubt of 0 or more, and chooses between a direct score and --n-cot reasonings")
    other = "file" if _is_server(model) else "server"
    for item in fields(options):
        if item.metadata["group"] == other and getattr(options, item.name) is not None:
            wanted = "a GGUF file" if other == "file" else "the URL of a server"
            raise ValueError(f"{flag_of(item.name)} is for {wanted}, and MODEL is {model}")
    if Path(model).is_dir():
        inside = sorted(Path(model).glob("*.gguf"))
        hint = f"judge with {inside[-1]}" if inside else "`tract-lite export` makes a GGUF of one"
        raise ValueError(f"{model} is a folder, and MODEL is a GGUF file: {hint}")
    if not _is_server(model) and not Path(model).is_file():
        raise FileNotFoundError(f"no file {model}: MODEL is a GGUF file or a server's URL")
    # Before anything of them is read in this process.
    for file in filter(None, (None if _is_server(model) else model, options.spec)):
        if file == model or Path(file).suffix == ".gguf" and Path(file).is_file():
            from tract_lite.engines.trial import check_runs

            check_runs(file, -1 if options.gpu_layers is None else options.gpu_layers)


def _open(model: str, options: AskOptions, records: Sequence[Record], **changed: Any) -> Judge:
    group = "server" if _is_server(model) else "file"
    names = [item.name for item in fields(options) if item.metadata["group"] == group or item.name == "parallel"]
    chosen = {name: getattr(options, name) for name in names} | changed
    given = {name: value for name, value in chosen.items() if value is not None}
    if _is_server(model):
        name = given.pop("server_model", None)
        given["api_key"] = os.environ.get(API_KEY)
        return Judge.from_server(model, name, options.spec, **_asked(options, records), **given)
    return Judge.from_gguf(model, options.spec, **_asked(options, records), **given)


def _asked(options: AskOptions, records: Sequence[Record]) -> dict[str, Any]:
    """How a model without a judge spec is asked. Raises ValueError: a scale or a file is none."""
    asked: dict[str, Any] = {}
    if options.scale:
        asked["scale"] = named_scale(options.scale) or propose_scale(records)
    if options.template:
        asked["template"] = read_template(options.template)
    if options.chat:
        asked["chat"] = read_template_text(options.chat)
    return asked


def _is_server(model: str) -> bool:
    return model.startswith(("http://", "https://"))
