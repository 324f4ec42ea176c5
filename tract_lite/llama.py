"""llama.cpp from below: its models, the memory of its sequences, its batches."""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Sequence

import numpy as np

from tract_lite.spec import JudgeSpec

SPEC_KEY = "tract_lite.judge_spec"
BATCH_TOKENS = 512

# Repacked weights, a second copy of most of the file, are read slower by llama.cpp's newer kernels.
REPACK = False

_GGML_ERROR = 4

logger = logging.getLogger(__name__)
# What llama.cpp calls for as long as the process lives.
_kept: list[Any] = []
# What llama.cpp complained of lately, the oldest first.
_complaints: deque[str] = deque(maxlen=20)


@cache
def quiet_llama() -> ModuleType:
    """The llama_cpp module, with llama.cpp's words in this package's debug log alone."""
    # By default OpenMP's threads wait by spinning; beside another busy program that makes
    # everything many times slower, and alone it gains nothing.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").rstrip()
        logger.debug(line)
        if level == _GGML_ERROR:
            _complaints.append(line)

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    _kept.append(log)
    return llama_cpp


def system_info() -> str:
    """What the processor can do, in llama.cpp's words."""
    return quiet_llama().llama_print_system_info().decode()


def repacks_weights() -> bool:
    """Whether llama.cpp is to keep a second copy of the weights, where nobody says."""
    if "AMX_INT8 = 1" in system_info():
        logger.info("weights are not repacked: with AMX, llama.cpp can crash on repacked ones")
        return False
    return REPACK


def check_gguf(path: str | Path) -> None:
    """Raises ValueError for a file that does not begin as a GGUF file does."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")


def load_model(path: str | Path, **params: Any) -> Any:
    """A `llama_model` pointer, to be freed by the caller; `params` as in `llama_model_params`.

    Raises:
        ValueError: not a GGUF file, or one that llama.cpp can't read.
    """
    llama = quiet_llama()
    check_gguf(path)
    settings = llama.llama_model_default_params()
    if "use_extra_bufts" not in params:
        params["use_extra_bufts"] = repacks_weights()
    for name, value in params.items():
        setattr(settings, name, value)
    _complaints.clear()
    model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise ValueError(f"llama.cpp can't read {path}: {_complaint()} (is the file complete, a "
                         "model and no adapter, and of a kind that llama-cpp-python "
                         f"{llama.__version__} knows?)")
    return model


def cache_bytes(model: Any) -> int:
    """Bytes that one token takes in a context's memory, in 16 bits."""
    llama = quiet_llama()
    head_size = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
    return 2 * 2 * llama.llama_model_n_layer(model) * llama.llama_model_n_head_kv(model) * head_size


def spec_of(model: Any) -> JudgeSpec | None:
    """The judge's spec inside a loaded model (a `llama_model` pointer)."""
    return spec_in(quiet_llama().llama_model_meta_val_str, model)


def spec_in(get_value: Callable[..., int], holder: Any) -> JudgeSpec | None:
    """The judge's spec in the metadata of a model or adapter, read by llama.cpp's `get_value`."""
    key = SPEC_KEY.encode()
    length = get_value(holder, key, None, 0)
    if length < 0:
        return None
    buffer = ctypes.create_string_buffer(length + 1)
    get_value(holder, key, buffer, len(buffer))
    return JudgeSpec.from_json(buffer.value.decode("utf-8"))


class Context:
    """The memory of `sequences` numbered sequences of up to `length` tokens each.

    `threads`: None for all CPUs in reach. `flash_attention`: None leaves the choice to llama.cpp.
    `cache_type`: a type of llama.cpp, such as "f16", "f32" or "q8_0".

    Raises:
        ValueError: fewer than one sequence, or an unknown type.
        RuntimeError: llama.cpp can't hold that much.
    """

    def __init__(self, model: Any, sequences: int, length: int, *, threads: int | None = None,
                 flash_attention: bool | None = None, cache_type: str = "f16"):
        self._llama = llama = quiet_llama()
        self.pointer = None
        if sequences < 1:
            raise ValueError(f"parallel must be at least 1, got {sequences}")
        params = llama.llama_context_default_params()
        params.n_seq_max = params.n_outputs_max = sequences
        params.n_ctx = sequences * length
        params.n_batch = params.n_ubatch = self.batch_size = max(BATCH_TOKENS, sequences)
        params.n_threads = params.n_threads_batch = self.threads = threads or usable_cpus()
        params.type_k = params.type_v = _tensor_type(cache_type)
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        params.kv_unified = False
        _complaints.clear()
        self.pointer = llama.llama_init_from_model(model, params)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp can't hold {sequences} sequences of {length} tokens: "
                               f"{_complaint()}; lower parallel or context_length")
        self._memory = llama.llama_get_memory(self.pointer)
        self._logits_shape = (llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)),)

    def clear(self) -> None:
        """Forget all sequences."""
        self._llama.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Make a sequence the same as another; whole, as llama.cpp can't copy a part of one."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def cut(self, sequence: int, length: int) -> None:
        """Forget what a sequence holds from position `length` on."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int],
               outputs: Sequence[int]) -> None:
        """Run one batch: each token at its position of its sequence; `outputs` rows get logits.

        Raises:
            RuntimeError: llama.cpp failed.
        """
        size = len(tokens)
        integers, pointers = ctypes.c_int32 * size, ctypes.POINTER(ctypes.c_int32) * size
        logits = (ctypes.c_int8 * size)()
        for row in outputs:
            logits[row] = True
        batch = self._llama.llama_batch(
            size, integers(*tokens), None, integers(*positions), integers(*[1] * size),
            pointers(*map(_sequence_pointer, sequences)), logits)
        _complaints.clear()
        if self._llama.llama_decode(self.pointer, batch):
            raise RuntimeError(f"llama.cpp could not decode {size} tokens: {_complaint()}")

    def logits(self, row: int) -> np.ndarray:
        """The logits (V,) after a row of the last batch, valid until the next one."""
        logits = self._llama.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(logits, shape=self._logits_shape)

    def close(self) -> None:
        """Free the memory."""
        if self.pointer:
            self._llama.llama_free(self.pointer)
        self.pointer = None


@cache
def _sequence_pointer(sequence: int) -> Any:
    return ctypes.pointer(ctypes.c_int32(sequence))


def _tensor_type(name: str) -> int:
    llama, prefix = quiet_llama(), "GGML_TYPE_"
    types = {key[len(prefix):].lower(): getattr(llama, key) for key in dir(llama)
             if key.startswith(prefix)}
    if name.lower() not in types:
        raise ValueError(f"unknown cache_type {name!r}; there are {', '.join(types)}")
    return types[name.lower()]


def _complaint() -> str:
    """Why llama.cpp failed: the first complaint is the one that tells most."""
    function, _, text = _complaints[0].partition(": ") if _complaints else ("", "", "")
    return text or function or "no reason given"


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
