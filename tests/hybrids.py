"""Tiny random models with a recurrent state, alone or beside attention, as GGUF judges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tiny import BYTE_LEVEL, SIZES, told, vocabulary_folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    MambaConfig,
    Qwen3_5TextConfig,
)

from tract_lite.data.jsonl import read_json, write_json
from tract_lite.export.converter import convert_model
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, Sampling, make_spec

VOCABULARY = "split digits"
LARGER = {**SIZES, "num_hidden_layers": 4, "max_position_embeddings": 1024, "tie_word_embeddings": False}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
GRANITE_LAYERS = ["mamba", "attention"] * 2
HYBRIDS: dict[str, Any] = {
    "lfm2": lambda **sizes: Lfm2Config(
        **sizes | {"tie_word_embeddings": True}, layer_types=["conv", "full_attention"] * 2, block_multiple_of=16
    ),
    "qwen3.5": lambda **sizes: Qwen3_5TextConfig(
        **sizes,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 0],
        },
    ),
    "falcon-h1": lambda **sizes: FalconH1Config(**sizes, **MAMBA, mamba_d_ssm=128, head_dim=16),
    "granite-4": lambda **sizes: GraniteMoeHybridConfig(
        **sizes,
        **MAMBA,
        layer_types=GRANITE_LAYERS,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    ),
    "mamba": lambda **sizes: MambaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=64,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        bos_token_id=sizes["bos_token_id"],
        eos_token_id=sizes["eos_token_id"],
        pad_token_id=sizes["pad_token_id"],
    ),
}


def make_hybrid(folder: Path, family: str, std: float = 0.2) -> None:
    """A judge of one of `HYBRIDS` in `model`, and `judge.gguf` in float32.

    Its distributions are far from flat. The marker is one token, which it writes as often as it
    ends: their rows of the head are longer than the others.
    """
    model_dir = folder / "model"
    shutil.copytree(vocabulary_folder(VOCABULARY), model_dir, ignore=shutil.ignore_patterns("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        HYBRIDS[family](**LARGER, **ids, vocab_size=len(tokenizer)), dtype=torch.float32
    )
    spec = hybrid_spec(tokenizer, "the")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=std)
        model.get_output_embeddings().weight[[spec.marker_ids[0], spec.eos_id]] *= 2
    model.save_pretrained(model_dir)
    if family == "granite-4":
        # As on the hub; transformers has other names for layers, which the converter does not know.
        write_json(model_dir / "config.json", read_json(model_dir / "config.json") | {"layer_types": GRANITE_LAYERS})
    spec.save(model_dir)
    with told(BYTE_LEVEL[VOCABULARY][0]):
        convert_model(model_dir, folder / "judge.gguf", "f32", spec)


def hybrid_spec(tokenizer: Any, marker: str) -> JudgeSpec:
    sampling = Sampling(max_new_tokens=24)
    return make_spec(tokenizer, ScoreScale.integers(1, 5), marker=marker, max_length=512, sampling=sampling)
