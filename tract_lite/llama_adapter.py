"""LoRA adapters in llama.cpp: read onto a loaded base, and set for what a context computes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from tract_lite.llama import check_gguf, quiet_llama, spec_in
from tract_lite.spec import JudgeSpec


def load_adapter(model: Any, path: str | Path) -> tuple[Any, JudgeSpec | None]:
    """A `llama_adapter_lora` pointer, freed with its model, and the judge's spec in its file.

    Raises:
        ValueError: not a GGUF adapter, or one of another base.
    """
    llama = quiet_llama()
    check_gguf(path)
    adapter = llama.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise ValueError(f"llama.cpp can't add {path} to this base: it is no LoRA adapter, or was "
                         "trained on another seed")
    return adapter, spec_in(llama.llama_adapter_meta_val_str, adapter)


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
