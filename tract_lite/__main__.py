"""The command line: each verb turns its flags into plain values and calls one function."""

import argparse
import json
import logging
import os
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Callable, Sequence

from tract_lite.data.places import seed_model_of
from tract_lite.data.records import how_to_read, read_records, with_own_ids
from tract_lite.errors import told
from tract_lite.options import (
    ExportOptions,
    GateOptions,
    JudgeOptions,
    MergeOptions,
    ReasonOptions,
    TrainOptions,
    add_flags,
    options_from,
)
from tract_lite.presets import SMALL, TOY, preset_for
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec
from tract_lite.training.settings import ADAPTER
from tract_lite.version import __version__

logger = logging.getLogger(__name__)


def _training_records(source: str, **how: Any) -> list[Record]:
    return with_own_ids([pair for record in read_records(source, **how) for pair in record.pairs()])


def train(args: argparse.Namespace) -> None:
    """Train one stage on records with gold scores and, if they have them, reasonings."""
    from tract_lite.estimate import estimate_run
    from tract_lite.export.small_seed_model import small_seed_model
    from tract_lite.training.stage import train_adapter

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    options = options_from(TrainOptions, args)
    preset = preset_for(options)
    if preset.seed_model == TOY:
        raise ValueError("name the model to train with --seed-model: a folder, a hub id, or small")
    how: dict[str, Any] = {"scale": preset.scale, **how_to_read(options)}
    training = _training_records(args.data, **how)
    validation = _training_records(options.validation, **how) if options.validation else []
    preset, training = preset.on([*training, *validation]), training[: preset.max_items]
    preset = preset.paced_by(len(training))
    if not (preset.training.direct_share or any(record.feedback or record.feedback_ids for record in training)):
        logger.info("no record has a reasoning: the judge learns to answer directly")
        preset = replace(preset, training=replace(preset.training, direct_share=1.0))
    if preset.seed_model == SMALL:
        preset = replace(preset, seed_model=small_seed_model(preset.offline))
    seed = {"gradient_checkpointing": preset.gradient_checkpointing, **preset.seed}
    estimate_run(training, preset.training, parallel=None, validation=validation, **seed)
    print(train_adapter(training, args.output, settings=preset.training, validation=validation, **seed))


def reason(args: argparse.Namespace) -> None:
    """Let an adapter's judge write a reasoning for each record, in place of the one it has."""
    from tract_lite.export.reasoning_judge import reasoning_judge
    from tract_lite.self_cot import generate_cots

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    options = options_from(ReasonOptions, args)
    inside = args.adapter_dir / ADAPTER
    spec = JudgeSpec.load(inside if inside.is_dir() else args.adapter_dir)
    records = _training_records(args.data, scale=spec.units or spec.scale, **how_to_read(options))
    with reasoning_judge(args.adapter_dir, records=records, parallel=options.parallel) as judge:
        kept, rejected = generate_cots(judge, records, args.output, options.seed)
    print(f"{args.output}: {len(kept)} reasonings, {rejected.total()} rejected {dict(rejected) or ''}".rstrip())


def merge(args: argparse.Namespace) -> None:
    """Add an adapter to its seed model and write a plain model folder."""
    from tract_lite.export.merge import merge_adapter

    seed_model = args.seed_model or seed_model_of(JudgeSpec.load(args.adapter_dir).base_model, args.adapter_dir)
    print(merge_adapter(seed_model, args.adapter_dir, args.output, base=args.base))


def export(args: argparse.Namespace) -> None:
    """Write a model folder, or an adapter's alone, as GGUF."""
    from tract_lite.export.gguf import export_adapter, export_gguf

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    names, check = args.quantization, not args.no_check
    if (args.model_dir / "adapter_config.json").is_file():
        if names:
            raise ValueError(f"{args.model_dir} is an adapter, written as it is: --quantization is for model folders")
        seed_model = args.seed_model or seed_model_of(JudgeSpec.load(args.model_dir).base_model, args.model_dir)
        written: Path | list[Path] = export_adapter(args.model_dir, seed_model, args.output, check=check)
    else:
        names = names or ["f16"]
        written = export_gguf(args.model_dir, args.output, names[0] if len(names) == 1 else names, check=check)
    for path in [written] if isinstance(written, Path) else written:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def judge(args: argparse.Namespace) -> None:
    """Judge what has no judgement in the output yet, or explain one judgement."""
    from tract_lite.judge_file import judge_file, judge_item, judge_rows

    options = options_from(JudgeOptions, args)
    if args.explain is not None:
        judged = judge_item(args.model, args.input, args.explain, options)
        print("\n\n".join(judgement.explain(record) for record, judgement in judged))
        for record, judgement in judged:
            if judgement.error:
                raise RuntimeError(f"item {record.id!r} could not be judged: {judgement.error}")
    elif args.output is None:
        raise ValueError("name the output with -o FILE.jsonl, .csv or .parquet, or give --explain")
    elif str(args.output) == "-":
        for row in judge_rows(args.model, args.input, options):
            print(json.dumps(row), flush=True)
    else:
        print(judge_file(args.model, args.input, args.output, options))


def gate(args: argparse.Namespace) -> None:
    """Find the doubt above which reasoning pays, for a share of its tokens."""
    from tract_lite.judge_file import find_gate

    print(find_gate(args.model, args.data, options_from(GateOptions, args)))


def evaluate(args: argparse.Namespace) -> None:
    """Print how well judgements agree with their gold scores, or which of several answers wins."""
    from tract_lite.data.table import read_columns
    from tract_lite.data.wins import wins_in_words
    from tract_lite.report.comparison import rows_by_criterion
    from tract_lite.report.contents import notes_of, rows_of, verdict_of
    from tract_lite.report.items import judged_in_file
    from tract_lite.report.rows import other_figures, short_table

    if not args.output.exists():
        raise FileNotFoundError(f"no file {args.output}")
    if wins := wins_in_words(read_columns(args.output)):
        # Rows of several answers have no gold score of their own.
        print(wins)
        return
    judged = judged_in_file(args.output)
    rows = rows_of(judged)
    own = rows[judged.name]
    print(short_table(rows))
    print(other_figures(own))
    if own.get("off_scale"):
        off = f"{own['off_scale']} of {len(judged.items)} gold scores are outside the judge's scale"
        shown = ", ".join(f"{low:g} to {high:g}" for low, high in judged.scales)
        logger.warning("%s (%s): without one unit, rmse and mae mean nothing", off, shown)
    for note in notes_of(rows):
        print(note)
    gold = f"{len(judged.items)} items with a gold score, {own['count']} of them with a judgement"
    print(f"{gold}; {judged.without_gold} without a gold score are left out")
    print("", *textwrap.wrap(verdict_of(judged, rows), 100), sep="\n")
    if by_criterion := rows_by_criterion(args.output):
        print("", "by each criterion:", "", short_table(by_criterion), sep="\n")


def compare(args: argparse.Namespace) -> None:
    """Print how much better one judged file agrees with the gold scores than another."""
    from tract_lite.report.comparison import compared_files

    for path in (args.first_path, args.second_path):
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
    print(compared_files(args.first_path, args.second_path, args.data))


def report(args: argparse.Namespace) -> None:
    """Make the page of a run folder, or of a file of judgements with gold scores."""
    from tract_lite.report.page import write_report

    print(write_report(args.path, args.output, args.data))


DATA = ("data", "DATA", "file or hub id of records with gold scores and reasonings")
ADAPTER_DIR = ("adapter_dir", "ADAPTER", "folder that `train` has written")
MODEL_DIR = ("model_dir", "MODEL_DIR", "merged judge, or the folder of an adapter")
MODEL = ("model", "MODEL", "GGUF file, or the http(s) URL of a server")
VALIDATION = ("data", "VALIDATION", "file or hub id of items like those to come, not trained on")
INPUT = ("input", "INPUT", "file or hub id; '-' is JSONL on standard input")
JUDGED = ("output", "OUTPUT", "what `judge` has written: FILE.jsonl, or the table of its rows")
FIRST = ("first_path", "FIRST", "what `judge` has written, with gold scores: FILE.jsonl, or the table of its rows")
SECOND = ("second_path", "SECOND", "what another judge has written of the same items")
JUDGE_OUTPUT = (
    "FILE.jsonl, to which what is missing is added, a table of its rows (FILE.csv, FILE.parquet), or '-' for JSONL on "
    "standard output"
)
PAGE_OF = ("path", "PATH", "folder of a run, or what `judge` has written: FILE.jsonl, or the table of its rows")
PAGE_OUTPUT = "the page (report.html in the folder of a run, FILE.report.html beside another file)"
PAGE_DATA = "what was judged, for the texts in the page of FILE.jsonl, and gold scores where it has none"
COMPARE_DATA = "what was judged, for the rubrics of the items of FILE.jsonl, and gold scores where it has none"
# Each verb with its positional arguments, what it writes, and its options.
VERBS: tuple[tuple[Callable, tuple, str, type | None], ...] = (
    (train, (DATA,), "FOLDER", TrainOptions),
    (reason, (ADAPTER_DIR, DATA), "FILE.jsonl", ReasonOptions),
    (merge, (ADAPTER_DIR,), "FOLDER", MergeOptions),
    (export, (MODEL_DIR,), "FILE.gguf", ExportOptions),
    (judge, (MODEL, INPUT), "", JudgeOptions),
    (gate, (MODEL, VALIDATION), "", GateOptions),
    (evaluate, (JUDGED,), "", None),
    (compare, (FIRST, SECOND), "", None),
    (report, (PAGE_OF,), "", None),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the verb's function as `run`."""
    parser = argparse.ArgumentParser("tract-lite", description="Judge text with numbers.")
    parser.add_argument("--version", action="version", version=f"tract-lite {__version__}")
    verbs = parser.add_subparsers(metavar="VERB")
    for run, places, written, kind in VERBS:
        verb = verbs.add_parser(run.__name__, help=run.__doc__)
        verb.set_defaults(run=run)
        for name, shown, meaning in places:
            is_path = name.endswith(("_dir", "path")) or name == "output"
            verb.add_argument(name, type=Path if is_path else str, metavar=shown, help=meaning)
        if written:
            verb.add_argument("-o", "--output", type=Path, required=True, metavar=written)
        if run is judge:
            verb.add_argument("-o", "--output", type=Path, metavar="OUTPUT", help=JUDGE_OUTPUT)
            explained = "print one item (the first) as a person reads it, and write nothing"
            verb.add_argument("--explain", nargs="?", const="", metavar="ID", help=explained)
        if run is report:
            verb.add_argument("-o", "--output", type=Path, metavar="FILE.html", help=PAGE_OUTPUT)
            verb.add_argument("--data", metavar="FILE", help=PAGE_DATA)
        if run is compare:
            verb.add_argument("--data", metavar="FILE", help=COMPARE_DATA)
        if kind:
            add_flags(verb, kind)
    args = parser.parse_args(arguments)
    if "run" not in args:
        parser.error(f"name a verb\n\n{parser.format_help()}")
    return args


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
    except (Exception, KeyboardInterrupt) as error:
        failure = told(error)
        if failure is None:
            raise
    text = "; ".join(line.strip() for line in failure.lines)
    print("error:", re.sub("([.:;,]);", r"\1", text), file=sys.stderr)
    with suppress(RuntimeError):
        _flush_stdout()
    return failure.code


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
