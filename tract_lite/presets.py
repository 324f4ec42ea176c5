"""What a run takes on each kind of machine, and what its user may choose.

The paper's settings where it has them.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Sequence

from tract_lite.data.places import content_of
from tract_lite.data.records import how_to_read
from tract_lite.data.scales import AUTO, DEFAULT_SCALE, brings_others, named_scale, propose_scale
from tract_lite.options import DataOptions, add_flags, option, options_from
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import DEFAULT_TEMPLATE, Sampling, read_template
from tract_lite.training.settings import PRECISIONS, TARGETS, TrainSettings

logger = logging.getLogger(__name__)

FEEDBACK_COLLECTION = "prometheus-eval/Feedback-Collection"
MISTRAL = "unsloth/mistral-7b-instruct-v0.2-bnb-4bit"
# Cards up to here get the settings of a T4.
T4_BYTES = 20e9


@dataclass(frozen=True)
class Preset:
    """What suits a machine, how much of the data a run takes on it, and what its user chose.

    `data` and `held_out` are files or hub ids; no `data`: the built-in example. No `seed_model`: a
    toy one, made for the data. `template`: the file of a prompt's template, None for the default.

    `scale`: that of the gold scores, None until the data have proposed one. `remap`: the scale
    whose labels the judge learns in its place. `any_scale`: whether items bring others of theirs.

    `max_items` is chosen so that a run ends overnight, `max_validation` of them at most are not
    trained on; `max_held_out` items are kept for judging, `gguf_items` of them are judged with each
    GGUF file, `gguf_parallel` sequences at once (by the memory that they take). `parallel`
    reasonings are written at once.
    """

    training: TrainSettings
    data: str | None
    seed_model: str | None
    max_items: int
    max_held_out: int
    gguf_items: int
    max_validation: int = 100
    max_length: int = 3000
    max_new_tokens: int = 1024
    parallel: int = 8
    gradient_checkpointing: bool = True
    quantization: tuple[str, ...] = ("q4_k_m",)
    gguf_parallel: int | None = None
    scale: ScoreScale | None = None
    remap: ScoreScale | None = None
    any_scale: bool = False
    template: str | None = None
    held_out: str | None = None
    format: str = "auto"
    split: str | None = None
    encoding: str | None = None
    columns: tuple[str, ...] | None = None
    criteria: str | None = None
    rubric: str | None = None
    skip_bad: bool = False
    precision: str | None = None
    base: str = "4bit"

    @property
    def seed(self) -> dict[str, Any]:
        """How the seed model is loaded and asked, as `train_adapter` takes it.
        Raises ValueError: no scale was named or proposed.
        """
        if self.scale is None:
            raise ValueError("no scale was named, and none proposed by the data")
        template = read_template(self.template) if self.template else None
        return {
            "seed_model": self.seed_model,
            "scale": self.scale.remapped(self.remap) if self.remap else self.scale,
            "units": self.scale if self.remap else None,
            "any_scale": self.any_scale,
            "template": template or DEFAULT_TEMPLATE,
            "max_length": self.max_length,
            "sampling": Sampling(max_new_tokens=self.max_new_tokens),
            "precision": self.precision,
        }

    @property
    def splits(self) -> dict[str, Any]:
        """What of the data is read, and how much, as `read_splits` takes it."""
        names = "data held_out scale max_items max_held_out max_validation"
        return {name: getattr(self, name) for name in names.split()} | how_to_read(self)

    def on(self, records: Sequence[Record], scale: ScoreScale | None = None) -> Preset:
        """The preset with the scale of these records: the one that was named, else `scale`, else
        the one that they propose.
        Raises ValueError: there is to be a remap, and some bring scales of their own.
        """
        scale = self.scale or scale or propose_scale(records)
        return replace(self, scale=scale, any_scale=brings_others(records, scale, scale if self.remap else None))


_HUNDRED: dict[str, Any] = {"max_held_out": 100, "max_validation": 40}
# The scale is the built-in example's.
_EXAMPLE: dict[str, Any] = {"scale": DEFAULT_SCALE}
_SHORT: dict[str, Any] = {"max_length": 256, "max_new_tokens": 96, "parallel": 250, "gradient_checkpointing": False}
_TOY_SIZES: dict[str, Any] = {"max_items": 2600, "max_held_out": 1000, "gguf_items": 1000}
_TOY_TRAINING = TrainSettings(batch_size=16, micro_batch_size=16, learning_rate=6e-3)
_TOY = Preset(_TOY_TRAINING, None, None, quantization=("f16", "q8_0"), **_TOY_SIZES, **_SHORT, **_EXAMPLE)
_LARGE_SIZES: dict[str, Any] = {"max_items": 6000, "max_held_out": 300, "gguf_items": 50, "parallel": 16}
_LARGE = Preset(TrainSettings(micro_batch_size=2, save_every=50), FEEDBACK_COLLECTION, MISTRAL, **_LARGE_SIZES)
# The demo's way with a quarter of its data: every step can be seen, its judge is a poor one.
_QUICK = replace(_TOY, training=replace(_TOY.training, save_every=25), max_items=640, gguf_items=100, **_HUNDRED)
_T4 = replace(_LARGE, training=TrainSettings(save_every=40), max_items=1000, gguf_items=10, **_HUNDRED)
PRESETS = {
    "demo": _TOY,
    "quick": replace(_QUICK, quantization=("q8_0",)),
    "24gb": _LARGE,
    "t4": replace(_T4, parallel=8, gguf_parallel=4),
}
# The toy presets on somebody's own data, whose texts are longer.
_TOY_ON_OWN_DATA: dict[str, Any] = {
    "training": TrainSettings(micro_batch_size=4, learning_rate=6e-3, log_every=2),
    "scale": None,
    "max_items": 1000,
    "max_held_out": 20,
    "gguf_items": 20,
    "max_length": 4096,
    "max_new_tokens": 384,
    "parallel": 32,
}


@dataclass(frozen=True)
class StageOptions(DataOptions):
    """What a user may choose for the training of a stage; None leaves it to the preset."""

    preset: str = option("auto", "24gb or t4 by the GPU's memory, else quick", choices=("auto", *PRESETS))
    seed_model: str | None = option(None, "folder or hub id of the model to train")
    scale: str = option(AUTO, "of the scores: 1-5, in steps 0-5:0.5, with labels bad=0,good=1, or as the data propose")
    remap: str | None = option(
        None, "scale whose labels the judge writes in place of these, such as 0-9", metavar="SCALE"
    )
    template: str | None = option(None, "file of the prompt's Jinja template", metavar="FILE")
    max_items: int | None = option(None, "training items to use at most")
    max_length: int | None = option(None, "tokens of a training sequence at most")
    max_new_tokens: int | None = option(None, "tokens of a reasoning at most")
    epochs: float | None = option(None, "epochs of each stage")
    direct_share: float | None = option(None, "share of the training that scores without a reasoning (0)", least=0)
    target: str | None = option(
        None,
        "of a score between two labels: learn the nearest one, or soft: both by their share (nearest)",
        choices=TARGETS,
    )
    precision: str | None = option(None, "type to compute in (by the hardware)", choices=PRECISIONS)


@dataclass(frozen=True)
class TrainOptions(StageOptions):
    """What a user may choose for a single stage."""

    validation: str | None = option(None, "records to choose the best step by (none: the last)", metavar="FILE")


@dataclass(frozen=True)
class RunOptions(StageOptions):
    """What a user may choose for a whole run; None leaves it to the preset."""

    data: str | None = option(None, "file of rows (CSV, Excel, JSONL, JSON, Parquet), or a hub data set")
    held_out: str | None = option(None, "file of the items to measure with (a tenth of the data)", metavar="FILE")
    out: str | None = option(None, "run folder (runs/PRESET); goes on if it is there", metavar="FOLDER")
    quantization: tuple[str, ...] | None = option(None, "GGUF types, such as f16 q8_0 q4_k_m", metavar="NAME")
    base: str = option("4bit", "weights that the adapter is merged onto", choices=("4bit", "16bit"))
    scratch: str | None = option(
        None, "for what is large and can be made again, such as the merged weights (the run folder)", metavar="FOLDER"
    )
    train_only: bool = option(False, "stop before the export; the same call without it goes on")


def parse_options(arguments: Sequence[str] | None = None) -> RunOptions:
    """The options of a command line; without a preset, the one that suits this machine."""
    parser = argparse.ArgumentParser(description="Train a judge in two stages and export it as a GGUF file.")
    add_flags(parser, RunOptions)
    options = options_from(RunOptions, parser.parse_args(arguments))
    for name in ("scale", "remap"):
        try:
            named_scale(getattr(options, name))
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    if options.scratch and Path(options.scratch).is_file():
        raise ValueError(f"--scratch {options.scratch} is a file: name a folder")
    if options.preset == "auto":
        options = replace(options, preset=preset_of_machine())
    return replace(options, out=options.out or f"runs/{options.preset}")


def preset_of_machine() -> str:
    """The name of the preset that suits this machine."""
    import torch

    if not torch.cuda.is_available():
        logger.warning("no GPU here: this is a quick run in demo size on the CPU")
        return "quick"
    return "24gb" if torch.cuda.get_device_properties(0).total_memory > T4_BYTES else "t4"


def preset_for(options: StageOptions) -> Preset:
    """The preset with what the user chose put in its place.
    Raises ValueError: the scale can't be read, or a run is to have no reasonings.
    """
    name = preset_of_machine() if options.preset == "auto" else options.preset
    # A form in a notebook has no other way of leaving a field to the preset.
    chosen: dict[str, Any] = {key: value for key, value in vars(options).items() if value not in (None, "", 0)}
    preset = PRESETS[name]
    # A single stage has no built-in example: its data are always somebody's own.
    if preset.data is None and getattr(options, "data", True):
        preset = replace(preset, **_TOY_ON_OWN_DATA)
    chosen["scale"] = named_scale(options.scale) or preset.scale
    chosen["remap"] = named_scale(options.remap)
    if names := chosen.get("quantization"):
        # They stand in the names of files.
        chosen["quantization"] = tuple(name.lower() for name in names)
    if isinstance(options, RunOptions) and options.direct_share == 1:
        advice = "take less, or train one stage alone with `tract-lite train`"
        raise ValueError(f"--direct-share 1 leaves no reasonings for a second stage\n{advice}")
    stage = {name: getattr(options, name) for name in ("epochs", "direct_share", "target")}
    chosen["training"] = replace(preset.training, **{n: value for n, value in stage.items() if value is not None})
    known = {item.name for item in fields(Preset)}
    return replace(preset, **{key: value for key, value in chosen.items() if key in known})


def settings_of(options: RunOptions) -> dict[str, Any]:
    """What a user chose and the preset gives, by name; of files and models, also their content.
    Raises ValueError: as `read_template`.
    """
    preset = preset_for(options)
    scales = {"scale": str(preset.scale or AUTO), "remap": str(preset.remap) if preset.remap else None}
    settings = {"preset": options.preset, **asdict(preset), **scales}
    # The data tell.
    del settings["any_scale"]
    settings |= settings.pop("training")
    for name in ("data", "held_out", "rubric", "template", "seed_model"):
        settings[f"{name}_sha256"] = content_of(settings[name]) if settings[name] else None
    if preset.template:
        read_template(preset.template)
    return settings
