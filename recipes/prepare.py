"""What a run without data or without a seed model takes: ordinary files, made or fetched here.

The built-in example becomes data, held-out items and a template in the run's folder; a small seed
model comes from the network; a toy is trained from nothing on the text that it is to judge.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Sequence

import example

from tract_lite import (
    Judgement,
    Preset,
    Record,
    Run,
    Splits,
    make_toy_seed_model,
    read_splits,
    small_seed_model,
    write_records,
)

logger = logging.getLogger("prepare")

BEST = "true mean (best possible)"


def prepare(preset: Preset, run: Run) -> tuple[Preset, Splits]:
    """The preset with all files and models named, and the splits of its data, always the same."""
    own_data = preset.data is not None
    if not own_data:
        folder = run.once("example", write_example, run, preset.max_items, preset.max_held_out)
        files = {"data": "data.jsonl", "held_out": "held_out.jsonl", "template": "template.jinja"}
        preset = replace(preset, **{name: str(folder / file) for name, file in files.items()})
    data = run.data(read_splits, **preset.splits)
    counts = len(data.training), len(data.validation), len(data.held_out)
    logger.info("items: %d to train on, %d to choose the best step by, %d held out to measure with", *counts)
    preset = preset.on(data.records, data.scale).taught_by(data.training)
    if preset.seed_model == "small":
        preset = replace(preset, seed_model=_small_seed_model(preset, run))
    elif preset.seed_model == "toy":
        if own_data:
            way = "to show the way: for a judge of use, leave --seed-model out"
            logger.warning("the seed model is a toy, made of the texts of the data %s", way)
            answered = [replace(record, feedback=record.feedback or record.response) for record in data.training]
            made = _toy_seed_model(preset, answered, vocabulary_size=4000, steps=100)
        else:
            made = _toy_seed_model(preset, example.pretraining_records(), vocabulary_size=800, steps=500)
        preset = replace(preset, seed_model=str(made))
    return preset, data


def write_example(run: Run, training: int, held_out: int, folder: Path) -> None:
    """The built-in example as files, and what the best judge says of its held-out items."""
    folder.mkdir(parents=True, exist_ok=True)
    items = example.make_items(held_out, example.HELD_OUT_SEED)
    write_records(folder / "data.jsonl", [i.record for i in example.make_items(training, example.TRAINING_SEED)])
    write_records(folder / "held_out.jsonl", [item.record for item in items])
    (folder / "template.jinja").write_text(example.TEMPLATE, encoding="utf-8")
    run.keep_judged(BEST, [Judgement(item.record.id, score=item.mean) for item in items])


def _small_seed_model(preset: Preset, run: Run) -> str:
    """The same one in all processes and at every call; fetched again where its folder is gone."""
    kept = run.once("small_seed_model.txt", lambda path: path.write_text(small_seed_model(preset.offline)))
    name = kept.read_text()
    return small_seed_model(preset.offline) if Path(name).is_absolute() and not Path(name).is_dir() else name


def _toy_seed_model(preset: Preset, records: Sequence[Record], **size: int) -> Path:
    fields = {name: preset.seed[name] for name in "scale units any_scale template max_length sampling".split()}
    return make_toy_seed_model(records, **size, **fields)
