"""GGUF files with a judge's spec, written by llama.cpp's own converter and quantiser."""

import ctypes
import json
import logging
import os
import re
import runpy
import sys
import tarfile
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence

from tract_lite.data.files import cache_folder
from tract_lite.engines.child import run_python
from tract_lite.engines.llama_cpp import SPEC_KEY, complaints, load_model, quiet_llama
from tract_lite.spec import JudgeSpec
from tract_lite.training.quiet import progress
from tract_lite.vocabulary import GGUFVocabulary

logger = logging.getLogger(__name__)

_MODELS, _ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
# What llama.cpp makes with an importance matrix alone, and what its quantiser knows by name alone.
NEED_MATRIX = "iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq2_m iq3_xxs iq3_xs q2_k_s".split()
_NOT_MADE = ("nvfp4",)
# The names of Granite-4's layers where transformers has saved them, as the converter knows them.
GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
_USUAL = "q4_k_m, q5_k_m, q6_k, q8_0, f16, bf16 or f32"
_NEEDED = re.compile(r"[^/]+/vendor/llama\.cpp/(convert_\w+\.py|conversion/.+|gguf-py/.+)")


def llama_cpp_source() -> Path:
    """The folder of llama.cpp's converter, in the version of the installed llama-cpp-python.

    `LLAMA_CPP_DIR` names it; without, it is fetched once with pip into the cache folder.
    Raises ValueError: `LLAMA_CPP_DIR` is not such a folder. Raises RuntimeError: pip failed.
    """
    if chosen := os.environ.get("LLAMA_CPP_DIR"):
        if not Path(chosen, _MODELS).is_file():
            advice = "let it name llama.cpp's source, or unset it"
            raise ValueError(f"LLAMA_CPP_DIR is {chosen}, which has no {_MODELS}\n{advice}")
        return Path(chosen).resolve()
    release = version("llama_cpp_python").partition("+")[0]
    folder = cache_folder() / f"llama.cpp-{release}"
    if not folder.is_dir():
        _fetch_source(release, folder)
    return folder


def convert_model(model_dir: Path, out: Path, file_type: str, spec: JudgeSpec | None, *options: str) -> None:
    """Write a model folder as GGUF: "f32", "f16", "bf16", "q8_0", or "auto" for its own 16 bits.

    With the option "--vocab-only" it needs no weights. Raises RuntimeError: the converter failed.
    """
    _convert(_MODELS, model_dir, out, ["--outtype", file_type, *options], spec)


def convert_adapter(adapter_dir: Path, base_dir: Path, out: Path, spec: JudgeSpec) -> None:
    """Write an adapter as GGUF, in float32; `base_dir` holds its seed model's config."""
    _convert(_ADAPTERS, adapter_dir, out, ["--outtype", "f32", "--base", str(base_dir.resolve())], spec)


def run_converter() -> None:
    """Run the script of llama.cpp that this process's first argument names, on the others.

    The spec on standard input is written with the other metadata, so the file is written once.
    Layers that predict further tokens are left out: a judge has no use for them, and many seed
    models come without. Granite-4's layers get the names that they have on the hub.
    """
    import gguf
    from conversion.base import ModelBase

    spec = sys.stdin.buffer.read().decode("utf-8")

    class Writer(gguf.GGUFWriter):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            if spec:
                self.add_string(SPEC_KEY, spec)

    gguf.GGUFWriter, ModelBase.no_mtp = Writer, True
    _rename_granite_layers()
    parent = os.getppid()

    def end_with_parent() -> None:
        # A killed export must not leave a process that goes on filling the disk. On Windows, where
        # the id stays as it was, it goes on to its end.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _rename_granite_layers() -> None:
    """Let the converter know Granite-4's layers by the names that transformers saves, too."""
    with suppress(ImportError):
        from conversion.granite import GraniteHybridModel

        find = GraniteHybridModel.get_attn_layers

        def get_attn_layers(model: Any) -> list[int]:
            if kinds := model.hparams.get("layer_types"):
                model.hparams["layer_types"] = [GRANITE_LAYERS.get(kind, kind) for kind in kinds]
            return find(model)

        GraniteHybridModel.get_attn_layers = get_attn_layers


def read_texts() -> None:
    """Read the texts on standard input, a JSON list, with the vocabulary of a GGUF file.

    The file is this process's first argument. An assertion of llama.cpp's ends the process.
    """
    vocabulary = GGUFVocabulary(load_model(sys.argv[1], vocab_only=True))
    for text in json.load(sys.stdin):
        vocabulary.encode(text)


def file_types() -> dict[str, int]:
    """The names of the file types that llama.cpp makes, such as "q4_k_m", with their numbers."""
    llama, prefix = quiet_llama(), "LLAMA_FTYPE_MOSTLY_"
    mostly = {name[len(prefix) :].lower(): value for name, value in vars(llama).items() if name.startswith(prefix)}
    return {"f32": llama.LLAMA_FTYPE_ALL_F32, **{name: mostly[name] for name in mostly if name not in _NOT_MADE}}


def check_types(names: Sequence[str]) -> None:
    """Raises ValueError: no type, one that can't be made here, or one in two spellings."""
    if not names:
        raise ValueError(f"no quantization is asked for\ntake {_USUAL}")
    known, lowered = file_types(), [name.lower() for name in names]
    if unknown := [name for name in names if name.lower() not in known]:
        raise ValueError(f"unknown quantization {', '.join(unknown)}\ntake {_USUAL}, or another of llama.cpp's")
    if needing := [name for name in names if name.lower() in NEED_MATRIX]:
        raise ValueError(f"{', '.join(needing)} needs an importance matrix, which is not made here\ntake {_USUAL}")
    if len(set(lowered)) < len(set(names)):
        raise ValueError(f"one quantization is asked for in two spellings: {', '.join(names)}\nname it once")


def quantize(source: Path, out: Path, name: str) -> None:
    """Write a GGUF file in another of llama.cpp's types. Raises RuntimeError: it could not."""
    llama = quiet_llama()
    complaints.clear()
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_types()[name]
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)):
        # The last complaint is in one line, unlike those before it.
        cause = complaints[-1].rpartition(": ")[2] if complaints else "no reason given"
        advice = "is there room on the disk? if there is, take another type, such as q8_0"
        raise RuntimeError(f"llama.cpp could not quantise to {name}: {cause}\n{advice}")


def _convert(script: str, folder: Path, out: Path, options: Sequence[str], spec: JudgeSpec | None) -> None:
    source = llama_cpp_source()
    command = ["-c", f"from {__name__} import run_converter; run_converter()", script, str(folder.resolve())]
    command += ["--outfile", str(out.resolve()), *options]
    with progress("converting to GGUF"):
        fault = run_python(command, source / "gguf-py", cwd=source, input=spec.to_json() if spec else "")
    if fault:
        known = f"is this model known to llama-cpp-python {quiet_llama().__version__}? if not, upgrade it"
        advice = f"{known}, or choose another seed model"
        raise RuntimeError(f"llama.cpp's converter failed on {folder.name}: {fault}\n{advice}")


def _fetch_source(release: str, folder: Path) -> None:
    logger.info("export: pip fetches llama.cpp's converter, once")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        command = f"-m pip download --no-deps --no-binary llama-cpp-python llama-cpp-python=={release} --dest"
        if fault := run_python([*command.split(), temporary]):
            advice = f"let LLAMA_CPP_DIR name the vendor/llama.cpp folder of llama-cpp-python {release}'s source"
            what = f"pip could not fetch llama.cpp's converter: {fault}"
            raise RuntimeError(f"{what}\ngo on where a package index is in reach, or {advice}")
        source = Path(temporary, "source")
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                if found := _NEEDED.fullmatch(member.name):
                    member.name = found[1]
                    archive.extract(member, source, filter="data")
        if not folder.is_dir():
            os.replace(source, folder)
