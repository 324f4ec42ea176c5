"""The command line: judge, export, evaluate, report. Each verb imports what it needs by itself."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Sequence

from tract_lite import __version__

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
# What the user can mend; what else is an OSError belongs to the machine.
MENDABLE = (ValueError, ModuleNotFoundError, FileNotFoundError, FileExistsError, IsADirectoryError,
            NotADirectoryError, PermissionError)


def judge(args: argparse.Namespace) -> None:
    """Judge what has no judgement in the output yet, or explain one judgement."""
    from tract_lite.judge_command import judge

    judge(args)


def export(args: argparse.Namespace) -> None:
    """Write a model folder, or an adapter's alone, as GGUF."""
    from tract_lite.gguf import export_adapter, export_gguf
    from tract_lite.spec import JudgeSpec

    logging.getLogger("tract_lite").setLevel(logging.INFO)
    names = args.quantization
    if (args.model_dir / "adapter_config.json").is_file():
        if names or args.cleanup:
            raise ValueError(f"{args.model_dir} is an adapter, which is written as it is: "
                             "--quantization and --cleanup are for model folders")
        seed = args.seed_model or JudgeSpec.load(args.model_dir).base_model
        written = export_adapter(args.model_dir, seed, args.output, check=args.check)
    else:
        names = names or ["f16"]
        written = export_gguf(args.model_dir, args.output, names[0] if len(names) == 1 else names,
                              check=args.check, cleanup=args.cleanup)
    for path in [written] if isinstance(written, Path) else written:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def evaluate(args: argparse.Namespace) -> None:
    """Print how well judgements agree with their gold scores."""
    from tract_lite.jsonl import read_rows
    from tract_lite.metrics import evaluate, format_table

    if not args.output.exists():
        raise FileNotFoundError(f"no file {args.output}")
    if args.output.suffix != ".jsonl":
        raise ValueError(f"{args.output}: evaluate reads the rows in "
                         f"{args.output.with_suffix('.jsonl')}")
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

    verb = verbs.add_parser("judge", help="judge records with a GGUF file or a server")
    verb.set_defaults(run=judge)
    _add_judge_arguments(verb)

    verb = verbs.add_parser("export", help="write a model folder or an adapter as GGUF")
    verb.set_defaults(run=export)
    _add_export_arguments(verb)

    verb = verbs.add_parser("evaluate", help="measure agreement with gold scores")
    verb.set_defaults(run=evaluate)
    verb.add_argument("output", type=Path, metavar="OUTPUT.jsonl", help="what `judge` has written")

    verb = verbs.add_parser("report", help="make a run folder's page")
    verb.set_defaults(run=report)
    verb.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    return parser.parse_args(arguments)


def _add_export_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model_dir", type=Path, metavar="MODEL_DIR",
                      help="merged judge, or the folder of an adapter")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf",
                      help="several quantizations give FILE-<name>.gguf each")
    verb.add_argument("--quantization", nargs="+", metavar="NAME",
                      help="file types of llama.cpp, such as q4_k_m (f16)")
    verb.add_argument("--seed-model", metavar="SEED",
                      help="an adapter's seed, folder or hub id (the one in its spec)")
    verb.add_argument("--no-check", dest="check", action="store_false",
                      help="do not compare with transformers")
    verb.add_argument("--cleanup", action="store_true", help="remove MODEL_DIR when all is done")


def _add_judge_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="GGUF file, or the http(s) URL of a server")
    verb.add_argument("input", metavar="INPUT",
                      help="file or hub id; '-' is JSONL on standard input")
    verb.add_argument("-o", "--output", type=Path, metavar="OUTPUT",
                      help=".jsonl: rows are appended, and items that are there already are not "
                           "judged again; .csv or .parquet: a table made from such rows, which "
                           "stand in OUTPUT's name with .jsonl")
    verb.add_argument("--explain", nargs="?", const="", metavar="ID",
                      help="print one item (the first) as a person reads it, and write nothing")
    for name, default, meaning in (
        ("--n-cot", 1, "reasonings per item"),
        ("--seed", 0, "seed of the sampling"),
    ):
        verb.add_argument(name, type=int, default=default, metavar="N",
                          help=f"{meaning} ({default})")
    verb.add_argument("--parallel", type=int, metavar="N",
                      help="sequences decoded at once (by the context's length), or requests in "
                           "flight (16)")
    verb.add_argument("--spec", metavar="SPEC",
                      help="the judge's spec, its file or folder (the one inside the model); for a "
                           "server also the judge's GGUF file")
    verb.add_argument("--format", default="auto", help="jsonl, json, csv, parquet or hub (by name)")
    verb.add_argument("--skip-bad", action="store_true", help="leave unusable rows out")
    file = verb.add_argument_group("a GGUF file")
    file.add_argument("--adapter", metavar="FILE.gguf", help="a judge's adapter on top of MODEL")
    file.add_argument("--threads", type=int, metavar="N", help="CPU threads (one per CPU)")
    file.add_argument("--gpu-layers", type=int, metavar="N", help="layers on the GPU (all)")
    file.add_argument("--context-length", type=int, metavar="N",
                      help="tokens per sequence (as in training)")
    server = verb.add_argument_group("a server (its key, if it wants one: TRACT_LITE_API_KEY)")
    server.add_argument("--server-model", metavar="NAME", help="the model's name there")
    server.add_argument("--timeout", type=float, metavar="SECONDS", help="of one request")


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
        code, message = INTERRUPTED, ["stopped; `judge` goes on with the same command"]
    except ModuleNotFoundError as error:
        code, message = USER_ERROR, [f"{error}: pip install {error.name}, or all that "
                                     "requirements.txt lists"]
    except MENDABLE as error:
        # Of many bad rows, the first.
        code, message = USER_ERROR, str(error).splitlines()[:2]
    except (RuntimeError, OSError, MemoryError) as error:
        code, message = FAILED, (str(error) or type(error).__name__).splitlines()
    print("error:", " ".join(line.strip() for line in message), file=sys.stderr)
    with suppress(RuntimeError):
        _flush_stdout()
    return code


def _flush_stdout() -> None:
    """Raises RuntimeError for what standard output can't take, and drops it.

    Python would try it again at its end, and fail with more than one line.
    """
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RuntimeError(f"standard output takes no more ({error.strerror}); files are "
                           "written") from error


if __name__ == "__main__":
    sys.exit(main())
