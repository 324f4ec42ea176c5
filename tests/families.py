"""The families of seed models: each as a tiny random one, the whole way from training to GGUF."""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ContextManager

import torch
import transformers
from stages import SCALE, make_records
from tiny import LETTERS, SIZES, make_byte_level, make_gemma_spm, make_phi_spm, told
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tract_lite.data.jsonl import read_json
from tract_lite.export import converter
from tract_lite.export.exportable import check_exportable
from tract_lite.export.gguf import export_adapter, export_gguf
from tract_lite.export.merge import merge_adapter
from tract_lite.export.parity import Parity, compare
from tract_lite.judge import Judge
from tract_lite.spec import Sampling
from tract_lite.training.settings import TrainSettings
from tract_lite.training.stage import train_adapter

SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = LETTERS.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Byte-level vocabularies by llama.cpp's names, with the pattern that cuts a text into words.
BYTE_LEVELS: dict[str, str | None] = {
    **dict.fromkeys(("llama-bpe", "dbrx", "lfm2", "falcon-h1", "chatglm-bpe"), LETTERS % "{1,3}"),
    "qwen2": LETTERS % "",
    "qwen35": MARKS % "",
    "gpt-4o": CASED % (f"{SHORTENED}?", f"{SHORTENED}?", "{1,3}"),
    "tekken": CASED % ("", "", ""),
    **dict.fromkeys(("refact", "command-r"), DIGITS),
    **dict.fromkeys(("phi-2", "gpt-2"), None),
}
SPM = "SentencePiece"
HEADS, TIED = {"head_dim": 16}, {"tie_word_embeddings": True}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA_2 = {**HEADS, **TIED, "query_pre_attn_scalar": 16}
# llama.cpp has this pattern of windows in its code, and Gemma-3n's sizes.
GEMMA_3 = {**GEMMA_2, "num_hidden_layers": 6}
GEMMA_3N = {
    **HEADS,
    **TIED,
    "num_hidden_layers": 4,
    "layer_types": WINDOWED["layer_types"] * 2,
    "activation_sparsity_pattern": [0.95] * 4,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 256,
}
GEMMA_4 = {
    **HEADS,
    **TIED,
    **WINDOWED,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "final_logit_softcapping": 30.0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {**HEADS, **EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True}
GATED_DELTA = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
GRANITE_4 = {**MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}
VISION: dict[str, dict[str, Any]] = {
    "Qwen3_5Config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    "Gemma4Config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


HYBRIDS = ("falcon_h1", "granitemoehybrid", "lfm2", "qwen3_5_text")


@dataclass(frozen=True)
class Family:
    """A config of transformers with its sizes, the kind of vocabulary, and how it goes.

    `std` is that of the random weights. `within`: how far the scores from GGUF may lie from those
    of the trained judge. `refusal`: why it is refused before it is trained.
    """

    config: str
    vocabulary: str
    options: dict[str, Any]
    std: float = 0.1
    within: float = 1e-4
    refusal: str = ""


FAMILIES = {
    "Llama": Family("LlamaConfig", "llama-bpe", {}),
    "Mistral": Family("MistralConfig", SPM, {}),
    "Ministral-3": Family("Ministral3Config", "tekken", HEADS),
    "Qwen2, Qwen2.5": Family("Qwen2Config", "qwen2", {}),
    "Qwen3": Family("Qwen3Config", "qwen2", HEADS),
    "Qwen3-MoE": Family("Qwen3MoeConfig", "qwen2", QWEN_MOE),
    "Qwen3.5": Family("Qwen3_5TextConfig", "qwen35", GATED_DELTA),
    "Qwen3.5 with vision": Family("Qwen3_5Config", "qwen35", GATED_DELTA),
    "Gemma-2": Family("Gemma2Config", "Gemma", GEMMA_2, std=0.05),
    "Gemma-3": Family("Gemma3TextConfig", "Gemma", GEMMA_3, std=0.05),
    "Gemma-3n": Family("Gemma3nTextConfig", "Gemma", GEMMA_3N, std=0.05, within=3e-3),
    "Gemma-4": Family("Gemma4TextConfig", "Gemma", GEMMA_4, std=0.05),
    "Gemma-4 with vision": Family("Gemma4Config", "Gemma", GEMMA_4, std=0.05),
    "SmolLM3": Family("SmolLM3Config", "llama-bpe", {**TIED, "num_hidden_layers": 4}),
    "Granite-3": Family("GraniteConfig", "refact", {"logits_scaling": 8.0}, std=0.3),
    "Granite-4": Family("GraniteMoeHybridConfig", "dbrx", GRANITE_4 | EXPERTS),
    "Granite-4 without experts": Family(
        "GraniteMoeHybridConfig",
        "dbrx",
        {**GRANITE_4, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 128},
    ),
    "Granite-4 with experts in use that it lacks": Family(
        "GraniteMoeHybridConfig",
        "dbrx",
        {**GRANITE_4, "num_local_experts": 0, "num_experts_per_tok": 2},
        refusal="llama.cpp ends the process with this seed model",
    ),
    "OLMo-3": Family("Olmo3Config", "dbrx", WINDOWED),
    "gpt-oss": Family("GptOssConfig", "gpt-4o", {**HEADS, **EXPERTS, **WINDOWED}, within=3e-3),
    "Phi-2": Family("PhiConfig", "phi-2", {"num_key_value_heads": 4, "intermediate_size": 256}),
    "Phi-3": Family("Phi3Config", SPM, {}),
    "GLM-4": Family("Glm4Config", "chatglm-bpe", HEADS),
    "Cohere": Family("CohereConfig", "command-r", {**TIED, "logit_scale": 0.25}, std=0.2),
    "LFM2": Family("Lfm2Config", "lfm2", CONVOLUTIONS),
    "Falcon-H1": Family("FalconH1Config", "falcon-h1", {**MAMBA, **HEADS, "mamba_d_ssm": 128}),
    "GPT-2": Family("GPT2Config", "gpt-2", {}, refusal="has no linear layers that LoRA could change"),
}


def make_seed(family: Family, folder: Path) -> Path:
    """Write a random float32 model of a family, with a small vocabulary of its kind beside it."""
    if family.vocabulary == SPM:
        make_phi_spm(folder)
    elif family.vocabulary == "Gemma":
        make_gemma_spm(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    else:
        folder.mkdir()
        # GLM-4's converter looks for this token.
        make_byte_level(folder, family.vocabulary, BYTE_LEVELS[family.vocabulary], "<|user|>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # Granite-4's converter rounds it up.
    size = -(-len(tokenizer) // 16) * 16
    options = {**SIZES, "tie_word_embeddings": False, "vocab_size": size, **family.options, **ids}
    if "hidden_size_per_layer_input" in options:
        options["vocab_size_per_layer_input"] = size
    kind, auto = getattr(transformers, family.config), AutoModelForCausalLM
    if family.config in VISION:
        tied = {"tie_word_embeddings": options["tie_word_embeddings"]}
        config, auto = (
            kind(text_config=options, vision_config=VISION[family.config], **tied),
            AutoModelForImageTextToText,
        )
    else:
        config = kind(**options)
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 or not weight.any():
                weight.normal_(std=family.std)
    model.save_pretrained(folder)
    return folder


def known_to_the_converter(family: Family) -> ContextManager[None]:
    return told(family.vocabulary) if family.vocabulary in BYTE_LEVELS else nullcontext()


def run_forked(command: list[str], *paths: Path, cwd: Path, input: str) -> str:
    """As `run_python`, for the converter alone: in a copy of this process, with all it imported.

    Imports take most of a conversion. With one thread, so that none is waited for that was not
    copied.
    """
    message, told_by = os.pipe()
    if not (child := os.fork()):
        fault = ""
        try:
            torch.set_num_threads(1)
            os.chdir(cwd)
            sys.path[:0] = map(str, (cwd, *paths))
            sys.argv, sys.stdin = ["-c", *command[2:]], io.TextIOWrapper(io.BytesIO(input.encode()))
            converter.run_converter()
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        os.write(told_by, fault.encode()[:4000])
        os._exit(0)
    os.close(told_by)
    os.waitpid(child, 0)
    with open(message, "rb") as words:
        return words.read().decode()


def ask(seed: Path) -> None:
    """What a run asks before it trains."""
    check_exportable(seed, SCALE, "f32", max_length=512)


def whole_way(seed: Path, folder: Path) -> tuple[Parity, float]:
    """Train two steps in 4 bits, judge, merge, export and judge again.

    Returns how far the GGUF judge lies from the trained one, and the spread of the scores.
    """
    records = make_records(8)
    settings = TrainSettings(max_steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2)
    sampling = Sampling(max_new_tokens=16)
    options: dict[str, Any] = {"load_in_4bit": True, "precision": "float32"}
    options |= {"max_length": 512, "sampling": sampling}
    adapter = train_adapter(records, folder / "run", seed_model=seed, scale=SCALE, settings=settings, **options)
    file = folder / "judge.gguf"
    if read_json(seed / "config.json")["model_type"] in HYBRIDS:
        # The adapter alone goes another way through the converter.
        export_adapter(adapter, seed, folder / "adapter.gguf")
    with Judge.from_adapter(adapter, precision="float32") as trained:
        judged = list(trained.score_many(records))
        export_gguf(merge_adapter(seed, adapter, folder / "merged"), file, "f32", figures=folder / "parity.json")
        with Judge.from_gguf(file, parallel=4, cache_type="f32", flash_attention=False) as judge:
            assert not any(judgement.error for judgement in judge.score_many(records))
            parity = compare(trained, judge, records, judged)
    return parity, torch.tensor([judgement.score for judgement in judged]).std().item()


def table() -> str:
    """The families as a table of docs/seeds.md."""
    rows = ["| family | config of transformers | vocabulary | outcome |", "| --- | --- | --- | --- |"]
    for name, family in FAMILIES.items():
        works = "works" if family.within <= 1e-4 else f"works, scores within {family.within:g}"
        outcome = f"refused: {family.refusal}" if family.refusal else works
        rows.append(f"| {name} | `{family.config}` | {family.vocabulary} | {outcome} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
