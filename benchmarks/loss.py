"""The CoT-RAFT loss against a plain full-logits implementation, forward and backward.

    python benchmarks/loss.py              # 2,048 tokens, vocabulary of 128,256
    python benchmarks/loss.py --smallest   # shows that it works, and measures nothing

The plain way projects every position onto the vocabulary; ours projects the supervised positions
alone, chunk by chunk. The head is frozen, as in LoRA training. For times the variants take turns
in one process; memory is the peak of one step above the level just before it, each step in a
process of its own. Also asked: whether torch's own `linear_cross_entropy` would serve better for
the plain term.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Mapping, Sequence

import measure
import torch
from measure import GB, MB, in_child, ratio, table
from torch.nn import functional as F

from tract_lite.loss.cot_raft import IGNORE_INDEX, cot_raft_loss
from tract_lite.loss.projection import chunk_rows

TIME_BAR, MEMORY_BAR, GROWTH_BAR = 0.30, 0.05, 1.10
CAPPED_TIME_BAR, CAPPED_MEMORY_BAR = 1.15, 1.05
# Logits, log-probabilities, and the gradients of both.
PLAIN_COPIES = 4
SCORE_VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)
PLAIN, OURS = "plain, all logits", "cot_raft_loss"
OURS_CAPPED, SOFTCAP = "cot_raft_loss, soft-capped", 30.0
OURS_CE, TORCH_CE = "cot_raft_loss, raft_weight 0", "linear_cross_entropy, same chunks"


def random_example(ids: torch.Tensor, supervised: int) -> dict[str, torch.Tensor]:
    """What `cot_raft_loss` needs to know of sequences of random ids (B, T).

    The last `supervised` tokens are learnt; the last but one is the score token.
    """
    count, tokens = ids.shape
    score_ids = torch.arange(len(SCORE_VALUES), device=ids.device)
    labels = ids.clone()
    labels[:, -2] = score_ids[3]
    labels[:, : tokens - supervised] = IGNORE_INDEX
    return {
        "labels": labels,
        "score_positions": torch.full((count,), tokens - 2, device=ids.device),
        "score_token_ids": score_ids,
        "score_values": torch.tensor(SCORE_VALUES, device=ids.device),
        "targets": torch.full((count,), SCORE_VALUES[3], device=ids.device),
    }


def plain_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    score_positions: torch.Tensor,
    score_token_ids: torch.Tensor,
    score_values: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """The same loss from the logits (B, T, V) of all positions; every row has a score."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ce = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORE_INDEX)
    rows = torch.arange(len(labels), device=labels.device)
    probabilities = logits[rows, score_positions - 1].softmax(-1)[:, score_token_ids]
    return ce + (probabilities @ score_values.to(probabilities) - targets).square().mean()


def make_data(tokens: int, supervised: int, hidden: int, vocabulary: int, dtype: str, device: str) -> dict[str, Any]:
    """Random hidden states, head and example."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    states = torch.randn(1, tokens, hidden, device=device, dtype=kind)
    head = torch.empty(vocabulary, hidden, device=device, dtype=kind)
    ids = torch.randint(vocabulary, (1, tokens), device=device)
    return {
        "states": states.requires_grad_(True),
        "head": head.normal_(std=hidden**-0.5),
        "example": random_example(ids, supervised),
    }


def step(variant: str, states: torch.Tensor, head: torch.Tensor, example: Mapping[str, torch.Tensor]) -> float:
    """One forward and backward; returns the loss."""
    states.grad = None
    if variant == PLAIN:
        loss = plain_loss(F.linear(states, head), **example)
    elif variant in (OURS, OURS_CE, OURS_CAPPED):
        weight, cap = float(variant != OURS_CE), SOFTCAP if variant == OURS_CAPPED else None
        loss = cot_raft_loss(states, head, **example, raft_weight=weight, softcap=cap).loss
    else:
        following = example["labels"][:, 1:]
        learnt = (following != IGNORE_INDEX).nonzero(as_tuple=True)
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(len(head)))
        loss = F.linear_cross_entropy(states[learnt], head, following[learnt], options=chunks)
    loss.backward()
    return loss.item()


def warm_up(variants: Sequence[str], dtype: str, device: str) -> None:
    """Load libraries and start threads, with a step too small to be seen."""
    data = make_data(32, 8, 16, 256, dtype, device)
    for variant in variants:
        step(variant, **data)


def memory(variant: str, device: str, **sizes: Any) -> dict[str, float]:
    """Peak bytes of one step above the level before it, and its loss."""
    warm_up([variant], sizes["dtype"], device)
    data = make_data(device=device, **sizes)
    measure.reset_peak_memory(device)
    before = measure.memory_in_use(device)
    loss = step(variant, **data)
    return {"loss": loss, "bytes": measure.peak_memory(device) - before}


def times(variants: Sequence[str], repeats: int, device: str, **sizes: Any) -> dict[str, float]:
    """Median seconds of one step of each variant."""
    warm_up(variants, sizes["dtype"], device)
    data = make_data(device=device, **sizes)
    steps = {variant: partial(step, variant, **data) for variant in variants}
    return measure.interleaved_seconds(steps, repeats)


def child(job: str, **arguments: Any) -> dict[str, float]:
    return {"memory": memory, "times": times}[job](**arguments)


class Comparison:
    """The measurements of one call; every one of them runs in a process of its own."""

    def __init__(self, options: argparse.Namespace):
        self.tokens, self.repeats = options.tokens, options.repeats
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sizes = {
            "supervised": max(3, round(options.supervised * options.tokens)),
            "hidden": options.hidden,
            "vocabulary": options.vocabulary,
            "dtype": options.dtype,
            "device": self.device,
        }
        has_torch_ce = hasattr(F, "linear_cross_entropy")
        self.variants = [PLAIN, OURS, OURS_CE, *([TORCH_CE] if has_torch_ce else [])]
        self._peaks: dict[tuple[str, int], dict] = {}

    def show(self) -> None:
        sizes = self.sizes
        gpu = f", {torch.cuda.get_device_name()}" if self.device == "cuda" else ""
        print(f"{measure.machine('torch')}, {torch.get_num_threads()} threads{gpu}")
        print(
            f"{self.tokens:,} tokens, {sizes['supervised']:,} of them supervised, hidden size "
            f"{sizes['hidden']:,}, vocabulary {sizes['vocabulary']:,}, {sizes['dtype']}, "
            f"median of {self.repeats}; the bars are for the default sizes on two cores\n"
        )
        print(self.variant_table(self.variants, PLAIN, (TIME_BAR, MEMORY_BAR)))
        if TORCH_CE not in self.variants:
            print("linear_cross_entropy: not in this torch (2.13 and newer)")
        print(f"\nPeak extra memory, {sizes['supervised']:,} supervised tokens\n")
        print(self.length_table())
        print("\nA head whose logits are capped, as in Gemma\n")
        print(self.variant_table([OURS, OURS_CAPPED], OURS, (CAPPED_TIME_BAR, CAPPED_MEMORY_BAR)))

    def variant_table(self, variants: Sequence[str], base: str, bars: tuple[float, float]) -> str:
        """Time and memory of each variant at the length asked for; the second has the bars."""
        fitting = [name for name in variants if "bytes" in self.peak(name, self.tokens)]
        seconds = in_child(
            __file__,
            {"job": "times", "variants": fitting, "tokens": self.tokens, "repeats": self.repeats, **self.sizes},
        )
        base_bytes = self.peak(base, self.tokens).get("bytes")
        rows = []
        for name in variants:
            peak = self.peak(name, self.tokens)
            if "error" in peak or "error" in seconds:
                why = peak.get("error") or seconds["error"]
                rows.append([name, why, *[""] * 4])
                continue
            time_bar, memory_bar = bars if name == variants[1] else (None, None)
            rows.append(
                [
                    name,
                    f"{peak['loss']:.5f}",
                    f"{seconds[name]:.3f}",
                    ratio(seconds[name], seconds.get(base), time_bar),
                    f"{peak['bytes'] / MB:,.1f}",
                    ratio(peak["bytes"], base_bytes, memory_bar),
                ]
            )
        share = f"of {base.partition(',')[0]}"
        return table(["forward and backward", "loss", "seconds", share, "peak extra MB", share], rows)

    def length_table(self) -> str:
        """Memory from half the length to four times the length, the supervised tokens constant."""
        rows, base = [], self.peak(OURS, self.tokens // 2).get("bytes")
        for tokens in (self.tokens // 2, self.tokens, 2 * self.tokens, 4 * self.tokens):
            ours, plain = self.peak(OURS, tokens), self.peak(PLAIN, tokens)
            shown = [peak.get("error") or f"{peak['bytes'] / MB:,.1f}" for peak in (plain, ours)]
            growth = ratio(ours["bytes"], base, GROWTH_BAR) if "bytes" in ours else ""
            rows.append([f"{tokens:,}", *shown, growth])
        return table(["tokens", "plain, MB", "cot_raft_loss, MB", "of the shortest"], rows)

    def peak(self, variant: str, tokens: int) -> dict[str, Any]:
        """`bytes` and `loss` of one step, or `error`: why there are none."""
        if (variant, tokens) not in self._peaks:
            why = self.too_large(tokens) if variant == PLAIN else None
            self._peaks[variant, tokens] = (
                {"error": why}
                if why
                else in_child(__file__, {"job": "memory", "variant": variant, "tokens": tokens, **self.sizes})
            )
        return self._peaks[variant, tokens]

    def too_large(self, tokens: int) -> str | None:
        """Why the plain way is not run at this length, where it is not."""
        columns = self.sizes["vocabulary"] * getattr(torch, self.sizes["dtype"]).itemsize
        needed = columns * (PLAIN_COPIES * tokens + self.sizes["hidden"])
        free = measure.free_memory(self.device)
        if 1.1 * needed < free:
            return None
        return f"not run: needs {needed / GB:.1f} GB, {free / GB:.1f} GB are free"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--supervised", type=float, default=0.2, help="share of the tokens")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smallest", action="store_true", help="512 tokens, a small model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return measure.answer(child, options.child)
    if not 0 < options.supervised <= 0.5:
        parser.error("--supervised: above 0, at most 0.5 (half the length is measured too)")
    if options.smallest:
        options.tokens, options.hidden, options.vocabulary, options.repeats = 512, 64, 8192, 1
    Comparison(options).show()


if __name__ == "__main__":
    main()
