"""Python in a process of its own, for what may end it."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Sequence

logger = logging.getLogger(__name__)


def run_python(arguments: Sequence[str], *paths: Path, **options: Any) -> str:
    """Run Python, with `paths` and this package to import from; `options` are subprocess.run's.

    Nothing comes back after success, else the last line that it wrote; the log has more.
    """
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run([sys.executable, *arguments], env=environment(*paths), **options)
    if not done.returncode:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    logger.info("%s", "\n".join(lines[-15:]))
    last = lines[-1].strip() if lines else "no reason given"
    return f"{last} (ended by signal {-done.returncode})" if done.returncode < 0 else last


def environment(*paths: Path) -> dict[str, str]:
    """The variables of such a process, with `paths` and this package to import from."""
    found = filter(None, (*paths, Path(__file__).parents[2], os.environ.get("PYTHONPATH")))
    told = {"PYTHONPATH": os.pathsep.join(map(str, found)), "GGML_NO_BACKTRACE": "1"}
    # Paths and messages may hold letters that the user's locale lacks.
    return {**os.environ, **told, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
