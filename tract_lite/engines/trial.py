"""Does llama.cpp run a model, or end the process? Its assertions can't be caught inside one."""

import hashlib
import re
import sys
from contextlib import suppress
from pathlib import Path

from tract_lite.data.files import cache_folder, fingerprint
from tract_lite.engines.child import run_python
from tract_lite.engines.context import Context
from tract_lite.engines.llama_cpp import check_generates, check_gguf, load_model, quiet_llama, system_info

_REFUSED, _KILLED = "refused", "(ended by signal 9)"
# What has run since this process began.
_ran: set[str] = set()


def check_runs(path: str | Path, gpu_layers: int = -1) -> None:
    """Load a GGUF model in a process of its own and decode a little; nothing the second time.

    What runs is remembered in the cache folder, by content. What llama.cpp refuses in words passes:
    whoever loads the model is told them.
    Raises ValueError: not a GGUF file, or llama.cpp ends the process with such a model.
    Raises RuntimeError: the process was killed, as for want of memory.
    """
    check_gguf(path)
    key = _key(path, gpu_layers)
    if key in _ran or _is_noted(key):
        return
    script = f"from {__name__} import run_here; run_here()"
    # Nothing is imported from where the user is.
    fault = run_python(["-P", "-c", script, str(path), str(gpu_layers)])
    if not fault:
        _note(key)
    elif fault.endswith(_KILLED):
        raise RuntimeError(f"the process that tried {path} was killed: is there memory for this model?")
    elif fault != _REFUSED:
        # Without the folder of llama.cpp's source where it was built.
        cause = re.sub(r"^\S*[/\\](?=[^/\\\s]+:\d+:)", "", fault)
        advice = f"take another model, or another llama-cpp-python than {quiet_llama().__version__}"
        raise ValueError(f"llama.cpp ends the process with {path}: {cause}\n{advice}")


def _key(path: str | Path, gpu_layers: int) -> str:
    """What a trial stands for: this content, on this build of llama.cpp and this processor."""
    file, llama = Path(path).stat(), quiet_llama()
    told = [fingerprint(path), file.st_mtime_ns, gpu_layers, llama.__version__, system_info()]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _is_noted(key: str) -> bool:
    try:
        return (cache_folder() / "runs" / key).exists()
    except (OSError, RuntimeError):
        return False


def _note(key: str) -> None:
    """Remember what runs: in this process, and in the cache folder if it can be written."""
    _ran.add(key)
    with suppress(OSError, RuntimeError):
        noted = cache_folder() / "runs" / key
        noted.parent.mkdir(exist_ok=True)
        noted.touch()


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
    # Some builds of llama.cpp end the process at its end, if a model is still there.
    context.close()
    quiet_llama().llama_model_free(model)
