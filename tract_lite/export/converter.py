"""GGUF files with a judge's spec, written by llama.cpp's own converter and quantiser."""

import ctypes
import os
import re
import runpy
import subprocess
import sys
import tarfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence

from tract_lite.data.files import cache_folder
from tract_lite.engines.llama_cpp import SPEC_KEY, quiet_llama
from tract_lite.spec import JudgeSpec

_MODELS, _ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_NEEDED = re.compile(r"[^/]+/vendor/llama\.cpp/(convert_\w+\.py|conversion/.+|gguf-py/.+)")


def llama_cpp_source() -> Path:
    """The folder of llama.cpp's converter, in the version of the installed llama-cpp-python.

    `LLAMA_CPP_DIR` names it; without, it is fetched once with pip into the cache folder.
    Raises ValueError: `LLAMA_CPP_DIR` is not such a folder. Raises RuntimeError: pip failed.
    """
    if chosen := os.environ.get("LLAMA_CPP_DIR"):
        if not Path(chosen, _MODELS).is_file():
            raise ValueError(f"LLAMA_CPP_DIR is {chosen}, which has no {_MODELS}")
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
    """
    import gguf

    spec = sys.stdin.buffer.read().decode("utf-8")

    class Writer(gguf.GGUFWriter):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            if spec:
                self.add_string(SPEC_KEY, spec)

    gguf.GGUFWriter = Writer
    parent = os.getppid()

    def end_with_parent() -> None:
        # A killed export must not leave a process that goes on filling the disk.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


def file_types() -> dict[str, int]:
    """The names of llama.cpp's file types, such as "q4_k_m", with their numbers."""
    llama, prefix = quiet_llama(), "LLAMA_FTYPE_MOSTLY_"
    mostly = {name[len(prefix) :].lower(): value for name, value in vars(llama).items() if name.startswith(prefix)}
    return {"f32": llama.LLAMA_FTYPE_ALL_F32, **mostly}


def quantize(source: Path, out: Path, name: str) -> None:
    """Write a GGUF file in another of llama.cpp's types. Raises RuntimeError: it could not."""
    llama = quiet_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_types()[name]
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)):
        cause = "the disk is full, or it needs an importance matrix (q4_k_m, q5_k_m, q6_k and q8_0 do not)"
        raise RuntimeError(f"llama.cpp could not quantise to {name}: {cause}")


def _convert(script: str, folder: Path, out: Path, options: Sequence[str], spec: JudgeSpec | None) -> None:
    source = llama_cpp_source()
    paths = (source / "gguf-py", Path(__file__).parents[2], os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = ["-c", f"from {__name__} import run_converter; run_converter()", script, str(folder.resolve())]
    command += ["--outfile", str(out.resolve()), *options]
    if log := _run(command, cwd=source, env=environment, input=spec.to_json() if spec else ""):
        raise RuntimeError(f"llama.cpp's converter failed on {folder}:\n{log}")


def _run(arguments: Sequence[str], **options: Any) -> str:
    """Run Python; nothing after success, else the last lines that it wrote."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run([sys.executable, *arguments], **options)
    tail = done.stdout.splitlines()[-15:]
    return "\n".join([*tail, f"exit status {done.returncode}"]) if done.returncode else ""


def _fetch_source(release: str, folder: Path) -> None:
    with TemporaryDirectory(dir=folder.parent) as temporary:
        command = f"-m pip download --no-deps --no-binary llama-cpp-python llama-cpp-python=={release} --dest"
        if log := _run([*command.split(), temporary]):
            advice = f"set LLAMA_CPP_DIR to the vendor/llama.cpp folder of version {release}"
            fault = "pip could not fetch llama-cpp-python's source with llama.cpp's converter"
            raise RuntimeError(f"{fault}: try with a package index in reach, or {advice}\n{log}")
        source = Path(temporary, "source")
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                if found := _NEEDED.fullmatch(member.name):
                    member.name = found[1]
                    archive.extract(member, source, filter="data")
        if not folder.is_dir():
            os.replace(source, folder)
