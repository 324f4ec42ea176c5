"""Runs the recipe with the given arguments, as often as it is killed at a place, and once more.

    python tests/killed.py SNAPSHOTS PLACE ... -- ARGUMENT ...

A place is a pattern for the path of a file that is opened for writing, or that another is renamed
to; PLACE#3 is the third time. A call that gets there ends at once by SIGKILL, and what its run
folder then holds, weights aside, is copied to SNAPSHOTS/1, and so on. The imports are made once:
each call is a fork.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import two_stage

import tract_lite


def kill_at(place: str) -> None:
    """Let this process be killed at a place."""
    pattern, _, number = place.partition("#")
    left = int(number or 1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" and isinstance(arguments[1], str) and set("wa+") & set(arguments[1]):
            path = arguments[0]
        elif event == "os.rename":
            path = arguments[1]
        else:
            return
        left -= bool(re.search(pattern, str(path)))
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def call(arguments: list[str], place: str | None) -> int:
    """One call of the recipe, killed at the place; returns its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            if place:
                kill_at(place)
            two_stage.main(arguments)
            os._exit(0)
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(snapshots: str, *words: str) -> None:
    places, arguments = words[: words.index("--")], list(words[words.index("--") + 1 :])
    out = arguments[arguments.index("--out") + 1]
    # The names are imported at their first use, which shall not be in each child.
    for name in tract_lite.__all__:
        getattr(tract_lite, name)
    for number, place in enumerate(places, 1):
        code = call(arguments, place)
        if code != -signal.SIGKILL:
            raise SystemExit(f"was not killed at {place}, but ended with {code}")
        shutil.copytree(out, Path(snapshots, str(number)), ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    if code := call(arguments, None):
        raise SystemExit(f"ended with {code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
