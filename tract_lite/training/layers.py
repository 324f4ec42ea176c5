"""The parts of a transformers model that training meets: layers, last hidden states, projection."""

from typing import Any, Mapping

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def lora_targets(model: Any) -> list[str]:
    """The layers that LoRA changes, as peft takes them.

    They are named by the last parts of their names, or in full where other layers share those.
    """
    layers = linear_layers(model)
    ends = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return layers if meant - set(layers) else sorted(ends)


def linear_layers(model: Any) -> list[str]:
    """The names of the linear layers inside the text model's blocks.

    A Mamba mixer's last projection is none of them: its kernels take the weight and leave out what
    LoRA adds. Nor is a Falcon-H1 mixer's first one: llama.cpp's converter makes no adapter of it.
    """
    text = model.get_decoder()
    named = dict(model.named_modules())
    start = next(name for name, module in named.items() if module is text)

    def is_target(name: str, module: Any) -> bool:
        within, _, own = name.rpartition(".")
        in_block = any(part.isdigit() for part in within.removeprefix(start).split("."))
        mixer = named[within]
        passed_by = own == "out_proj" and hasattr(mixer, "A_log") and hasattr(mixer, "D")
        passed_by |= own == "in_proj" and hasattr(mixer, "ssm_in_multiplier")
        return name.startswith(f"{start}.") and in_block and not passed_by and isinstance(module, torch.nn.Linear)

    return [name for name, module in named.items() if is_target(name, module)]


def last_hidden_states(model: Any, batch: Mapping[str, Any], use_cache: bool = False) -> torch.Tensor:
    """The hidden states (B, T, H) before the vocabulary projection, from the model's own forward.

    Those of Gemma-3n are four streams there, which its text model joins.
    """
    passed: list[Any] = []
    text = getattr(model, "module", model).get_decoder()
    hook = text.register_forward_hook(lambda *call: passed.append(call[-1]))
    try:
        found = model(**batch, use_cache=use_cache, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    finally:
        hook.remove()
    return found if found.dim() == 3 else passed[-1].last_hidden_state


def keeps_prefixes(model: Any) -> bool:
    """Whether a pass keeps what later tokens can go on from, anywhere in it and with gradients.

    Recurrent and sliding layers do not, nor does a model that computes its passes twice
    (gradient checkpointing).
    """
    held = getattr(model, "module", model)
    layers = DynamicCache(config=held.config.get_text_config()).layers
    states = [name for name in getattr(held.config.get_text_config(), "layer_types", None) or () if "full" not in name]
    is_plain = all(type(layer) is DynamicLayer for layer in layers) and not states
    return is_plain and not getattr(held, "_is_stateful", False) and not held.is_gradient_checkpointing


def prefix_states(
    model: Any, input_ids: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, suffixes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of sequences (B, T, H) and of suffixes (R, S, H) in one reading.

    Each of `suffixes` (R, S) goes on from the first `starts` (R,) tokens of the sequence that
    `rows` (R,) names.
    """
    cache = DynamicCache(config=getattr(model, "module", model).config.get_text_config())
    whole = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "past_key_values": cache}
    hidden = last_hidden_states(model, whole, use_cache=True)
    longest = int(starts.max())
    if behind := input_ids.shape[1] - longest:
        cache.crop(-behind)
    cache.batch_select_indices(rows)
    read = torch.arange(longest, device=starts.device) < starts[:, None]
    after = torch.arange(suffixes.shape[1], device=starts.device)
    batch = {"input_ids": suffixes, "position_ids": starts[:, None] + after, "past_key_values": cache}
    batch["attention_mask"] = torch.cat([read.to(suffixes.dtype), torch.ones_like(suffixes)], dim=1)
    return hidden, last_hidden_states(model, batch, use_cache=True)


def full_logits(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The logits (B, T, V) as the model itself computes them: much memory, for a check alone."""
    return model(input_ids=input_ids, attention_mask=attention_mask).logits


def lm_head_weight(model: Any) -> torch.Tensor:
    """The vocabulary projection (V, H)."""
    return model.get_output_embeddings().weight


def head_options(model: Any) -> dict[str, Any]:
    """What a model does with its logits beside the projection, as `cot_raft_loss` takes it."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        factor = getattr(config, name, None) or 1.0
        # Granite alone divides.
        scale *= 1 / factor if name == "logits_scaling" and config.model_type.startswith("granite") else factor
    cap, bias = getattr(config, "final_logit_softcapping", None), getattr(model.get_output_embeddings(), "bias", None)
    return {"softcap": cap, "logit_scale": scale, "head_bias": bias}
