"""The verb `judge`: records in, judgements out, from a GGUF file or a server."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any, Iterator, Sequence

from tract_lite import __version__
from tract_lite.judge import Judge
from tract_lite.judge_output import JudgeOutput
from tract_lite.records import Record, read_records
from tract_lite.spec import JudgeSpec

# A server's key is not given on the command line, where others could read it.
API_KEY = "TRACT_LITE_API_KEY"
FILE_OPTIONS = ("adapter", "threads", "gpu_layers", "context_length")
SERVER_OPTIONS = ("timeout",)
PIECES, PIECE_BYTES = 256, 4096


def judge(args: argparse.Namespace) -> None:
    """Judge what has no judgement in the output yet, and append row by row."""
    _check(args)
    if args.explain is not None:
        return _explain(args)
    output = JudgeOutput(args.output, args.input)
    records = read_records(args.input, args.format, skip_bad=args.skip_bad)
    todo = output.missing(records)
    failures: list[str] = []
    with _open_judge(args) as model:
        run = _describe_run(args, model)
        output.check_run(run)
        if todo:
            output.start(run, {**model.engine.shape, "tract_lite": __version__}, todo)
            output.append(_rows(model, todo, args, failures))
        output.finish(model.spec.scale.labels, [record.id for record in records])
    if failures and len(failures) == len(records):
        raise RuntimeError(f"none of the {len(records)} items could be judged; the first: "
                           f"{failures[0]}")
    first = f"; the first failure: {failures[0]}" if failures else ""
    print(f"{output.path}: {len(todo)} judged, {len(failures)} of them failed, "
          f"{len(records) - len(todo)} were there already{first}")


def _rows(model: Judge, records: Sequence[Record], args: argparse.Namespace,
          failures: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each record, with progress; what went wrong is added to `failures`."""
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    judgements = model.score_many(records, args.n_cot, args.seed)
    with logging_redirect_tqdm(), tqdm(judgements, "judging", len(records), unit="item",
                                       smoothing=0, disable=sys.stderr is None) as progress:
        for judgement, record in zip(progress, records):
            if judgement.error:
                failures.append(judgement.error)
            gold = {} if record.score is None else {"gold": record.score}
            yield judgement.to_row() | {"key": record.key} | gold


def _explain(args: argparse.Namespace) -> None:
    """Print one judgement as a person would read it; nothing is written."""
    records = read_records(args.input, args.format, skip_bad=args.skip_bad)
    record = next((record for record in records if args.explain in ("", record.id)), None)
    if record is None:
        raise ValueError(f"{args.input} has no item with the id {args.explain!r}; its first is "
                         f"{records[0].id!r}")
    args.parallel = min(args.parallel or args.n_cot, args.n_cot)
    with _open_judge(args) as model:
        judgement = next(model.score_many([record], args.n_cot, args.seed))
    print(judgement.explain(record))
    if judgement.error:
        raise RuntimeError(f"item {record.id!r} could not be judged: {judgement.error}")


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError, or FileNotFoundError, for what can be told without reading anything."""
    if args.output is None and args.explain is None:
        raise ValueError("name the output with -o FILE.jsonl, .csv or .parquet, or give --explain")
    for name in ("n_cot", "parallel", "threads", "context_length", "timeout"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
    is_server = _is_server(args)
    for name in FILE_OPTIONS if is_server else ("server_model", *SERVER_OPTIONS):
        if getattr(args, name) is not None:
            wanted = "a GGUF file" if is_server else "the URL of a server"
            raise ValueError(f"{_flag(name)} is for {wanted}, and MODEL is {args.model}")
    if Path(args.model).is_dir():
        raise ValueError(f"{args.model} is a folder: `python -m tract_lite export` makes a GGUF "
                         "file of it")
    if not is_server and not Path(args.model).is_file():
        raise FileNotFoundError(f"no file {args.model}: MODEL is a GGUF file or a server's URL")


def _open_judge(args: argparse.Namespace) -> Judge:
    names = ("parallel", *(SERVER_OPTIONS if _is_server(args) else FILE_OPTIONS))
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if _is_server(args):
        options["api_key"] = os.environ.get(API_KEY)
        return Judge.from_server(args.model, args.server_model, args.spec, **options)
    return Judge.from_gguf(args.model, JudgeSpec.load(args.spec) if args.spec else None, **options)


def _describe_run(args: argparse.Namespace, model: Judge) -> dict[str, Any]:
    """What makes the judgements what they are."""
    is_server = _is_server(args)
    return {
        "model": model.engine.shape["model"] if is_server else Path(args.model).name,
        "fingerprint": None if is_server else _fingerprint(args.model),
        "adapter": _fingerprint(args.adapter) if args.adapter else None,
        "spec_sha256": hashlib.sha256(model.spec.to_json().encode("utf-8")).hexdigest(),
        "n_cot": args.n_cot,
        "seed": args.seed,
    }


def _fingerprint(path: str) -> str:
    """A hash of the file's size and of pieces from all over it: another judge differs in most."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(PIECES):
            file.seek(size * piece // PIECES)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _is_server(args: argparse.Namespace) -> bool:
    return args.model.startswith(("http://", "https://"))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
