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
from tract_lite.options import DIRECT, LAPTOP, TRACT, RunOptions, StageOptions, add_flags, options_from
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import DEFAULT_TEMPLATE, Sampling, read_template
from tract_lite.training.settings import TrainSettings

logger = logging.getLogger(__name__)

FEEDBACK_COLLECTION = "prometheus-eval/Feedback-Collection"
MISTRAL = "unsloth/mistral-7b-instruct-v0.2-bnb-4bit"
# Seed models that have no place yet: a toy made for the data, and a small real one.
TOY, SMALL = "toy", "small"
# Of the records, so many must have a reasoning for two stages to be taken.
REASONED_SHARE = 0.5
MOST_EPOCHS = 8
# Cards up to here get the settings of a T4.
T4_BYTES = 20e9


@dataclass(frozen=True)
class Preset:
    """What suits a machine, how much of the data a run takes on it, and what its user chose.

    `data` and `held_out` are files or hub ids; no `data`: the built-in example. `seed_model`: a
    folder, a hub id, "toy" or "small". `template`: the file of a prompt's template, None for the
    default.

    `method`: "tract", or "direct", which trains one stage on scores alone (RAFT); "auto" until the
    data tell. `seen`: how many sequences a stage reads, by which the epochs are chosen, if any.

    `scale`: that of the gold scores, None until the data have proposed one. `remap`: the scale
    whose labels the judge learns in its place. `any_scale`: whether items bring others of theirs.

    `max_items` is chosen so that a run ends overnight, `max_validation` of them at most are not
    trained on; `max_held_out` items are kept for judging, `gguf_items` of them are judged with each
    GGUF file, `gguf_parallel` sequences at once (by the memory that they take). `parallel`
    reasonings are written at once.
    """

    training: TrainSettings
    data: str | None
    seed_model: str
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
    method: str = AUTO
    seen: int | None = None
    offline: bool = False

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
    def is_direct(self) -> bool:
        """Whether there is one stage, on scores alone."""
        return self.method == DIRECT

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

    def taught_by(self, records: Sequence[Record]) -> Preset:
        """The preset with the method and the epochs for these training records, and a line why."""
        method, training, count = self.method, self.training, len(records)
        if method == AUTO and training.direct_share:
            method = DIRECT if training.direct_share == 1 else TRACT
        if method == AUTO:
            reasoned = sum(bool(record.feedback) for record in records)
            method = TRACT if reasoned >= REASONED_SHARE * count else DIRECT
            said = f"{reasoned:,} of {count:,} training items have a reasoning"
            ways = {TRACT: "two stages", DIRECT: "one stage, on the scores alone (--method tract forces two)"}
            logger.info("method: %s, %s: %s", method, said, ways[method])
        if method == DIRECT:
            training = replace(training, direct_share=1.0)
        return replace(self, method=method, training=training).paced_by(count)

    def paced_by(self, count: int) -> Preset:
        """The preset with the epochs for so many training records, and a line why."""
        training = self.training
        if self.seen:
            training = replace(training, epochs=float(min(MOST_EPOCHS, max(1, round(self.seen / count)))))
            logger.info(
                "epochs: %g of %d items: a small seed model learns by about %d sequences; --epochs asks for others",
                *(training.epochs, count, self.seen),
            )
        return replace(self, training=training)


_HUNDRED: dict[str, Any] = {"max_held_out": 100, "max_validation": 40}
# The scale is the built-in example's.
_EXAMPLE: dict[str, Any] = {"scale": DEFAULT_SCALE}
_SHORT: dict[str, Any] = {"max_length": 256, "max_new_tokens": 96, "parallel": 250, "gradient_checkpointing": False}
_TOY_SIZES: dict[str, Any] = {"max_items": 2600, "max_held_out": 1000, "gguf_items": 1000}
_TOY_TRAINING = TrainSettings(batch_size=16, micro_batch_size=16, learning_rate=6e-3)
_TOY = Preset(_TOY_TRAINING, None, TOY, quantization=("f16", "q8_0"), **_TOY_SIZES, **_SHORT, **_EXAMPLE)
_LARGE_SIZES: dict[str, Any] = {"max_items": 6000, "max_held_out": 300, "gguf_items": 50, "parallel": 16}
_LARGE = Preset(TrainSettings(micro_batch_size=2, save_every=50), FEEDBACK_COLLECTION, MISTRAL, **_LARGE_SIZES)
# The demo's way with a quarter of its data: every step can be seen, its judge is a poor one.
_QUICK = replace(_TOY, training=replace(_TOY.training, save_every=25), max_items=640, gguf_items=100, **_HUNDRED)
_T4 = replace(_LARGE, training=TrainSettings(save_every=40), max_items=1000, gguf_items=10, **_HUNDRED)
# For a small real seed model: the rate at which so small an adapter learns, and by how many
# sequences.
_LAPTOP = Preset(
    TrainSettings(micro_batch_size=4, learning_rate=1e-3, save_every=50),
    None,
    SMALL,
    seen=2700,
    max_items=2000,
    max_held_out=300,
    gguf_items=300,
    max_length=2048,
    max_new_tokens=256,
    parallel=32,
    gradient_checkpointing=False,
    quantization=("q8_0",),
)
PRESETS = {
    "demo": _TOY,
    "quick": replace(_QUICK, quantization=("q8_0",)),
    LAPTOP: _LAPTOP,
    "24gb": _LARGE,
    "t4": replace(_T4, parallel=8, gguf_parallel=4),
}
# Training settings whose options have other names: `seed` is that of the sampling everywhere.
_OPTIONS = {"seed": "training_seed"}
# The toy presets on somebody's own data, whose texts are longer.
_TOY_ON_OWN_DATA: dict[str, Any] = {
    "training": TrainSettings(micro_batch_size=4, learning_rate=6e-3, log_every=2),
    "scale": None,
    "max_items": 1000,
    "max_held_out": 100,
    "gguf_items": 100,
    "max_length": 4096,
    "max_new_tokens": 384,
    "parallel": 32,
}


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
    if options.preset == AUTO:
        options = replace(options, preset=preset_of_machine(options))
    return replace(options, out=options.out or f"runs/{options.preset}")


def preset_of_machine(options: StageOptions) -> str:
    """The name of the preset that suits this machine and the data."""
    import torch

    if torch.cuda.is_available():
        return "24gb" if torch.cuda.get_device_properties(0).total_memory > T4_BYTES else "t4"
    # A single stage has no built-in example: its data are always somebody's own.
    if getattr(options, "data", True) and options.seed_model != TOY:
        return LAPTOP
    logger.warning("no GPU here: this is a quick run in demo size on the CPU")
    return "quick"


def preset_for(options: StageOptions) -> Preset:
    """The preset with what the user chose put in its place.
    Raises ValueError: the scale can't be read, or two stages are to have no reasonings.
    """
    name = preset_of_machine(options) if options.preset == AUTO else options.preset
    # A form in a notebook has no other way of leaving a field to the preset.
    chosen: dict[str, Any] = {key: value for key, value in vars(options).items() if value not in (None, "", 0)}
    preset = _for_seed(PRESETS[name], chosen.get("seed_model"), bool(getattr(options, "data", True)))
    if options.epochs is not None:
        preset = replace(preset, seen=None)
    chosen["scale"] = named_scale(options.scale) or preset.scale
    chosen["remap"] = named_scale(options.remap)
    if names := chosen.get("quantization"):
        # They stand in the names of files.
        chosen["quantization"] = tuple(name.lower() for name in names)
    if isinstance(options, RunOptions) and options.direct_share == 1 and options.method != DIRECT:
        raise ValueError("--direct-share 1 leaves no reasonings for a second stage\n--method direct trains one stage")
    stage = {item.name: getattr(options, _OPTIONS.get(item.name, item.name), None) for item in fields(TrainSettings)}
    chosen["training"] = replace(preset.training, **{n: value for n, value in stage.items() if value is not None})
    known = {item.name for item in fields(Preset)}
    return replace(preset, **{key: value for key, value in chosen.items() if key in known})


def _for_seed(preset: Preset, seed_model: str | None, own_data: bool) -> Preset:
    """The preset for the kind of seed model: a toy, a small and a large one need others."""
    if (seed_model or preset.seed_model) == TOY:
        preset = preset if preset.seed_model == TOY else PRESETS["quick"]
        return replace(preset, **(_TOY_ON_OWN_DATA if own_data else {}))
    if seed_model and preset.seed_model == TOY and not own_data:
        return replace(preset, training=_LAPTOP.training, seen=_LAPTOP.seen)
    if seed_model == SMALL or preset.seed_model == TOY:
        return replace(_LAPTOP, quantization=preset.quantization, data=preset.data)
    return preset


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
    if preset.seen:
        # The number of items tells.
        settings["epochs"] = None
    for name in ("data", "held_out", "rubric", "template", "seed_model"):
        settings[f"{name}_sha256"] = content_of(settings[name]) if settings[name] else None
    if preset.template:
        read_template(preset.template)
    return settings
