"""Options that stand in one place: the fields of a dataclass, which give the flags as well."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, Mapping, TypeVar

from tract_lite.data.scales import AUTO
from tract_lite.training.settings import PRECISIONS, TARGETS

Chosen = TypeVar("Chosen")

LAPTOP = "laptop"
PRESET_NAMES = ("demo", "quick", LAPTOP, "24gb", "t4")
# Two stages with reasonings, or one on scores alone.
TRACT, DIRECT = METHODS = ("tract", "direct")
GROUPS = {
    "data": "the rows",
    "training": "the training of a stage (as the preset has it)",
    "untrained": "a model without a judge spec",
    "file": "a GGUF file",
    "server": "a server (its key, if it wants one: TRACT_LITE_API_KEY)",
}
_TYPES = {"int": int, "float": float, "str": str, "tuple[str, ...]": str}


def option(default: Any, help: str, *, group: str = "", least: float | None = None, **flag: Any) -> Any:
    """A field of a dataclass of options. `flag`: what argparse is told beside its help.

    `least`: what a number must be at least. `group`: the flags it is shown with.
    """
    return field(default=default, metadata={"help": help, "group": group, "least": least, "flag": flag})


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, kind: type[Any], groups: Mapping[str, str] = GROUPS) -> None:
    """Add a flag for each field of a dataclass of options; `groups` has the groups' titles."""
    used = {item.metadata["group"] for item in fields(kind)}
    places = {name: parser.add_argument_group(title) for name, title in (groups or {}).items() if name in used}
    for item in fields(kind):
        name, told = str(item.type).removesuffix(" | None"), dict(item.metadata["flag"])
        if name == "bool":
            told["action"] = "store_true"
        else:
            told |= {"type": _TYPES[name], "default": item.default}
            if "choices" not in told:
                told.setdefault("metavar", "N" if name in ("int", "float") else item.name.upper())
        if name.startswith("tuple"):
            told["nargs"] = "+"
        shown = item.metadata["help"]
        if item.default not in (None, False) and name != "bool":
            shown += f" ({item.default})"
        places.get(item.metadata["group"], parser).add_argument(flag_of(item.name), help=shown, **told)


def options_from(kind: type[Chosen], arguments: argparse.Namespace) -> Chosen:
    """The options that were given as flags. Raises ValueError: a number is too small."""
    chosen = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value = getattr(arguments, item.name)
        least = item.metadata["least"]
        if least is not None and value is not None and not value >= least:
            raise ValueError(f"{flag_of(item.name)} must be at least {least}, got {value}")
        chosen[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**chosen)


@dataclass(frozen=True)
class DataOptions:
    """What a user may choose for reading rows; None leaves it to what stands in them."""

    format: str = option("auto", "jsonl, json, csv, tsv, xlsx, parquet or hub (by name)", group="data", metavar="NAME")
    split: str | None = option(None, "split of a hub data set (train)", group="data", metavar="NAME")
    encoding: str | None = option(None, "of a text file (utf-8, utf-16, Excel's cp1252)", group="data", metavar="NAME")
    columns: tuple[str, ...] | None = option(
        None, "columns by field, as in response=Answer score=Rating", group="data", metavar="FIELD=COLUMN"
    )
    criteria: str | None = option(None, "what makes a score, for all rows", group="data", metavar="TEXT")
    rubric: str | None = option(
        None, "file of a rubric for all rows (JSON, or a text), or of several to judge by", group="data", metavar="FILE"
    )
    skip_bad: bool = option(False, "leave unusable rows out", group="data")


@dataclass(frozen=True)
class AskOptions(DataOptions):
    """What a user may choose for opening and asking a judge; None leaves it to the judge."""

    n_cot: int | None = option(
        None, "reasonings per item; 0 reads the score without one (1, or 0 as the judge was trained)", least=0
    )
    seed: int = option(0, "seed of the sampling")
    parallel: int | None = option(None, "sequences at once (by the context's length), or requests (16)", least=1)
    spec: str | None = option(None, "the judge's spec: its file, folder or a judge's GGUF (the one inside the model)")
    scale: str | None = option(
        None,
        "of items without their own: 1-5, 0-5:0.5, bad=0,good=1, or auto: as they propose (1-5)",
        group="untrained",
    )
    template: str | None = option(None, "file of the prompt's Jinja template", group="untrained", metavar="FILE")
    chat: str | None = option(None, "file of a chat template (the model's own)", group="untrained", metavar="FILE")
    adapter: str | None = option(None, "a judge's adapter (GGUF) on top of MODEL", group="file")
    threads: int | None = option(None, "CPU threads (one per CPU)", group="file", least=1)
    gpu_layers: int | None = option(None, "layers on the GPU (all)", group="file")
    context_length: int | None = option(None, "tokens per sequence (as in training)", group="file", least=1)
    server_model: str | None = option(None, "the model's name there", group="server")
    timeout: float | None = option(None, "seconds of one request", group="server", least=1)
    retries: int | None = option(None, "how often a request is sent again (4)", group="server", least=0)


@dataclass(frozen=True)
class JudgeOptions(AskOptions):
    """What a user may choose for judging a file."""

    gate: float | None = option(None, "reason only where a direct score's doubt is above (see `gate`)", least=0)


@dataclass(frozen=True)
class GateOptions(AskOptions):
    """What a user may choose for finding a gate."""

    share: float = option(0.35, "of the tokens that always reasoning writes, what may be written", least=0)


@dataclass(frozen=True)
class ReasonOptions(DataOptions):
    """What a user may choose for the reasonings of a trained adapter."""

    seed: int = option(0, "seed of the sampling")
    parallel: int = option(16, "sequences that transformers decodes at once", least=1)


@dataclass(frozen=True)
class MergeOptions:
    """What a user may choose for a merge."""

    seed_model: str | None = option(None, "the adapter's seed model, folder or hub id (the one in its spec)")
    base: str = option("4bit", "weights to add to", choices=("4bit", "16bit"))


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose for an export."""

    quantization: tuple[str, ...] | None = option(
        None, "llama.cpp types (f16); several: FILE-NAME.gguf", metavar="NAME"
    )
    seed_model: str | None = option(None, "an adapter's seed model, folder or hub id (the one in its spec)")
    no_check: bool = option(False, "do not compare with transformers")


@dataclass(frozen=True)
class StageOptions(DataOptions):
    """What a user may choose for the training of a stage; None leaves it to the preset."""

    preset: str = option(
        AUTO,
        "24gb or t4 by the GPU's memory, else laptop for own data and quick without",
        choices=(AUTO, *PRESET_NAMES),
    )
    seed_model: str | None = option(
        None, "folder or hub id of the model to train; small: SmolLM2-135M-Instruct; toy: one made for the data"
    )
    offline: bool = option(False, "fetch no small seed model from the network")
    scale: str = option(AUTO, "of the scores: 1-5, in steps 0-5:0.5, with labels bad=0,good=1, or as the data propose")
    remap: str | None = option(
        None, "scale whose labels the judge writes in place of these, such as 0-9", metavar="SCALE"
    )
    template: str | None = option(None, "file of the prompt's Jinja template", metavar="FILE")
    max_items: int | None = option(None, "training items to use at most")
    max_length: int | None = option(None, "tokens of a training sequence at most")
    max_new_tokens: int | None = option(None, "tokens of a reasoning at most")
    epochs: float | None = option(None, "epochs of each stage", group="training")
    batch_size: int | None = option(None, "sequences of one step", group="training", least=1)
    micro_batch_size: int | None = option(None, "of these, computed at once", group="training", least=1)
    learning_rate: float | None = option(None, "at its highest", group="training", least=0)
    warmup_ratio: float | None = option(None, "share of the steps with a rising rate", group="training", least=0)
    raft_weight: float | None = option(None, "of the squared error of the score", group="training", least=0)
    max_steps: int | None = option(None, "steps of each stage at most", group="training", least=1)
    save_every: int | None = option(None, "steps from one checkpoint to the next", group="training", least=1)
    training_seed: int | None = option(None, "seed of the adapter and of the order", group="training")
    direct_share: float | None = option(
        None, "share of the sequences that have no reasoning (0)", group="training", least=0
    )
    target: str | None = option(
        None,
        "of a score between two labels: learn the nearest one, or soft: both by their share (nearest)",
        group="training",
        choices=TARGETS,
    )
    precision: str | None = option(None, "type to compute in (by the hardware)", group="training", choices=PRECISIONS)


@dataclass(frozen=True)
class TrainOptions(StageOptions):
    """What a user may choose for a single stage."""

    validation: str | None = option(None, "records to choose the best step by (none: the last)", metavar="FILE")


@dataclass(frozen=True)
class RunOptions(StageOptions):
    """What a user may choose for a whole run; None leaves it to the preset."""

    data: str | None = option(None, "file of rows (CSV, Excel, JSONL, JSON, Parquet), or a hub data set")
    method: str = option(
        AUTO,
        "two stages with reasonings, or one on scores alone, as for data that bring few reasonings",
        choices=(AUTO, *METHODS),
    )
    held_out: str | None = option(
        None,
        "file of the items to measure with (a quarter of the data, at most 100; of over 1,000 a tenth)",
        metavar="FILE",
    )
    out: str | None = option(None, "run folder (runs/PRESET); goes on if it is there", metavar="FOLDER")
    quantization: tuple[str, ...] | None = option(None, "GGUF types, such as f16 q8_0 q4_k_m", metavar="NAME")
    base: str = option("4bit", "weights that the adapter is merged onto", choices=("4bit", "16bit"))
    scratch: str | None = option(
        None, "for what is large and can be made again, such as the merged weights (the run folder)", metavar="FOLDER"
    )
    train_only: bool = option(False, "stop before the export; the same call without it goes on")
