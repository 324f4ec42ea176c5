"""What a run takes on each kind of machine, and what its user may choose.

The paper's settings where it has them.
"""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import dataclass, replace
from typing import Sequence

import torch

from tract_lite import TrainSettings
from tract_lite.seed import PRECISIONS

logger = logging.getLogger("two_stage")

FEEDBACK_COLLECTION = "prometheus-eval/Feedback-Collection"
MISTRAL = "unsloth/mistral-7b-instruct-v0.2-bnb-4bit"
# Cards up to here get the settings of a T4.
T4_BYTES = 20e9


@dataclass(frozen=True)
class Preset:
    """`max_items` is chosen so that a run ends overnight, `validation` of them at most are not
    trained on; `held_out` items are kept for judging, `gguf_items` of them are judged with each
    GGUF file, `gguf_parallel` sequences at once (by the memory that they take). No `data`: the
    built-in example; no `seed_model`: a toy one, made for the data."""

    training: TrainSettings
    data: str | None
    seed_model: str | None
    max_items: int
    held_out: int
    gguf_items: int
    validation: int = 100
    max_length: int = 3000
    max_new_tokens: int = 1024
    batch_size: int = 8
    gradient_checkpointing: bool = True
    quantization: tuple[str, ...] = ("q4_k_m",)
    gguf_parallel: int | None = None


PRESETS = {
    "demo": Preset(
        training=TrainSettings(batch_size=16, micro_batch_size=16, learning_rate=6e-3),
        data=None, seed_model=None, max_items=2600, held_out=1000, gguf_items=1000,
        max_length=256, max_new_tokens=96, batch_size=250, gradient_checkpointing=False,
        quantization=("f16", "q8_0"),
    ),
    # The demo's way with a quarter of its data: every step can be seen, its judge is a poor one.
    "quick": Preset(
        training=TrainSettings(batch_size=16, micro_batch_size=16, learning_rate=6e-3,
                               save_every=25),
        data=None, seed_model=None, max_items=640, held_out=100, gguf_items=100, validation=40,
        max_length=256, max_new_tokens=96, batch_size=250, gradient_checkpointing=False,
        quantization=("q8_0",),
    ),
    "24gb": Preset(
        training=TrainSettings(micro_batch_size=2, save_every=50), data=FEEDBACK_COLLECTION,
        seed_model=MISTRAL, max_items=6000, held_out=300, gguf_items=50, batch_size=16,
    ),
    "t4": Preset(
        training=TrainSettings(save_every=40), data=FEEDBACK_COLLECTION, seed_model=MISTRAL,
        max_items=1000, held_out=100, gguf_items=10, validation=40, gguf_parallel=4,
    ),
}

DEMO_ON_OWN_DATA = replace(
    PRESETS["demo"],
    training=TrainSettings(micro_batch_size=4, learning_rate=6e-3, log_every=2),
    max_items=1000, held_out=20, gguf_items=20, max_length=4096, max_new_tokens=384, batch_size=32,
)


@dataclass(frozen=True)
class Options:
    """What a user may choose; None leaves it to the preset."""

    preset: str
    out: str
    data: str | None = None
    split: str | None = None
    seed_model: str | None = None
    scale: str = "1-5"
    max_items: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    epochs: float | None = None
    quantization: tuple[str, ...] | None = None
    base: str = "4bit"
    precision: str | None = None
    skip_bad: bool = False
    scratch: str | None = None
    train_only: bool = False


def preset_for(options: Options) -> Preset:
    """The preset with what the user chose put in its place."""
    preset = PRESETS[options.preset]
    if options.preset in ("demo", "quick") and options.data:
        preset = replace(DEMO_ON_OWN_DATA, quantization=preset.quantization)
    chosen = {name: getattr(options, name)
              for name in ("data", "seed_model", "max_items", "max_length", "max_new_tokens",
                           "quantization")
              if getattr(options, name) is not None}
    if options.epochs is not None:
        chosen["training"] = replace(preset.training, epochs=options.epochs)
    return replace(preset, **chosen)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line; without a preset, the one that suits this machine."""
    parser = argparse.ArgumentParser(
        description="Train a judge in two stages and export it as a GGUF file.")
    parser.add_argument("--preset", choices=("auto", *PRESETS), default="auto",
                        help="auto (the default): 24gb or t4 by the GPU's memory, else quick")
    parser.add_argument("--data", help="JSONL, JSON, CSV or Parquet file, or a hub data set")
    parser.add_argument("--split", help="split of a hub data set (default: train)")
    parser.add_argument("--out", help="run folder (default: runs/PRESET); goes on if it is there")
    parser.add_argument("--seed-model", help="folder or hub id of the model to train")
    parser.add_argument("--scale", default="1-5", help="lowest and highest score (default: 1-5)")
    parser.add_argument("--max-items", type=int, help="training items to use at most")
    parser.add_argument("--max-length", type=int, help="tokens of a training sequence at most")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of a reasoning at most")
    parser.add_argument("--epochs", type=float, help="epochs of each stage")
    parser.add_argument("--quantization", nargs="+", help="GGUF types, such as f16 q8_0 q4_k_m")
    parser.add_argument("--base", choices=("4bit", "16bit"), default="4bit",
                        help="weights that the adapter is merged onto (default: 4bit)")
    parser.add_argument("--precision", choices=PRECISIONS,
                        help="type to compute in (default: by the hardware)")
    parser.add_argument("--skip-bad", action="store_true", help="go on without unusable rows")
    parser.add_argument("--scratch", metavar="FOLDER",
                        help="for what is large and can be made again, such as the merged weights "
                             "(default: the run folder)")
    parser.add_argument("--train-only", action="store_true",
                        help="stop before the export; the same call without it goes on")
    chosen = vars(parser.parse_args(arguments))
    if not re.fullmatch(r"-?\d+-\d+", chosen["scale"]):
        parser.error(f"--scale must be like 1-5, got {chosen['scale']}")
    if chosen["preset"] == "auto":
        chosen["preset"] = _preset_of_machine()
    chosen["out"] = chosen["out"] or f"runs/{chosen['preset']}"
    # A form in a notebook has no other way of leaving a field to the preset.
    chosen |= {name: chosen[name] or None for name in ("data", "seed_model", "max_items")}
    chosen["quantization"] = chosen["quantization"] and tuple(chosen["quantization"])
    return Options(**chosen)


def _preset_of_machine() -> str:
    if not torch.cuda.is_available():
        logger.warning("no GPU here: this is a quick run in demo size on the CPU")
        return "quick"
    memory = torch.cuda.get_device_properties(0).total_memory
    return "24gb" if memory > T4_BYTES else "t4"
