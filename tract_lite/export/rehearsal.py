"""A few of a seed model's layers, empty, through llama.cpp's converter and llama.cpp.

What they can't do with a model shows in seconds so, and before it is trained. What they do
otherwise than transformers shows after the export alone: see `parity`.
"""

import logging
import shutil
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from tract_lite.data.jsonl import read_json, write_json
from tract_lite.engines.llama_cpp import check_generates, complaint, load_model, quiet_llama
from tract_lite.engines.trial import check_runs
from tract_lite.export.converter import convert_model
from tract_lite.export.model_folder import GB
from tract_lite.training.quiet import without_bars

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# How many of the last layers read the keys and values of an earlier one.
SHARING = "num_kv_shared_layers"
# Beyond these many weights the rest of a model's layers is not tried too.
SMALL = 10**8
OTHER_SEED = "choose another seed model, such as a Llama, Mistral, Qwen or Phi"

logger = logging.getLogger(__name__)


def rehearse(folder: Path, file: Path) -> bool:
    """Convert and run as few of a model's layers as show every kind; its vocabulary is in `file`.

    `folder`: a copy of the seed model's files but its weights, by `copy_other_files`; it gets empty
    weights and a config to match. Where few layers fail, a small model is tried with all of them.
    Returns False, and says so, where memory or disk are too small even for a few layers.
    Raises ValueError: llama.cpp or its converter can't do it, or llama.cpp ends its process.
    """
    config = read_json(folder / "config.json")
    model = _empty(folder)
    count = model.config.get_text_config().num_hidden_layers
    kept = _layers_that_show_all(model, count)
    fault: ValueError | None = None
    for layers in dict.fromkeys((kept, count)):
        write_json(folder / "config.json", shortened(config, layers, count))
        try:
            model = _empty(folder)
        except Exception:  # whatever transformers says of a config that can't be shortened so
            continue
        weights = sum(prod(weight.shape) for weight in model.parameters())
        if (layers > kept and weights > SMALL) or not _has_room(folder, weights):
            break
        try:
            _convert_and_run(model, folder, file)
            return True
        except ValueError as error:
            fault = error
    if fault:
        raise fault
    write_json(folder / "config.json", config)
    logger.warning("not tried whether llama.cpp runs this seed model")
    return False


def shortened(config: dict[str, Any], layers: int, count: int) -> dict[str, Any]:
    """The content of a config.json of `count` layers for the first `layers` of them."""
    text = config.get("text_config", config)
    short = dict(text)
    for key, value in text.items():
        if key in LAYER_COUNTS:
            short[key] = layers
        elif key == SHARING and value:
            short[key] = max(0, layers - (count - value))
        elif (isinstance(value, list) or _is_pattern(key, value)) and len(value) == count:
            short[key] = value[:layers]
        elif isinstance(value, dict) and value and all(str(part).isdigit() for part in value):
            short[key] = {part: value[part] for part in value if int(part) < layers}
    return config | {"text_config": short} if "text_config" in config else short


def _is_pattern(key: str, value: Any) -> bool:
    """Whether a text has one letter for each layer, as Nemotron-H's has."""
    return key.endswith("pattern") and isinstance(value, str)


def _empty(folder: Path) -> Any:
    """The model of a folder's config, without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float16)


def _layers_that_show_all(model: Any, count: int) -> int:
    """How many of the first layers are of every kind that the model has; two at least.

    The kind of a layer: its weights with their shapes, and what the config lists for it.
    """
    lists = [v for v in model.config.get_text_config().to_dict().values() if isinstance(v, list) and len(v) == count]
    found = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    blocks = next(found, None)
    if blocks is None:
        return count
    kinds = []
    for number, block in enumerate(blocks):
        weights = frozenset((name, weight.shape) for name, weight in block.named_parameters())
        kinds.append((weights, str([values[number] for values in lists])))
    kept = max(2, 1 + max(map(kinds.index, kinds)))
    # A model may ask of its last layer what its others needn't be.
    return next((n for n in range(kept, count) if kinds[n - 1] == kinds[-1]), count) if kept < count else count


def _has_room(folder: Path, weights: int) -> bool:
    """Whether there is memory and disk for so many weights, twice as files."""
    need = 2 * weights + GB
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    if need < memory and 2 * need < disk:
        return True
    logger.warning("a few layers take %.1f GB of memory and %.1f of disk, more than is free", need / GB, 2 * need / GB)
    return False


def _convert_and_run(model: Any, folder: Path, file: Path) -> None:
    """Write the model with weights of zero, convert it, and run what comes of it."""
    config = read_json(folder / "config.json")
    model.to_empty(device="cpu")
    model.tie_weights()
    for weight in model.state_dict().values():
        weight.zero_()
    with without_bars():
        model.save_pretrained(folder)
    # transformers writes a config of the text part alone, or with other names.
    write_json(folder / "config.json", config)
    try:
        convert_model(folder, file, "f16", None)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    try:
        check_runs(file)
    except ValueError as error:
        cause = str(error).splitlines()[0].partition(f"{file}: ")[2]
        raise ValueError(f"llama.cpp ends the process with this seed model: {cause}\n{OTHER_SEED}") from error
    try:
        loaded = load_model(file)
    except ValueError as error:
        raise ValueError(f"llama.cpp can't run this seed model: {complaint()}\n{OTHER_SEED}") from error
    try:
        check_generates(loaded)
    finally:
        quiet_llama().llama_model_free(loaded)
