"""LoRA adapters in llama.cpp: read onto a loaded base, and set for what a context computes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from tract_lite.llama import SPEC_KEY, quiet_llama
from tract_lite.spec import JudgeSpec


def load_adapter(model: Any, path: str | Path) -> tuple[Any, JudgeSpec | None]:
    """A `llama_adapter_lora` pointer, freed with its model, and the judge's spec in its file.

    Raises:
        ValueError: not a GGUF adapter, or one of another base.
    """
    llama = quiet_llama()
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
    adapter = llama.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise ValueError(f"llama.cpp can't add {path} to this base: it is no LoRA adapter, or was "
                         "trained on another seed")
    key, length = SPEC_KEY.encode(), 0
    length = llama.llama_adapter_meta_val_str(adapter, key, None, 0)
    if length < 0:
        return adapter, None
    text = ctypes.create_string_buffer(length + 1)
    llama.llama_adapter_meta_val_str(adapter, key, text, len(text))
    return adapter, JudgeSpec.from_json(text.value.decode("utf-8"))


def set_adapter(context: Any, adapter: Any | None) -> None:
    """Let a `llama_context` compute with this adapter alone, or with none.

    What its memory holds was computed with the one before: clear it.

    Raises:
        RuntimeError: llama.cpp failed.
    """
    llama = quiet_llama()
    adapters = [adapter] if adapter else []
    pointers = (llama.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    scales = (ctypes.c_float * len(adapters))(*[1.0] * len(adapters))
    if llama.llama_set_adapters_lora(context, pointers, len(adapters), scales):
        raise RuntimeError("llama.cpp could not set the adapter")
