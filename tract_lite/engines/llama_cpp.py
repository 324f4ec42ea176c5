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
TYPE_KEY = "general.type"
_GGML_ERROR = 4
_GGUF_TEXT = 8

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


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def check_gguf(path: str | Path) -> None:
    """Raises ValueError for what does not begin as a GGUF file does."""
    if not is_gguf(path):
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
    if llama.llama_model_has_encoder(model) or llama.llama_model_is_diffusion(model):
        advice = "take one that does, such as a Llama, Mistral, Qwen or Phi"
        raise ValueError(f"this model does not write from left to right\n{advice}")


def has_state(model: Any) -> bool:
    """Whether a model has a recurrent state, alone or beside attention: it can't forget a tail."""
    llama = quiet_llama()
    return llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model)


def cache_bytes(model: Any) -> int:
    """Bytes that one token takes in the memory of a model with attention alone, in 16 bits."""
    llama, kind = quiet_llama(), metadata(model, "general.architecture")
    usual = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
    widths = [metadata(model, f"{kind}.attention.{part}_length") for part in ("key", "value")]
    values = llama.llama_model_n_head_kv(model) * sum(int(width or usual) for width in widths)
    return 2 * llama.llama_model_n_layer(model) * values


def metadata(loaded: Any, key: str, kind: str = "model") -> str | None:
    """A value, as text, in the file of a loaded "model" or "adapter" (a pointer of llama.cpp)."""
    get_value, name = getattr(quiet_llama(), f"llama_{kind}_meta_val_str"), key.encode()
    length = get_value(loaded, name, None, 0)
    if length < 0:
        return None
    buffer = ctypes.create_string_buffer(length + 1)
    get_value(loaded, name, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def spec_of(loaded: Any, kind: str = "model") -> JudgeSpec | None:
    """The judge's spec inside a loaded "model" or "adapter" (a pointer of llama.cpp)."""
    text = metadata(loaded, SPEC_KEY, kind)
    return JudgeSpec.from_json(text) if text else None


def read_spec(path: str | Path) -> JudgeSpec | None:
    """The judge's spec inside a GGUF file, of a model or an adapter; None where it holds none.
    Raises ValueError: not a GGUF file that llama.cpp can read, or a spec of another vocabulary.
    """
    check_gguf(path)
    if _file_value(path, TYPE_KEY) == "adapter":
        # It has no vocabulary; that of its base is looked at when both are loaded.
        text = _file_value(path, SPEC_KEY)
        return JudgeSpec.from_json(text) if text else None
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
    is_model = path.suffix == ".gguf" or (path.is_file() and is_gguf(path))
    return read_spec(path) if is_model else JudgeSpec.load(path)


def _file_value(path: str | Path, key: str) -> str | None:
    """A text in the metadata of a GGUF file, of which nothing else is read."""
    library = _gguf_library()
    opened = library.gguf_init_from_file(os.fsencode(path), _ReadOptions(no_alloc=True))
    if not opened:
        return None
    try:
        number = library.gguf_find_key(opened, key.encode())
        is_text = number >= 0 and library.gguf_get_kv_type(opened, number) == _GGUF_TEXT
        return library.gguf_get_val_str(opened, number).decode("utf-8", "replace") if is_text else None
    finally:
        library.gguf_free(opened)


class _ReadOptions(ctypes.Structure):
    """`gguf_init_params` of ggml."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@cache
def _gguf_library() -> ctypes.CDLL:
    """The functions of ggml that read a GGUF file, which llama-cpp-python does not declare."""
    from llama_cpp._ctypes_extensions import load_shared_library

    llama = quiet_llama()
    library = load_shared_library("ggml-base", Path(str(llama.__file__)).parent / "lib")
    opened, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    # It may be loaded a second time, with a log of its own.
    library.ggml_log_set(_kept[0], None)
    for name, result, arguments in (
        ("init_from_file", opened, [text, _ReadOptions]),
        ("find_key", number, [opened, text]),
        ("get_kv_type", ctypes.c_int, [opened, number]),
        ("get_val_str", text, [opened, number]),
        ("free", None, [opened]),
    ):
        function = getattr(library, f"gguf_{name}")
        function.restype, function.argtypes = result, arguments
    return library


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
