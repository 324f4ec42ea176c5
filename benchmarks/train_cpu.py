"""One training step on a CPU in every precision and type of weights: tokens per second.

    python benchmarks/train_cpu.py
    python benchmarks/train_cpu.py --model toy   # the demo's seed model alone

A random model of a real one's shape, LoRA of rank 8, our loss, AdamW. All variants are loaded as
a run loads them, have the same adapter, and take turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from loss import random_example
from measure import interleaved_seconds, machine, table
from train_gpu import write_tokenizer

from tract_lite.loss.cot_raft import cot_raft_loss
from tract_lite.training.layers import lm_head_weight
from tract_lite.training.precision import has_bfloat16_units
from tract_lite.training.seed_model import add_lora, compute_dtype, hidden_states, load_seed

# Width, inner width, layers, heads, heads of keys, vocabulary; sequences of a micro-batch, tokens.
SHAPES = {"toy": (128, 256, 3, 4, 4, 700, 16, 200), "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152, 2, 1000)}
WAYS = {
    "4 bits, float32": (True, "float32"),
    "4 bits, bfloat16": (True, "bfloat16"),
    "16 bits, bfloat16": (False, "bfloat16"),
    "32 bits, float32": (False, "float32"),
}


def write_model(name: str, folder: Path) -> None:
    """A random model of the shape in bfloat16, and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads, kv_heads, vocabulary, _, _ = SHAPES[name]
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).bfloat16().save_pretrained(folder)
    write_tokenizer(str(folder))


def make_step(folder: Path, in_4bit: bool, precision: str, sequences: int, tokens: int) -> Callable[[], float]:
    """One optimiser step of a new adapter, as the trainer takes it; it returns the loss."""
    model, _ = load_seed(folder, in_4bit, tokens, backend="transformers", precision=precision)
    model = add_lora(model, gradient_checkpointing=False).train()
    dtype, head = compute_dtype(model), lm_head_weight(model)
    torch.manual_seed(0)
    ids = torch.randint(3, len(head), (sequences, tokens))
    mask, example = torch.ones_like(ids), random_example(ids, tokens // 5)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = cot_raft_loss(hidden_states(model, ids, mask), head, **example).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(name: str, repeats: int) -> None:
    """Measure and print one model's table."""
    *_, sequences, tokens = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        write_model(name, Path(folder))
        steps = {way: make_step(Path(folder), *how, sequences, tokens) for way, how in WAYS.items()}
        # The first steps warm up, and their losses say whether the same thing is computed.
        losses = {way: step() for way, step in steps.items()}
        seconds = interleaved_seconds(steps, repeats)
    rows = [[way, f"{losses[way]:.3f}", f"{sequences * tokens / seconds[way]:,.0f}"] for way in WAYS]
    print(f"\n{name}, {sequences} x {tokens:,} tokens, median of {repeats} steps\n")
    print(table([f"{name}: weights, computing", "loss", "tokens/s"], rows), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5, help="steps of each way, which take turns")
    options = parser.parse_args(argv)
    units = "with" if has_bfloat16_units() else "without"
    print(f"{machine('torch', 'transformers', 'peft', 'bitsandbytes')}, {units} bfloat16 units")
    for name in options.model:
        compare(name, options.repeats)


if __name__ == "__main__":
    main()
