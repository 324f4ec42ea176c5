"""The command line: each verb turns its flags into plain values and calls one function."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Callable, Sequence

from tract_lite.options import JudgeOptions, add_flags, options_from
from tract_lite.presets import StageOptions, preset_for
from tract_lite.version import __version__

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
# What the user can mend; what else is an OSError belongs to the machine.
MENDABLE = (
    ValueError,
    ModuleNotFoundError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# Modules whose packages have other names.
PACKAGES = {"llama_cpp": "llama-cpp-python"}


def train(args: argparse.Namespace) -> None:
    """Train one stage on records with reasonings and gold scores."""
    from tract_lite.data.records import read_records
    from tract_lite.estimate import estimate_run
    from tract_lite.training.stage import train_adapter

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    preset = preset_for(options_from(StageOptions, args))
    if not preset.seed_model:
        raise ValueError("name the model to train with --seed-model, a folder or a hub id")
    files = {name: source for name in ("data", "validation") if (source := getattr(args, name))}
    records = {
        name: [
            pair
            for record in read_records(source, args.format, scale=preset.scale, skip_bad=preset.skip_bad)
            for pair in record.pairs()
        ]
        for name, source in files.items()
    }
    training, settings = records.pop("data")[: preset.max_items], preset.training
    options = {"gradient_checkpointing": preset.gradient_checkpointing, **preset.seed}
    estimate_run(training, settings, parallel=preset.parallel, **options)
    print(train_adapter(training, args.output, settings=settings, **records, **options))


def reason(args: argparse.Namespace) -> None:
    """Let an adapter's judge write a reasoning for each record, in place of the one it has."""
    from tract_lite.data.records import read_records
    from tract_lite.judge import Judge
    from tract_lite.self_cot import generate_cots

    records = [pair for record in read_records(args.data, args.format) for pair in record.pairs()]
    with Judge.from_adapter(args.adapter_dir, parallel=args.parallel) as judge:
        kept, rejected = generate_cots(judge, records, args.output, args.seed)
    print(f"{args.output}: {len(kept)} reasonings, {rejected.total()} rejected {dict(rejected) or ''}".rstrip())


def merge(args: argparse.Namespace) -> None:
    """Add an adapter to its seed model and write a plain model folder."""
    from tract_lite.export.merge import merge_adapter
    from tract_lite.spec import JudgeSpec

    seed_model = args.seed_model or JudgeSpec.load(args.adapter_dir).base_model
    print(merge_adapter(seed_model, args.adapter_dir, args.output, base=args.base))


def export(args: argparse.Namespace) -> None:
    """Write a model folder, or an adapter's alone, as GGUF."""
    from tract_lite.export.gguf import export_adapter, export_gguf
    from tract_lite.spec import JudgeSpec

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    names = args.quantization
    if (args.model_dir / "adapter_config.json").is_file():
        if names:
            raise ValueError(
                f"{args.model_dir} is an adapter, which is written as it is: --quantization is for model folders"
            )
        seed_model = args.seed_model or JudgeSpec.load(args.model_dir).base_model
        written = export_adapter(args.model_dir, seed_model, args.output, check=args.check)
    else:
        names = names or ["f16"]
        written = export_gguf(args.model_dir, args.output, names[0] if len(names) == 1 else names, check=args.check)
    for path in [written] if isinstance(written, Path) else written:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def judge(args: argparse.Namespace) -> None:
    """Judge what has no judgement in the output yet, or explain one judgement."""
    from tract_lite.judge_file import judge_file, judge_item

    options = options_from(JudgeOptions, args)
    if args.explain is not None:
        record, judgement = judge_item(args.model, args.input, args.explain, options)
        print(judgement.explain(record))
        if judgement.error:
            raise RuntimeError(f"item {record.id!r} could not be judged: {judgement.error}")
    elif args.output is None:
        raise ValueError("name the output with -o FILE.jsonl, .csv or .parquet, or give --explain")
    else:
        print(judge_file(args.model, args.input, args.output, options))


def evaluate(args: argparse.Namespace) -> None:
    """Print how well judgements agree with their gold scores."""
    from tract_lite.data.jsonl import read_rows
    from tract_lite.metrics import evaluate, format_table

    if not args.output.exists():
        raise FileNotFoundError(f"no file {args.output}")
    if args.output.suffix != ".jsonl":
        raise ValueError(f"{args.output}: evaluate reads the rows in {args.output.with_suffix('.jsonl')}")
    # Of two rows of one item the later one stands.
    rows = list({row.get("id", number): row for number, row in enumerate(read_rows(args.output))}.values())
    pairs = [(row.get("score"), row["gold"]) for row in rows if row.get("gold") is not None]
    if not pairs:
        raise ValueError(f"none of the {len(rows)} rows of {args.output} has a gold score")
    figures = evaluate(*zip(*pairs))
    print(format_table({args.output.stem: figures}))
    print(
        f"{len(pairs)} items with a gold score, {figures['count']} of them with a judgement; "
        f"{len(rows) - len(pairs)} without a gold score are left out"
    )


def report(args: argparse.Namespace) -> None:
    """Make a run folder's page."""
    from tract_lite.report.page import write_report

    print(write_report(args.run_dir))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the verb's function as `run`."""
    parser = argparse.ArgumentParser("tract-lite", description="Judge text with numbers.")
    parser.add_argument("--version", action="version", version=f"tract-lite {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(run: Callable[[argparse.Namespace], None], *places: tuple[str, str, str], output: str = "") -> Any:
        """A verb with its positional arguments: name, how it is shown, what it is."""
        added = verbs.add_parser(run.__name__, help=run.__doc__)
        added.set_defaults(run=run)
        for name, shown, meaning in places:
            kind = Path if name.endswith("_dir") or name == "output" else str
            added.add_argument(name, type=kind, metavar=shown, help=meaning)
        if output:
            added.add_argument("-o", "--output", type=Path, required=True, metavar=output)
        return added

    data = ("data", "DATA", "file or hub id of records with gold scores and reasonings")
    adapter = ("adapter_dir", "ADAPTER", "folder that `train` has written")
    formats = {"default": "auto", "help": "jsonl, json, csv, parquet or hub (by name)"}
    seed_model = {"metavar": "SEED", "help": "an adapter's seed model, folder or hub id (the one in its spec)"}

    added = verb(train, data, output="FOLDER")
    add_flags(added, StageOptions)
    added.add_argument("--validation", metavar="FILE", help="records to choose the best step by (none: the last)")
    added.add_argument("--format", **formats)

    added = verb(reason, adapter, data, output="FILE.jsonl")
    added.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (0)")
    added.add_argument("--parallel", type=int, default=16, metavar="N", help="sequences decoded at once (16)")
    added.add_argument("--format", **formats)

    added = verb(merge, adapter, output="FOLDER")
    added.add_argument("--seed-model", **seed_model)
    added.add_argument("--base", choices=("4bit", "16bit"), default="4bit", help="weights to add to (4bit)")

    added = verb(export, ("model_dir", "MODEL_DIR", "merged judge, or the folder of an adapter"), output="FILE.gguf")
    added.add_argument(
        "--quantization", nargs="+", metavar="NAME", help="llama.cpp's file types (f16); several give FILE-NAME.gguf"
    )
    added.add_argument("--seed-model", **seed_model)
    added.add_argument("--no-check", dest="check", action="store_false", help="do not compare with transformers")

    added = verb(
        judge,
        ("model", "MODEL", "GGUF file, or the http(s) URL of a server"),
        ("input", "INPUT", "file or hub id; '-' is JSONL on standard input"),
    )
    added.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUTPUT",
        help=".jsonl: rows are appended, and items that are there already are not judged again; .csv or .parquet: "
        "a table made from such rows, which stand in OUTPUT's name with .jsonl",
    )
    added.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="ID",
        help="print one item (the first) as a person reads it, and write nothing",
    )
    titles = {"file": "a GGUF file", "server": "a server (its key, if it wants one: TRACT_LITE_API_KEY)"}
    add_flags(added, JudgeOptions, titles)

    verb(evaluate, ("output", "OUTPUT.jsonl", "what `judge` has written"))
    verb(report, ("run_dir", "RUN_DIR", "folder of a run"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; what goes wrong is one line on standard error and an exit code.

    2 for what the user can mend, 1 for what failed at run time, 130 for Ctrl-C.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        args.run(args)
        _flush_stdout()
        return 0
    except KeyboardInterrupt:
        code, message = INTERRUPTED, ["stopped; the same command goes on"]
    except ModuleNotFoundError as error:
        package = PACKAGES.get(error.name or "", error.name)
        code, message = USER_ERROR, [f"{error}: pip install {package}"]
    except MENDABLE as error:
        # Of many bad rows, the first.
        code, message = USER_ERROR, str(error).splitlines()[:2]
    except (RuntimeError, OSError, MemoryError) as error:
        code, message = FAILED, (str(error) or type(error).__name__).splitlines()
    print("error:", " ".join(line.strip() for line in message), file=sys.stderr)
    with suppress(RuntimeError):
        _flush_stdout()
    return code


def console() -> None:
    """The command `tract-lite`."""
    sys.exit(main())


def _flush_stdout() -> None:
    """Raises RuntimeError for what standard output can't take, and drops it.

    Python would try it again at its end, and fail with more than one line.
    """
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RuntimeError(f"standard output takes no more ({error.strerror}); files are written") from error


if __name__ == "__main__":
    console()
