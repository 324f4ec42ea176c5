"""Random judges that several test files share: seed models, adapters on them, GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, load_tokenizer, make_family, make_llama, vocabulary_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from tract_lite.data.jsonl import write_json
from tract_lite.engines.context import Context
from tract_lite.engines.llama_cpp import load_adapter, load_model, quiet_llama
from tract_lite.export.gguf import export_gguf
from tract_lite.record import Record
from tract_lite.scale import ScoreScale, find_score_tokens
from tract_lite.spec import JudgeSpec, Sampling, make_spec
from tract_lite.vocabulary import TransformersVocabulary

# Gemma ties its embeddings and scales its queries by a number of the config.
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 8.0},
}
TYPES = ("f32", "q8_0", "q4_k_m")
WORDS = "poor=0,weak=1,fair=2,good=3,excellent=4"
# Words of which one begins another.
NESTED = "right=2,right and clear=1,right and clear and kind=0,rightly=3,wrong=-1"
SCALES = {text: ScoreScale.parse(text) for text in ("1-5", "0-10", "1-100", "0-100", "0-5:0.5", WORDS, NESTED)}


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def randomise(model: Any, std: float = 0.1) -> Any:
    """Give an adapter weights that change its model."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.normal_(std=std)
    return model


def make_adapter(seed_model: Path, folder: Path, tokenizer: Any = None, **options: Any) -> Path:
    """An adapter with random weights, none zero, on all linear layers and `modules_to_save`."""
    options = {"target_modules": "all-linear", **options}
    config = LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options)
    randomise(get_peft_model(base_model(seed_model), config)).save_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(seed_model)
    make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=512, base_model=str(seed_model)).save(folder)
    return folder


def seed_models(shared_once: Callable[..., Path]) -> dict[str, Path]:
    """A random model of each architecture, with one vocabulary."""

    def make(folder: Path) -> None:
        for family in FAMILIES:
            make_family(folder / family, vocabulary_folder("spm"), family, **OPTIONS.get(family, {}))

    return {family: shared_once("seed_models", make) / family for family in FAMILIES}


def adapters_on(seeds: dict[str, Path], shared_once: Callable[..., Path]) -> dict[str, Path]:
    """A random adapter on each of these seed models."""

    def make(folder: Path) -> None:
        tokenizer = load_tokenizer("spm")
        for family, seed_model in seeds.items():
            make_adapter(seed_model, folder / family, tokenizer)

    return {family: shared_once("adapters", make) / family for family in seeds}


def make_wide_judge(folder: Path) -> None:
    """A judge in `model`, wide enough for Q4_K; its GGUF files in `out`, figures beside it."""
    make_llama(folder / "model", vocabulary_folder("spm"), hidden=256)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    method = {"stage": 2, "note": "π"}
    make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=512, method=method).save(folder / "model")
    (folder / "out").mkdir()
    figures = folder / "parity.json"
    write_json(figures, {"earlier.gguf": {"records": 7}})
    records = [Record(prompt="The answer", feedback="It is clear."), Record(prompt="Why so?")]
    # A dot in a name is not always that of a suffix.
    export_gguf(folder / "model", folder / "out" / "judge-3.2", TYPES, records=records, figures=figures)


def make_reader(folder: Path, name: str) -> None:
    """A random Llama with one of `VOCABULARIES` in `model`, which has learnt how labels go on.

    After the last token of the marker, or one of a label, the next ones of labels are likelier than
    others; how much, hangs on the text.
    """
    make_llama(folder / "model", vocabulary_folder(name), 2.0, hidden=128)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    vocabulary, sampling = TransformersVocabulary(tokenizer), Sampling(max_new_tokens=8)
    options: dict[str, Any] = {"template": "{{ response }}\n", "max_length": 256, "sampling": sampling}
    spec = make_spec(tokenizer, SCALES["1-5"], any_scale=True, **options)
    spec.save(folder / "model")
    steps = set()
    for scale in SCALES.values():
        tokens = find_score_tokens(vocabulary, spec.marker, scale)
        for path in tokens.labels:
            steps |= set(zip((tokens.marker[-1], *path), path))
            steps |= {(path[-1], spec.eos_id)} if path in tokens.following else set()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        embeddings.normal_()
        head.normal_(std=0.06)
        for before, after in sorted(steps):
            head[after] += (0.7 if len(tokenizer) < 2000 else 1.1) * embeddings[before] / embeddings[before].norm()
    model.save_pretrained(folder / "model")


def llama_logits(gguf: Path, ids: list[int], *adapters: Path | None) -> list[np.ndarray]:
    """The logits after `ids`, without an adapter or after each of `adapters`, base loaded once."""
    model = load_model(gguf)
    context = Context(model, 1, 128, threads=1, flash_attention=False, cache_type="f32")
    found = []
    for adapter in adapters or [None]:
        context.use_adapter(adapter and load_adapter(model, adapter)[0])
        context.clear()
        context.decode(ids, range(len(ids)), [0] * len(ids), [len(ids) - 1])
        found.append(context.logits(0 if len(ids) == 1 else len(ids) - 1).copy())
    context.close()
    quiet_llama().llama_model_free(model)
    return found


@torch.no_grad()
def torch_logits(model, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0, -1].float().numpy()


def score_ids(spec: JudgeSpec) -> list[int]:
    """Some tokens, and a judge's marker behind them."""
    ids = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    return [*ids, *spec.marker_ids]
