"""TRACT in two stages: from judging data to a judge in one GGUF file.

    python recipes/two_stage.py --preset demo
    python recipes/two_stage.py --data my_scores.csv --out runs/mine
    accelerate launch --multi_gpu recipes/two_stage.py --data my_scores.csv

A second call with the same --out goes on where the first one stopped. With several GPUs, all of
them train; the first one does the rest. Source: TRACT, section 3.
"""

import importlib.util
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Sequence

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if importlib.util.find_spec("unsloth") and importlib.util.find_spec("torch"):
    import torch

    if torch.cuda.is_available():
        # Unsloth patches transformers, so it comes first; its fused forward would leave models such
        # as Phi without the hidden states that our loss needs.
        os.environ["UNSLOTH_FUSED_FORWARD"] = "0"
        import unsloth  # noqa: F401

import torch
from prepare import prepare

from tract_lite import (
    Judge,
    JudgeSpec,
    Measured,
    Preset,
    Record,
    Run,
    RunOptions,
    Splits,
    apart,
    check_exportable,
    errors_in_words,
    estimate_run,
    export_adapter,
    export_gguf,
    finish_run,
    generate_cots,
    merge_adapter,
    parse_options,
    preset_for,
    reasoning_judge,
    settings_of,
    train_adapter,
)

logger = logging.getLogger("two_stage")

# Held-out items that an export is checked with, and those that the untrained seed model judges.
CHECKED, BASELINE_ITEMS = 50, 100


def two_stage(options: RunOptions, run: Run) -> None:
    """Train a judge, by the method or directly, export it, and measure it on items not seen."""
    run.begin(settings_of(options))
    preset, data = prepare(preset_for(options), run)

    # What all stages share: the seed model (p_0), how it is asked, and how it is trained.
    seed = preset.seed
    if run.is_first and not options.train_only and not run.stages():
        check_exportable(quantization=preset.quantization, base=preset.base, **seed)
    p0 = {**seed, "settings": preset.training, "gradient_checkpointing": preset.gradient_checkpointing}
    opened = {"seed_model": preset.seed_model, "precision": preset.precision, "parallel": preset.parallel}
    open_seed = partial(reasoning_judge, parallel=preset.parallel, **seed)
    if run.is_first and not run.stages():
        ending = None if options.train_only else ending_of(preset, len(data.held_out))
        parallel = None if preset.is_direct and options.train_only else preset.parallel
        estimate_run(data.training, validation=data.validation, parallel=parallel, ending=ending, **p0)
    if preset.is_direct:
        adapters = {"direct": train_adapter(data.training, run / "direct", validation=data.validation, **p0)}
    else:
        adapters = tract(data, run, open_seed, opened, p0)

    if run.is_first and not options.train_only:
        scratch = Path(options.scratch) if options.scratch else run.folder
        *_, final = adapters.values()
        files = export(final, run, scratch, preset, data.held_out)
        # A GPU needs no GGUF file of the seed model, which a large one would fill the disk with.
        untrained = partial(Judge.from_seed, **seed) if torch.cuda.is_available() else open_seed
        judges = {
            "untrained seed model, direct": Measured(untrained, BASELINE_ITEMS, 0, True),
            "untrained seed model": Measured(untrained, BASELINE_ITEMS, 1, True),
        }
        judges |= {name: Measured(partial(Judge.from_adapter, path, **opened)) for name, path in adapters.items()}
        for file in files:
            # The run's folder may be on a drive that is slow to read from.
            near = scratch / file.name if (scratch / file.name).exists() else file
            open_file = partial(Judge.from_gguf, near, parallel=preset.gguf_parallel)
            judges[file.name] = Measured(open_file, preset.gguf_items)
        finish_run(run, data.held_out, judges, scale=preset.scale, cards=[scratch / "merged"])


def ending_of(preset: Preset, count: int) -> dict[str, int]:
    """What follows the training, with `count` held-out items, as `estimate_run` takes it."""
    ending = {"held_out": count, "untrained": BASELINE_ITEMS, "by_file": preset.gguf_items, "checked": CHECKED}
    return {**{name: min(items, count) for name, items in ending.items()}, "files": len(preset.quantization)}


def tract(data: Splits, run: Run, open_seed: Any, opened: dict[str, Any], p0: dict[str, Any]) -> dict[str, Path]:
    """The method: two stages, with the judge's own reasonings between them; their adapters."""
    records = reasoned([*data.training, *data.validation], run, open_seed)
    training, validation = apart(records, data.validation)

    # Stage 1: learn from the reasonings in the data (p_a), or from the seed model's own.
    p_s = train_adapter(training, run / "stage1", validation=validation, **p0)

    # The stage-1 judge writes its own reasoning for every item. Its score is thrown away.
    own = run.once("self_generated.jsonl", write_reasonings, partial(reasoning_judge, p_s, **opened), records)
    training, validation = apart(run.records(own.name), data.validation)

    # Stage 2: the seed model anew, on reasonings like those that it will write itself.
    p_tract = train_adapter(training, run / "stage2", validation=validation, **p0)
    return {"stage 1": p_s, "stage 2": p_tract}


def reasoned(records: list[Record], run: Run, open_seed: Any) -> list[Record]:
    """The records; where annotators gave no reasoning, with one that the seed model writes."""
    lacking = [record for record in records if not record.feedback]
    if not lacking:
        return records
    logger.info("%d of %d records have a score and no reasoning: the seed model writes one", len(lacking), len(records))
    written = run.once("seed_reasonings.jsonl", write_reasonings, open_seed, lacking)
    return [record for record in records if record.feedback] + run.records(written.name)


def write_reasonings(open_judge: Any, records: Sequence[Record], out: Path) -> None:
    """A judge's own reasonings for the records."""
    with open_judge(records=records) as judge:
        kept, rejected = generate_cots(judge, records, out)
    lost = (
        f", {rejected.total()} rejected ({', '.join(f'{why}: {n}' for why, n in rejected.items())})" if rejected else ""
    )
    logger.info("%s: %d reasonings%s", out.name, len(kept), lost)


def export(adapter: Path, run: Run, scratch: Path, preset: Preset, held_out: Sequence[Record]) -> list[Path]:
    """The adapter alone, then the merged judge in each type; checked on some held-out items."""
    seed_model = preset.seed_model
    if preset.base == "4bit" and not Path(seed_model).is_dir():
        # Of a hub id, Unsloth may have trained its own 4-bit copy.
        seed_model = JudgeSpec.load(adapter).base_model
    if not (run / "adapter.gguf").exists():
        run.keep(export_adapter(adapter, seed_model, scratch / "adapter.gguf"))
    files = [run / f"judge-{name}.gguf" for name in preset.quantization]
    missing = [name for name, file in zip(preset.quantization, files) if not file.exists()]
    if missing:
        merged = merge_adapter(seed_model, adapter, scratch / "merged", base=preset.base)
        checked = {"records": held_out[:CHECKED], "figures": run / "parity.json"}
        for file in export_gguf(merged, scratch / "judge.gguf", missing, **checked):
            logger.info("%s: %.0f MB%s", file.name, file.stat().st_size / 1e6, difference(run, file.name))
            run.keep(file)
    return files


def difference(run: Run, name: str) -> str:
    """What the check of a GGUF file has found, in words."""
    figures = json.loads((run / "parity.json").read_text()).get(name) if (run / "parity.json").exists() else None
    if not figures:
        return ""
    off = f"{figures['mean_difference']:.3f} on average, {figures['largest_difference']:.3f} at most"
    return f"; by the export, scores differ by {off}, on {figures['records']} items"


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_in_words():
        options = parse_options(arguments)
        run = Run(options.out)
        with run.log():
            two_stage(options, run)


if __name__ == "__main__":
    main()
