"""Unsloth's CUDA path on a processor, and the way through training and judging that a backend goes.

    python tests/unsloth_on_cpu.py BACKEND WAY SEED_MODEL DATA OUT

Unsloth itself takes its CUDA branches without a card where UNSLOTH_ALLOW_CPU is set. What they then
ask of the card, its kernels and the index of its device are replaced by `pretend`, under names that
are Unsloth's own affair: it knows those of the versions that `test_unsloth.py` pins. It must be
called before anything else imports transformers or Unsloth.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Mapping

FAMILIES = ("llama", "mistral", "qwen3", "phi3")
MAX_LENGTH = 128
# Triton's kernels can't be compiled, and torch.compile takes minutes.
ENVIRONMENT = {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_BLOCK_COMPILE_LEGACY": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",
}


def pretend() -> None:
    """Let Unsloth, and the modules that load a seed model, take this processor for a card."""
    os.environ |= {**ENVIRONMENT, "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp()}
    import torch

    for name in ("custom_fwd", "custom_bwd"):
        setattr(torch.amp, name, _for_the_cpu(getattr(torch.amp, name)))
    from tract_lite.training import precision, seed_model

    os.environ |= seed_model.IMPORT_SWITCHES
    import unsloth  # noqa: F401

    replaced = {**_device(), **_kernels(), **_four_bits()}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("unsloth", "unsloth_zoo"):
            for known in replaced.keys() & vars(module).keys():
                setattr(module, known, replaced[known])
    _keep_whole_rope_tables()
    for module in (precision, seed_model):
        module.torch = _with_a_card(torch)
    # Unsloth collects garbage at every turn, and would go through all that is imported.
    gc.freeze()


def _for_the_cpu(decorator: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of torch's mixed precision, whatever device it is asked for."""

    def on_cpu(function: Any = None, **options: Any) -> Any:
        return decorator(function, **{**options, "device_type": "cpu"})

    return on_cpu


class _View(ModuleType):
    """A module in which some names mean something else."""

    def __init__(self, module: ModuleType, **names: Any):
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_a_card(torch: ModuleType) -> ModuleType:
    """torch on a machine with a card of bfloat16 units; tensors stay where they are."""
    answers = {"is_available": True, "get_device_name": "a pretended card", "get_device_capability": (8, 0)}
    answers["get_arch_list"] = ["sm_75", "sm_80"]
    asked = {name: lambda *_, answer=answer: answer for name, answer in answers.items()}
    return _View(torch, cuda=_View(torch.cuda, **asked))


def _device() -> dict[str, Any]:
    """What Unsloth knows of the device that it computes on."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    # Checkpointing is torch's own: what it keeps is not moved away from a card.
    unused = "clean_gpu_cache _current_device patch_unsloth_smart_gradient_checkpointing"
    unused += " verify_fp8_support_if_applicable"
    return {
        "DEVICE_TYPE_TORCH": "cpu",
        "DEVICE_COUNT": 1,
        "SUPPORTS_BFLOAT16": True,
        "is_bfloat16_supported": lambda *_, **__: True,
        "get_current_device": lambda: "cpu",
        "get_device_stats": lambda *_: ("a processor. ", "", 0),
        "_eviction_hints_ok": lambda *_: False,
        **dict.fromkeys(unused.split(), nothing),
    }


def _keep_whole_rope_tables() -> None:
    """Sines and cosines of all positions at once: a processor's tensors have no device's index."""
    import torch
    from unsloth.models.llama import _PerDeviceRopeCache

    def ensure(self: Any, device_index: int | None = None) -> int:
        table = self.multi_gpu_cos_cached[0]
        if table is None or len(table) < self.current_rope_size:
            # What is made while judging must serve for a gradient later.
            with torch.inference_mode(False), torch.no_grad():
                place = {"device": torch.device("cpu", 0), "dtype": self._rope_cache_dtype}
                self._set_cos_sin_cache(seq_len=self.current_rope_size, **place)
        return 0

    _PerDeviceRopeCache._ensure_rope_cache = ensure


def _kernels() -> dict[str, Any]:
    """The formulas of the kernels: norm, rotation of positions, gated activation."""
    from torch import cat
    from torch.nn.functional import rms_norm, silu
    from unsloth.kernels.swiglu import _DWf_DW_dfg_traced as gradient_of_swiglu

    def norm(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
        eps = layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps
        return layer.weight * rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)

    def rotate(queries: Any, keys: Any, cos: Any, sin: Any, positions: Any = None) -> Any:
        cos, sin = cos.squeeze().float(), sin.squeeze().float()
        if positions is None:
            cos, sin = cos[: queries.shape[2]], sin[: queries.shape[2]]
        else:
            place = positions.view(len(queries), 1, -1).long()
            cos, sin = cos[place], sin[place]

        def turned(x: Any) -> Any:
            left, right = x.float().chunk(2, dim=-1)
            return (x * cos + cat([-right, left], dim=-1) * sin).to(x.dtype)

        return turned(queries), turned(keys)

    def swiglu(gate: Any, up: Any) -> Any:
        return silu(gate.float()).to(up.dtype) * up

    return {
        "fast_rms_layernorm": norm,
        "fast_rope_embedding": rotate,
        "swiglu_fg_kernel": swiglu,
        "swiglu_DWf_DW_dfg_kernel": gradient_of_swiglu,
    }


def _four_bits() -> dict[str, Any]:
    """bitsandbytes' weights, read by its own functions."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    @torch.no_grad()
    def dequantize(weight: Any, state: Any = None, out: Any = None, *_: Any, **__: Any) -> Any:
        if state is None:
            return weight
        # Packed weights are a column; a row stands for the transposed weight.
        plain = dequantize_4bit(weight.reshape(-1, 1), state)
        plain = plain.t() if weight.shape[0] == 1 else plain
        return plain if out is None else out.copy_(plain)

    def multiply(x: Any, weight: Any, state: Any, out: Any = None) -> Any:
        plain = weight if state is None else dequantize(weight, state).t()
        return torch.matmul(x, plain.to(x.dtype), out=out)

    return {
        "ALLOW_BITSANDBYTES": True,
        "ALLOW_PREQUANTIZED_MODELS": True,
        "fast_dequantize": dequantize,
        "fast_gemv": multiply,
    }


def same_adapter(model: Any) -> Any:
    """Give an adapter weights that both backends can make alike, whatever they draw at first."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted((name, weight) for name, weight in model.named_parameters() if "lora_" in name):
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def read_data(data: str) -> tuple[list[Any], list[Any]]:
    """Records to train on and to validate with."""
    from tract_lite import read_records

    records = read_records(data)
    return records[:-6], records[-6:]


def opened(seed_model: str, **options: Any) -> tuple[Any, Any, Any]:
    """The seed model with an adapter, its tokenizer, and a spec."""
    from tract_lite import Sampling, ScoreScale, add_lora
    from tract_lite.training.seed_model import open_seed_model

    options = {"precision": "float32", "load_in_4bit": False, "max_length": MAX_LENGTH, **options}
    options["sampling"] = Sampling(max_new_tokens=8)
    model, tokenizer, spec = open_seed_model(seed_model, ScoreScale.integers(1, 5), **options)
    return same_adapter(add_lora(model)), tokenizer, spec


def the_whole_way(seed_model: str, data: str, out: Path) -> dict[str, Any]:
    """Loss and gradients, a stage with validation, the same stage stopped and resumed, judging."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from tract_lite import Judge, TrainSettings, train_stage
    from tract_lite.training.seed_model import UNSLOTH_MARK
    from tract_lite.training.stage import newest_complete_checkpoint

    records, validation = read_data(data)
    settings = TrainSettings(epochs=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2, save_every=2, log_every=1)
    figures: dict[str, Any] = {}
    # As a run does first, which asks whether the seed model can be exported.
    with init_empty_weights():
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(seed_model))

    def stage(folder: Path) -> tuple[Any, dict[str, Any]]:
        model, tokenizer, spec = opened(seed_model)
        found = train_stage(model, tokenizer, records, spec, folder, settings, validation=validation)
        weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        save_file({name: weight.clone() for name, weight in weights.items()}, folder / "trained.safetensors")
        return (model, tokenizer, spec), found

    figures["loss"], gradients = loss_and_gradients(*opened(seed_model), records[:4], out)
    save_file(gradients, out / "gradients.safetensors")
    (model, tokenizer, spec), found = stage(out / "whole")
    figures["by_unsloth"] = hasattr(model, UNSLOTH_MARK)
    figures["log"], figures["kept_step"] = found["log"], found["kept_step"]

    # As a run leaves it that was killed before its last checkpoint.
    shutil.copytree(out / "whole", out / "resumed")
    steps = sorted(int(path.name.partition("-")[2]) for path in out.glob("resumed/checkpoint-*"))
    for name in (f"checkpoint-{steps[-1]}", "adapter"):
        shutil.rmtree(out / "resumed" / name)
    (out / "resumed" / "stage.json").unlink()
    figures["resumed_from"] = int(newest_complete_checkpoint(out / "resumed").rpartition("-")[2])
    _, resumed = stage(out / "resumed")
    figures["resumed_log"] = resumed["log"]

    reasonings = [[tokenizer.encode(record.feedback)] for record in validation]
    # Behind the training, and then of one loaded anew.
    trained, loaded = Judge.from_model(model, tokenizer, spec), Judge.from_adapter(out / "whole", precision="float32")
    for name, judge in (("trained", trained), ("loaded", loaded)):
        figures[name] = [judgement.score for judgement in judge.score_many(validation, reasonings=reasonings)]
        figures[f"{name}_writes"] = [judgement.feedback_ids for judgement in judge.score_many(validation, seed=3)]
    return figures


def loss_and_gradients(model: Any, tokenizer: Any, spec: Any, records: list[Any], out: Path) -> tuple[float, Any]:
    """The loss of one batch, by the trainer, and the gradients of the adapter."""
    from tract_lite import TrainSettings
    from tract_lite.training.encode import collate, encode_records
    from tract_lite.training.seed_model import for_training
    from tract_lite.training.trainer import CotRaftTrainer
    from tract_lite.vocabulary import TransformersVocabulary

    examples, _ = encode_records(records, spec, TransformersVocabulary(tokenizer))
    for_training(model)
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out / "loss", TrainSettings(batch_size=4))
    with trainer.compute_loss_context_manager():
        loss = trainer.loss_of(trainer.model, collate(examples, tokenizer.pad_token_id)).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_4_bits(seed_model: str, data: str, out: Path) -> dict[str, Any]:
    """Loss and preflight on a seed model in 4 bits, in the precision of the card."""
    from tract_lite import TrainSettings, train_stage

    records, _ = read_data(data)
    model, tokenizer, spec = opened(seed_model, load_in_4bit=True, precision="bfloat16")
    kinds = sorted({type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj.base_layer")})
    found = train_stage(model, tokenizer, records, spec, out / "stage", TrainSettings(max_steps=1, batch_size=4))
    loss, _ = loss_and_gradients(*opened(seed_model, load_in_4bit=True, precision="bfloat16"), records[:4], out)
    return {"kinds": kinds, "loss": loss, "steps": found["log"][-1]["step"]}


def refusals(seed_model: str, data: str, out: Path) -> dict[str, str]:
    """What is said of sequences that Unsloth would cut, and of 4 bits that it does not give."""
    from dataclasses import replace

    import torch

    from tract_lite import load_seed, train_stage
    from tract_lite.training.seed_model import hidden_states

    said: dict[str, str] = {}

    def ask(name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    model, tokenizer, spec = opened(seed_model)
    ids = torch.ones(1, MAX_LENGTH + 1, dtype=torch.long)
    ask("batch", hidden_states, model, ids, torch.ones_like(ids))
    ask("stage", train_stage, model, tokenizer, read_data(data)[0], replace(spec, max_length=129), out)
    ask("positions", load_seed, seed_model, False, 513)
    sys.modules["unsloth.models.loader"].ALLOW_BITSANDBYTES = False
    ask("4 bits", load_seed, seed_model, True, MAX_LENGTH)
    return said


WAYS: Mapping[str, Callable[..., dict[str, Any]]] = {"whole": the_whole_way, "4 bits": in_4_bits, "refusals": refusals}


def main(backend: str, way: str, seed_model: str, data: str, out: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if backend == "unsloth":
        pretend()
    Path(out).mkdir(parents=True)
    figures = WAYS[way](seed_model, data, Path(out))
    Path(out, "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
