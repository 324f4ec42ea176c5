"""One training step of a 4-bit seed, three ways: time, tokens per second, peak memory, does it fit.

    python benchmarks/train_gpu.py --model llama     # the shape of Llama-3.1-8B
    python benchmarks/train_gpu.py --model mistral   # the shape of Mistral-7B
    python benchmarks/train_gpu.py --model tiny      # no GPU needed; shows that it works

Compared: Unsloth with our loss, transformers and peft with our loss, transformers and peft with
the loss of all logits. All three load one NF4 checkpoint with random weights, which is made on the
spot, block by block: nothing is downloaded, and no memory ever holds the model in 16 bits. Every
measurement has a process of its own. For the question of fit, torch may allocate no more than the
size asked for, from the loading on; what CUDA itself takes comes on top.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import measure
import torch
from loss import plain_loss, random_example
from measure import GB, in_child, ratio, table

from tract_lite.loss.cot_raft import cot_raft_loss
from tract_lite.training.layers import head_options, lm_head_weight
from tract_lite.training.precision import pick_dtype
from tract_lite.training.seed_model import add_lora, for_training, hidden_states, load_seed

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "mistral": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}
VARIANTS = {
    "plain": "transformers + peft, all logits",
    "transformers": "transformers + peft, cot_raft_loss",
    "unsloth": "Unsloth, cot_raft_loss",
}
SPECIAL_TOKENS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
INDEX = "model.safetensors.index.json"
RANK = 8
WARM_UP_STEPS = 2


def write_checkpoint(model: str, folder: str, **changes: Any) -> dict[str, Any]:
    """Write a random NF4 checkpoint and a tokenizer of bytes, unless the folder has them.

    `changes`: what of the shape's config is otherwise.
    """
    if not (Path(folder) / INDEX).exists():
        dtype, _ = pick_dtype()
        skeleton = make_skeleton(model, dtype, **changes)
        skeleton.config.save_pretrained(folder)
        write_tokenizer(folder)
        _write_weights(skeleton, dtype, Path(folder))
    if not torch.cuda.is_available():
        return {"gpu": "no GPU", "gpu_bytes": 0}
    size = torch.cuda.mem_get_info()[1]
    return {"gpu": f"{torch.cuda.get_device_name()}, {size / GB:.1f} GB", "gpu_bytes": size}


def make_skeleton(model: str, dtype: torch.dtype, **changes: Any) -> Any:
    """The model without weights, its config that of an NF4 checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.for_model(
        **{**SHAPES[model], **changes},
        tie_word_embeddings=False,
        **{f"{name}_token_id": number for number, name in enumerate(SPECIAL_TOKENS)},
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    config = skeleton.config
    config.architectures, config.dtype = [type(skeleton).__name__], dtype
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    return skeleton


def _write_weights(skeleton: Any, dtype: torch.dtype, folder: Path) -> None:
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    quantised = {
        f"{name}.weight"
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    files: dict[str, str] = {}
    blocks = itertools.groupby(skeleton.named_parameters(), lambda item: _block(item[0]))
    for number, (_, parameters) in enumerate(blocks):
        tensors = {}
        for name, parameter in parameters:
            weight = torch.ones(parameter.shape, dtype=dtype, device=device)
            if weight.dim() > 1:
                weight.normal_(std=0.02)
            tensors |= _in_4bit(name, weight) if name in quantised else {name: weight.cpu()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    # Last, so that a folder with an index is complete.
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))


def _block(name: str) -> str:
    """The block that a parameter is in, or what it is in instead."""
    parts = name.split(".")
    return ".".join(parts[:3] if "layers" in parts else parts[:-1])


def _in_4bit(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {part: value.cpu() for part, value in {name: packed, **parts}.items()}


def write_tokenizer(folder: str) -> None:
    """A vocabulary of single bytes: the ids of the benchmark are random, nothing is encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def train(
    variant: str,
    folder: str,
    tokens: int,
    supervised: int,
    steps: int,
    cap_gb: float | None = None,
    checkpointing: bool = True,
) -> dict[str, float]:
    """Load, attach an adapter, train some steps on one sequence; memory in bytes.

    `first`: the seconds of the first step, with all that is compiled in it.

    Raises:
        RuntimeError: more memory than `cap_gb` was reserved although torch was told not to.
    """
    if cap_gb:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(cap_gb * GB / total)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "unsloth" if variant == "unsloth" else "transformers"
    model, _ = load_seed(folder, max_seq_length=tokens, backend=backend)
    model = add_lora(model, rank=RANK, gradient_checkpointing=checkpointing)
    for_training(model)
    step = _make_step(model, variant, tokens, supervised, device)
    loaded = measure.memory_in_use(device)
    measure.reset_peak_memory(device)
    losses, seconds = [], []
    for _ in range(WARM_UP_STEPS + steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    if cap_gb and torch.cuda.max_memory_reserved() > cap_gb * GB:
        raise RuntimeError(f"{torch.cuda.max_memory_reserved() / GB:.1f} GB were reserved")
    return {
        "seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "first": seconds[0],
        "loss": losses[0],
        "loaded": loaded,
        "peak": measure.peak_memory(device),
    }


def _make_step(model: Any, variant: str, tokens: int, supervised: int, device: str) -> Callable[[], float]:
    """One optimiser step in the precision of the hardware, as in training; it returns the loss."""
    dtype, _ = pick_dtype()
    head, options = lm_head_weight(model), head_options(model)
    torch.manual_seed(0)
    ids = torch.randint(3, len(head), (1, tokens)).to(device)
    mask = torch.ones_like(ids)
    example = random_example(ids, supervised)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step() -> float:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            if variant == "plain":
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            else:
                hidden = hidden_states(model, ids, mask)
        if variant == "plain":
            loss = plain_loss(logits.float(), **example)
        else:
            loss = cot_raft_loss(hidden, head, **example, **options).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    return step


def child(job: str, **arguments: Any) -> dict[str, Any]:
    return {"write": write_checkpoint, "train": train}[job](**arguments)


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print; a variant that fails says why, and the others go on."""
    made = _run({"job": "write", "model": options.model}, folder)
    if "error" in made:
        raise SystemExit(f"no checkpoint: {made['error']}")
    print(f"{made['gpu']}\n", flush=True)
    rows, failures, plain = [], [], {}
    for variant in (name for name in VARIANTS if name in options.backends):
        job = {
            "job": "train",
            "variant": variant,
            "tokens": options.tokens,
            "steps": options.steps,
            "supervised": max(3, round(options.supervised * options.tokens)),
        }
        result = _run(job, folder)
        print(json.dumps({"variant": variant, **result}), flush=True)
        if "error" in result:
            rows.append([VARIANTS[variant], "failed", *[""] * (6 + len(options.caps))])
            failures.append(f"{VARIANTS[variant]}: {result['error']}")
            continue
        plain = result if variant == "plain" else plain
        rows.append(
            [
                VARIANTS[variant],
                f"{result['loss']:.3f}",
                f"{result['seconds']:.3f}",
                f"{options.tokens / result['seconds']:,.0f}",
                ratio(result["seconds"], plain.get("seconds")),
                f"{result['loaded'] / GB:.2f}",
                f"{result['peak'] / GB:.2f}",
                ratio(result["peak"], plain.get("peak")),
                *_fits(job, folder, made["gpu_bytes"], options.caps),
            ]
        )
    print()
    print(
        table(
            [
                "one step",
                "loss",
                "seconds",
                "tokens/s",
                "time of plain",
                "loaded, GB",
                "peak, GB",
                "peak of plain",
                *(f"in {cap:g} GB" for cap in options.caps),
            ],
            rows,
        )
    )
    print("\n".join(["", *failures]))


def _fits(job: dict[str, Any], folder: Path, gpu_bytes: int, caps: Sequence[float]) -> list[str]:
    """Whether training fits each memory size; what fits a smaller one is not run again."""
    answers: list[str] = []
    for cap in caps:
        if not gpu_bytes:
            answers.append("no GPU")
        elif "fits" in answers:
            answers.append("fits")
        elif gpu_bytes < cap * GB:
            answers.append("card too small")
        else:
            error = _run({**job, "steps": 1, "cap_gb": cap}, folder).get("error")
            out = error and "out of memory" in error.lower()
            answers.append("out of memory" if out else error or "fits")
    return answers


def _run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    # Unsloth writes a cache into its working directory.
    return in_child(__file__, {**job, "folder": str(folder)}, folder.parent)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--supervised", type=float, default=0.2, help="share of the tokens")
    parser.add_argument("--steps", type=int, default=5, help=f"measured, after {WARM_UP_STEPS}")
    parser.add_argument("--backends", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--caps", nargs="*", type=float, default=[15, 24], metavar="GB", help="memory sizes to try (default: 15 24)"
    )
    parser.add_argument("--folder", type=Path, help="keep the random model here for later calls")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.caps.sort()
    if options.child:
        return measure.answer(child, options.child)
    if options.model != "tiny" and not torch.cuda.is_available():
        parser.error(f"--model {options.model} needs a CUDA GPU; --model tiny does not")
    print(measure.machine("torch", "transformers", "peft", "bitsandbytes", "unsloth"))
    print(
        f"{options.model}: 1 sequence of {options.tokens:,} tokens, LoRA rank {RANK}, median of {options.steps} steps"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / options.model
        folder.mkdir(parents=True, exist_ok=True)
        compare(options, folder.resolve())


if __name__ == "__main__":
    main()
