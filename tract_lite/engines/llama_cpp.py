"""llama.cpp from below: its models, its adapters, and the specs inside their files."""

import ctypes
import logging
import os
from collections import deque
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tract_lite.spec import SPEC_FILE, JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary

SPEC_KEY = "tract_lite.judge_spec"
_GGML_ERROR = 4

logger = logging.getLogger(__name__)
# What llama.cpp calls for as long as the process lives.
_kept: list[Any] = []
# What llama.cpp complained of lately, the oldest first.
complaints: deque[str] = deque(maxlen=20)


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
            complaints.append(line)

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    _kept.append(log)
    return llama_cpp


def system_info() -> str:
    """What the processor can do, in llama.cpp's words."""
    return quiet_llama().llama_print_system_info().decode()


def has_amx() -> bool:
    """Whether the processor has Intel's AMX, on which llama.cpp crashes with repacked weights."""
    return "AMX_INT8 = 1" in system_info()


def check_gguf(path: str | Path) -> None:
    """Raises ValueError for a file that does not begin as a GGUF file does."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")


def load_model(path: str | Path, **params: Any) -> Any:
    """A `llama_model` pointer, to be freed by the caller; `params` as in `llama_model_params`.

    Weights are not repacked (`use_extra_bufts`) unless that is asked for: with AMX, llama.cpp's
    kernels for repacked weights end the process, and elsewhere they were not found to be faster.
    Raises ValueError: not a GGUF file, one that llama.cpp can't read, or repacked with AMX.
    """
    if params.get("use_extra_bufts") and has_amx():
        raise ValueError("llama.cpp crashes with repacked weights on this processor, which has AMX: leave repack off")
    llama = quiet_llama()
    check_gguf(path)
    settings = llama.llama_model_default_params()
    for name, value in {"use_extra_bufts": False, **params}.items():
        setattr(settings, name, value)
    complaints.clear()
    model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        advice = f"is the file complete, a model and no adapter, and known to llama-cpp-python {llama.__version__}?"
        raise ValueError(f"llama.cpp can't read {path}: {complaint()} ({advice})")
    return model


def check_generates(model: Any) -> None:
    """Raises ValueError: the engine can't write with such a model; its vocabulary is enough."""
    llama = quiet_llama()
    if llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model):
        fault = "this is a recurrent or hybrid model, which llama.cpp can't set back to a prompt"
    elif llama.llama_model_has_encoder(model) or llama.llama_model_is_diffusion(model):
        fault = "this model does not write from left to right"
    else:
        return
    raise ValueError(f"{fault}\ntake a seed model with attention alone, such as a Llama, Mistral, Qwen or Phi")


def cache_bytes(model: Any) -> int:
    """Bytes that one token takes in a context's memory, in 16 bits."""
    llama = quiet_llama()
    head_size = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
    return 2 * 2 * llama.llama_model_n_layer(model) * llama.llama_model_n_head_kv(model) * head_size


def spec_of(loaded: Any, kind: str = "model") -> JudgeSpec | None:
    """The judge's spec inside a loaded "model" or "adapter" (a pointer of llama.cpp)."""
    get_value, key = getattr(quiet_llama(), f"llama_{kind}_meta_val_str"), SPEC_KEY.encode()
    length = get_value(loaded, key, None, 0)
    if length < 0:
        return None
    buffer = ctypes.create_string_buffer(length + 1)
    get_value(loaded, key, buffer, len(buffer))
    return JudgeSpec.from_json(buffer.value.decode("utf-8"))


def read_spec(path: str | Path) -> JudgeSpec | None:
    """The judge's spec inside a GGUF file; None where it holds none.
    Raises ValueError: not a GGUF file that llama.cpp can read, or a spec of another vocabulary.
    """
    model = load_model(path, vocab_only=True)
    try:
        if spec := spec_of(model):
            spec.check_vocabulary(GGUFVocabulary(model))
        return spec
    finally:
        quiet_llama().llama_model_free(model)


def spec_at(path: str | Path) -> JudgeSpec | None:
    """The judge's spec in its own file, or in a folder or a GGUF file; None where it holds none."""
    path = Path(path)
    if path.is_dir():
        return JudgeSpec.load(path) if (path / SPEC_FILE).is_file() else None
    return JudgeSpec.load(path) if path.suffix == ".json" else read_spec(path)


def load_adapter(model: Any, path: str | Path) -> tuple[Any, JudgeSpec | None]:
    """A `llama_adapter_lora` pointer, freed with its model, and the judge's spec in its file.
    Raises ValueError: not a GGUF adapter, or one of another base.
    """
    llama = quiet_llama()
    check_gguf(path)
    adapter = llama.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise ValueError(f"llama.cpp can't add {path} to this base: it is no LoRA adapter, or one of another seed")
    return adapter, spec_of(adapter, "adapter")


def complaint() -> str:
    """Why llama.cpp failed: the first complaint is the one that tells most."""
    function, _, text = complaints[0].partition(": ") if complaints else ("", "", "")
    return text or function or "no reason given"
