"""What went wrong, for people: a few words and an exit code in place of a traceback."""

import errno
import os
import sys
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Iterator, NamedTuple

from tqdm.auto import tqdm

from tract_lite.data.records import BadRows

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
# What the user can mend; what else is an OSError belongs to the machine.
MENDABLE = ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError
# Modules whose packages have other names.
PACKAGES = {"llama_cpp": "llama-cpp-python", "google": "protobuf"}

# A full disk, as the system says it and as torch does.
DISK_FULL = (os.strerror(errno.ENOSPC), "inline_container.cc")


class Failure(NamedTuple):
    """The exit code of a process that failed, and the lines that say why."""

    code: int
    lines: list[str]


def told(error: BaseException) -> Failure | None:
    """What to say of an error; None: it is a fault of the program, whose traceback is needed.

    The code is 2 for what the user can mend, 1 for what failed at run time, 130 for Ctrl-C.
    """
    from jinja2 import TemplateError

    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyboardInterrupt):
        return Failure(INTERRUPTED, ["stopped; the same command goes on"])
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return Failure(USER_ERROR, [f"{error}: pip install {PACKAGES.get(module, module)}"])
    if isinstance(error, BadRows):
        return Failure(USER_ERROR, lines[:2])  # the first of many
    if isinstance(error, TemplateError):
        place = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        return Failure(USER_ERROR, [f"the prompt's template{place}: {error.message}"])
    if isinstance(error, (*MENDABLE, ImportError)):
        return Failure(USER_ERROR, lines)
    if any(words in lines[0] for words in DISK_FULL):
        return Failure(FAILED, [f"{lines[0]}: the disk is full; make room, and the same command goes on"])
    if type(error).__name__ == "SafetensorError":
        return Failure(USER_ERROR, [f"a file of weights is damaged ({lines[0]}): make it, or copy it, again"])
    if isinstance(error, MemoryError):
        return Failure(FAILED, ["this machine's memory is too small for what was asked"])
    return Failure(FAILED, lines) if isinstance(error, (RuntimeError, OSError)) else None


@contextmanager
def errors_in_words() -> Iterator[None]:
    """What goes wrong inside is told on standard error, and ends the process with its code.

    Standard output shows what it can't encode as `?`.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not (failure := told(error)):
            raise
        # Not onto the line of a progress bar.
        tqdm.write("error: " + "\n".join(failure.lines), file=sys.stderr)
        raise SystemExit(failure.code) from error
