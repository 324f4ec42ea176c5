"""Seed model plus adapter to a plain model folder, tensor by tensor, from files.

The weights never pass through a loaded model: bitsandbytes repacks those it computes with, and a
merge of repacked weights is garbage.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Sequence

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open

from tract_lite.data.jsonl import read_json
from tract_lite.export.adapter import EMBEDDING, HEAD, Adapter
from tract_lite.export.model_folder import (
    copy_other_files,
    is_merged_judge,
    plain_name,
    seed_folder,
    weight_files,
    work_folder,
)
from tract_lite.spec import SPEC_FILE, JudgeSpec
from tract_lite.training.layers import linear_layers
from tract_lite.training.quiet import progress

# With its head, a file of several tensors stays below 256 MB.
SHARD_BYTES = 255 * 10**6
# The names that safetensors files give to the types of weights.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
QUANTISED_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def merge_adapter(seed_model: str | Path, adapter: str | Path, out_dir: str | Path, *, base: str = "4bit") -> Path:
    """Write the seed model with the adapter added (W + factor * B A, in float32) to a plain folder.

    `seed_model`: a folder or hub id, in 16 bits or in 4 bits of bitsandbytes. `base`: "4bit" adds
    to the weights as they were in training; where that was in 4 bits, to the dequantised ones, also
    of a seed model in 16 bits. "16bit" adds to the seed model's own. Tensors keep the type of its
    files; tokenizer files and spec are copied. Memory holds one tensor at a time; files have 256 MB
    or one tensor. An older merge in `out_dir` is replaced at once, by a whole one alone.
    Raises ValueError: the adapter is of another seed model, has no spec or is of a kind that can't
        be merged, or `out_dir` holds something else.
    Raises RuntimeError: the disk has no room.
    """
    seed_dir, out_dir = seed_folder(seed_model), Path(out_dir).resolve()
    _check_base(seed_dir, base)
    if out_dir.exists() and any(out_dir.iterdir()) and (not is_merged_judge(out_dir) or out_dir == seed_dir.resolve()):
        raise ValueError(f"{out_dir} is there and holds other things than an older merge: choose another folder")
    changes = Adapter(adapter)
    in_4bit = base == "4bit" and JudgeSpec.load(adapter).method.get("load_in_4bit", True)
    changes.check_seed(seed_model, seed_dir)
    weights = _find_weights(seed_dir, changes.unties)
    changes.check_fits({plain_name(weight.name): weight.shape for weight in weights})
    size = sum(weight.size for weight in weights)
    with work_folder(out_dir, size, "export the adapter alone: export_adapter needs no merge") as folder:
        merged = folder / "merged"
        merged.mkdir()
        _merge_weights(weights, changes, _quantised(seed_dir, weights) if in_4bit else set(), merged)
        copy_other_files(seed_dir, merged, untied=changes.unties)
        shutil.copyfile(Path(adapter, SPEC_FILE), merged / SPEC_FILE)
        if out_dir.exists():
            os.replace(out_dir, folder / "old")
        os.replace(merged, out_dir)
    return out_dir


def write_as_trained(seed_dir: Path, out_dir: Path) -> None:
    """Write a seed model's 4-bit weights, as training computes with them, to a new plain folder.

    As `merge_adapter` with the base "4bit", and without an adapter. Raises as that does.
    """
    weights = _find_weights(seed_dir)
    out_dir.mkdir()
    _merge_weights(weights, None, _quantised(seed_dir, weights), out_dir)
    copy_other_files(seed_dir, out_dir)


def check_mergeable(seed_dir: Path, base: str) -> None:
    """Make sure that an adapter on all linear layers can be merged onto a seed model.

    Where its weights are not there yet, what hangs on their names stays open.
    Raises ValueError: an unknown base, one that the seed model is not stored in, no linear layers,
        or weights in another format or with other names than transformers gives them.
    """
    _check_base(seed_dir, base)
    linear = {plain_name(f"{name}.weight") for name in linear_layers(_empty_model(seed_dir))}
    if not linear:
        raise ValueError(f"{seed_dir} has no linear layers that LoRA could change\nchoose another seed model")
    if not any(seed_dir.glob("*.safetensors*")):
        if any(seed_dir.glob("*.bin")):
            advice = "load the model with transformers and save it into its folder"
            raise ValueError(f"{seed_dir} has its weights in *.bin files, and a merge reads safetensors\n{advice}")
        return
    if lacking := sorted(linear - set(map(plain_name, weight_files(seed_dir)))):
        fault = f"its files have weights such as {lacking[0]} under other names than transformers"
        raise ValueError(f"nothing can be merged onto {seed_dir}: {fault}\nchoose another seed model")


def _check_base(seed_dir: Path, base: str) -> None:
    if base not in ("4bit", "16bit"):
        raise ValueError(f"base must be '4bit' or '16bit', got {base!r}")
    kept = read_json(seed_dir / "config.json").get("quantization_config") or {}
    if base == "16bit" and kept.get("load_in_4bit"):
        raise ValueError(f"{seed_dir} is there in 4 bits alone\ngive the model that it was made from, or base 4bit")


class _Weight:
    """A weight in the seed model's files, plain or packed in 4 bits, and its name in the merge."""

    def __init__(self, name: str, key: str, files: dict[str, Path]):
        self.name, self._key, self._files = name, key, files
        self._parts = [part for part in files if part.startswith(f"{key}.")]
        self.is_packed = bool(self._parts)
        stored = self._state() if self.is_packed else self._tensor(key)
        self.shape, self.dtype = tuple(stored.shape), stored.dtype
        # In bytes, as they are written.
        self.size = math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The weight, without its 4 bits; mapped from its file where it is there as it is."""
        if not self.is_packed:
            return self._tensor(self._key)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._tensor(self._key), self._state())

    def _tensor(self, key: str) -> torch.Tensor:
        with safe_open(self._files[key], "pt") as opened:
            return opened.get_tensor(key)

    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        parts = {part.removeprefix(f"{self._key}."): self._tensor(part) for part in self._parts}
        return QuantState.from_dict(parts, device=torch.device("cpu"))


def _find_weights(seed_dir: Path, unties: bool = False) -> list[_Weight]:
    """The weights of the merge; where an adapter unties the embeddings, with one for the head."""
    files = weight_files(seed_dir)
    names = [name for name in files if not name.partition(".weight.")[2].startswith(QUANTISED_PARTS)]
    weights = [_Weight(name, name, files) for name in names]
    embedding = next((name for name in files if plain_name(name) == EMBEDDING), None)
    if unties and HEAD not in files and embedding:
        weights.append(_Weight(HEAD, embedding, files))
    for weight in weights:
        if weight.dtype not in DTYPES:
            fault = f"the seed model has weights of type {weight.dtype} ({weight.name})"
            raise ValueError(f"{fault}\ngive it in 16 or 32 bits, or in bitsandbytes' 4 bits")
    return weights


def _quantised(seed_dir: Path, weights: Sequence[_Weight]) -> set[str]:
    """The plain names of the weights that go through 4 bits to be as they were in training."""
    # What a seed model in 4 bits keeps in 16 was so in training too.
    return set() if any(weight.is_packed for weight in weights) else _packed_weights(_empty_model(seed_dir))


def _merge_weights(weights: Sequence[_Weight], changes: Adapter | None, quantised: set[str], out_dir: Path) -> None:
    """Write all weights in shards, with the index that transformers reads."""
    by_name = {weight.name: weight for weight in weights}
    options: dict[str, Any] = {"get_storage_id": lambda _: None, "get_storage_size": lambda weight: weight.size}
    options |= {"filename_pattern": "model{suffix}.safetensors", "max_shard_size": SHARD_BYTES}
    split = split_state_dict_into_shards_factory(by_name, **options)
    with progress("merging", len(weights)) as bar:
        for name, inside in split.filename_to_tensors.items():
            # Wider types first, so that each tensor lies at a multiple of its type's width.
            shard = sorted(map(by_name.__getitem__, inside), key=lambda weight: -weight.dtype.itemsize)
            with open(out_dir / name, "wb") as file:
                file.write(_header(shard))
                for weight in shard:
                    file.write(_merged(weight, changes, plain_name(weight.name) in quantised))
                    bar.update()
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _merged(weight: _Weight, changes: Adapter | None, quantised: bool) -> Any:
    """The changed weight's bytes, as a NumPy array."""
    tensor = weight.read()
    if quantised:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # In float32, so that the only rounding is the one of the result.
        packed, state = quantize_4bit(tensor.float().contiguous(), quant_type="nf4", compress_statistics=True)
        tensor = dequantize_4bit(packed, state)
    changed = changes.apply(plain_name(weight.name), tensor) if changes else tensor
    return changed.to(weight.dtype).reshape(-1).view(torch.uint8).numpy()


def _header(shard: Sequence[_Weight]) -> bytes:
    """The head of a safetensors file; its library writes only what is wholly in memory."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in shard:
        start, end = end, end + weight.size
        entries[weight.name] = {"dtype": DTYPES[weight.dtype], "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _empty_model(seed_dir: Path) -> Any:
    """The seed model as transformers builds it, without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(seed_dir))


def _packed_weights(model: Any) -> set[str]:
    """The plain names of the text model's weights that transformers packs when it loads 4 bits."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept, text = get_keys_to_not_convert(model), set(model.get_decoder().modules())
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and module in text]
    return {plain_name(f"{name}.weight") for name in linear if should_convert_module(name, kept)}
