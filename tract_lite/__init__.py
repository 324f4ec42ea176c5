"""tract-lite: teach a language model to judge text with numbers, and run it from one GGUF file."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# At its import it advises a package for inference on CPUs, which `seed.py` rules out.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Imported on first use: judging a GGUF file needs no torch, and `import tract_lite` stays fast.
_HOMES = {
    "ScoreScale": "scale",
    "JudgeSpec": "spec",
    "Sampling": "spec",
    "Rubric": "records",
    "Record": "records",
    "read_records": "records",
    "split_records": "records",
    "evaluate": "metrics",
    "load_seed": "seed",
    "add_lora": "seed",
    "TrainSettings": "settings",
    "train_stage": "train",
    "merge_adapter": "merge",
    "export_gguf": "gguf",
    "export_adapter": "gguf",
    "Judge": "judge",
    "Judgement": "judgement",
    "generate_cots": "self_cot",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tract_lite' has no attribute {name!r}")
    return getattr(import_module(f"tract_lite.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
