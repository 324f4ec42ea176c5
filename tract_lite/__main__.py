"""The command line: judge, export, evaluate, report. Each verb imports what it needs by itself."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Sequence

from tract_lite import __version__

USER_ERROR = 2


def judge(args: argparse.Namespace) -> None:
    """Judge what has no judgement in the output yet, and append row by row."""
    from tqdm.auto import tqdm

    from tract_lite.judge import Judge
    from tract_lite.jsonl import append_rows, read_rows
    from tract_lite.records import read_records
    from tract_lite.spec import JudgeSpec

    if args.n_cot < 1:
        raise ValueError(f"--n-cot must be at least 1, got {args.n_cot}")
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"no folder {args.output.parent}")
    spec = JudgeSpec.load(args.spec) if args.spec else None
    records = read_records(args.input, args.format, skip_bad=args.skip_bad)
    rows = read_rows(args.output)
    if not all("id" in row and "probabilities" in row for row in rows):
        raise ValueError(f"{args.output} holds other rows than judgements: choose another output")
    done = {row["id"] for row in rows}
    todo = [record for record in records if record.id not in done]
    if todo:
        with Judge.from_gguf(
            args.model, spec, parallel=args.parallel, threads=args.threads,
            gpu_layers=args.gpu_layers, context_length=args.context_length,
        ) as model:
            judgements = model.score_many(todo, args.n_cot, args.seed)
            progress = tqdm(judgements, "judging", len(todo), unit="item", smoothing=0)
            append_rows(args.output, (
                judgement.to_row() | ({} if record.score is None else {"gold": record.score})
                for judgement, record in zip(progress, todo)
            ))
    failed = sum(row["error"] is not None for row in read_rows(args.output)[len(rows):])
    print(f"{args.output}: {len(todo)} judged, {failed} of them failed, "
          f"{len(records) - len(todo)} were there already")


def export(args: argparse.Namespace) -> None:
    """Write a model folder as GGUF."""
    from tract_lite.gguf import export_gguf

    names = args.quantization
    written = export_gguf(args.model_dir, args.output, names[0] if len(names) == 1 else names)
    for path in [written] if isinstance(written, Path) else written:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def evaluate(args: argparse.Namespace) -> None:
    """Print how well judgements agree with their gold scores."""
    from tract_lite.jsonl import read_rows
    from tract_lite.metrics import evaluate, format_table

    if not args.output.exists():
        raise FileNotFoundError(f"no file {args.output}")
    rows = read_rows(args.output)
    pairs = [(row.get("score"), row["gold"]) for row in rows if row.get("gold") is not None]
    if not pairs:
        raise ValueError(f"none of the {len(rows)} rows of {args.output} has a gold score")
    figures = evaluate(*zip(*pairs))
    print(format_table({args.output.stem: figures}))
    print(f"{len(pairs)} items with a gold score, {figures['count']} of them with a judgement; "
          f"{len(rows) - len(pairs)} without a gold score are left out")


def report(args: argparse.Namespace) -> None:
    """Make a run folder's page."""
    from tract_lite.report import write_report

    print(write_report(args.run_dir))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the verb's function as `run`."""
    parser = argparse.ArgumentParser("python -m tract_lite", description="Judge text with numbers.")
    parser.add_argument("--version", action="version", version=f"tract-lite {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("judge", help="judge records with a GGUF file")
    verb.set_defaults(run=judge)
    _add_judge_arguments(verb)

    verb = verbs.add_parser("export", help="write a model folder as GGUF")
    verb.set_defaults(run=export)
    verb.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf",
                      help="several quantizations give FILE-<name>.gguf each")
    verb.add_argument("--quantization", nargs="+", default=["f16"], metavar="NAME",
                      help="file types of llama.cpp, such as q4_k_m (f16)")

    verb = verbs.add_parser("evaluate", help="measure agreement with gold scores")
    verb.set_defaults(run=evaluate)
    verb.add_argument("output", type=Path, metavar="OUTPUT.jsonl", help="what `judge` has written")

    verb = verbs.add_parser("report", help="make a run folder's page")
    verb.set_defaults(run=report)
    verb.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    return parser.parse_args(arguments)


def _add_judge_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL.gguf")
    verb.add_argument("input", metavar="INPUT",
                      help="file or hub id; '-' is JSONL on standard input")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="OUTPUT.jsonl",
                      help="rows are appended; items that are there already are not judged again")
    for name, default, meaning in (
        ("--n-cot", 1, "reasonings per item"),
        ("--parallel", 8, "sequences decoded at once"),
        ("--seed", 0, "seed of the sampling"),
        ("--gpu-layers", -1, "layers on the GPU, -1 for all"),
    ):
        verb.add_argument(name, type=int, default=default, metavar="N",
                          help=f"{meaning} ({default})")
    verb.add_argument("--threads", type=int, metavar="N", help="CPU threads (one per CPU)")
    verb.add_argument("--context-length", type=int, metavar="N",
                      help="tokens per sequence (as in training)")
    verb.add_argument("--spec", metavar="SPEC.json", help="judge's spec (the one inside the model)")
    verb.add_argument("--format", default="auto", help="jsonl, json, csv, parquet or hub (by name)")
    verb.add_argument("--skip-bad", action="store_true", help="leave unusable rows out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; what the user can mend is one line on standard error and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse(arguments)
    try:
        args.run(args)
        return 0
    except ModuleNotFoundError as error:
        message = f"{error}: install what requirements.txt lists"
    except (ValueError, FileNotFoundError) as error:
        # Of many bad rows, the first.
        message = " ".join(line.strip() for line in str(error).splitlines()[:2])
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
