"""Seed plus adapter to a plain model folder, tensor by tensor, from files.

The weights never pass through a loaded model: bitsandbytes repacks those it computes with, and a
merge of repacked weights is garbage.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from tract_lite.spec import SPEC_FILE

SHARD_BYTES = 256 * 2**20
QUANTISED_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
NOT_COPIED = (".safetensors", ".bin", ".gguf", ".index.json", ".pt", ".pth", ".h5", ".msgpack")


def merge_adapter(seed: str | Path, adapter: str | Path, out_dir: str | Path, *,
                  base: str = "4bit") -> Path:
    """Write the seed with the adapter added (W + scale * B A, in float32) to a plain folder.

    `seed`: a folder or hub id, in 16 bits or as 4-bit bitsandbytes weights. `base`: "4bit" adds to
    the weights as the adapter met them in training, quantised and dequantised; "16bit" to the
    seed's own. Tensors keep the type of the seed's files. Tokenizer files are copied as they are,
    the judge's spec too.

    Raises:
        ValueError: the adapter belongs to another seed or names weights that the seed lacks.
    """
    if base not in ("4bit", "16bit"):
        raise ValueError(f"base must be '4bit' or '16bit', got {base!r}")
    seed_dir, adapter, out_dir = _seed_folder(seed), Path(adapter), Path(out_dir)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if Path(config["base_model_name_or_path"]).name != Path(seed).name:
        raise ValueError(
            f"the adapter was trained on {config['base_model_name_or_path']}, not on {seed}"
        )
    deltas = _Deltas(adapter, config)
    quantised = _quantised_weights(seed_dir) if base == "4bit" else set()
    unfinished = out_dir.with_name(out_dir.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    writer = _ShardWriter(unfinished)
    for name, weight in _tensors(seed_dir):
        dtype = weight.dtype
        if isinstance(weight, _Packed):
            weight = weight.dequantise()
        elif name in quantised:
            weight = _through_4bit(weight)
        writer.add(name, deltas.add_to(name, weight).to(dtype))
    deltas.check_all_used()
    writer.finish()
    _copy_other_files(seed_dir, unfinished)
    shutil.copy(adapter / SPEC_FILE, unfinished / SPEC_FILE)
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(unfinished, out_dir)
    return out_dir


def _seed_folder(seed: str | Path) -> Path:
    if Path(seed).is_dir():
        return Path(seed)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(seed), ignore_patterns=["*.bin", "*.gguf", "*.pth"]))


class _Deltas:
    """The adapter's weight changes, by the name of the weight they change."""

    def __init__(self, adapter: Path, config: dict[str, Any]):
        tensors = load_file(adapter / "adapter_model.safetensors")
        self._alpha_pattern = config.get("alpha_pattern") or {}
        self._config = config
        self._pairs: dict[str, list[torch.Tensor]] = {}
        for key, tensor in sorted(tensors.items()):
            name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            if not part:
                raise ValueError(f"the adapter holds {key}, which is no LoRA weight")
            self._pairs.setdefault(name, []).append(tensor)
        self._unused = set(self._pairs)

    def add_to(self, weight_name: str, weight: torch.Tensor) -> torch.Tensor:
        name = weight_name.removesuffix(".weight")
        if name not in self._pairs:
            return weight
        self._unused.discard(name)
        down, up = (part.float() for part in self._pairs[name])
        return weight.float().addmm_(up, down, alpha=self._scale(name, down.shape[0]))

    def check_all_used(self) -> None:
        if self._unused:
            raise ValueError(f"the adapter changes weights the seed lacks: {sorted(self._unused)}")

    def _scale(self, name: str, rank: int) -> float:
        # As in peft: the first pattern that matches whole parts of the name.
        matching = (value for pattern, value in self._alpha_pattern.items()
                    if re.fullmatch(rf"(.*\.)?({pattern})", name))
        alpha = next(matching, self._config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _quantised_weights(seed_dir: Path) -> set[str]:
    """The names of the weights that 4-bit loading quantises: all linear layers but the head."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(seed_dir)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head}


def _through_4bit(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # In float32, so that the only rounding is the one of the result.
    packed, state = quantize_4bit(
        weight.float().contiguous(), quant_type="nf4", compress_statistics=True
    )
    return dequantize_4bit(packed, state)


@dataclass
class _Packed:
    """A 4-bit weight as bitsandbytes saves it, with what describes it."""

    weight: torch.Tensor
    state: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype

    def dequantise(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.state)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor | _Packed]]:
    """The seed's weights one by one, 4-bit ones with their state."""
    from bitsandbytes.functional import QuantState

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files")
    where = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))
    weights = [name for name in where
               if not name.partition(".weight.")[2].startswith(QUANTISED_PARTS)]
    for name in tqdm(weights, "merging"):
        parts = {key.removeprefix(f"{name}."): _read(where[key], key)
                 for key in where if key.startswith(f"{name}.")}
        weight = _read(where[name], name)
        yield name, _Packed(weight, QuantState.from_dict(parts, device="cpu")) if parts else weight


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


class _ShardWriter:
    """Collects tensors and writes them in shards, with the index that transformers reads."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._pending and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        self._flush()
        names = [f"model-{n:05}-of-{len(self._shards):05}.safetensors"
                 for n in range(1, len(self._shards) + 1)]
        for number, name in enumerate(names):
            os.replace(self._folder / f"{number}.tmp", self._folder / name)
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {key: name for name, keys in zip(names, self._shards) for key in keys},
        }
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        save_file(self._pending, self._folder / f"{len(self._shards)}.tmp", {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0


def _copy_other_files(seed_dir: Path, out_dir: Path) -> None:
    """Config and tokenizer files; the config no longer speaks of 4 bits."""
    for file in seed_dir.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copy(file, out_dir / file.name)
    path = out_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
