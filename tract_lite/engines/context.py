"""llama.cpp from below: the memory of its sequences, and its batches."""

import ctypes
import os
from typing import Any, Sequence

import numpy as np

from tract_lite.engines.llama_cpp import cache_bytes, complaint, complaints, has_state, quiet_llama

BATCH_TOKENS = 512
# llama.cpp's flag for what of a sequence can't be cut (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY).
_STATE = 1
# Those of llama.cpp that its kernels read back; with any other it ends the process.
EXACT_CACHES = ("f16", "f32")
CACHES = (*EXACT_CACHES, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


class Context:
    """The memory of `sequences` numbered sequences of up to `length` tokens each.

    `threads`: None for all CPUs in reach. `flash_attention`: None leaves the choice to llama.cpp.
    `cache_type`: one of `CACHES`; all but the first two need flash attention.
    Raises ValueError: fewer than one sequence, or another type.
    Raises RuntimeError: llama.cpp can't hold that much; also its methods, where llama.cpp fails.
    """

    def __init__(
        self,
        model: Any,
        sequences: int,
        length: int,
        *,
        threads: int | None = None,
        flash_attention: bool | None = None,
        cache_type: str = "f16",
    ):
        self._llama = llama = quiet_llama()
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
        complaints.clear()
        self.pointer = llama.llama_init_from_model(model, params)
        if not self.pointer:
            advice = "lower parallel or context_length"
            if cache_type.lower() not in EXACT_CACHES:
                advice = f"take cache_type f16: {cache_type} needs flash attention and heads of a multiple of 32 values"
            fault = f"llama.cpp can't hold {sequences} sequences of {length} tokens: {complaint()}"
            raise RuntimeError(f"{fault}\n{advice}")
        self.forgets = not has_state(model)
        self._kept: dict[int, Any] = {}
        self._numbers = [ctypes.pointer(ctypes.c_int32(number)) for number in range(sequences)]
        self._memory = llama.llama_get_memory(self.pointer)
        self._logits_shape = (llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)),)

    def use_adapter(self, adapter: Any | None) -> None:
        """Compute with this adapter alone, or with none; what the memory holds is then to clear."""
        count = 1 if adapter else 0
        pointers = (self._llama.llama_adapter_lora_p_ctypes * count)(*[adapter] * count)
        scales = (ctypes.c_float * count)(*[1.0] * count)
        if self._llama.llama_set_adapters_lora(self.pointer, pointers, count, scales):
            raise RuntimeError("llama.cpp could not set the adapter")

    def clear(self) -> None:
        """Forget all sequences."""
        self._kept.clear()
        self._llama.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Make a sequence the same as another; whole, as llama.cpp can't copy a part of one."""
        self._kept[target] = self._kept.get(source)
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def cut(self, sequence: int, length: int) -> None:
        """Forget what a sequence holds from position `length` on.

        Unless the context `forgets`, that is all of it, nothing, or what came after `keep`.
        """
        if not self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1):
            state, restore = self._kept.get(sequence), self._llama.llama_state_seq_set_data_ext
            if not (state and restore(self.pointer, state, len(state), sequence, _STATE)):
                raise RuntimeError("llama.cpp can't set a sequence of this model back to its prompt")
            self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def keep(self, sequence: int) -> None:
        """Keep the state of a sequence, in place of an earlier one, so that it can be `cut` to it.

        Only the recurrent part is copied, into main memory: a fixed size for any length.
        """
        state = (ctypes.c_uint8 * self.sizes(sequence)[1])()
        self._llama.llama_state_seq_get_data_ext(self.pointer, state, len(state), sequence, _STATE)
        self._kept[sequence] = state

    def sizes(self, sequence: int) -> tuple[int, int]:
        """Bytes of all that a sequence holds, and of its recurrent state alone."""
        whole, state = (self._llama.llama_state_seq_get_size_ext(self.pointer, sequence, part) for part in (0, _STATE))
        return whole, state

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], outputs: Sequence[int]
    ) -> None:
        """Run one batch: each token at its position of its sequence; `outputs` rows get logits."""
        size = len(tokens)
        integers, pointers = ctypes.c_int32 * size, ctypes.POINTER(ctypes.c_int32) * size
        logits = (ctypes.c_int8 * size)()
        for row in outputs:
            logits[row] = True
        counts, numbers = integers(*[1] * size), pointers(*[self._numbers[n] for n in sequences])
        batch = self._llama.llama_batch(size, integers(*tokens), None, integers(*positions), counts, numbers, logits)
        complaints.clear()
        if self._llama.llama_decode(self.pointer, batch):
            raise RuntimeError(f"llama.cpp could not decode {size} tokens: {complaint()}")

    def logits(self, row: int) -> np.ndarray:
        """The logits (V,) after a row of the last batch, valid until the next one."""
        logits = self._llama.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(logits, shape=self._logits_shape)

    def close(self) -> None:
        """Free the memory."""
        self._llama.llama_free(self.pointer)
        self.pointer = None


def memory_bytes(model: Any) -> tuple[int, int]:
    """Bytes in 16 bits that a context takes for each token, and for each sequence beside them.

    What a recurrent state takes is read off one token's; it is there twice, as `keep` copies it.
    Raises RuntimeError: llama.cpp can't compute with the model.
    """
    if not has_state(model):
        return cache_bytes(model), 0
    context = Context(model, 1, 1)
    try:
        context.decode([0], [0], [0], [])
        whole, state = context.sizes(0)
    finally:
        context.close()
    return whole - state, 2 * state


def _tensor_type(name: str) -> int:
    if name.lower() not in CACHES:
        raise ValueError(f"unknown cache_type {name!r}; there are {', '.join(CACHES)}")
    return getattr(quiet_llama(), f"GGML_TYPE_{name.upper()}")


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
