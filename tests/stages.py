"""Short trainings on a tiny seed model, for tests in several files and in other processes."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import load_file
from tiny import make_family, vocabulary_folder

from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.training.seed_model import add_lora, load_seed
from tract_lite.training.settings import TrainSettings

SCALE = ScoreScale.integers(1, 5)
SHORT: dict[str, Any] = dict(batch_size=4, micro_batch_size=2, learning_rate=1e-2, log_every=1, epochs=3)
SAVING = TrainSettings(save_every=2, **SHORT)


def small_seed_model(shared_once: Callable[..., Path]) -> Path:
    """A random Llama of one layer."""
    return shared_once("one_layer", lambda out: make_family(out, vocabulary_folder("spm"), "llama", layers=1))


def make_records(count: int = 10, seed: int = 0) -> list[Record]:
    """Responses whose first word tells the score."""
    rng = random.Random(seed)
    words = ("wrong", "short", "kind", "clear", "right")
    records = []
    for n in range(count):
        score = rng.randrange(5)
        filler = " ".join(rng.choices(words, k=rng.randint(1, 9)))
        text = {"prompt": f"{words[score]} {filler}\n", "feedback": f"It is {words[score]}."}
        records.append(Record(**text, score=score + 1.0, id=str(n)))
    return records


def load_exact(seed_model: Path, in_4bit: bool = False) -> tuple[Any, Any]:
    """The seed model and its tokenizer, computing in float32 whatever the processor can do."""
    return load_seed(seed_model, in_4bit, backend="transformers", precision="float32")


def load(seed_model: Path) -> tuple[Any, Any, JudgeSpec]:
    """The seed model with a new adapter, its tokenizer, and a spec."""
    model, tokenizer = load_exact(seed_model)
    return add_lora(model), tokenizer, make_spec(tokenizer, SCALE, max_length=128)


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: weight.detach().clone() for name, weight in named if weight.requires_grad}


def weights_in(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def python_environment() -> dict[str, str]:
    """The environment of a process that imports from the tests."""
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
