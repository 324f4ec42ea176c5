"""A LoRA adapter as files: what it changes, by how much, and which seed model it belongs to."""

import math
import re
from pathlib import Path
from typing import Mapping, Sequence

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tract_lite.data.jsonl import read_json, write_json
from tract_lite.data.places import content_of
from tract_lite.export.model_folder import plain_name, seed_folder, weight_files
from tract_lite.spec import SPEC_FILE
from tract_lite.training.seed_model import COPY_MARKS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# LoRA initialisations that take their start off the seed model's weights.
CHANGES_SEED = ("pissa", "olora", "corda", "loftq")
# What peft can train that is not merged here, by a part of its tensors' names.
OTHER_KINDS = {
    "base_layer.bias": "biases",
    "lora_B.bias": "biases",
    "lora_magnitude": "DoRA",
    "base_layer": "LoRA on embeddings or head",
    "lora_embedding": "LoRA on embeddings or head",
    "token_adapter": "embeddings of single tokens",
    ".lora_": "LoRA on other layers",
}
OTHERWISE = (
    "merge it with peft's merge_and_unload, save that with the seed model's tokenizer files "
    "and the adapter's judge_spec.json, and export the folder"
)
# Rows compared per weight, to tell one seed model from another.
COMPARED_ROWS = 16


class Adapter:
    """The weight changes in an adapter's folder, by the plain name of the weight they change.
    Raises ValueError: not a LoRA adapter on linear layers, with or without `modules_to_save`.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
            inside = next((path.parent for path in folder.glob(f"*/{CONFIG_FILE}")), None)
            hint = f"; {inside} is one" if inside else ""
            raise ValueError(f"{folder} is not an adapter: it has no {CONFIG_FILE} or no {WEIGHTS_FILE}{hint}")
        self.size = (folder / WEIGHTS_FILE).stat().st_size
        self.config = read_json(folder / CONFIG_FILE)
        self._content = read_json(folder / SPEC_FILE).get("method", {}).get("seed_model_sha256")
        start = str(self.config.get("init_lora_weights")).lower()
        if self.config.get("fan_in_fan_out") or start.startswith(CHANGES_SEED):
            other = f"fan_in_fan_out or a start that changes the seed model ({', '.join(CHANGES_SEED)})"
            raise ValueError(f"the adapter was made with {other}, and only plain LoRA is merged here\n{OTHERWISE}")
        self.saved: dict[str, torch.Tensor] = {}
        self.pairs: dict[str, list[torch.Tensor]] = {}
        # The layers' own names, which the adapter's patterns are written for.
        self._layers: dict[str, str] = {}
        for key, tensor in sorted(load_file(folder / WEIGHTS_FILE).items()):
            own = key.removeprefix("base_model.model.")
            name = plain_name(own)
            if pair := re.fullmatch(r"(.+)\.lora_[AB]\.weight", name):
                self.pairs.setdefault(f"{pair[1]}.weight", []).append(tensor)
                self._layers[f"{pair[1]}.weight"] = own.rpartition(".lora_")[0]
            elif kind := next((words for part, words in OTHER_KINDS.items() if part in name), None):
                fault = f"the adapter trains {kind} ({name}), and only LoRA on linear layers and modules_to_save"
                raise ValueError(f"{fault} are merged here\n{OTHERWISE}")
            else:
                self.saved[name] = tensor
        if self.config.get("ensure_weight_tying") and EMBEDDING in self.saved:
            self.saved.pop(HEAD, None)

    @property
    def unties(self) -> bool:
        """Whether input and output embeddings are two weights afterwards, as in peft."""
        return not self.config.get("ensure_weight_tying") and bool(self.saved.keys() & {HEAD, EMBEDDING})

    def check_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises ValueError: the seed model lacks what is changed, or has it in other shapes."""
        changed = {name: tuple(tensor.shape) for name, tensor in self.saved.items()}
        changed |= {name: (up.shape[0], down.shape[1]) for name, (down, up) in self.pairs.items()}
        if lacking := sorted(changed.keys() - shapes.keys()):
            raise ValueError(f"the adapter changes weights the seed model lacks: {_some(lacking)}\n{OTHERWISE}")
        both = [(name, shape, tuple(shapes[name])) for name, shape in changed.items()]
        if unequal := [f"{name} {ours} and {theirs}" for name, ours, theirs in both if ours != theirs]:
            advice = "give the seed model that it was trained on"
            raise ValueError(f"adapter and seed model have other shapes: {_some(unequal)}\n{advice}")

    def check_seed(self, seed_model: str | Path, seed_dir: Path) -> None:
        """Raises ValueError: the adapter was trained on another seed model than that in `seed_dir`.

        They are told apart by the content that the adapter's spec knows, by their weights where the
        adapter's own seed model is still at hand, else by the last part of a path or hub id.
        """
        if self._content and self._content == content_of(seed_model):
            return
        trained_on = self.config.get("base_model_name_or_path") or "an unnamed seed model"
        try:
            same = _same_weights(seed_folder(trained_on, download=False), seed_dir)
        except (FileNotFoundError, ValueError):
            same = _name(trained_on) == _name(seed_model)
        if not same:
            advice = "give that one; if both are the same, let its folder have that name"
            raise ValueError(f"the adapter was trained on {trained_on}, not on {seed_model}\n{advice}")

    def check_alone(self) -> None:
        """Raises ValueError: it replaces whole weights, which llama.cpp has no adapter for."""
        if self.saved:
            raise ValueError(
                f"the adapter replaces whole weights ({_some(sorted(self.saved))}), which llama.cpp can't do\n"
                "merge it: use merge_adapter and export_gguf, or tract-lite merge and export"
            )

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, in float32 where it is a sum; an unchanged one as it is."""
        if name not in self.pairs:
            return self.saved.get(name, weight)
        down, up = (part.float() for part in self.pairs[name])
        return weight.float().addmm_(up, down, alpha=self.factor(name))

    def factor(self, name: str) -> float:
        """The factor of B A for a weight: alpha / rank or, rank-stabilised, alpha / sqrt(rank)."""
        rank = self.pairs[name][0].shape[0]
        # As in peft: the first pattern that matches whole parts of the name.
        layer, patterns = self._layers[name], (self.config.get("alpha_pattern") or {}).items()
        matching = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer))
        alpha = next(matching, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def save_for_llama_cpp(self, folder: Path) -> None:
        """Write it with alpha / rank as the factor of each pair, as llama.cpp takes it."""
        folder.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for name, (down, up) in self.pairs.items():
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            # B takes the rest.
            rest = self.factor(name) * down.shape[0] / self.config["lora_alpha"]
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up.float() * rest}
        save_file(tensors, folder / WEIGHTS_FILE)
        write_json(folder / CONFIG_FILE, self.config)


def _some(names: Sequence[str]) -> str:
    """The first of many names, and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _name(seed_model: str | Path) -> str:
    """A seed model's own name, also inside the hub's cache, without what marks a copy of it.

    Copies in 4 bits may be written in small letters.
    """
    path = Path(seed_model)
    cached = [part for part in path.parts if part.startswith("models--")]
    return COPY_MARKS.sub("", (cached[0].rpartition("--")[2] if cached else path.name).lower())


def _same_weights(folder: Path, other: Path) -> bool:
    """Whether the first rows of all weights that both hold in one shape are the same.

    To the precision of bfloat16, as a copy may be stored so; what one holds in 4 bits is left out.
    """
    if folder.resolve() == other.resolve():
        return True
    files, others = weight_files(folder), weight_files(other)
    both = ((_first_rows(files[name], name), _first_rows(others[name], name)) for name in files.keys() & others.keys())
    compared = [torch.allclose(a, b, rtol=2**-8, atol=1e-6) for a, b in both if a.shape == b.shape]
    return bool(compared) and all(compared)


def _first_rows(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        rows = opened.get_slice(name)
        return (rows[:COMPARED_ROWS] if rows.get_shape() else opened.get_tensor(name)).float()
