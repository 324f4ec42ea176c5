"""Does llama.cpp run a model, or end the process? Its assertions can't be caught inside one."""

import re
import sys
from pathlib import Path

from tract_lite.data.files import cache_folder, fingerprint
from tract_lite.engines.child import run_python
from tract_lite.engines.context import Context
from tract_lite.engines.llama_cpp import check_generates, check_gguf, load_model, quiet_llama

_REFUSED = "refused"


def check_runs(path: str | Path, gpu_layers: int = -1) -> None:
    """Load a GGUF model in a process of its own and decode a little; nothing the second time.

    What runs is remembered in the cache folder, by content. What llama.cpp refuses in words passes:
    whoever loads the model is told them.
    Raises ValueError: not a GGUF file, or llama.cpp ends the process with such a model.
    """
    check_gguf(path)
    version = quiet_llama().__version__
    noted = _note(path, version)
    if noted and noted.exists():
        return
    script = f"from {__name__} import run_here; run_here()"
    fault = run_python(["-c", script, str(path), str(gpu_layers)])
    if not fault:
        if noted:
            noted.touch()
    elif fault != _REFUSED:
        # Without the folder of llama.cpp's source where it was built.
        cause = re.sub(r"^\S*[/\\](?=[^/\\\s]+:\d+:)", "", fault)
        advice = f"take another model, or another llama-cpp-python than {version}"
        raise ValueError(f"llama.cpp ends the process with {path}: {cause}\n{advice}")


def _note(path: str | Path, version: str) -> Path | None:
    """The file that stands for a model that runs; None where the cache folder can't be written."""
    try:
        folder = cache_folder() / "runs"
        folder.mkdir(exist_ok=True)
        return folder / f"{fingerprint(path)}-{version}"
    except PermissionError:
        return None


def run_here() -> None:
    """Decode with the model file and the GPU layers that this process's arguments name.

    Two sequences, first two tokens of each, then one: the ways that an engine goes.
    """
    try:
        model = load_model(sys.argv[1], n_gpu_layers=int(sys.argv[2]))
        check_generates(model)
        context = Context(model, 2, 8)
        context.decode([0] * 4, [0, 1, 0, 1], [0, 0, 1, 1], [1, 3])
        context.copy(0, 1)
        context.decode([0] * 2, [2, 2], [0, 1], [0, 1])
    except (ValueError, RuntimeError):
        sys.exit(_REFUSED)
