"""The command line: each verb turns its flags into plain values and calls one function."""

import argparse
import logging
import os
import re
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Callable, Sequence

from tract_lite.data.records import BadRows, read_records
from tract_lite.options import GROUPS, ExportOptions, JudgeOptions, MergeOptions, ReasonOptions, add_flags, options_from
from tract_lite.presets import TrainOptions, preset_for
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec
from tract_lite.version import __version__

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
# What the user can mend; what else is an OSError belongs to the machine.
MENDABLE = ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError
# Modules whose packages have other names.
PACKAGES = {"llama_cpp": "llama-cpp-python"}


def _training_records(source: str, format: str, **how: Any) -> list[Record]:
    return [pair for record in read_records(source, format, **how) for pair in record.pairs()]


def train(args: argparse.Namespace) -> None:
    """Train one stage on records with reasonings and gold scores."""
    from tract_lite.estimate import estimate_run
    from tract_lite.training.stage import train_adapter

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    options = options_from(TrainOptions, args)
    preset = preset_for(options)
    if not preset.seed_model:
        raise ValueError("name the model to train with --seed-model, a folder or a hub id")
    how: dict[str, Any] = {"format": options.format, "scale": preset.scale, "skip_bad": preset.skip_bad}
    training = _training_records(args.data, **how)[: preset.max_items]
    validation = _training_records(options.validation, **how) if options.validation else []
    seed = {"gradient_checkpointing": preset.gradient_checkpointing, **preset.seed}
    estimate_run(training, preset.training, parallel=preset.parallel, **seed)
    print(train_adapter(training, args.output, settings=preset.training, validation=validation, **seed))


def reason(args: argparse.Namespace) -> None:
    """Let an adapter's judge write a reasoning for each record, in place of the one it has."""
    from tract_lite.judge import Judge
    from tract_lite.self_cot import generate_cots

    options = options_from(ReasonOptions, args)
    records = _training_records(args.data, options.format)
    with Judge.from_adapter(args.adapter_dir, parallel=options.parallel) as judge:
        kept, rejected = generate_cots(judge, records, args.output, options.seed)
    print(f"{args.output}: {len(kept)} reasonings, {rejected.total()} rejected {dict(rejected) or ''}".rstrip())


def merge(args: argparse.Namespace) -> None:
    """Add an adapter to its seed model and write a plain model folder."""
    from tract_lite.export.merge import merge_adapter

    seed_model = args.seed_model or JudgeSpec.load(args.adapter_dir).base_model
    print(merge_adapter(seed_model, args.adapter_dir, args.output, base=args.base))


def export(args: argparse.Namespace) -> None:
    """Write a model folder, or an adapter's alone, as GGUF."""
    from tract_lite.export.gguf import export_adapter, export_gguf

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    names, check = args.quantization, not args.no_check
    if (args.model_dir / "adapter_config.json").is_file():
        if names:
            raise ValueError(f"{args.model_dir} is an adapter, written as it is: --quantization is for model folders")
        seed_model = args.seed_model or JudgeSpec.load(args.model_dir).base_model
        written: Path | list[Path] = export_adapter(args.model_dir, seed_model, args.output, check=check)
    else:
        names = names or ["f16"]
        written = export_gguf(args.model_dir, args.output, names[0] if len(names) == 1 else names, check=check)
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
    # Of two rows of one item the later one stands; without an id, each is an item.
    rows = list({row.get("id") or (number,): row for number, row in enumerate(read_rows(args.output))}.values())
    pairs = [(row.get("score"), row["gold"]) for row in rows if row.get("gold") is not None]
    if not pairs:
        raise ValueError(f"none of the {len(rows)} rows of {args.output} has a gold score")
    figures = evaluate(*zip(*pairs))
    print(format_table({args.output.stem: figures}))
    gold = f"{len(pairs)} items with a gold score, {figures['count']} of them with a judgement"
    print(f"{gold}; {len(rows) - len(pairs)} without a gold score are left out")


def report(args: argparse.Namespace) -> None:
    """Make a run folder's page."""
    from tract_lite.report.page import write_report

    print(write_report(args.run_dir))


DATA = ("data", "DATA", "file or hub id of records with gold scores and reasonings")
ADAPTER_DIR = ("adapter_dir", "ADAPTER", "folder that `train` has written")
MODEL_DIR = ("model_dir", "MODEL_DIR", "merged judge, or the folder of an adapter")
MODEL = ("model", "MODEL", "GGUF file, or the http(s) URL of a server")
INPUT = ("input", "INPUT", "file or hub id; '-' is JSONL on standard input")
JUDGED = ("output", "OUTPUT.jsonl", "what `judge` has written")
JUDGE_OUTPUT = "FILE.jsonl, to which what is missing is added, or a table of its rows: FILE.csv or FILE.parquet"
RUN_DIR = ("run_dir", "RUN_DIR", "folder of a run")
# Each verb with its positional arguments, what it writes, and its options.
VERBS: tuple[tuple[Callable, tuple, str, type | None], ...] = (
    (train, (DATA,), "FOLDER", TrainOptions),
    (reason, (ADAPTER_DIR, DATA), "FILE.jsonl", ReasonOptions),
    (merge, (ADAPTER_DIR,), "FOLDER", MergeOptions),
    (export, (MODEL_DIR,), "FILE.gguf", ExportOptions),
    (judge, (MODEL, INPUT), "", JudgeOptions),
    (evaluate, (JUDGED,), "", None),
    (report, (RUN_DIR,), "", None),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the verb's function as `run`."""
    parser = argparse.ArgumentParser("tract-lite", description="Judge text with numbers.")
    parser.add_argument("--version", action="version", version=f"tract-lite {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for run, places, written, kind in VERBS:
        verb = verbs.add_parser(run.__name__, help=run.__doc__)
        verb.set_defaults(run=run)
        for name, shown, meaning in places:
            is_path = name.endswith("_dir") or name == "output"
            verb.add_argument(name, type=Path if is_path else str, metavar=shown, help=meaning)
        if written:
            verb.add_argument("-o", "--output", type=Path, required=True, metavar=written)
        if run is judge:
            verb.add_argument("-o", "--output", type=Path, metavar="OUTPUT", help=JUDGE_OUTPUT)
            explained = "print one item (the first) as a person reads it, and write nothing"
            verb.add_argument("--explain", nargs="?", const="", metavar="ID", help=explained)
        if kind:
            add_flags(verb, kind, GROUPS if kind is JudgeOptions else None)
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
        module = (error.name or "").partition(".")[0]
        code, message = USER_ERROR, [f"{error}: pip install {PACKAGES.get(module, module)}"]
    except BadRows as error:
        code, message = USER_ERROR, str(error).splitlines()[:2]  # the first of many
    except MENDABLE as error:
        code, message = USER_ERROR, str(error).splitlines()
    except (RuntimeError, OSError, MemoryError) as error:
        code, message = FAILED, (str(error) or type(error).__name__).splitlines()
    text = "; ".join(line.strip() for line in message)
    print("error:", re.sub("([.:;,]);", r"\1", text), file=sys.stderr)
    with suppress(RuntimeError):
        _flush_stdout()
    return code


def console() -> None:
    """The command `tract-lite`."""
    sys.exit(main())


def _flush_stdout() -> None:
    """Raises RuntimeError for what standard output can't take, and drops it: Python would retry."""
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RuntimeError(f"standard output takes no more ({error.strerror}); files are written") from error


if __name__ == "__main__":
    console()
