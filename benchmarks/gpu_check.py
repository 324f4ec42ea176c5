"""What only a GPU can tell of training and judging on it, in one call of nine minutes at most.

    python benchmarks/gpu_check.py              # a CUDA GPU, 8 GB of disk, nothing is downloaded
    python benchmarks/gpu_check.py --smallest   # on any machine: shows that it works

On small random models: the stage of a training with its preflight, by Unsloth and by transformers,
in the precision of the card and in float16 with its scaler; judging one text alone and beside a
longer one, which pads it on the left; training with and without checkpointing, which Unsloth moves
off the card. On a random model of the shape of Llama-3.1-8B: whether a step on 3,000 tokens fits
15 and 24 GB, tokens per second with and without compiled blocks, against transformers + peft, and
how fast either one writes. Each check has a process and a time limit of its own: what breaks, or
finds no time any more, is told at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

import measure
import torch
import train_gpu
from measure import GB, in_child, table

FAMILIES = ("llama", "mistral", "qwen3", "phi3")
BACKENDS = ("unsloth", "transformers")
# Of the small models; the sizes of `--smallest` are those of "tiny" itself.
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
}
# How far the first loss of a stage may be from that of the other backend, relative to it.
TOLERANCE = 0.05
# How far a score may be from that of the same text judged alone, relative to it.
SCORE_TOLERANCE = 0.1
NOT_COMPILED = {"UNSLOTH_BLOCK_COMPILE_LEGACY": "0"}
MINUTES = 9.0
# What of it the small models may take.
SMALL_SHARE = 0.5
# A check for which less is left is not begun.
LEAST_SECONDS = 15.0
CAPS_GB = (15.0, 24.0)


@dataclass(frozen=True)
class Check:
    """One line of the result: what the child is asked, and what it is compared with.

    `like`: the name of the check whose loss must be the same, and whose speed is compared. With
    `caps`, it is asked under each of these memory sizes until it fits one.
    """

    name: str
    job: Mapping[str, Any]
    like: str = ""
    limit: float = 150.0
    caps: Sequence[float] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def small_checks(smallest: bool) -> list[Check]:
    """Checks on small models, which may run side by side, as nothing in them is timed.

    What is asked of Unsloth comes first, in case that there is no time for all.
    """
    families, tokens = (FAMILIES[:1], 256) if smallest else (FAMILIES, 3000)
    step = {"job": "memory", "folder": "llama", "tokens": tokens, "supervised": tokens // 5, "steps": 1}
    checks = []
    for backend in BACKENDS:
        asked = {"backend": backend}
        for family in families:
            job = {"job": "judge_padded", "folder": family, **asked}
            checks.append(Check(f"{family}: padded on the left, {backend}", job))
        for family in families:
            like = f"{family}: stage, transformers" if backend == "unsloth" else ""
            checks.append(Check(f"{family}: stage, {backend}", {"job": "stage", "folder": family, **asked}, like))
        job = {"job": "stage", "folder": "llama", "precision": "float16", **asked}
        checks.append(Check(f"llama: stage in float16, {backend}", job, "llama: stage, transformers"))
        step["variant"], kept = backend, f"llama: step that keeps all, {backend}"
        checks.append(Check(kept, {**step, "checkpointing": False}))
        checks.append(Check(f"llama: step with checkpointing, {backend}", dict(step), kept))
    return checks


def large_checks(smallest: bool) -> list[Check]:
    """Checks on the large model, one after the other: memory and speed."""
    tokens, new_tokens, caps = (256, 8, ()) if smallest else (3000, 64, CAPS_GB)
    step = {"job": "train", "folder": "large", "tokens": tokens, "supervised": tokens // 5, "steps": 1}
    write = {"job": "write_reasonings", "folder": "large", "parallel": 8, "new_tokens": new_tokens}
    plain, wrote = "large: step, transformers", "large: writing, transformers"
    return [
        Check(plain, {**step, "variant": "transformers"}, caps=caps),
        Check("large: step, unsloth", {**step, "variant": "unsloth"}, plain, caps=caps),
        Check(wrote, {**write, "backend": "transformers"}),
        Check("large: writing, unsloth", {**write, "backend": "unsloth"}, wrote),
        Check("large: step, unsloth, not compiled", {**step, "variant": "unsloth"}, plain, environment=NOT_COMPILED),
    ]


def opened(backend: str, folder: str, new_tokens: int = 8, precision: str | None = None) -> tuple[Any, Any, Any]:
    """The folder's model in 4 bits, its tokenizer and a spec, for texts of some hundred bytes."""
    from tract_lite import Sampling, ScoreScale, load_seed, make_spec

    max_length = 1024
    model, tokenizer = load_seed(folder, max_seq_length=max_length, backend=backend, precision=precision)
    sampling = Sampling(max_new_tokens=new_tokens)
    return model, tokenizer, make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=max_length, sampling=sampling)


def records(count: int, longest: int) -> list[Any]:
    """Texts of all lengths up to `longest` bytes, each with a score and a reasoning."""
    from tract_lite import Record

    texts = ["It is clear. " * (1 + longest * (n + 1) // count // 13) for n in range(count)]
    return [Record(prompt=text, feedback="So it is.", score=1.0 + n % 5) for n, text in enumerate(texts)]


def stage(backend: str, folder: str, precision: str | None = None) -> dict[str, float]:
    """Some steps of a stage with validation, as in a run: the first and the last loss.

    Raises:
        RuntimeError: the preflight found a fault, or a loss is not finite.
    """
    from tract_lite import TrainSettings, add_lora, train_stage

    model, tokenizer, spec = opened(backend, folder, precision=precision)
    settings = TrainSettings(
        batch_size=4, micro_batch_size=2, max_steps=6, learning_rate=1e-3, save_every=3, log_every=1
    )
    with tempfile.TemporaryDirectory() as out:
        model = add_lora(model)
        found = train_stage(model, tokenizer, records(16, 400), spec, out, settings, validation=records(4, 300))
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses that are not finite: {losses}")
    return {"loss": losses[0], "last loss": losses[-1]}


def judge_padded(backend: str, folder: str) -> dict[str, float]:
    """A short text judged alone and beside a longer one, in eval mode as it comes.

    Raises:
        RuntimeError: it can't be judged, or its score is another one.
    """
    from tract_lite import Judge

    model, tokenizer, spec = opened(backend, folder)
    short, long = records(2, 400)
    given = [[tokenizer.encode("So it is.", add_special_tokens=False)]]
    [alone] = Judge.from_model(model, tokenizer, spec, 1).score_many([short], reasonings=given)
    beside, _ = Judge.from_model(model, tokenizer, spec, 2).score_many([short, long], reasonings=given * 2)
    # Written, too, and not only read.
    wrote = list(Judge.from_model(model, tokenizer, spec, 2).score_many([short, long]))
    for judgement in (alone, beside, *wrote):
        if judgement.error:
            raise RuntimeError(judgement.error)
    # The labels have little of a random model's probability, so scores are small.
    difference = abs(alone.score / beside.score - 1)
    if not difference <= SCORE_TOLERANCE:
        raise RuntimeError(f"score {alone.score:.4g} alone, {beside.score:.4g} beside a longer text")
    return {"difference of scores": difference}


def memory(**job: Any) -> dict[str, float]:
    """A step of `train_gpu.py` and its memory."""
    found = train_gpu.train(**job)
    return {"loss": found["loss"], "peak GB": found["peak"] / GB}


def train(**job: Any) -> dict[str, float]:
    """A step of `train_gpu.py` with its speed and memory."""
    found = train_gpu.train(**job)
    figures = {"loss": found["loss"], "first step, s": found["first"], "step, s": found["seconds"]}
    return {**figures, "tokens/s": job["tokens"] / found["seconds"], "peak GB": found["peak"] / GB}


def write_reasonings(backend: str, folder: str, parallel: int, new_tokens: int) -> dict[str, float]:
    """How fast a batch of reasonings is written, behind prompts of some hundred tokens."""
    from tract_lite import Judge

    model, tokenizer, spec = opened(backend, folder, new_tokens)
    judge = Judge.from_model(model, tokenizer, spec, parallel)
    asked = records(parallel, 500)
    # Of what is compiled or allocated at first, nothing is timed.
    list(judge.score_many(asked[:1]))
    start = time.perf_counter()
    written = sum(len(judgement.feedback_ids[0]) for judgement in judge.score_many(asked))
    return {"tokens/s": written / (time.perf_counter() - start)}


JOBS = {
    "write": train_gpu.write_checkpoint,
    "stage": stage,
    "judge_padded": judge_padded,
    "memory": memory,
    "train": train,
    "write_reasonings": write_reasonings,
}


def child(job: str, environment: Mapping[str, str], **arguments: Any) -> dict[str, Any]:
    # Before Unsloth is imported, which reads it then.
    os.environ |= environment
    return JOBS[job](**arguments)


class Checks:
    """Runs checks in a folder with their models until `end`, and keeps what they found."""

    def __init__(self, folder: Path):
        self._folder, self.end = folder, math.inf
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, check: Check) -> None:
        """Ask a child, under one cap after the other where there are some; print what it says."""
        result: dict[str, Any] = {}
        for cap in check.caps or (None,):
            capped = {"cap_gb": cap} if cap else {}
            result = self._ask(check, {**check.job, **capped, "environment": dict(check.environment)})
            if cap and "error" not in result:
                result["fits GB"] = cap
            if "out of memory" not in result.get("error", "").lower():
                break
        self.found[check.name] = result
        print(f"{check.name}: {_shown(result)}", flush=True)

    def _ask(self, check: Check, job: dict[str, Any]) -> dict[str, Any]:
        left = self.end - time.monotonic()
        if left < LEAST_SECONDS:
            return {"error": "not run: no time left"}
        # Unsloth writes a cache into its working directory.
        place = self._folder / "caches" / "".join(filter(str.isalnum, check.name))
        place.mkdir(parents=True, exist_ok=True)
        job["folder"] = str(self._folder / job["folder"])
        return in_child(__file__, job, place, min(check.limit, left))

    def compare(self, check: Check) -> None:
        """Hold a check's loss and speed against those of the other one, where both are there."""
        ours, theirs = self.found[check.name], self.found.get(check.like, {})
        if "error" in ours or "error" in theirs or not theirs:
            return
        for name, ratio in (("tokens/s", "x speed"), ("peak GB", "x memory")):
            if name in ours and name in theirs:
                ours[ratio] = ours[name] / theirs[name]
        if "loss" in ours and not abs(ours["loss"] - theirs["loss"]) <= TOLERANCE * abs(theirs["loss"]):
            ours["error"] = f"the loss is {ours['loss']:.4f}, and {theirs['loss']:.4f} in '{check.like}'"


def _shown(result: Mapping[str, Any]) -> str:
    """Figures with their names; texts alone."""
    return ", ".join(value if isinstance(value, str) else f"{name} {value:.4g}" for name, value in result.items())


def run_all(folder: Path, smallest: bool, minutes: float) -> list[str]:
    """All checks, in a table; returns what broke."""
    checks, start = Checks(folder), time.monotonic()
    small, large = small_checks(smallest), large_checks(smallest)
    shape = {} if smallest else SMALL
    seeds = {name: {"model": "tiny", "model_type": name, **shape} for name in sorted({c.job["folder"] for c in small})}
    seeds["large"] = {"model": "tiny" if smallest else "llama"}

    def write(name: str) -> None:
        (folder / name).mkdir()
        checks.run(Check(f"{name}: its weights", {"job": "write", "folder": name, **seeds[name]}))

    with ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1))) as pool:
        checks.end = start + 60 * minutes
        list(pool.map(write, seeds))
        # Of the models themselves, only what failed is told.
        checks.found = {name: result for name, result in checks.found.items() if "error" in result}
        checks.end = start + 60 * minutes * SMALL_SHARE
        list(pool.map(checks.run, small))
    checks.end = start + 60 * minutes
    for check in large:
        checks.run(check)
    for check in (*small, *large):
        checks.compare(check)
    rows, broke = [], []
    for name, result in checks.found.items():
        error = result.pop("error", "")
        rows.append([name, "broke" if error else "ok", _shown(result)])
        broke += [f"{name}: {error}"] if error else []
    print(f"\n{table(['check', '', 'figures'], rows)}\n")
    return broke


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smallest", action="store_true", help="tiny models, also without a GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all checks (default: {MINUTES:g})")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return measure.answer(child, options.child)
    if not options.smallest and not torch.cuda.is_available():
        parser.error("the checks need a CUDA GPU; --smallest does not")
    print(measure.machine("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "xformers"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        broke = run_all(Path(folder), options.smallest, options.minutes)
    print("\n".join(["What broke:", *broke] if broke else ["Nothing broke."]))


if __name__ == "__main__":
    main()
