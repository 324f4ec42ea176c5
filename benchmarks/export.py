"""Merging and exporting a judge, against loading the whole model for it.

    python benchmarks/export.py              # Llama-3.2-1B's shape: 12 GB of disk, 8 GB of memory
    python benchmarks/export.py --smallest   # shows that it works, and measures nothing

The plain way loads the 16-bit seed and the adapter, calls peft's `merge_and_unload`, and saves;
ours is `merge_adapter`, tensor by tensor. Both then convert with llama.cpp's converter and quantise
to Q4_K_M. Each way has a process of its own, and they take turns. Memory is the peak of what the
merge holds for itself above the bare imports: pages of mapped files don't count, since the system
can drop them. Once more with twice the layers, ours must not hold more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence

import measure
from measure import MB, in_child, ratio, table

TIME_BAR, WHOLE_BAR, MEMORY_BAR, GROWTH_BAR = 0.8, 1.0, 0.35, 1.05
QUANTIZATION = "q4_k_m"
SHARDS = 3
PLAIN, OURS = "plain: load all, merge_and_unload", "merge_adapter"
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
SMALLEST = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Samples the peak from outside, so that a call that holds the interpreter hides nothing.
SAMPLER = """
import select, sys
peak = 0
print(flush=True)
while not select.select([sys.stdin], [], [], 0.002)[0]:
    for line in open(f"/proc/{sys.argv[1]}/status"):
        if line.startswith("RssAnon"):
            peak = max(peak, int(line.split()[1]))
print(peak)
"""


def anonymous_memory() -> int:
    """Bytes that this process holds for itself (under Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class AnonymousPeak:
    """`bytes`: the most that this process held for itself in the `with` block, above its start."""

    def __enter__(self) -> AnonymousPeak:
        command = [sys.executable, "-c", SAMPLER, str(os.getpid())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._start = anonymous_memory()
        self._sampler = subprocess.Popen(command, text=True, **pipes)
        self._sampler.stdout.readline()
        return self

    def __exit__(self, *_: Any) -> None:
        kilobytes, _ = self._sampler.communicate("stop\n")
        self.bytes = max(1024 * int(kilobytes), anonymous_memory()) - self._start


def make_seed(folder: str, shape: dict[str, Any]) -> dict:
    """A random bfloat16 Llama in shards, with a small vocabulary, and a rank-8 adapter on it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    seed, adapter = Path(folder, "seed"), Path(folder, "adapter")
    config = LlamaConfig(
        **shape, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    config.save_pretrained(seed)
    write_vocabulary(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    shapes = {name: tuple(model.state_dict()[name].shape) for name in names}
    torch.manual_seed(0)
    where, pairs = {}, {}
    for number in range(SHARDS):
        shard = {}
        for name in names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]:
            weight = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
            shard[name] = weight.fill_(1) if "norm" in name else weight
            where[name] = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
            if "_proj" in name:
                layer, (rows, columns) = name.removesuffix(".weight"), shapes[name]
                pairs[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(8, columns) / 50
                pairs[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, 8) / 50
        save_file(shard, seed / where[name], {"format": "pt"})
    (seed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    write_adapter(adapter, seed, pairs)
    return {"weights": sum(math.prod(shape) for shape in shapes.values())}


def write_vocabulary(folder: Path) -> None:
    """A SentencePiece vocabulary of what stands in this file; the model's other rows have none."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )


def write_adapter(folder: Path, seed: Path, pairs: dict[str, Any]) -> None:
    """A judge's adapter of these LoRA weights."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from tract_lite.scale import ScoreScale
    from tract_lite.spec import make_spec

    targets = sorted({key.split(".")[-3] for key in pairs})
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(seed)
    config.save_pretrained(folder)
    save_file(pairs, folder / "adapter_model.safetensors", {"format": "pt"})
    make_spec(AutoTokenizer.from_pretrained(seed), ScoreScale.integers(1, 5)).save(folder)


def merge_whole(seed: Path, adapter: Path, out: Path) -> None:
    """The plain way; tokenizer files and spec are copied as in ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    for file in (*seed.glob("token*"), *adapter.glob("judge_spec*")):
        shutil.copy(file, out)


def export(way: str, folder: str, whole: bool) -> dict:
    """Seconds and peak bytes of one way's merge and, if `whole`, seconds of the rest."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from tract_lite.export.gguf import export_gguf
    from tract_lite.export.merge import merge_adapter

    seed, adapter, out = Path(folder, "seed"), Path(folder, "adapter"), Path(folder, "merged")
    start = time.perf_counter()
    with AnonymousPeak() as peak:
        if way == PLAIN:
            merge_whole(seed, adapter, out)
        else:
            merge_adapter(seed, adapter, out, base="16bit")
    merged = time.perf_counter()
    if whole:
        export_gguf(out, Path(folder, "judge.gguf"), QUANTIZATION, check=False)
    result = {"merge": merged - start, "rest": time.perf_counter() - merged, "bytes": peak.bytes}
    shutil.rmtree(out)
    return result


def child(job: str, **arguments: Any) -> dict:
    """What the process of one measurement does."""
    return {"seed": make_seed, "export": export}[job](**arguments)


class Comparison:
    """Both ways on one random model, and ours on one with twice the layers."""

    def __init__(self, folder: Path, shape: dict[str, Any], repeats: int):
        self.folder, self.shape, self.repeats = folder, shape, repeats

    def show(self) -> None:
        """Run and print everything."""
        made = in_child(__file__, {"job": "seed", "folder": str(self.folder), "shape": self.shape})
        check(made)
        print(f"{made['weights'] / 1e9:.2f} billion weights in bfloat16, {SHARDS} shards, {QUANTIZATION}")
        print(f"{measure.machine('torch', 'transformers', 'peft', 'safetensors')}\n")
        runs: dict[str, list[dict]] = {PLAIN: [], OURS: []}
        for _ in range(self.repeats):
            for way in runs:
                runs[way].append(self.run(way, self.folder, whole=True))
        plain, ours = (summary(runs[way]) for way in (PLAIN, OURS))
        print(f"{self.time_and_memory(plain, ours)}\n")
        print(self.growth(ours["bytes"]))

    def run(self, way: str, folder: Path, whole: bool) -> dict:
        """The figures of one way, in a process of its own."""
        return check(in_child(__file__, {"job": "export", "way": way, "folder": str(folder), "whole": whole}))

    def time_and_memory(self, plain: dict, ours: dict) -> str:
        """Both ways side by side."""
        rows = []
        for name, run in ((PLAIN, plain), (OURS, ours)):
            bars = (TIME_BAR, WHOLE_BAR, MEMORY_BAR) if run is ours else (None, None, None)
            whole, plain_whole = run["merge"] + run["rest"], plain["merge"] + plain["rest"]
            rows.append(
                [
                    name,
                    f"{run['merge']:.1f}",
                    ratio(run["merge"], plain["merge"], bars[0]),
                    f"{run['rest']:.1f}",
                    f"{whole:.1f}",
                    ratio(whole, plain_whole, bars[1]),
                    f"{run['bytes'] / MB:,.0f}",
                    ratio(run["bytes"], plain["bytes"], bars[2]),
                ]
            )
        return table(
            [
                "merge and export",
                "merge, s",
                "of plain",
                "convert and quantise, s",
                "whole, s",
                "of plain",
                "merge, peak MB",
                "of plain",
            ],
            rows,
        )

    def growth(self, held: int) -> str:
        """The peak of our merge with twice the layers beside `held`, the one with as many."""
        layers = self.shape["num_hidden_layers"]
        double = {**self.shape, "num_hidden_layers": 2 * layers}
        folder = self.folder / "double"
        check(in_child(__file__, {"job": "seed", "folder": str(folder), "shape": double}))
        runs = [self.run(OURS, folder, whole=False) for _ in range(self.repeats)]
        larger = summary(runs)["bytes"]
        rows = [
            [str(layers), f"{held / MB:,.0f}", ""],
            [str(2 * layers), f"{larger / MB:,.0f}", ratio(larger, held, GROWTH_BAR)],
        ]
        return table(["layers", f"{OURS}, peak MB", "of half the layers"], rows)


def summary(runs: Sequence[dict]) -> dict:
    """The median of the times, and the highest of the peaks."""
    times = {name: statistics.median(run[name] for run in runs) for name in ("merge", "rest")}
    return {**times, "bytes": max(run["bytes"] for run in runs)}


def check(result: dict) -> dict:
    """The result of a child, which must not have failed."""
    if "error" in result:
        raise SystemExit(result["error"])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the models are written, by default a temporary one")
    parser.add_argument("--smallest", action="store_true", help="a tiny model, once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return measure.answer(child, options.child)
    shape = {**SHAPE, "num_hidden_layers": options.layers}
    if options.smallest:
        shape, options.repeats = {**SHAPE, **SMALLEST}, 1
    with TemporaryDirectory(dir=options.folder) as folder:
        Comparison(Path(folder), shape, options.repeats).show()


if __name__ == "__main__":
    main()
