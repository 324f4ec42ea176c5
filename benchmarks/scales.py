"""What a scale whose labels take several tokens costs in training: time and memory of one step.

    python benchmarks/scales.py
    python benchmarks/scales.py --model toy   # seconds

A random model of a real one's shape, LoRA of rank 8, AdamW, no gradient checkpointing; scores are
spelled digit by digit, as most vocabularies do. Each scale has a process of its own, and the median
step counts. "rows" is what is done where a model can't go on from a part of a sequence: with
gradient checkpointing, under Unsloth, in recurrent models and those with a sliding window.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Sequence
from unittest.mock import patch

import torch
from measure import MB, answer, in_child, machine, memory_in_use, peak_memory, ratio, reset_peak_memory, table
from train_cpu import SHAPES, write_model

from tract_lite.loss.cot_raft import cot_raft_loss
from tract_lite.loss.label_trees import cot_raft_tree_loss
from tract_lite.scale import ScoreScale, ScoreTokens
from tract_lite.training import branches
from tract_lite.training.encode import Example, collate
from tract_lite.training.layers import lm_head_weight
from tract_lite.training.seed_model import add_lora, hidden_states, load_seed

ONE_TOKEN = "1-5, one token"
WAYS = {ONE_TOKEN: "1-5", "1-10": "1-10", "0-100": "0-100", "1-10, rows": "1-10", "0-100, rows": "0-100"}
# What memory may grow by at 1-10.
MEMORY_BAR = 1.3
FIRST_ID = 3


def make_examples(scale: ScoreScale, count: int, length: int, vocabulary: int) -> list[Example]:
    """Sequences of random ids, of which the last fifth is learnt; digits are ids of their own."""
    draw = random.Random(0)
    paths = tuple(tuple(FIRST_ID + int(digit) for digit in label) for label in scale.labels)
    tokens = ScoreTokens((), paths, scale.values)
    examples = []
    # In the middle, where a sequence holds the fewest branches itself.
    label = len(paths) // 2
    for _ in range(count):
        text = [draw.randrange(FIRST_ID + 10, vocabulary) for _ in range(length - 1 - len(paths[label]))]
        ids = [*text, *paths[label], 2]
        examples.append(Example(ids, length * 4 // 5, len(text), scale.values[label], tokens, label, {label: 1.0}))
    return examples


def measure(name: str, folder: str, model: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step, and the bytes that steps take beside the model."""
    *_, vocabulary, count, length = SHAPES[model]
    is_rows = name.endswith("rows")
    net, _ = load_seed(folder, False, length, backend="transformers", precision="float32")
    net = add_lora(net, gradient_checkpointing=False).train()
    head = lm_head_weight(net)
    examples = make_examples(ScoreScale.parse(WAYS[name]), count, length, vocabulary)
    batch = collate(examples, 0)
    ids, labels, targets = (batch[key] for key in ("input_ids", "labels", "targets"))
    optimizer = torch.optim.AdamW([weight for weight in net.parameters() if weight.requires_grad], fused=True)

    def loss() -> torch.Tensor:
        if examples[0].tokens.is_flat:
            hidden = hidden_states(net, ids, torch.ones_like(ids))
            first = torch.tensor([label[0] for label in examples[0].tokens.labels])
            values = torch.tensor(examples[0].tokens.values)
            return cot_raft_loss(hidden, head, labels, batch["score_positions"], first, values, targets).loss
        trees, nodes = branches.label_trees(examples, 2)
        hidden, states = branches.node_states(net, examples, ids, nodes)
        spans = torch.stack([batch["score_positions"], batch["score_lengths"]], dim=1)
        return cot_raft_tree_loss(hidden, head, labels, spans, states, trees, targets).loss

    seconds = []
    reset_peak_memory()
    before = memory_in_use()
    with patch.object(branches, "goes_on_from_prefixes", lambda _: not is_rows):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    # The first step warms up.
    return {"seconds": statistics.median(seconds[1:]), "peak": peak_memory() - before}


def compare(model: str, repeats: int) -> None:
    """Measure and print one model's table."""
    *_, count, length = SHAPES[model]
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        jobs = {name: {"name": name, "folder": folder, "model": model, "repeats": repeats} for name in WAYS}
        results = {name: in_child(__file__, job) for name, job in jobs.items()}
    base, rows = results[ONE_TOKEN], []
    for name, result in results.items():
        if "error" in result:
            rows.append([name, result["error"], "", "", ""])
            continue
        bar = MEMORY_BAR if name == "1-10" else None
        times = ratio(result["seconds"], base.get("seconds"))
        memory = ratio(result["peak"], base.get("peak"), bar)
        rows.append([name, f"{result['seconds']:.2f}", times, f"{result['peak'] / MB:,.0f}", memory])
    print(f"\n{model}, {count} x {length:,} tokens, float32, median of {repeats} steps\n")
    print(table([f"{model}: scale", "seconds", "of one token", "peak extra MB", "of one token"], rows), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3, help="steps of each scale")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return answer(measure, options.child)
    print(machine("torch", "transformers", "peft"))
    for name in options.model:
        compare(name, options.repeats)


if __name__ == "__main__":
    main()
